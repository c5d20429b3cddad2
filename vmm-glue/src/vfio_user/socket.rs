//! Framing and fds over a connected socket: every received fd is owned at once, all is bounded.
//!
//! The kernel ends a receive behind the bytes that fds travelled with, so fds belong to the
//! message that holds the last byte received with them.

use super::{
    spin::{Pause, Spin, SpinPolicy},
    wire::{Envelope, HEADER_BYTES, Header, MESSAGE_MAX, WireError},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};
use vfio_shim::model::Runtime;
use zerocopy::FromBytes;

/// The most fds that one message may bring: what the kernel lets through at once. QEMU is told of
/// fewer (`MSG_FDS_MAX`); cloud-hypervisor does not ask and sends all vectors in one message.
pub const FDS_MAX: usize = 253;
/// What is received at once, where no message needs more.
const RECEIVE_BYTES: usize = 64 << 10;
/// So many looks at the socket may go by without one at the owner's stop.
const LOOKS_MAX: u32 = 64;

/// Why the stream cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel refused.
    #[error("cannot {act} the VMM's socket")]
    Io {
        /// `receive from`, `send to` or `wait for`.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The header of a message is malformed.
    #[error("the VMM sent a malformed message")]
    Header(#[source] WireError),
    /// More fds than one message may bring.
    #[error("the VMM sent more than {FDS_MAX} file descriptors with one message")]
    TooManyFds,
    /// Closed within a message.
    #[error("the VMM closed its socket after {0} bytes of an unfinished message")]
    Cut(usize),
}

fn failed(act: &'static str) -> impl Fn(Errno) -> SocketError {
    move |errno| SocketError::Io {
        act,
        source: errno.into(),
    }
}

/// What came of waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The socket is ready.
    Ready,
    /// The owner wants the session to end.
    Stopped,
    /// The VMM closed its end.
    Closed,
}

/// How the owner ends a wait, and what waits.
#[derive(Clone, Copy, Debug)]
pub struct Stop<'a> {
    /// Readable when the owner wants the session to end.
    pub fd: BorrowedFd<'a>,
    /// What the waiting thread stands on.
    pub runtime: &'a dyn Runtime,
}

/// Waits for the socket or the owner's stop.
pub fn wait(socket: BorrowedFd<'_>, events: PollFlags, stop: Stop<'_>) -> Result<Wake, Errno> {
    let mut fds = [
        PollFd::from_borrowed_fd(socket, events),
        PollFd::from_borrowed_fd(stop.fd, PollFlags::IN),
    ];
    stop.runtime.poll(&mut fds)?;
    match fds[1].revents().is_empty() {
        true => Ok(Wake::Ready),
        false => Ok(Wake::Stopped),
    }
}

/// Whether the owner wants the session to end, without waiting for it.
fn is_stopped(stop: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN)];
    match poll(&mut fds, Some(&Timespec::default())) {
        Ok(_) => Ok(!fds[0].revents().is_empty()),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// What the stream brought.
#[derive(Debug)]
pub enum Incoming<'a> {
    /// A whole message.
    Message(Envelope, &'a [u8], Vec<OwnedFd>),
    /// The VMM closed its end, between two messages.
    End,
    /// The owner wants the session to end.
    Stopped,
}

/// The receiving side: cuts the stream into messages.
#[derive(Debug)]
pub struct Receiver {
    buffer: Vec<u8>,
    /// The bytes of `buffer` not taken yet.
    start: usize,
    end: usize,
    /// How many bytes were received in all; the place of `end` in the stream.
    received: u64,
    /// Fds not taken yet, each with the place in the stream behind the last byte it came with.
    fds: Vec<(u64, OwnedFd)>,
    policy: SpinPolicy,
    spinners_max: usize,
    /// Looks at the socket since the last one at the owner's stop.
    looks: u32,
}

/// What one look at the socket brought.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Received {
    Bytes,
    Nothing,
    End,
}

impl Receiver {
    /// Nothing has come yet. It waits awake beside no more than so many.
    pub fn new(spinners_max: usize) -> Self {
        Self {
            buffer: vec![0; RECEIVE_BYTES],
            start: 0,
            end: 0,
            received: 0,
            fds: Vec::new(),
            policy: SpinPolicy::default(),
            spinners_max,
            looks: 0,
        }
    }

    /// The next message, waiting for it as long as it takes.
    pub fn next(
        &mut self,
        socket: BorrowedFd<'_>,
        stop: Stop<'_>,
    ) -> Result<Incoming<'_>, SocketError> {
        let mut entered = None;
        let envelope = loop {
            let wanted = match self.envelope()? {
                Some(envelope) if self.held() >= HEADER_BYTES + envelope.body_bytes => {
                    break envelope;
                }
                Some(envelope) => HEADER_BYTES + envelope.body_bytes,
                None => HEADER_BYTES,
            };
            self.make_room(wanted);
            let since = *entered.get_or_insert_with(|| stop.runtime.spin_clock_ns());
            match self.more(socket, stop, since)? {
                Some(Received::End) => {
                    return match self.held() {
                        0 => Ok(Incoming::End),
                        bytes => Err(SocketError::Cut(bytes)),
                    };
                }
                Some(_) => {}
                None => return Ok(Incoming::Stopped),
            }
        };
        // A message that was there already tells nothing of how long the VMM thinks.
        if let Some((since, now)) = entered.flatten().zip(stop.runtime.spin_clock_ns()) {
            self.policy.gap(now.saturating_sub(since));
        }
        Ok(self.take(envelope))
    }

    /// Waits for more bytes, awake where that pays; none when the owner wants the end.
    fn more(
        &mut self,
        socket: BorrowedFd<'_>,
        stop: Stop<'_>,
        since: Option<u64>,
    ) -> Result<Option<Received>, SocketError> {
        let mut spin = since.and_then(|since| Spin::begin(&self.policy, since, self.spinners_max));
        while let Some(awake) = &mut spin {
            if self.looks >= LOOKS_MAX {
                self.looks = 0;
                if is_stopped(stop.fd).map_err(failed("wait for"))? {
                    return Ok(None);
                }
            }
            self.looks += 1;
            let received = self.receive(socket)?;
            if received != Received::Nothing {
                return Ok(Some(received));
            }
            match awake.pause(stop.runtime) {
                Pause::Again => {}
                Pause::Over => spin = None,
                Pause::Contended => {
                    self.policy.contended();
                    spin = None;
                }
            }
        }
        self.looks = 0;
        match wait(socket, PollFlags::IN, stop).map_err(failed("wait for"))? {
            Wake::Stopped => Ok(None),
            Wake::Ready | Wake::Closed => self.receive(socket).map(Some),
        }
    }

    fn held(&self) -> usize {
        self.end - self.start
    }

    fn envelope(&self) -> Result<Option<Envelope>, SocketError> {
        match Header::ref_from_prefix(&self.buffer[self.start..self.end]) {
            Ok((header, _)) => header.envelope().map(Some).map_err(SocketError::Header),
            Err(_) => Ok(None),
        }
    }

    /// Makes the buffer hold `wanted` bytes from `start` on; `Envelope` bounds them.
    fn make_room(&mut self, wanted: usize) {
        debug_assert!(wanted <= MESSAGE_MAX);
        if self.held() == 0 {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.start < wanted {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.held());
        }
        if self.buffer.len() < wanted {
            self.buffer.resize(wanted, 0);
        }
    }

    /// Receives once, without waiting.
    fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<Received, SocketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut room = [IoSliceMut::new(&mut self.buffer[self.end..])];
        let message = match recvmsg(socket, &mut room, &mut control, flags) {
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            Err(Errno::CONNRESET) => return Ok(Received::End),
            Err(errno) => return Err(failed("receive from")(errno)),
        };
        self.end += message.bytes;
        self.received += message.bytes as u64;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds.map(|fd| (self.received, fd)));
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > FDS_MAX {
            return Err(SocketError::TooManyFds);
        }
        match message.bytes {
            0 => Ok(Received::End),
            _ => Ok(Received::Bytes),
        }
    }

    fn take(&mut self, envelope: Envelope) -> Incoming<'_> {
        let body = self.start + HEADER_BYTES;
        let next = body + envelope.body_bytes;
        // The place in the stream behind this message.
        let place = self.received - (self.end - next) as u64;
        let count = self.fds.iter().take_while(|(at, _)| *at <= place).count();
        let fds = self.fds.drain(..count).map(|(_, fd)| fd).collect();
        self.start = next;
        Incoming::Message(envelope, &self.buffer[body..next], fds)
    }
}

/// Sends a whole message, with an fd beside its first byte. A VMM that does not read its replies
/// holds up nobody but itself: the owner's stop ends the wait.
pub fn send(
    socket: BorrowedFd<'_>,
    stop: Stop<'_>,
    mut bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> Result<Wake, SocketError> {
    let rights: &[BorrowedFd<'_>] = fd.as_slice();
    let mut unsent = !rights.is_empty();
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if unsent {
            control.push(SendAncillaryMessage::ScmRights(rights));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(sent) => {
                unsent = false;
                bytes = &bytes[sent..];
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let act = "wait for";
                if wait(socket, PollFlags::OUT, stop).map_err(failed(act))? == Wake::Stopped {
                    return Ok(Wake::Stopped);
                }
            }
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(Wake::Closed),
            Err(errno) => return Err(failed("send to")(errno)),
        }
    }
    Ok(Wake::Ready)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::{
        io::Write,
        os::{fd::AsFd, unix::net::UnixStream},
    };
    use vfio_shim::model::OsRuntime;

    fn reset(id: u16) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        bytes[..2].copy_from_slice(&id.to_le_bytes());
        bytes[2] = 13;
        bytes[4] = 16;
        bytes
    }

    fn send_with(socket: &UnixStream, bytes: &[u8], fds: usize) {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let rights = vec![fd.as_fd(); fds];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if fds != 0 {
            assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
        }
        let sent = sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::empty(),
        );
        assert_eq!(sent.unwrap(), bytes.len());
    }

    fn stop(fd: &OwnedFd) -> Stop<'_> {
        Stop {
            fd: fd.as_fd(),
            runtime: &OsRuntime,
        }
    }

    struct Pair {
        near: UnixStream,
        far: UnixStream,
        stop: OwnedFd,
        receiver: Receiver,
    }

    fn pair() -> Pair {
        let (near, far) = UnixStream::pair().unwrap();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let receiver = Receiver::new(1);
        Pair {
            near,
            far,
            stop,
            receiver,
        }
    }

    impl Pair {
        fn next(&mut self) -> Result<Incoming<'_>, SocketError> {
            self.receiver.next(self.near.as_fd(), stop(&self.stop))
        }

        fn message(&mut self) -> (u16, usize) {
            match self.next().unwrap() {
                Incoming::Message(envelope, _, fds) => (envelope.id, fds.len()),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn fds_go_to_the_message_they_were_sent_with_when_several_arrive_at_once() {
        let mut pair = pair();
        for (id, fds) in [(1, 0), (2, 2), (3, 0), (4, 1), (5, FDS_MAX)] {
            send_with(&pair.far, &reset(id), fds);
        }
        for expected in [(1, 0), (2, 2), (3, 0), (4, 1), (5, FDS_MAX)] {
            assert_eq!(pair.message(), expected);
        }
    }

    #[test]
    fn fds_sent_with_the_first_byte_of_a_message_go_to_it() {
        let mut pair = pair();
        let bytes = reset(9);
        send_with(&pair.far, &bytes[..1], 1);
        pair.far.write_all(&bytes[1..]).unwrap();
        assert_eq!(pair.message(), (9, 1));
    }

    #[test]
    fn more_fds_than_fit_one_message_end_the_stream() {
        let mut pair = pair();
        send_with(&pair.far, &[0], FDS_MAX);
        send_with(&pair.far, &[0], 1);
        assert!(matches!(pair.next(), Err(SocketError::TooManyFds)));
    }

    #[test]
    fn a_message_cut_short_is_told_from_an_end() {
        let mut pair = pair();
        pair.far.write_all(&reset(1)).unwrap();
        pair.far.write_all(&[0; 5]).unwrap();
        pair.far.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(pair.message().0, 1);
        assert!(matches!(pair.next(), Err(SocketError::Cut(5))));
    }

    #[test]
    fn a_message_of_the_largest_size_arrives_whole() {
        let mut pair = pair();
        let mut bytes = vec![0; MESSAGE_MAX];
        bytes[2] = 10;
        bytes[4..8].copy_from_slice(&(MESSAGE_MAX as u32).to_le_bytes());
        bytes[MESSAGE_MAX - 1] = 0xa5;
        let mut far = pair.far.try_clone().unwrap();
        let writer = std::thread::spawn(move || {
            far.write_all(&reset(1)).unwrap();
            far.write_all(&bytes).unwrap();
            far.write_all(&reset(3)).unwrap();
        });
        assert_eq!(pair.message().0, 1);
        match pair.next().unwrap() {
            Incoming::Message(_, body, _) => assert_eq!(body.last(), Some(&0xa5)),
            other => panic!("{other:?}"),
        }
        assert_eq!(pair.message().0, 3);
        writer.join().unwrap();
    }

    #[test]
    fn stop_ends_a_session_whose_messages_never_pause() {
        let mut pair = pair();
        // Close upon each other, until one is waited for awake.
        for id in 0..16 {
            pair.far.write_all(&reset(id)).unwrap();
            assert_eq!(pair.message().0, id);
        }
        assert_ne!(pair.receiver.policy.spin_ns(), 0);
        rustix::io::write(&pair.stop, &1u64.to_ne_bytes()).unwrap();
        let stopped = (0..=LOOKS_MAX).any(|_| {
            pair.far.write_all(&reset(1)).unwrap();
            matches!(pair.next().unwrap(), Incoming::Stopped)
        });
        assert!(stopped);
    }

    #[test]
    fn a_vmm_that_reads_no_replies_does_not_hold_up_the_stop() {
        let pair = pair();
        let bytes = vec![0; 4 << 20];
        rustix::io::write(&pair.stop, &1u64.to_ne_bytes()).unwrap();
        let wake = send(pair.near.as_fd(), stop(&pair.stop), &bytes, None).unwrap();
        assert_eq!(wake, Wake::Stopped);
    }
}
