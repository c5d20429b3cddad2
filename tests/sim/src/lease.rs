//! What an operator of the simulation has under way and holds: verbs, borrowed functions, their workers.

use crate::guest::Guest;
use crate::scheduler::{Core, Process};
use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use sublet::daemon::vocabulary::VerbError;
use sublet::worker::server::WorkerServer;
use vfio_shim::path::{BorrowedFunction, CallError, LeaseId, Refusal};
use vmm_glue::vfio_user::{SessionShared, SessionState};

/// What `borrow` makes.
pub enum Borrowed {
    /// What a thread of the port's process is to serve.
    Function(Arc<BorrowedFunction>),
    /// What a process of its own serves.
    Served(Arc<WorkerServer>),
}

/// What came of `borrow`, or why it was refused.
pub type Borrow = Result<Borrowed, String>;

/// How a borrowed function is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// By a thread of the port's process.
    Thread,
    /// By a process of its own, whose loads and stores the port does.
    Channel,
    /// By a process of its own, which has its slice of the window.
    Window,
}

/// What is to become of a `borrow`.
pub struct Wish {
    /// Room for guest memory that is set aside.
    pub ram: Option<u64>,
    /// Where a VMM is to connect.
    pub socket: PathBuf,
    /// Where its guest session will stand.
    pub shared: Arc<SessionShared>,
    /// The process that is to serve, what is gone when the port has buried it, and whether it
    /// reaches BARs by itself.
    pub worker: Option<(Process, Weak<()>, bool)>,
}

/// Who serves a borrowed function to its VMM.
pub enum Server {
    /// A thread of the port's process.
    Thread {
        /// The borrower's end.
        borrowed: Arc<BorrowedFunction>,
        /// Ends the thread.
        stop: Arc<OwnedFd>,
        /// It has ended.
        ended: Arc<AtomicBool>,
    },
    /// A process of its own.
    Worker {
        /// The port's side of it.
        server: Arc<WorkerServer>,
        /// The process.
        process: Process,
        /// Gone when the port's thread for it has ended.
        alive: Weak<()>,
        /// Whether it reaches BARs by itself.
        near: bool,
        /// Who knows whether it lives.
        core: Arc<Core>,
    },
}

impl Server {
    /// The lease.
    pub fn lease(&self) -> LeaseId {
        match self {
            Self::Thread { borrowed, .. } => borrowed.lease(),
            Self::Worker { server, .. } => server.lease(),
        }
    }

    /// Whether it ended.
    pub fn ended(&self) -> bool {
        match self {
            Self::Thread { ended, .. } => ended.load(Ordering::Acquire),
            Self::Worker { process, core, .. } => core.is_dead(*process),
        }
    }
}

/// What a verb answers.
pub enum Outcome {
    /// Of `borrow`.
    Borrowed(Borrow),
    /// Of `return`.
    Returned(Result<(), CallError>),
    /// Of `available` and `unavailable`.
    Lent(Result<(), Refusal>),
    /// No keeper has opened what was to be offered.
    NotOpened(VerbError),
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
    /// Of `borrow`.
    pub wish: Option<Wish>,
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

/// A borrowed function with its server.
pub struct Held {
    /// Who holds it.
    pub side: usize,
    /// Which of the lender's functions.
    pub function: usize,
    /// The lease.
    pub lease: LeaseId,
    /// Who serves it.
    pub server: Server,
    /// Where a VMM connects.
    pub socket: PathBuf,
    /// Where the guest session stands.
    pub shared: Arc<SessionShared>,
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
        match &self.server {
            Server::Thread { .. } => idle || self.server.ended(),
            // Where it died, its port undoes all; who returns it waits for that.
            Server::Worker { .. } if self.server.ended() => self.is_buried() && !self.returning,
            Server::Worker { .. } => idle,
        }
    }

    /// Whether the port has done what the end of a worker leaves to it.
    pub fn is_buried(&self) -> bool {
        match &self.server {
            Server::Worker { alive, .. } => alive.strong_count() == 0,
            Server::Thread { .. } => true,
        }
    }

    /// The process that serves it, where that is one of its own.
    pub fn worker(&self) -> Option<Process> {
        match &self.server {
            Server::Worker { process, .. } => Some(*process),
            Server::Thread { .. } => None,
        }
    }

    /// Whether a VMM is there whose guest can be told something.
    pub fn guest(&self) -> Option<&Rc<RefCell<Guest>>> {
        self.vmm.as_ref().map(|vmm| &vmm.guest)
    }
}
