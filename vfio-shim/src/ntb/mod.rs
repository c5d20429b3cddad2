//! A host's own end of an NTB: windows, doorbells, scratchpads, link, as the kernel's ntb.h names them.

#[cfg(any(test, feature = "contract"))]
pub mod contract;
pub mod hw;
mod port;
pub mod soft;

pub use port::{NtbPort, PortError, PortInfo};
