//! What workers and verbs ask of the borrower's end, what they are answered, and what the driver has to do.

use crate::model::{Access, Bdf, Span, WindowOffset};
use crate::path::message::{LeaseId, OpId, PoolEntry, Refusal, RemoteFunction, Request};
use std::{os::fd::OwnedFd, sync::Arc};

/// Names a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// A piece of guest RAM, and the memory fd behind it.
#[derive(Clone, Debug)]
pub struct GuestMap {
    /// Guest-physical addresses.
    pub span: Span,
    /// What the function may do.
    pub access: Access,
    /// The memory.
    pub fd: Arc<OwnedFd>,
    /// Offset of the first byte in it.
    pub fd_offset: u64,
}

/// What a worker or a verb asks for.
#[derive(Debug)]
pub enum Call {
    /// The peer's pool.
    List,
    /// Borrow, reserving so many bytes of the window for guest RAM.
    Borrow(Bdf, Option<u64>),
    /// Open the path of a lease.
    Open(LeaseId),
    /// End a lease; the path is undone first.
    Return(LeaseId),
    /// Map guest RAM.
    Map(LeaseId, Vec<GuestMap>),
    /// Unmap all that lies within the span.
    Unmap(LeaseId, Span),
    /// Anything that the lender does at once.
    Forward(LeaseId, Request),
}

impl Call {
    /// Which lease it is about.
    pub fn lease(&self) -> Option<LeaseId> {
        match self {
            Self::List | Self::Borrow(..) => None,
            Self::Open(lease)
            | Self::Return(lease)
            | Self::Map(lease, _)
            | Self::Unmap(lease, _)
            | Self::Forward(lease, _) => Some(*lease),
        }
    }
}

/// What a call gave.
#[derive(Debug)]
pub enum Answer {
    /// Done.
    Done,
    /// The pool.
    List(Vec<PoolEntry>),
    /// A lease.
    Borrowed(LeaseId, PoolEntry),
    /// An open path.
    Opened(Box<OpenedPath>),
    /// Bytes of a register or of config space.
    Bytes(Vec<u8>),
    /// So many bytes were unmapped.
    Unmapped(u64),
}

/// What a worker needs to know of an open path.
#[derive(Clone, Debug)]
pub struct OpenedPath {
    /// The function as the lender tells it.
    pub function: RemoteFunction,
    /// Its config space as the lender's VFIO shows it.
    pub config: Vec<u8>,
}

/// Why a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// There is no open link session, or it ended.
    #[error("{0}")]
    Gone(String),
    /// The peer, or this side, refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Something is mapped there, or would be twice.
    #[error("guest memory {0} is mapped already: unmap it first")]
    Overlap(Span),
    /// An unmap would cut a mapping in two.
    #[error("unmapping guest memory {0} would cut a mapping in two: unmap whole mappings")]
    Bisect(Span),
    /// Not whole pages.
    #[error("guest memory {0} is empty or not aligned to 4 KiB pages")]
    Align(Span),
    /// Not answered in time.
    #[error("not answered within {0} ms: the other host is slow or gone")]
    Timeout(u64),
    /// Its worker can still store into the slices of the lease.
    #[error(
        "the lease's worker, or a VMM with the window, has been killed and does not end: what the \
         lease had stays in quarantine until it does, and then all else goes on by itself. It \
         stands in the kernel, most likely for a file system whose server does not answer: end the \
         VMM and that server, or write 1 to the `abort` of its connection below \
         /sys/fs/fuse/connections"
    )]
    Held,
    /// The kernel refused to pin.
    #[error("pinning guest memory failed: {0}")]
    Pin(String),
}

/// One piece of guest RAM to be mapped into the port's own container.
#[derive(Clone, Debug)]
pub struct Pin {
    /// Where in the own window.
    pub offset: WindowOffset,
    /// The guest RAM.
    pub map: GuestMap,
}

/// A slice of the own window: where, and how many bytes.
pub type Slice = (WindowOffset, u64);

/// What the driver has to do.
#[derive(Debug)]
pub enum BorrowerAction {
    /// Send a request; the reply comes to `reply` with the same step.
    Send(Step, Request),
    /// Map into the port's container; all or none; answered by `pinned`.
    Pin(Step, LeaseId, Vec<Pin>),
    /// Unmap from the port's container; answered by `pinned`.
    Unpin(Step, LeaseId, Vec<Slice>),
    /// Scan these words of the interrupt table for the lease, from zero.
    Scan(LeaseId, u32, u32),
    /// Scan them no more.
    ScanEnd(LeaseId),
    /// Answer the lender's `revoked`: nothing of the lease is pinned, or unpinning failed.
    Confirm(OpId, Result<(), CallError>),
    /// Answer a call.
    Answer(Token, Result<Answer, CallError>),
    /// The lease is over: its worker reads ones from now on, and lets go of its slices, which
    /// `let_go` answers with the same step.
    Lost(Step, LeaseId, String),
}

/// Names a step under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Step(pub u64);
