//! A keeper's sockets: files of root's own folder, each for one user alone.

use rustix::{
    fs::{AtFlags, CWD, Mode, chownat, fchmod},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    },
    process::{Uid, geteuid},
};
use std::{
    fs::{self, DirBuilder},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 64;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody else could put a socket of their own there.
    #[error(
        "{} belongs to user {owner} or can be written by others than its owner: `folder` in [keeper] must be this process's own (user {own}), mode 0755", path.display()
    )]
    NotOwn {
        /// The folder.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Whose it must be.
        own: u32,
    },
    /// Another keeper has it.
    #[error("another keeper serves {} already: stop it first, or set another `folder` in [keeper]", .0.display())]
    Running(PathBuf),
    /// The kernel refused.
    #[error("cannot {act} {}", path.display())]
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

fn kernel<E: Into<io::Error>>(act: &'static str, path: &Path) -> impl FnOnce(E) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError::Kernel {
        act,
        path,
        source: source.into(),
    }
}

/// Makes the folder, if it is not there, and makes sure that nobody else can change what is in it.
pub(super) fn claim_folder(folder: &Path) -> Result<(), SocketError> {
    let mut maker = DirBuilder::new();
    let made = maker.recursive(true).mode(0o755).create(folder);
    made.map_err(kernel("make the folder", folder))?;
    let found = fs::symlink_metadata(folder).map_err(kernel("look at", folder))?;
    if !is_own_folder(&found) {
        let (path, owner) = (folder.to_owned(), found.uid());
        let own = geteuid().as_raw();
        return Err(SocketError::NotOwn { path, owner, own });
    }
    Ok(())
}

/// Whether it is a folder of this process's user, in which nobody else can change anything.
pub(crate) fn is_own_folder(found: &fs::Metadata) -> bool {
    found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0
}

/// Listens at `path` for processes of user `uid`. A file that nobody listens at is replaced.
pub(super) fn listen_at(path: &Path, uid: u32) -> Result<OwnedFd, SocketError> {
    let socket = || {
        let flags = SocketFlags::CLOEXEC;
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
    };
    let address = SocketAddrUnix::new(path).map_err(kernel("name", path))?;
    let probe = socket().map_err(kernel("probe", path))?;
    match connect(&probe, &address) {
        Ok(()) => return Err(SocketError::Running(path.to_owned())),
        Err(Errno::NOENT) => {}
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(kernel("replace", path))?,
        Err(errno) => return Err(kernel("probe", path)(errno)),
    }
    let listener = socket().map_err(kernel("make a socket for", path))?;
    // Before the file exists: at no moment is it open to others.
    fchmod(&listener, Mode::RUSR | Mode::WUSR).map_err(kernel("close to others", path))?;
    bind(&listener, &address).map_err(kernel("listen at", path))?;
    if uid != geteuid().as_raw() {
        let owner = Some(Uid::from_raw(uid));
        chownat(CWD, path, owner, None, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(kernel("give to its user", path))?;
    }
    listen(&listener, BACKLOG).map_err(kernel("listen at", path))?;
    Ok(listener)
}
