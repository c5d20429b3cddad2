//! A host's own end of an NTB: windows, doorbells, scratchpads, link, as the kernel's ntb.h names them.

pub mod hw;
mod port;

pub use port::{NtbPort, PortError, PortInfo};
