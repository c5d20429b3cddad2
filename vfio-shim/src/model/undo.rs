//! The steps of undoing, by name and in their one order.

/// A step of undoing: return, revoke, the end of a session and a worker's death take the same ones.
/// Each is told to the `Runtime` just before it is made, so that a simulator can end the process
/// there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UndoStep {
    /// Borrower: no load or store of the lease begins any more.
    Lost,
    /// Borrower: a worker of its own lets go of the lease's slices, or is ended.
    LetGo,
    /// Borrower: the lease of a worker that has ended is given back.
    Bury,
    /// Borrower: the lender is asked to end the lease.
    Return,
    /// Borrower: guest memory is taken out of the port's container.
    Unpin,
    /// Lender: interrupts are off, and the relay rings no more.
    Interrupts,
    /// Lender: the function masters the bus no more.
    BusMaster,
    /// Lender: BAR slices are taken out of the port's container.
    Slices,
    /// Lender: the function is reset, and what that leaves behind is cleared.
    Reset,
    /// Lender: guest memory is taken out of the function's container.
    Memory,
    /// Lender: what the function wrote before has arrived.
    Drain,
    /// Lender: its own memory is cleared, where something else does that.
    Scrub,
}

impl UndoStep {
    /// All of them, in order.
    pub const ALL: [Self; 12] = [
        Self::Lost,
        Self::LetGo,
        Self::Bury,
        Self::Return,
        Self::Unpin,
        Self::Interrupts,
        Self::BusMaster,
        Self::Slices,
        Self::Reset,
        Self::Memory,
        Self::Drain,
        Self::Scrub,
    ];
}
