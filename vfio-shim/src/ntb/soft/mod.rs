//! The soft fabric: two hosts of one process, with the NTB, IOMMUs and functions between them in software.
//!
//! ```text
//! SoftFunction -> SoftSpace -> outbound window == SoftLink == inbound window -> SoftSpace -> memfd
//! ```
//! A [`FaultPlan`] makes it break, on purpose and again in the same way; without one it
//! keeps the promises of Intel's gen4 parts (NTB.md): all ones and dropped stores while the link
//! is down or past a limit, bells behind stores, a bell that finds its bit set is silent.

mod armed;
mod egress;
mod fault;
mod function;
mod host;
mod link;
mod port;
mod registers;
mod space;
mod window;

pub use fault::{CHANCE_ONE, Fault, FaultDice, FaultPlan, Operation};
pub use function::SoftFunction;
pub use host::SoftHost;
pub use link::{SoftLink, SoftPortConfig, StoresAreOrdered};
pub use port::SoftPort;
pub use registers::{
    COMPLETED, DESTINATION, DOORBELL, IDENT, IDENT_VALUE, LENGTH, SCRATCH, SOURCE, STATUS,
    STATUS_DONE, STATUS_FAILED, STATUS_IDLE, TRANSFER_BYTES_MAX, VECTOR,
};
pub use space::{FAULTS_MAX, SoftFault, SoftSpace};

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod tests;
