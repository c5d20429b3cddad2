//! The socket of one lease, where its operator names it or in a folder of its own: its owner's alone, and gone with the lease.

use super::refuse;
use crate::daemon::vocabulary::{ErrorCode, VerbError};
use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};
use vfio_shim::{model::Fdid, path::words};
use vmm_glue::vfio_user::Endpoint;

/// What the socket is called in there.
const SOCKET: &str = "vfio-user.sock";
/// Nobody but the owner reads it, or passes through.
const MODE: u32 = 0o700;

/// Where the socket of a lease lies that has a folder of its own.
pub(super) fn own_socket(sockets: &Path, fdid: Fdid) -> PathBuf {
    sockets.join(fdid.to_string()).join(SOCKET)
}

/// Listens at `path` for a VMM. What is made for that goes with it: the socket's file, and where it
/// has a folder of its own that one, too.
pub(crate) fn listen(path: &Path, own_folder: bool) -> Result<Endpoint, VerbError> {
    let folder = path.parent().filter(|_| own_folder);
    let folder = folder.map(LeaseFolder::make).transpose()?;
    let endpoint = Endpoint::bind(path);
    let endpoint = endpoint.map_err(|error| refuse(ErrorCode::Socket, words(&error)))?;
    Ok(endpoint.keeping(folder))
}

/// A folder; removed on drop, after the socket in it.
struct LeaseFolder(PathBuf);

impl LeaseFolder {
    /// Makes it. One that a killed process has left is taken.
    fn make(path: &Path) -> Result<Self, VerbError> {
        match make(path) {
            Ok(()) => Ok(Self(path.to_owned())),
            Err(error) => {
                let text = format!(
                    "{} cannot be made for the lease's socket: {error}; name another place with \
                     --socket",
                    path.display()
                );
                Err(refuse(ErrorCode::Socket, text))
            }
        }
    }
}

fn make(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(MODE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // A link that somebody has put there leads elsewhere.
            match fs::symlink_metadata(path)?.is_dir() {
                true => fs::set_permissions(path, Permissions::from_mode(MODE)),
                false => Err(error),
            }
        }
        made => made,
    }
}

impl Drop for LeaseFolder {
    fn drop(&mut self) {
        // With something else in it, it stays, and the next lease of the function takes it.
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a lease's folder could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn folder_is_its_owners_alone_and_goes_with_the_lease() {
        let dir = tempfile::tempdir().unwrap();
        let socket = own_socket(dir.path(), "44a01".parse().unwrap());
        let path = dir.path().join("44a01");
        assert_eq!(socket, path.join("vfio-user.sock"));
        let endpoint = listen(&socket, true).unwrap();
        assert_eq!((mode(&path), mode(&socket)), (0o700, 0o600));
        drop(endpoint);
        assert!(!path.exists());
    }

    #[test]
    fn folder_that_was_left_is_taken_and_closed_and_a_link_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("44a01");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        drop(LeaseFolder::make(&path).map(|_| assert_eq!(mode(&path), 0o700)));
        assert!(!path.exists());
        std::os::unix::fs::symlink("/tmp", &path).unwrap();
        let refused = LeaseFolder::make(&path).map(drop).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Socket);
        assert!(
            refused.text.contains("name another place with --socket"),
            "{refused}"
        );
    }
}
