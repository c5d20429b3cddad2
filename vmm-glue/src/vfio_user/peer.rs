//! Which process is at the other end of a connected socket.
#![allow(unsafe_code)] // getsockopt(2) fills a value in: rustix's takes a process id of 0 for impossible, and it is not.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// The process that connected; 0 for one in a PID namespace that this process does not see.
pub(super) fn peer_pid(socket: BorrowedFd<'_>) -> io::Result<i32> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of_val(&credentials) as libc::socklen_t;
    // SAFETY: both pointers are to live values, the first as long as `len` says; every bit pattern
    // is a `ucred`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(credentials.pid),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::peer_pid;
    use std::{fs::File, os::fd::AsFd, os::unix::net::UnixStream, process};

    #[test]
    fn a_socket_tells_its_peer_and_a_file_tells_an_error() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert_eq!(peer_pid(one.as_fd()).unwrap(), process::id() as i32);
        assert!(peer_pid(File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}
