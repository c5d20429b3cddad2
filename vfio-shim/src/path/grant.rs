//! What a port and the pool that grants leases say to each other, and the seam between them.
//!
//! A port never grants by itself: it asks, goes on with its other work, and is answered later, as
//! a grant is a durable write and a disk can be slow. Messages are plain values, so that they go
//! over a function call or a socket alike. The pool takes them in the order in which they were
//! told: the end of a lease comes before the next grant of its function.

use super::message::{LeaseId, Refusal, Secret};
use crate::model::Bdf;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// Names one ask of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AskId(pub u64);

/// What a port tells the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToPool {
    /// A borrower wants a function; answered by `ToPort::Granted`.
    Grant {
        /// Names the ask.
        ask: AskId,
        /// Which function.
        bdf: Bdf,
        /// The node that asks, once it has said who it is.
        borrower: Option<u16>,
        /// Fresh randomness: what `open` will have to show.
        secret: Secret,
    },
    /// The lease's path is open: its time to live stands still.
    Opened {
        /// Which function.
        bdf: Bdf,
        /// Which lease.
        lease: LeaseId,
    },
    /// The lease is over, and all of its path is undone.
    Ended {
        /// Which function.
        bdf: Bdf,
        /// Which lease.
        lease: LeaseId,
        /// How.
        end: LeaseEnd,
    },
    /// A function in quarantine may be lent again: what became of it since its last lease ended.
    Mended {
        /// Which function.
        bdf: Bdf,
        /// Its last lease.
        lease: LeaseId,
        /// How.
        undone: Undone,
    },
    /// The port has stopped: nothing of its leases is mapped any more. Its last word.
    Gone,
}

/// What the pool tells a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToPort {
    /// The answer to `ToPool::Grant`: the lease, written durably, or why not.
    Granted(AskId, Result<Grant, Refusal>),
    /// No path was opened within the lease's time to live: it is to be ended. Told again until it
    /// is, or a path opens.
    Expired(LeaseId),
}

/// A lease that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its id: the function's epoch, greater than that of any lease of it before.
    pub lease: LeaseId,
    /// What `open` has to show.
    pub secret: Secret,
}

/// How a lease ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseEnd {
    /// Why.
    pub cause: EndCause,
    /// What became of its path.
    pub undone: Undone,
}

/// Why a lease ended. As text it is a word of `status`, or a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndCause {
    /// The borrower gave it back.
    Returned,
    /// The link session was over, or nobody holds it any more.
    Reclaimed,
    /// No path was opened in time.
    Expired,
    /// The lender took it back.
    Revoked(String),
}

impl fmt::Display for EndCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Returned => "returned",
            Self::Reclaimed => "reclaimed",
            Self::Expired => "expired: no path was opened within its time to live",
            Self::Revoked(why) => why,
        })
    }
}

/// What became of an ended lease's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undone {
    /// There was none.
    NoPath,
    /// Undone, and the function is reset; what was done about its memory.
    Reset(Scrub),
    /// A step failed: nobody gets the function.
    Failed(String),
    /// A step failed, and this operator gave the function out as it is.
    Cleared(String),
}

/// What was done so that a function's own memory keeps nothing of a tenant. Never proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scrub {
    /// Nothing but the reset.
    No,
    /// Its driver was waited for, which tells when it has cleared it.
    Waited,
    /// So long was waited that it should be cleared.
    Assumed,
}

/// The way from the pool to a port: called by any thread, and never waits.
pub type PortLine = Box<dyn Fn(ToPort) + Send + Sync>;

/// Who grants the leases of a port's functions. No call waits: the port's control thread makes
/// them, and every tenant's messages go through it.
pub trait LeasePool: Send + Sync {
    /// A port has started, and holds no lease; this is the way to it. Called once, before `tell`.
    fn connect(&self, port: PortLine);
    /// Takes a message.
    fn tell(&self, message: ToPool);
}

/// A pool that forgets with the process: for a port without a daemon.
#[derive(Default)]
pub struct VolatilePool {
    state: Mutex<Volatile>,
}

#[derive(Default)]
struct Volatile {
    port: Option<PortLine>,
    epoch_last: u64,
    held: HashMap<Bdf, LeaseId>,
}

impl LeasePool for VolatilePool {
    fn connect(&self, port: PortLine) {
        self.state().port = Some(port);
    }

    fn tell(&self, message: ToPool) {
        let mut state = self.state();
        match message {
            ToPool::Grant {
                ask, bdf, secret, ..
            } => {
                let result = state.grant(bdf, secret);
                if let Some(port) = &state.port {
                    port(ToPort::Granted(ask, result));
                }
            }
            ToPool::Ended { bdf, lease, .. } if state.held.get(&bdf) == Some(&lease) => {
                state.held.remove(&bdf);
            }
            ToPool::Opened { .. } | ToPool::Ended { .. } | ToPool::Mended { .. } => {}
            ToPool::Gone => state.held.clear(),
        }
    }
}

impl VolatilePool {
    fn state(&self) -> std::sync::MutexGuard<'_, Volatile> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volatile {
    fn grant(&mut self, bdf: Bdf, secret: Secret) -> Result<Grant, Refusal> {
        if self.held.contains_key(&bdf) {
            return Err(super::lender::taken(bdf));
        }
        self.epoch_last += 1;
        let lease = LeaseId(self.epoch_last);
        self.held.insert(bdf, lease);
        Ok(Grant { lease, secret })
    }
}
