//! What can go wrong between a function and KVM, by family of operation.

use std::io;
use vfio_shim::model::{FunctionError, MapError, Span};

/// Interrupts: routes, irqfds, triggers.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// No such vector.
    #[error("vector {vector} does not exist; there are {count}")]
    NoVector {
        /// The vector asked for.
        vector: u32,
        /// How many there are.
        count: u32,
    },
    /// The routing table is full.
    #[error("{0} interrupt routes are the most that fit; give the guest fewer vectors")]
    RoutesFull(usize),
    /// The kernel refused.
    #[error("KVM refused to {act} for vector or GSI {number}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Of which vector or GSI.
        number: u32,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The function refused a trigger.
    #[error("the function refused a change of its interrupts")]
    Function(#[from] FunctionError),
}

/// Memory slots, and the memory behind them.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Not page aligned, or empty.
    #[error("memory slot {0} is empty or not aligned to 4 KiB pages")]
    Align(Span),
    /// No slot is left.
    #[error("{0} memory slots are the most that fit; map fewer areas")]
    Full(u32),
    /// The region's areas are not where they may be.
    #[error("region {0} has areas outside of it or unaligned; it can only be trapped")]
    Areas(u32),
    /// The kernel refused.
    #[error("the kernel refused to {act} {span}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Guest-physical addresses.
        span: Span,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

/// Attaching a function to a VM, and detaching it.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The addresses given do not suit the function.
    #[error("{what} cannot be placed at guest address {address:#x}: {cause}")]
    Placement {
        /// What was to be placed.
        what: String,
        /// Where.
        address: u64,
        /// Why not.
        cause: &'static str,
    },
    /// Too many doorbells.
    #[error("{0} doorbells are the most that one function can have")]
    Doorbells(usize),
    /// The doorbell's eventfd.
    #[error("the kernel refused to {act} the doorbell at {address:#x}")]
    Doorbell {
        /// What was asked.
        act: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The function refused.
    #[error("the function refused to {act}")]
    Function {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: FunctionError,
    },
    /// Guest RAM could not be given to the function, or taken away from it.
    #[error("guest memory could not be {act} the function")]
    Map {
        /// `given to` or `taken away from`.
        act: &'static str,
        /// The cause.
        #[source]
        source: MapError,
    },
    /// Its interrupts.
    #[error("the function's interrupts could not be set up")]
    Irq(#[from] IrqError),
    /// Its mapped BARs.
    #[error("the function's BARs could not be mapped")]
    Slot(#[from] SlotError),
}

/// Making a VM, and running a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The kernel refused.
    #[error("the kernel refused to {act}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// Guest memory.
    #[error("the guest's memory could not be made")]
    Slot(#[from] SlotError),
    /// There is no KVM behind it.
    #[error("a stand-in for a VM has no vCPU")]
    StandIn,
    /// The program does not fit.
    #[error("a program of {steps} steps does not fit; {max} do")]
    Program {
        /// How many there are.
        steps: usize,
        /// How many fit.
        max: usize,
    },
    /// Not enough memory for the program.
    #[error("the tiny guest needs memory from address 0 to {0:#x}")]
    Memory(u64),
}

impl RunError {
    /// For `map_err` on ioctls.
    pub(super) fn kernel<E: Into<io::Error>>(act: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Kernel {
            act,
            source: source.into(),
        }
    }
}
