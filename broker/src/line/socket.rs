//! One end of a line: datagrams, sent and received without waiting.

use super::message::MESSAGE_BYTES_MAX;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
        recv, send, shutdown, socket_with, sockopt::socket_peercred,
    },
    process::geteuid,
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// What came of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Sent,
    /// There is no room: the other end does not read.
    Full,
    /// The other end has gone.
    Closed,
}

/// One end of a line.
#[derive(Debug)]
pub struct Packets {
    socket: OwnedFd,
}

/// Connects to whoever listens there, without waiting for him; `WouldBlock` = he does not answer.
pub fn connect(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, kind, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

impl Packets {
    /// The end that this socket is.
    pub fn of(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The process at the other end, if it is this user's or root's; a refusal if it is not.
    pub fn peer(&self) -> io::Result<Option<i32>> {
        let peer = socket_peercred(&self.socket)?;
        match peer.uid.is_root() || peer.uid == geteuid() {
            true => Ok(Some(peer.pid.as_raw_nonzero().get())),
            false => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("the other end is of user {}", peer.uid.as_raw()),
            )),
        }
    }

    /// Sends a message if there is room for it.
    pub fn send(&self, bytes: &[u8]) -> io::Result<Sent> {
        loop {
            return match send(
                &self.socket,
                bytes,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(_) => Ok(Sent::Sent),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN | Errno::NOBUFS) => Ok(Sent::Full),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Ok(Sent::Closed),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// The next message, `None` at the end; `WouldBlock` when there is none yet.
    pub fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut room = vec![0; MESSAGE_BYTES_MAX];
        loop {
            let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
            return match recv(&self.socket, &mut room[..], flags) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => Ok(None),
                Ok((_, len)) if len > MESSAGE_BYTES_MAX => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a message of {len} bytes: at most {MESSAGE_BYTES_MAX} are right"),
                )),
                Ok((_, len)) => {
                    room.truncate(len);
                    Ok(Some(room))
                }
                Err(Errno::INTR) => continue,
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// Ends it: whoever waits at either end sees its end.
    pub fn close(&self) {
        // Fails where the other end has gone.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
