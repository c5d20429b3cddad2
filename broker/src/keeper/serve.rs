//! The keeper's sockets: who may connect, how many at once, and one thread for each connection.

use super::{
    holds::{Client, Holds},
    message::{FromKeeper, ToKeeper},
};
use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    ipc::{Channel, ChannelError, Check, Sent},
};
use rustix::{
    event::{PollFd, PollFlags},
    net::{SocketFlags, accept_with, sockopt::socket_peercred},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use vfio_shim::{
    model::{Bdf, Runtime, Span},
    path::words,
};
use vmm_glue::vfio_user::memory_check::{Inode, MemoryMaps};

/// The most connections of one socket: one for each open function, and checks under way.
pub const CONNECTIONS_MAX: usize = 256;
/// A connection's thread has one message and one path of a file on its stack.
const STACK_BYTES: usize = 256 << 10;

/// What a socket is for.
#[derive(Clone)]
pub(super) enum Service {
    /// Functions are opened and given back.
    Functions(Arc<Holds>),
    /// Memory of processes is looked at.
    Checks(Arc<dyn MemoryMaps>),
}

/// One of the connections that there may be.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(count: &Arc<AtomicUsize>) -> Option<Self> {
        let free = |now| (now < CONNECTIONS_MAX).then_some(now + 1);
        let taken = count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, free);
        taken.is_ok().then(|| Self(Arc::clone(count)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn refuse(code: ErrorCode, text: impl Into<String>) -> VerbError {
    VerbError::new(code, text)
}

/// Serves whoever runs as user `uid`, until one of `ends` is readable. Connections that are there
/// then go on until the process ends.
pub(super) fn serve(
    listener: BorrowedFd<'_>,
    uid: u32,
    service: &Service,
    ends: &[BorrowedFd<'_>],
    runtime: &Arc<dyn Runtime>,
) -> io::Result<()> {
    let count = Arc::new(AtomicUsize::new(0));
    let mut id = 0;
    loop {
        let mut fds = vec![PollFd::from_borrowed_fd(listener, PollFlags::IN)];
        let ends = ends.iter().copied();
        fds.extend(ends.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        runtime.poll(&mut fds)?;
        if fds[1..].iter().any(|fd| !fd.revents().is_empty()) {
            return Ok(());
        }
        let socket = match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            // It has gone again, or nothing is left to take it with.
            Err(errno) => {
                tracing::warn!(error = %errno, "a connection was not accepted");
                continue;
            }
        };
        id += 1;
        let connection = Connection {
            channel: Channel::of(socket).on(Arc::clone(runtime)),
            service: service.clone(),
            client: Client { id, pid: 0 },
            open: None,
        };
        connection.admit(uid, &count, &**runtime);
    }
}

/// One connection. What it has open is given back when it goes.
struct Connection {
    channel: Channel,
    service: Service,
    client: Client,
    open: Option<Bdf>,
}

impl Connection {
    /// Takes it in, or refuses it in words.
    fn admit(mut self, uid: u32, count: &Arc<AtomicUsize>, runtime: &dyn Runtime) {
        let slot = match self.judge(uid, count) {
            Ok(slot) => slot,
            Err(refusal) => {
                tracing::warn!("refused: {refusal}");
                // Nothing was sent yet, so there is room.
                let _ = self.channel.say(&FromKeeper::Refused(refusal), false);
                return;
            }
        };
        let run = move || {
            self.run();
            drop(self);
            drop(slot);
        };
        let spawned = runtime.spawn_small("connection".into(), STACK_BYTES, Box::new(run));
        if let Err(error) = spawned {
            tracing::error!(%error, "no thread for a connection: it is closed");
        }
    }

    fn judge(&mut self, uid: u32, count: &Arc<AtomicUsize>) -> Result<Slot, VerbError> {
        let peer = socket_peercred(self.channel.as_fd());
        let peer = peer.map_err(|errno| {
            let text = format!("the kernel does not tell who connected: {errno}");
            refuse(ErrorCode::Kernel, text)
        })?;
        self.client.pid = peer.pid.as_raw_nonzero().get();
        let came = peer.uid.as_raw();
        if came != uid {
            let text = format!(
                "process {} runs as user {came}, and the keeper serves user {uid} alone: start it \
                 as that user, or set `user` in [keeper] of the configuration",
                self.client.pid
            );
            return Err(refuse(ErrorCode::NotAllowed, text));
        }
        Slot::take(count).ok_or_else(|| {
            let text = format!(
                "the keeper has {CONNECTIONS_MAX} connections, its limit: close some, and try again"
            );
            refuse(ErrorCode::TooManyClients, text)
        })
    }

    fn run(&mut self) {
        // That it is taken in; whoever is not reads a refusal here.
        if !matches!(self.channel.say(&FromKeeper::Done, false), Ok(Sent::Sent)) {
            return;
        }
        loop {
            let answer = match self.channel.hear() {
                Ok(None) => return,
                Ok(Some(message)) => self.answer(message),
                Err(error) => {
                    self.tell_fault(&error);
                    return;
                }
            };
            let answer = match answer {
                Ok(answer) => answer,
                Err(refusal) => {
                    tracing::warn!(pid = self.client.pid, "refused: {refusal}");
                    FromKeeper::Refused(refusal)
                }
            };
            match self.channel.say(&answer, true) {
                Ok(Sent::Sent) => {}
                // Also when the function has just been opened for it: it is given back.
                _ => return,
            }
        }
    }

    /// What cannot be a message ends the connection.
    fn tell_fault(&self, error: &ChannelError) {
        tracing::warn!(pid = self.client.pid, "a connection ends: {}", words(error));
        let text = format!(
            "{}: ask with a `sublet` of the keeper's own build",
            words(error)
        );
        let refusal = refuse(ErrorCode::BadRequest, text);
        let _ = self.channel.say(&FromKeeper::Refused(refusal), false);
    }

    fn answer(&mut self, message: ToKeeper) -> Result<FromKeeper, VerbError> {
        match (message, self.service.clone()) {
            (ToKeeper::Open(bdf), Service::Functions(holds)) => {
                if let Some(open) = self.open {
                    let text =
                        format!("this connection has {open} open: use one for each function");
                    return Err(refuse(ErrorCode::BadRequest, text));
                }
                let opened = holds.open(self.client, bdf)?;
                self.open = Some(bdf);
                Ok(FromKeeper::Opened(opened))
            }
            (ToKeeper::Stop, Service::Functions(holds)) => self.stop(&holds),
            (ToKeeper::Close(bdf), Service::Functions(holds)) => {
                holds.close(self.client, bdf)?;
                self.open = self.open.filter(|open| *open != bdf);
                Ok(FromKeeper::Done)
            }
            (ToKeeper::CheckShared(check), Service::Checks(maps)) => shared(maps.as_ref(), check),
            _ => {
                let text = "that is asked at the keeper's other socket";
                Err(refuse(ErrorCode::BadRequest, text))
            }
        }
    }

    fn stop(&self, holds: &Holds) -> Result<FromKeeper, VerbError> {
        let bdf = self.open.ok_or_else(|| {
            let text = "this connection has no function open: ask on the one that opened it";
            refuse(ErrorCode::BadRequest, text)
        })?;
        match holds.stop(self.client, bdf)? {
            true => Ok(FromKeeper::Done),
            false => Ok(FromKeeper::NoFile),
        }
    }
}

fn shared(maps: &dyn MemoryMaps, check: Check) -> Result<FromKeeper, VerbError> {
    let range = |(device, number, range): (u64, u64, Span)| (Inode { device, number }, range);
    let ranges: Vec<_> = check.ranges.into_iter().map(range).collect();
    match maps.check_shared(check.pid, &ranges) {
        Ok(()) => Ok(FromKeeper::Done),
        Err(error) => Err(refuse(ErrorCode::NotAllowed, words(&error))),
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The other end reads the end now, and not only after the undoing.
        self.channel.close();
        if let (Some(bdf), Service::Functions(holds)) = (self.open.take(), &self.service) {
            holds.client_gone(self.client, bdf);
        }
    }
}
