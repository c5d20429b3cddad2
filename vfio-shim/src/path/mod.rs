//! All that carries one lent function between two hosts: protocol, state machines, undoing.

pub mod borrower;
mod codec;
pub mod core;
#[cfg(test)]
mod core_tests;
pub mod engine;
pub mod grant;
pub mod lender;
pub mod limits;
pub mod link;
pub mod mailbox;
pub mod message;
pub mod plan;
mod refusal;
pub mod refused;
pub mod relay;
pub mod wire;
pub mod work;

pub use borrower::CallError;
pub use engine::{
    BellStatus, BorrowedFunction, BorrowedPath, Engine, EngineConfig, EngineError, Keep,
    LentStatus, Orphaned, PathPort, PortStatus, ResetWord, ScrubPlan, SessionStatus, StopFunction,
    VectorStatus,
};
pub use grant::{LeasePool, VolatilePool};
pub use lender::OfferState;
pub use limits::Limits;
pub use message::{LeaseId, PoolEntry, PoolState};
pub use refusal::{Refusal, RefusalCode, clean_text};

/// An error and its causes in one line.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str(": ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words
}
