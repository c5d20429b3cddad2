//! SIGTERM and SIGINT as a file descriptor, so that the one loop sees them.
#![allow(unsafe_code)]
// Signal masks and signalfd have no safe wrapper among the crates that the workspace uses.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Blocks both signals and returns a descriptor that is readable when one has come.
pub fn termination_fd() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use, both calls only read it, and the
    // descriptor that signalfd returns is new and owned by nobody else.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}
