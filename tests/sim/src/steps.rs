//! The named moments at which a process may be killed: before each step of undoing, on both sides of what a daemon writes down, and in a keeper's work.

use std::fmt;
use sublet::pool::Move;
use vfio_shim::model::UndoStep;

/// A moment of a daemon's pool, of which the store is on one side or the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "their names say it")]
pub enum StoreStep {
    GrantUnwritten,
    GrantUntold,
    OpenUnwritten,
    OpenWritten,
    EndUnwritten,
    EndWritten,
}

impl StoreStep {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::GrantUnwritten,
        Self::GrantUntold,
        Self::OpenUnwritten,
        Self::OpenWritten,
        Self::EndUnwritten,
        Self::EndWritten,
    ];

    /// Before and after the write of this move.
    pub fn around(moved: &Move) -> Option<[Self; 2]> {
        match moved {
            Move::Granted(_) => Some([Self::GrantUnwritten, Self::GrantUntold]),
            Move::Opened => Some([Self::OpenUnwritten, Self::OpenWritten]),
            Move::Ended(_) => Some([Self::EndUnwritten, Self::EndWritten]),
            // Only when all is quiet, and nobody is killed.
            Move::Mended(_) => None,
        }
    }
}

/// A moment of a keeper's work on a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "their names say it")]
pub enum KeeperStep {
    Wrote,
    Opens,
    Opened,
}

impl KeeperStep {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Wrote, Self::Opens, Self::Opened];
}

/// Where a process may be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// A port or a worker, just before it undoes this.
    Undo(UndoStep),
    /// A daemon, at this moment of what it writes down.
    Store(StoreStep),
    /// A keeper, after a write to sysfs, or on either side of opening a group.
    Keeper(KeeperStep),
}

impl Step {
    /// How many there are of ports, workers and daemons: the first.
    pub const OF_PATHS: usize = UndoStep::ALL.len() + StoreStep::ALL.len();

    /// All of them, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        let undo = UndoStep::ALL.into_iter().map(Self::Undo);
        let store = StoreStep::ALL.into_iter().map(Self::Store);
        undo.chain(store)
            .chain(KeeperStep::ALL.into_iter().map(Self::Keeper))
    }

    /// For a trace.
    pub fn number(self) -> u64 {
        match self {
            Self::Undo(step) => step as u64,
            Self::Store(step) => UndoStep::ALL.len() as u64 + step as u64,
            Self::Keeper(step) => Self::OF_PATHS as u64 + step as u64,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undo(step) => write!(f, "{step:?}"),
            Self::Store(step) => write!(f, "{step:?}"),
            Self::Keeper(step) => write!(f, "Keeper{step:?}"),
        }
    }
}
