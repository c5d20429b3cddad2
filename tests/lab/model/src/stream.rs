//! One client's socket: whole messages with their file descriptors in, bytes out, never blocking.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};
use thiserror::Error;

use crate::wire::{HEADER_BYTES, Header, MESSAGE_BYTES_MAX, MESSAGE_FDS_MAX, WireError};

/// Bytes that may wait for a client that does not read; beyond that it is given up.
const OUT_BYTES_MAX: usize = 64 << 20;
/// Bytes asked for by one receive.
const RECEIVE_BYTES: usize = 64 << 10;

/// Why a client's stream ended.
#[derive(Debug, Error)]
pub enum StreamError {
    #[error("the client closed its socket")]
    Closed,
    #[error("receiving from the client")]
    Receive(#[source] std::io::Error),
    #[error("sending to the client")]
    Send(#[source] std::io::Error),
    #[error("the client does not read: {OUT_BYTES_MAX} bytes wait for it")]
    Stuck,
    #[error("a malformed message")]
    Wire(#[from] WireError),
}

/// One whole message.
#[derive(Debug)]
pub struct Message {
    pub header: Header,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// A connected client.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
    /// Room for what arrives; `start..end` of it is unread. Never shrunk and never cleared: a
    /// receive costs no more than its bytes.
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Stream position of `input[start]`.
    position: u64,
    /// Descriptors, each batch with the stream position behind the bytes it arrived with. The
    /// kernel ends a receive behind the bytes that descriptors were sent with, so that position
    /// lies in, or at the end of, the message they belong to.
    fds: VecDeque<(u64, Vec<OwnedFd>)>,
    output: Vec<u8>,
    sent: usize,
}

impl Stream {
    /// Takes over a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            input: Vec::new(),
            start: 0,
            end: 0,
            position: 0,
            fds: VecDeque::new(),
            output: Vec::new(),
            sent: 0,
        }
    }

    /// The socket, for polling.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Receives once. Returns false when nothing was there.
    pub fn receive(&mut self) -> Result<bool, StreamError> {
        if self.start > 0 {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.input.len() < self.end + RECEIVE_BYTES {
            self.input.resize(self.end + RECEIVE_BYTES, 0);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let result = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut self.input[self.end..])],
            &mut ancillary,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        );
        let received = match result {
            Ok(message) => message,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(StreamError::Receive(error.into())),
        };
        self.end += received.bytes;
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(WireError::FdsTruncated.into());
        }
        if received.bytes == 0 {
            return Err(StreamError::Closed);
        }
        if !fds.is_empty() {
            self.fds.push_back((self.position + self.end as u64, fds));
        }
        Ok(true)
    }

    /// The next whole message, if one has arrived.
    pub fn next_message(&mut self) -> Result<Option<Message>, StreamError> {
        let unread = &self.input[self.start..self.end];
        let Some(header) = unread.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::parse(header)?;
        let size = header.size as usize;
        debug_assert!(size <= MESSAGE_BYTES_MAX);
        if unread.len() < size {
            return Ok(None);
        }
        let body = unread[HEADER_BYTES..size].to_vec();
        self.start += size;
        self.position += size as u64;
        let mut fds = Vec::new();
        while self.fds.front().is_some_and(|(at, _)| *at <= self.position) {
            if let Some((_, batch)) = self.fds.pop_front() {
                fds.extend(batch);
            }
        }
        if fds.len() > MESSAGE_FDS_MAX {
            return Err(WireError::FdsTruncated.into());
        }
        Ok(Some(Message { header, body, fds }))
    }

    /// Sends a message made of a header and parts, or keeps what does not go out now.
    pub fn send(&mut self, header: &Header, parts: &[&[u8]]) -> Result<(), StreamError> {
        self.output.extend_from_slice(&header.encode());
        for part in parts {
            self.output.extend_from_slice(part);
        }
        self.flush()
    }

    /// True while bytes wait for the client to read.
    pub fn has_output(&self) -> bool {
        self.sent < self.output.len()
    }

    /// Sends what waits, as far as the client takes it.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        while self.has_output() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.socket, &self.output[self.sent..], flags) {
                Ok(bytes) => self.sent += bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if self.output.len() - self.sent > OUT_BYTES_MAX {
                        return Err(StreamError::Stuck);
                    }
                    return Ok(());
                }
                Err(error) => return Err(StreamError::Send(error.into())),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }
}
