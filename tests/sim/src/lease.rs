//! What an operator of the simulation has under way and holds: verbs, borrowed functions, their workers.

use crate::guest::Guest;
use crate::scheduler::Process;
use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vfio_shim::path::{BorrowedFunction, CallError, LeaseId, PoolEntry, Refusal};
use vmm_glue::vfio_user::{SessionShared, SessionState};

/// What came of `Engine::borrow`.
pub type Borrow = Result<(LeaseId, PoolEntry, Arc<BorrowedFunction>), CallError>;

/// What a verb answers.
pub enum Outcome {
    /// Of `borrow`.
    Borrowed(Borrow),
    /// Of `return`.
    Returned(Result<(), CallError>),
    /// Of `available` and `unavailable`.
    Lent(Result<(), Refusal>),
}

/// Which verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Offer a function.
    Lend,
    /// Take the offer back.
    Unlend,
    /// Borrow one.
    Borrow,
    /// Give it back.
    Return(LeaseId),
}

/// A verb under way.
pub struct Verb {
    /// On which host.
    pub side: usize,
    /// Which.
    pub kind: Kind,
    /// Of which function of the lender.
    pub function: usize,
    /// Room for guest memory that was set aside.
    pub ram: Option<u64>,
    /// Its answer.
    pub outcome: Rc<RefCell<Option<Outcome>>>,
    /// Its thread has ended.
    pub ended: Arc<AtomicBool>,
}

/// A VMM and its guest.
pub struct Vmm {
    /// Its process.
    pub process: Process,
    /// Its guest.
    pub guest: Rc<RefCell<Guest>>,
    /// Its thread has ended.
    pub ended: Arc<AtomicBool>,
}

/// A borrowed function with its worker.
pub struct Held {
    /// Who holds it.
    pub side: usize,
    /// Which of the lender's functions.
    pub function: usize,
    /// The lease.
    pub lease: LeaseId,
    /// The borrower's end.
    pub borrowed: Arc<BorrowedFunction>,
    /// Where a VMM connects.
    pub socket: PathBuf,
    /// Where the guest session stands.
    pub shared: Arc<SessionShared>,
    /// Ends the worker.
    pub stop: Arc<OwnedFd>,
    /// It has ended.
    pub worker_ended: Arc<AtomicBool>,
    /// Room for guest memory that was set aside.
    pub ram: Option<u64>,
    /// Who is served.
    pub vmm: Option<Vmm>,
    /// `return` is under way.
    pub returning: bool,
}

impl Held {
    /// Whether nothing of a guest session is left.
    pub fn is_undone(&self) -> bool {
        let idle = matches!(
            self.shared.state(),
            SessionState::Waiting | SessionState::Closed
        );
        idle || self.worker_ended.load(Ordering::Acquire)
    }

    /// Whether a VMM is there whose guest can be told something.
    pub fn guest(&self) -> Option<&Rc<RefCell<Guest>>> {
        self.vmm.as_ref().map(|vmm| &vmm.guest)
    }
}
