//! What comes with a lent function besides itself: how its memory is cleared, how it is stopped, what is kept for it.

use crate::path::message::LeaseId;
use std::any::Any;
use std::io;

/// How a function's own memory is cleared of a tenant after its reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScrubPlan {
    /// The reset is all there is.
    #[default]
    Reset,
    /// Its driver waits in the reset until it is cleared.
    DriverWaits,
    /// Something else clears it after the reset and tells nobody: so long is waited.
    Wait {
        /// Milliseconds.
        ms: u64,
    },
}

/// Stops what a function does by other means than its own registers, until its next reset.
pub type StopFunction = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What the kernel tells of resets elsewhere than to whoever asks for one.
pub trait ResetWord: Send {
    /// A reset is about to be made: what was told up to now is not about it.
    fn before(&mut self);
    /// Whether it was told that one failed since, or nobody knows.
    fn failed(&mut self) -> Option<String>;
}

/// Told why, when whoever made the function has let go of it without a word to the kernel: what a
/// virtual function does then, nobody knows. Looked at with each heartbeat.
pub type Orphaned = Box<dyn Fn() -> Option<String> + Send>;

/// What comes with a lent function.
#[derive(Default)]
pub struct Keep {
    /// How its memory is cleared.
    pub scrub: ScrubPlan,
    /// How it is stopped, where that is possible.
    pub stop: Option<StopFunction>,
    /// Where a failed reset is told that the reset itself does not tell.
    pub reset_word: Option<Box<dyn ResetWord>>,
    /// Whether whoever made it is gone.
    pub orphaned: Option<Orphaned>,
    /// Told when a lease's path has it, reset: what is seen of it from then on is that tenant's.
    pub begins: Option<Box<dyn Fn() + Send>>,
    /// Where it is in quarantine from before: since which lease, and why.
    pub quarantine: Option<(LeaseId, String)>,
    /// Kept as long as the function is open, and dropped after it.
    pub kept: Option<Box<dyn Any + Send>>,
}
