//! The messages between a daemon and a worker as values.

use crate::jail::Report;
use std::os::fd::OwnedFd;
use vfio_shim::{
    model::{Access, FunctionIds, Span},
    path::{
        CallError,
        message::{RANGES_MAX, RemoteFunction, Request},
    },
};
pub use vmm_glue::vfio_user::PEERS_MAX;
use vmm_glue::vfio_user::SessionState;

/// The most memory files of one map call; a guest has at most as many.
pub const FILES_MAX: usize = vmm_glue::vfio_user::MEMORY_FILES_MAX;
/// The most vectors in one [`Told`].
pub const SIGNALS_MAX: usize = 256;
/// The most pieces in one [`MapPart`], and ranges in one [`Check`].
pub const PIECES_MAX: usize = RANGES_MAX;

/// Names a request; its answer carries the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// One piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapPiece {
    /// Guest-physical addresses.
    pub span: Span,
    /// What the function may do.
    pub access: Access,
    /// Which of the call's memory files, in the order in which they were sent.
    pub file: u16,
    /// Offset of the first byte in it.
    pub offset: u64,
}

/// A part of one map call: the pieces of all parts up to the last are mapped, all or none.
#[derive(Debug)]
pub struct MapPart {
    /// Whether it is the last.
    pub last: bool,
    /// At most [`PIECES_MAX`].
    pub pieces: Vec<MapPiece>,
    /// Files that no part of the call has brought yet.
    pub files: Vec<OwnedFd>,
}

/// Memory that must be mapped shared in the VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The VMM's process.
    pub pid: i32,
    /// Device and inode of the file, and the range of it; at most [`PIECES_MAX`].
    pub ranges: Vec<(u64, u64, Span)>,
}

/// How a guest session stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Where the endpoint is.
    pub state: SessionState,
    /// Why the last guest session that did not end by itself was ended.
    pub last_error: Option<String>,
    /// BAR reads, BAR writes, config reads, maps now, bytes now, messages.
    pub counters: [u64; 6],
    /// Signals given, by vector from the one that was asked for; at most [`SIGNALS_MAX`].
    pub signals: Vec<u64>,
}

/// From a worker.
#[derive(Debug)]
pub enum ToPort {
    /// It has given up its rights and listens.
    Ready(Report),
    /// Something that the lender does at once; the lease in it is not sent.
    Forward(Token, Request),
    /// Guest memory is to be mapped.
    Map(Token, MapPart),
    /// All maps that lie within are to be taken away.
    Unmap(Token, Span),
    /// A load of 1, 2, 4 or 8 bytes from a BAR whose window the worker cannot map.
    Load(Token, u8, u64, u8),
    /// A store to one; it has no answer.
    Store(u8, u64, Vec<u8>),
    /// Whether the VMM's memory is shared.
    Check(Token, Check),
    /// A VMM is about to be given the window: its process, by number and pidfd.
    Holder(Token, i32, OwnedFd),
    /// To [`ToWorker::Tell`].
    Told(Token, Told),
    /// The function cannot serve another guest, or nobody can be accepted: it ends.
    Failed(String),
}

/// What came of a request.
#[derive(Clone, Debug)]
pub enum Answered {
    /// Done.
    Done,
    /// What was read.
    Bytes(Vec<u8>),
    /// So many bytes were unmapped.
    Unmapped(u64),
}

/// What a worker is to serve, and how. It goes with the listening socket, the table of interrupts,
/// its grip, and, where the window is memory, the window's descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The lease, for logs only.
    pub lease: u64,
    /// Where the socket is, for errors only.
    pub path: String,
    /// Whether the VMM maps the BARs itself.
    pub mapped: bool,
    /// Whether guest memory must be shared.
    pub memory_check: bool,
    /// Of which users a VMM may be, at most [`PEERS_MAX`], and of which groups, at most as many.
    pub vmm_uids: Vec<u32>,
    /// Groups.
    pub vmm_gids: Vec<u32>,
    /// The most DMA maps.
    pub maps_max: u32,
    /// The most bytes of guest memory.
    pub bytes_max: u64,
    /// Offset of the outbound window in its descriptor, where one goes along.
    pub window: Option<u64>,
}

/// To a worker.
#[derive(Debug)]
pub enum ToWorker {
    /// The function.
    Function(FunctionIds, Box<RemoteFunction>),
    /// The next bytes of its config space.
    Config(Vec<u8>),
    /// All is told: serve.
    Start(Start, Vec<OwnedFd>),
    /// What came of a request.
    Answer(Token, Result<Answered, CallError>),
    /// How does the guest session stand, with signals from this vector on.
    Tell(Token, u32),
    /// The lease is over: let go of the window.
    Lost(String),
    /// Look at the table of interrupts.
    Raised,
}
