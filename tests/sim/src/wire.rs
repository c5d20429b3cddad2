//! A VMM's end of a vfio-user socket: one request at a time, and others run while it waits.

use crate::coroutine::{Pause, is_dying, pause};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, socket_with,
};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use vfio_shim::model::Wait;
use vmm_glue::vfio_user::wire::{Command, FLAG_ERROR, HEADER_BYTES, Header};
use zerocopy::{FromBytes, IntoBytes};

/// The most fds that one request of ours carries.
const FDS_MAX: usize = 8;

/// The server has closed the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// A connected VMM.
pub struct Wire {
    socket: OwnedFd,
    id: u16,
    received: Vec<u8>,
}

impl Wire {
    /// Connects, if somebody listens there.
    pub fn connect(path: &Path) -> Result<Self, Gone> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.expect("a socket");
        let address = SocketAddrUnix::new(path).expect("a short path");
        connect(&socket, &address).map_err(|_| Gone)?;
        Ok(Self {
            socket,
            id: 0,
            received: Vec::new(),
        })
    }

    /// Sends a request whose body is these parts, and waits for its answer. True = no error in it.
    pub fn ask(
        &mut self,
        command: Command,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<bool, Gone> {
        let bytes = self.message(command, body);
        self.send(&bytes, fds)?;
        let header = self.reply()?;
        Ok(header.flags.get() & FLAG_ERROR == 0)
    }

    /// Sends the first bytes of a request and no more, as a VMM that is killed.
    pub fn cut_short(&mut self, command: Command, body: &[&[u8]], bytes: usize) {
        let message = self.message(command, body);
        let _ = self.send(&message[..bytes.min(message.len())], &[]);
    }

    fn message(&mut self, command: Command, body: &[&[u8]]) -> Vec<u8> {
        self.id = self.id.wrapping_add(1);
        let body = body.concat();
        let header = Header {
            id: self.id.into(),
            command: (command as u16).into(),
            size: ((HEADER_BYTES + body.len()) as u32).into(),
            flags: 0.into(),
            errno: 0.into(),
        };
        [header.as_bytes(), &body].concat()
    }

    fn send(&mut self, mut bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Gone> {
        let mut unsent = !fds.is_empty();
        let mut again = false;
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if unsent {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(sent) => {
                    unsent = false;
                    bytes = &bytes[sent..];
                    again = false;
                }
                Err(Errno::AGAIN) if !is_dying() => {
                    idle(again);
                    again = true;
                }
                Err(_) => return Err(Gone),
            }
        }
        Ok(())
    }

    fn reply(&mut self) -> Result<Header, Gone> {
        let mut again = false;
        loop {
            if let Ok((header, _)) = Header::read_from_prefix(&self.received)
                && self.received.len() >= header.size.get() as usize
            {
                assert_eq!(header.id.get(), self.id, "an answer to another request");
                self.received.drain(..header.size.get() as usize);
                return Ok(header);
            }
            idle(again);
            let mut room = [0; 4096];
            match recv(&self.socket, &mut room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Gone),
                Ok((bytes, _)) => {
                    self.received.extend(&room[..bytes]);
                    again = false;
                }
                Err(Errno::AGAIN) if !is_dying() => again = true,
                Err(_) => return Err(Gone),
            }
        }
    }

    /// Whether the server has hung up, without waiting.
    pub fn is_closed(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        match recv(&self.socket, &mut [0; 1], flags) {
            Ok((bytes, _)) => bytes == 0,
            Err(errno) => errno != Errno::AGAIN,
        }
    }
}

fn idle(again: bool) {
    pause(Pause::Idle(Wait {
        until_ms: None,
        again,
        fds: true,
    }));
}
