//! The control socket's file: made with mode 0600, owned by one daemon, replaced when stale.

use rustix::{
    fs::{FlockOperation, Mode, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen},
};
use std::{
    fs::{self, DirBuilder, File, Metadata},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 64;

/// Why the control socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another daemon has it.
    #[error("{}", running(path, *pid))]
    Running {
        /// The socket.
        path: PathBuf,
        /// Who listens there, if the kernel tells.
        pid: Option<i32>,
    },
    /// Another daemon is about to have it.
    #[error("another daemon is starting on {} at this moment; leave it to that one", .0.display())]
    Starting(PathBuf),
    /// Something that is no socket lies there.
    #[error("{} is there and no socket; move it away or set `control` to another path", .0.display())]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("cannot {act} {}; does the directory exist, and may this user write there?", path.display())]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Of which file.
        path: PathBuf,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

fn running(path: &Path, pid: Option<i32>) -> String {
    let who = pid.map_or("another daemon".to_owned(), |pid| format!("process {pid}"));
    format!(
        "{who} serves {} already; stop it first, or set `control` to another path",
        path.display()
    )
}

/// A listening socket and its file, which goes when this goes.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
    /// The directory, if it was made for the socket: it goes too, if nobody else uses it.
    made: Option<PathBuf>,
}

fn kernel<E: Into<io::Error>>(act: &'static str, path: &Path) -> impl FnOnce(E) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError::Kernel {
        act,
        path,
        source: source.into(),
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl ControlSocket {
    /// Listens at `path`, unless somebody else does. A file that nobody listens at is replaced.
    pub fn claim(path: &Path) -> Result<Self, SocketError> {
        Self::claim_as(path, SocketType::STREAM)
    }

    /// The same for a socket of datagrams with connections.
    pub fn claim_packets(path: &Path) -> Result<Self, SocketError> {
        Self::claim_as(path, SocketType::SEQPACKET)
    }

    fn claim_as(path: &Path, kind: SocketType) -> Result<Self, SocketError> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        let made = (!directory.exists()).then(|| directory.to_owned());
        (DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory))
        .map_err(kernel("make the directory", directory))?;
        // The lock lasts only while this function looks and binds; two starts cannot both find
        // the same stale file, and no lock file stays behind.
        let lock = File::open(directory).map_err(kernel("open", directory))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(SocketError::Starting(path.to_owned())),
            other => other.map_err(kernel("lock", directory))?,
        }
        refuse_if_taken(path, kind)?;
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        match fs::remove_file(&fresh) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(kernel("remove", &fresh)(e));
            }
            _ => {}
        }
        let listener =
            UnixListener::from(listen_at(&fresh, kind).map_err(kernel("listen at", path))?);
        (listener.set_nonblocking(true)).map_err(kernel("listen at", path))?;
        let metadata = fs::symlink_metadata(&fresh).map_err(kernel("look at", &fresh))?;
        fs::rename(&fresh, path).map_err(kernel("replace", path))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: identity(&metadata),
            made,
        })
    }

    /// The directory, if it was made for the socket.
    pub fn made(&self) -> Option<&Path> {
        self.made.as_deref()
    }

    /// The listener; it does not block.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for ControlSocket {
    /// Removes the file, if it is still this one's.
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| identity(&m) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "control socket stays behind");
        }
        if let Some(made) = &self.made {
            // Refused while somebody else has files there, and rightly.
            let _ = fs::remove_dir(made);
        }
    }
}

/// The mode is set before the file exists, so that at no moment it is open to others.
fn listen_at(path: &Path, kind: SocketType) -> Result<OwnedFd, Errno> {
    let fd = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    bind(&fd, &SocketAddrUnix::new(path)?)?;
    listen(&fd, BACKLOG)?;
    Ok(fd)
}

fn refuse_if_taken(path: &Path, kind: SocketType) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(kernel("look at", path)(e)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    // Without blocking: a daemon that is stuck with a full backlog is a daemon all the same.
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        kind,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(kernel("probe", path))?;
    let address = SocketAddrUnix::new(path).map_err(kernel("probe", path))?;
    match connect(&probe, &address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        Ok(()) => Err(SocketError::Running {
            path: path.to_owned(),
            pid: rustix::net::sockopt::socket_peercred(&probe)
                .ok()
                .map(|credentials| credentials.pid.as_raw_nonzero().get()),
        }),
        Err(Errno::AGAIN) => Err(SocketError::Running {
            path: path.to_owned(),
            pid: None,
        }),
        Err(e) => Err(kernel("probe", path)(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_socket_is_for_its_owner_only_and_goes_with_its_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new").join("control.sock");
        let socket = ControlSocket::claim(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        drop(socket);
        assert!(
            !path.parent().unwrap().exists(),
            "the directory it made goes too"
        );
        assert!(dir.path().exists());
    }

    #[test]
    fn a_second_daemon_is_refused_with_the_process_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let _first = ControlSocket::claim(&path).unwrap();
        let words = ControlSocket::claim(&path).unwrap_err().to_string();
        assert_eq!(
            words,
            format!(
                "process {} serves {} already; stop it first, or set `control` to another path",
                std::process::id(),
                path.display()
            )
        );
    }

    #[test]
    fn a_stale_file_is_replaced_and_another_kind_of_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(ControlSocket::claim(&path).unwrap());
        fs::write(&path, "precious").unwrap();
        let refused = ControlSocket::claim(&path);
        assert!(matches!(refused, Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_file_that_a_later_daemon_put_there_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let first = ControlSocket::claim(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = ControlSocket::claim(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }
}
