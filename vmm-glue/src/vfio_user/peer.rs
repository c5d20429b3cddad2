//! Which process is at the other end of a connected socket, of which user, and whether that one may attach.
#![allow(unsafe_code)] // getsockopt(2) fills a value in: rustix's takes a process id of 0 for impossible, and it is not.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// The most users, and the most groups, that may be named.
pub const PEERS_MAX: usize = 16;

/// Whose VMMs may attach. The socket's own mode is the first check, and this is the second: a file
/// that was made open to everybody by mistake lets in no more than these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Peers {
    /// Whoever can connect.
    #[default]
    Any,
    /// Processes of these users, or whose group is one of these.
    Only {
        /// Users.
        uids: Vec<u32>,
        /// Groups.
        gids: Vec<u32>,
    },
}

/// The process that connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    /// 0 for one in a PID namespace that this process does not see.
    pub(super) pid: i32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Peers {
    pub(super) fn may_attach(&self, peer: Peer) -> bool {
        match self {
            Self::Any => true,
            Self::Only { uids, gids } => uids.contains(&peer.uid) || gids.contains(&peer.gid),
        }
    }
}

/// A socket's option.
fn option<T: Copy>(socket: BorrowedFd<'_>, name: libc::c_int, mut value: T) -> io::Result<T> {
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: both pointers are to live values, the first as long as `len` says; for both types
    // that this is called with, every bit pattern is one.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Who connected, as the kernel saw it at that time.
pub(super) fn peer(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    let nobody = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let credentials = option(socket, libc::SO_PEERCRED, nobody)?;
    Ok(Peer {
        pid: credentials.pid,
        uid: credentials.uid,
        gid: credentials.gid,
    })
}

/// The pidfd of the process that connected, whatever has its number by now (Linux 6.5).
pub(super) fn process(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let fd: RawFd = option(socket, libc::SO_PEERPIDFD, -1)?;
    // SAFETY: the kernel has just made this descriptor for the caller, who alone knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::{Peer, Peers, peer, process};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::{fs::File, os::fd::AsFd, os::unix::net::UnixStream, process};

    #[test]
    fn a_socket_tells_its_peer_and_a_file_tells_an_error() {
        let (one, _other) = UnixStream::pair().unwrap();
        let me = Peer {
            pid: process::id() as i32,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        assert_eq!(peer(one.as_fd()).unwrap(), me);
        let file = File::open("/dev/null").unwrap();
        assert!(peer(file.as_fd()).is_err());
        // A process is readable when it has ended, and this one has not.
        let me = process(one.as_fd()).unwrap();
        assert_eq!(
            poll(
                &mut [PollFd::new(&me, PollFlags::IN)],
                Some(&Timespec::default())
            ),
            Ok(0)
        );
        assert!(process(file.as_fd()).is_err());
    }

    #[test]
    fn one_of_the_named_users_or_groups_may_attach_and_nobody_else() {
        let (pid, uids, gids) = (1, vec![0, 107], vec![50]);
        let only = Peers::Only { uids, gids };
        for (uid, gid, may) in [(0, 9, true), (107, 9, true), (9, 50, true), (9, 107, false)] {
            assert_eq!(only.may_attach(Peer { pid, uid, gid }), may, "{uid}:{gid}");
            assert!(Peers::Any.may_attach(Peer { pid, uid, gid }));
        }
    }
}
