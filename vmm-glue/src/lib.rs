//! This host and a VM: the vfio-user server that hands a function to a VMM.
#![deny(missing_docs)]

pub mod vfio_user;
