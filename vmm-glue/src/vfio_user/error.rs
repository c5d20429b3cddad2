//! Why a guest session or an endpoint ends, in words.

use super::{
    dma::MapRefusal, irqs::IrqError, socket::SocketError, version::VersionError, wire::Command,
    wire::WireError,
};
use std::{error::Error, io, path::PathBuf};
use vfio_shim::model::{FunctionError, IrqIndex, MapError};

/// Why a guest session was ended by this side.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The stream cannot go on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A message is malformed.
    #[error("the VMM sent a malformed message")]
    Malformed(#[from] WireError),
    /// No version was agreed on.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// VERSION comes first, and once.
    #[error("the VMM sent {0:?} out of turn: VERSION comes first, and once")]
    OutOfTurn(Command),
    /// Fds with a command that takes none.
    #[error("the VMM sent {fds} file descriptors with {command:?}, which takes none")]
    UnexpectedFds {
        /// The command.
        command: Command,
        /// How many.
        fds: usize,
    },
    /// A command that was not offered, from a client that takes no error for an answer.
    #[error("the VMM asked for {0:?}, which is not offered")]
    Unsupported(Command),
    /// Guest memory cannot be mapped.
    #[error("DMA_MAP of {iova:#x}+{len:#x} is refused")]
    Map {
        /// Guest-physical address.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        #[source]
        source: MapRefusal,
    },
    /// Guest memory cannot be unmapped.
    #[error("DMA_UNMAP of {iova:#x}+{len:#x} is refused")]
    Unmap {
        /// Guest-physical address.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// Why.
        #[source]
        source: MapRefusal,
    },
    /// Maps that were answered cannot be programmed.
    #[error("guest memory cannot be reached by the device as the guest enables bus mastering")]
    Enable(#[source] MapRefusal),
    /// The function did not enable bus mastering.
    #[error("the function's bus mastering could not be turned on for the guest")]
    BusMaster(#[source] FunctionError),
    /// A malformed SET_IRQS.
    #[error(transparent)]
    Irqs(IrqError),
}

/// Why an endpoint cannot serve any longer, or at all.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Somebody listens there.
    #[error("another process listens on {0}; choose another path")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket; choose another path")]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on {path}")]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The next VMM cannot be accepted.
    #[error("cannot accept a VMM on {path}")]
    Accept {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM's process is not known.
    #[error("cannot tell which process the VMM is")]
    Peer(#[source] io::Error),
    /// The function could not be reset after a guest; it must not be given to another.
    #[error("the function could not be reset after its guest")]
    Reset(#[source] FunctionError),
    /// Guest memory could not be taken away from the function; it must not be given to another.
    #[error("the guest's memory could not be taken away from the function")]
    Unmap(#[source] MapError),
    /// The guest's eventfds could not be taken away.
    #[error("the guest's {index:?} triggers could not be taken away")]
    Irqs {
        /// Of which interrupts.
        index: IrqIndex,
        /// Why.
        #[source]
        source: FunctionError,
    },
}

/// An error with all that caused it, in one line.
pub fn words(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        words.push_str(": ");
        words.push_str(&cause.to_string());
        source = cause.source();
    }
    words
}
