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
mod files;
mod function;
mod host;
mod link;
mod port;
#[cfg(any(test, feature = "contract"))]
pub mod recipe;
mod space;
mod window;

pub use fault::{CHANCE_ONE, Fault, FaultDice, FaultPlan, Operation};
pub use function::{
    ARC_BAR0_BYTES, ARC_COMPLETED, ARC_DESTINATION, ARC_DOORBELL, ARC_FLAGS, ARC_FROM_VRAM,
    ARC_GGTT, ARC_IDENT, ARC_IDENT_VALUE, ARC_IDS, ARC_LENGTH, ARC_MEMIRQ, ARC_MEMIRQ_ENABLE,
    ARC_MEMIRQ_SOURCE, ARC_MEMIRQ_STATUS, ARC_MEMIRQ_UNIT, ARC_SCRATCH, ARC_SOURCE, ARC_STATUS,
    ARC_TO_VRAM, CHECKSUM, COMPLETED, DESTINATION, DOORBELL, IDENT, IDENT_VALUE, LENGTH, OPERATION,
    OPERATION_CHECKSUM, OPERATION_COPY, SCRATCH, SOURCE, STATUS, STATUS_DONE, STATUS_FAILED,
    STATUS_IDLE, SoftFunction, SoftPf, SriovError, TRANSFER_BYTES_MAX, VECTOR, VFS_MAX, VfShape,
};
pub use host::SoftHost;
pub use link::{SoftLink, SoftPortConfig, StoresAreOrdered};
pub use port::SoftPort;
pub use space::{FAULTS_MAX, SoftFault, SoftSpace};

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
pub(crate) mod function_tests;
#[cfg(test)]
mod tests;
