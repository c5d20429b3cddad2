//! A guest session: one connected VMM, from its first byte until nothing of it is left.
//!
//! ```text
//! connected --VERSION--> agreed --any other--> agreed
//!     |                    |
//!     +---- EOF, stop, or a message that ends it ----> undoing --> over
//! ```
//! Undone in this order: the function is reset, which stops its DMA; guest memory is taken away;
//! eventfds are taken away; fds are closed. A later step is done even where an earlier one failed.

use super::{
    dispatch::Guest,
    error::{EndpointError, SessionError, words},
    holders::Vmm,
    options::{BarMode, Options},
    peer::{Peer, peer, process},
    shared::{SessionShared, SessionState},
    socket::{Incoming, Receiver, Stop, Wake, send},
    wire::Reply,
};
use rustix::{
    io::Errno,
    net::{Shutdown, shutdown},
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vfio_shim::model::{Function, IrqIndex};

/// How a guest session ended without a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Closed,
    Stopped,
}

/// Serves one VMM that is connected already, until it goes or `stop` becomes readable, and undoes
/// all that it had. An error means that the function must not be given to anybody else.
pub fn serve_connection(
    socket: OwnedFd,
    function: &dyn Function,
    options: &Options,
    stop: BorrowedFd<'_>,
    shared: &SessionShared,
) -> Result<(), EndpointError> {
    let peer = peer(socket.as_fd()).map_err(EndpointError::Peer)?;
    let pid = peer.pid;
    if let Err(words) = admit(socket.as_fd(), peer, options) {
        tracing::error!("{words}");
        shared.counters.refused.count();
        shared.fail(words);
        return Ok(());
    }
    shared.counters.sessions.count();
    shared.enter(SessionState::Connected { pid });
    tracing::info!(pid, "a VMM connected");
    let mut guest = Guest::new(function, options, &shared.counters, pid);
    let stop = Stop {
        fd: stop,
        runtime: &*options.runtime,
    };
    let receiver = Receiver::new(options.spinners_max);
    match run(&mut guest, receiver, (socket.as_fd(), stop), shared) {
        Ok(end) => tracing::info!(pid, ?end, "the guest session ended"),
        Err(error) => {
            let words = words(&error);
            shared.counters.refused.count();
            tracing::error!(pid, error = words, "the guest session is ended");
            shared.fail(words);
        }
    }
    shared.enter(SessionState::Undoing { pid });
    // A VMM that waits for an answer learns at once that none will come. Fails where it has gone.
    let _ = shutdown(&socket, Shutdown::Both);
    let undone = undo(&mut guest, function);
    guest.tell_maps();
    if let Err(error) = &undone {
        let words = words(error);
        tracing::error!(
            pid,
            error = words,
            "the function cannot serve another guest"
        );
        shared.fail(words);
    }
    undone
}

/// Whether a VMM may attach; if not, why.
fn admit(socket: BorrowedFd<'_>, peer: Peer, options: &Options) -> Result<(), String> {
    let Peer { pid, uid, gid } = peer;
    if !options.peers.may_attach(peer) {
        return Err(format!(
            "a process of user {uid}, group {gid} (process {pid}) may not attach here: start the \
             VMM as a user that may, or name it in policy.vmm_uids or policy.vmm_gids"
        ));
    }
    match &options.holders {
        Some(holders) if options.bars == BarMode::Mapped => {
            let process = process(socket).map_err(|error| {
                format!("the kernel does not tell which process the VMM is: {error}")
            })?;
            holders.begins(Vmm { pid, process })
        }
        _ => Ok(()),
    }
}

/// Answers the VMM's requests, one after the other.
fn run(
    guest: &mut Guest<'_>,
    mut receiver: Receiver,
    (socket, stop): (BorrowedFd<'_>, Stop<'_>),
    shared: &SessionShared,
) -> Result<End, SessionError> {
    let mut reply = Reply::default();
    loop {
        let (envelope, body, fds) = match receiver.next(socket, stop)? {
            Incoming::Message(envelope, body, fds) => (envelope, body, fds),
            Incoming::End => return Ok(End::Closed),
            Incoming::Stopped => return Ok(End::Stopped),
        };
        shared.counters.messages.count();
        reply.clear();
        let (fd, fault) = match guest.handle(&envelope, body, fds, &mut reply) {
            Ok(fd) => (fd, None),
            Err(error) => {
                reply.clear();
                reply.fail(Errno::INVAL.raw_os_error() as u32);
                (None, Some(error))
            }
        };
        let sent = match envelope.no_reply {
            true => Ok(Wake::Ready),
            false => {
                let bytes = reply.finish(envelope.id, envelope.command as u16);
                send(socket, stop, bytes, fd)
            }
        };
        if let Some(error) = fault {
            return Err(error);
        }
        match sent? {
            Wake::Ready => {}
            Wake::Closed => return Ok(End::Closed),
            Wake::Stopped => return Ok(End::Stopped),
        }
    }
}

fn undo(guest: &mut Guest<'_>, function: &dyn Function) -> Result<(), EndpointError> {
    let reset = function.reset().map_err(EndpointError::Reset);
    let unmapped = guest.dma().undo().map_err(EndpointError::Unmap);
    let disabled = IrqIndex::ALL.map(|index| {
        let disabled = function.disable_irqs(index);
        disabled.map_err(|source| EndpointError::Irqs { index, source })
    });
    reset.and(unmapped).and(disabled.into_iter().collect())
}
