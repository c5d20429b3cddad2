//! The soft fabric: two hosts of one process, with the NTB, IOMMUs and functions between them in software.
//!
//! ```text
//! SoftFunction -> SoftSpace -> outbound window == SoftLink == inbound window -> SoftSpace -> memfd
//! ```
//! It keeps the promises of Intel's gen4 parts (NTB.md): all ones and dropped stores while the
//! link is down or past a limit, bells behind stores, a bell that finds its bit set is silent.

mod function;
mod link;
mod port;
mod registers;
mod space;

pub use function::SoftFunction;
pub use link::{SoftLink, SoftPortConfig};
pub use port::SoftPort;
pub use registers::{
    COMPLETED, DESTINATION, DOORBELL, IDENT, IDENT_VALUE, LENGTH, SCRATCH, SOURCE, STATUS,
    STATUS_DONE, STATUS_FAILED, STATUS_IDLE, TRANSFER_BYTES_MAX, VECTOR,
};
pub use space::{FAULTS_MAX, SoftFault, SoftSpace};

#[cfg(test)]
mod tests;
