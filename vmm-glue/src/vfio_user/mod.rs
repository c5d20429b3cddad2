//! A vfio-user server that shows one function to one VMM at a time.

pub mod memory_check;
pub mod socket;
pub mod version;
pub mod wire;
