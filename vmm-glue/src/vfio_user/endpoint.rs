//! A long-lived listening socket on which one VMM at a time is served.
//!
//! The next VMM is accepted only when nothing of the one before is left: cloud-hypervisor
//! connects again 14 ms after a reboot of its guest, and waits in the socket's queue.

use super::{
    error::EndpointError,
    options::Options,
    session::serve_connection,
    shared::{SessionShared, SessionState},
    socket::{Stop, Wake, wait},
};
use rustix::{
    event::PollFlags,
    fs::{FileType, Mode, Stat, fchmod, lstat},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
        socket_with,
    },
};
use std::{
    any::Any,
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};
use vfio_shim::model::Function;

/// How many VMMs may wait for the one that is served.
const BACKLOG: i32 = 4;

/// A listening socket. What it made is removed when it is dropped.
#[derive(Debug)]
pub struct Endpoint {
    listener: OwnedFd,
    path: PathBuf,
    /// Device and inode of the socket's file: whatever else is there later is not ours. `None`
    /// where another process has made it.
    made: Option<(u64, u64)>,
    /// Goes after the socket's file.
    kept: Option<Box<dyn Any + Send + Sync>>,
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Makes the socket with access for its owner alone, at no time for more.
fn make(path: &Path, address: &SocketAddrUnix) -> Result<(OwnedFd, (u64, u64)), Errno> {
    let listener = stream_socket()?;
    // Linux gives the file the mode that the socket has when it is bound.
    fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
    bind(&listener, address)?;
    let made = identity(&lstat(path)?);
    listen(&listener, BACKLOG)?;
    Ok((listener, made))
}

/// Removes a socket that nobody listens on, as a process that was killed leaves it.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), EndpointError> {
    let failed = |errno: Errno| EndpointError::Bind {
        path: path.to_owned(),
        source: errno.into(),
    };
    let stat = match lstat(path) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(failed(errno)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(EndpointError::NotASocket(path.to_owned()));
    }
    let probe = stream_socket().map_err(failed)?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => rustix::fs::unlink(path).map_err(failed),
        Err(Errno::ACCESS | Errno::AGAIN) | Ok(()) => Err(EndpointError::InUse(path.to_owned())),
        Err(errno) => Err(failed(errno)),
    }
}

impl Endpoint {
    /// Listens on `path`. A socket there that nobody listens on is replaced.
    pub fn bind(path: &Path) -> Result<Self, EndpointError> {
        let failed = |errno: Errno| EndpointError::Bind {
            path: path.to_owned(),
            source: errno.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        remove_stale(path, &address)?;
        let (listener, made) = make(path, &address).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            made: Some(made),
            kept: None,
        })
    }

    /// Listens on a socket that another process has made, and removes when it is done with it.
    pub fn adopt(listener: OwnedFd, path: &Path) -> Self {
        Self {
            listener,
            path: path.to_owned(),
            made: None,
            kept: None,
        }
    }

    /// Keeps something until nobody listens any more and the socket's file is gone.
    pub fn keeping(mut self, kept: impl Any + Send + Sync) -> Self {
        self.kept = Some(Box::new(kept));
        self
    }

    /// The listening socket, to be handed to a process that serves on it.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves one VMM after the other in this thread, until `stop` becomes readable. An error
    /// means that the function must not be given to anybody else, or that nobody can be accepted.
    pub fn serve(
        &self,
        function: &Arc<dyn Function>,
        options: &Options,
        stop: BorrowedFd<'_>,
        shared: &SessionShared,
    ) -> Result<(), EndpointError> {
        let result = self.serve_each(function.as_ref(), options, stop, shared);
        shared.enter(SessionState::Closed);
        result
    }

    fn serve_each(
        &self,
        function: &dyn Function,
        options: &Options,
        stop: BorrowedFd<'_>,
        shared: &SessionShared,
    ) -> Result<(), EndpointError> {
        let runtime = &*options.runtime;
        loop {
            shared.enter(SessionState::Waiting);
            match self.accept(Stop { fd: stop, runtime })? {
                Some(socket) => serve_connection(socket, function, options, stop, shared)?,
                None => return Ok(()),
            }
        }
    }

    /// The next VMM, or `None` when the owner wants to stop.
    fn accept(&self, stop: Stop<'_>) -> Result<Option<OwnedFd>, EndpointError> {
        let failed = |errno: Errno| EndpointError::Accept {
            path: self.path.clone(),
            source: errno.into(),
        };
        loop {
            let listener = self.listener.as_fd();
            if wait(listener, PollFlags::IN, stop).map_err(failed)? == Wake::Stopped {
                return Ok(None);
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.listener, flags) {
                Ok(socket) => return Ok(Some(socket)),
                // The VMM gave up before it was its turn.
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let Some(made) = self.made else { return };
        let ours = lstat(&self.path).is_ok_and(|stat| identity(&stat) == made);
        // Nothing can be done where it fails: the next `bind` replaces a socket nobody listens on.
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}
