//! This host and PCIe, and the two hosts: model, VFIO, NTB, paths.
#![deny(missing_docs)]

pub mod iova;
pub mod model;
pub mod ntb;
pub mod path;
pub mod sysfs;
pub mod vfio;
