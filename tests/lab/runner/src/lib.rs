//! The lab as a library: hosts, guests, the cable between them, and the scenarios that use them.

pub mod agent;
pub mod cache;
pub mod check;
pub mod cpio;
pub mod guest;
pub mod host;
pub mod initramfs;
pub mod lab;
pub mod log;
pub mod ntb;
pub mod pci;
pub mod program;
pub mod scenario;
pub mod shutdown;
pub mod snapshot;
pub mod sublet;
pub mod tsc;
