//! The channel: datagrams with descriptors, each received whole or refused.

use super::{
    codec::MessageError,
    message::{ToPort, ToWorker},
};
use rustix::{
    event::{PollFd, PollFlags},
    fs::fcntl_get_seals,
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
        recvmsg, sendmsg, shutdown, socketpair,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};
use vfio_shim::model::{Idle, OsRuntime, Runtime, Wait};

/// The most bytes of a message.
pub const MESSAGE_BYTES_MAX: usize = vfio_shim::path::wire::PAYLOAD_BYTES_MAX;
/// The most descriptors with one message.
pub const FDS_MAX: usize = 64;

/// Why a channel cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The kernel refused.
    #[error("cannot {act} the channel")]
    Io {
        /// `make`, `receive from` or `send to`.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// A message that cannot be.
    #[error("a message that cannot be")]
    Message(#[from] MessageError),
}

/// What came of sending without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Sent,
    /// There is no room: the other end does not read.
    Full,
    /// The other end has gone.
    Closed,
}

/// A message as one datagram.
pub trait Datagram: Sized {
    /// Its bytes.
    fn encode(&self) -> Result<Vec<u8>, MessageError>;
    /// The descriptors that go along.
    fn fds(&self) -> Vec<BorrowedFd<'_>>;
    /// From a datagram. Whatever does not belong to it is an error, and its descriptors are closed.
    fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError>;
}

/// One end of a channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    runtime: Arc<dyn Runtime>,
}

fn failed(act: &'static str) -> impl Fn(Errno) -> ChannelError {
    move |errno| ChannelError::Io {
        act,
        source: errno.into(),
    }
}

impl Channel {
    /// Both ends.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let flags = SocketFlags::CLOEXEC;
        let made = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (one, other) = made.map_err(failed("make"))?;
        Ok((Self::of(one), Self::of(other)))
    }

    /// The end that this socket is.
    pub fn of(socket: OwnedFd) -> Self {
        let runtime = Arc::new(OsRuntime);
        Self { socket, runtime }
    }

    /// The same, whose threads wait on this runtime.
    pub fn on(self, runtime: Arc<dyn Runtime>) -> Self {
        Self { runtime, ..self }
    }

    /// The socket, to be handed to a child.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Ends it: whoever waits at either end sees its end.
    pub fn close(&self) {
        // Fails where the other end has gone.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Whether the thread waits in the kernel; where not, others have run meanwhile.
    fn may_block(&self, again: bool) -> bool {
        let wait = Wait {
            again,
            fds: true,
            ..Wait::default()
        };
        self.runtime.idle(wait) == Idle::Block
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], wait: bool) -> Result<Sent, ChannelError> {
        if bytes.len() > MESSAGE_BYTES_MAX || fds.len() > FDS_MAX {
            return Err(MessageError::TooLong(bytes.len(), fds.len()).into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let mut again = false;
        loop {
            let look = wait && !self.may_block(again);
            let mut flags = SendFlags::NOSIGNAL;
            flags.set(SendFlags::DONTWAIT, look || !wait);
            return match sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(_) => Ok(Sent::Sent),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) if look => {
                    again = true;
                    continue;
                }
                Err(Errno::AGAIN) => Ok(Sent::Full),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Ok(Sent::Closed),
                Err(errno) => Err(failed("send to")(errno)),
            };
        }
    }

    /// The next datagram, if what came with it is all taken; `None` at the end.
    fn receive(
        &self,
        room: &mut [u8],
        takes: fn(&OwnedFd) -> bool,
    ) -> Result<Option<(usize, Vec<OwnedFd>)>, ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut again = false;
        let received = loop {
            let look = !self.may_block(again);
            let mut flags = RecvFlags::CMSG_CLOEXEC;
            flags.set(RecvFlags::DONTWAIT, look);
            let mut slices = [IoSliceMut::new(room)];
            match recvmsg(&self.socket, &mut slices, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if look => again = true,
                Err(Errno::CONNRESET) => return Ok(None),
                other => break other.map_err(failed("receive from"))?,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(brought) = message {
                fds.extend(brought);
            }
        }
        if !fds.iter().all(takes) {
            // Closing a file waits for whoever serves it, which may be a VMM, and then this thread
            // would stand in that for good. It goes with this process.
            fds.into_iter().for_each(std::mem::forget);
            return Err(MessageError::NoMemory.into());
        }
        let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
        if received.flags.intersects(cut) {
            return Err(MessageError::TooLong(received.bytes, fds.len()).into());
        }
        // No message is empty: nothing means that the other end is closed.
        Ok((received.bytes != 0).then_some((received.bytes, fds)))
    }

    /// The next message; `None` when the other end has gone.
    pub fn hear<M: Datagram>(&self) -> Result<Option<M>, ChannelError> {
        self.hear_with(|_| true)
    }

    fn hear_with<M: Datagram>(
        &self,
        takes: fn(&OwnedFd) -> bool,
    ) -> Result<Option<M>, ChannelError> {
        let mut room = [0; MESSAGE_BYTES_MAX];
        let Some((bytes, fds)) = self.receive(&mut room, takes)? else {
            return Ok(None);
        };
        Ok(Some(M::decode(&room[..bytes], fds)?))
    }

    /// Whether there is something to hear within so long, be it the end.
    pub fn wait(&self, wait: Duration) -> Result<bool, ChannelError> {
        let mut fds = [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::IN)];
        let until_ms = self.runtime.now_ms() + wait.as_millis() as u64;
        let ready = self.runtime.poll_until(&mut fds, Some(until_ms));
        ready.map_err(failed("wait for"))
    }

    /// Sends a message: `wait` only in a thread that serves this channel alone.
    pub fn say<M: Datagram>(&self, message: &M, wait: bool) -> Result<Sent, ChannelError> {
        self.send(&message.encode()?, &message.fds(), wait)
    }

    /// The next message of a worker; `None` when it has gone. One that is not trusted brings memory
    /// and nothing else: only that has seals, which the kernel tells without asking anybody.
    pub fn receive_from_worker(&self, trusted: bool) -> Result<Option<ToPort>, ChannelError> {
        match trusted {
            true => self.hear(),
            false => self.hear_with(|fd| fcntl_get_seals(fd).is_ok()),
        }
    }

    /// The next message of the port; `None` when it has gone.
    pub fn receive_from_port(&self) -> Result<Option<ToWorker>, ChannelError> {
        self.hear()
    }

    /// To the port, waiting for room.
    pub fn send_to_port(&self, message: &ToPort) -> Result<Sent, ChannelError> {
        self.say(message, true)
    }

    /// To a worker: `wait` only in the thread that serves this worker alone.
    pub fn send_to_worker(&self, message: &ToWorker, wait: bool) -> Result<Sent, ChannelError> {
        self.say(message, wait)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

macro_rules! datagram {
    ($($message:ty),*) => {$(
        impl Datagram for $message {
            fn encode(&self) -> Result<Vec<u8>, MessageError> {
                self.encode()
            }
            fn fds(&self) -> Vec<BorrowedFd<'_>> {
                self.fds()
            }
            fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
                Self::decode(bytes, fds)
            }
        }
    )*};
}

datagram!(ToPort, ToWorker);
