//! The folder of one lease's socket, for a lease whose operator names no path: its owner's alone, and gone with the lease.

use super::refuse;
use crate::daemon::vocabulary::{ErrorCode, VerbError};
use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};
use vfio_shim::model::Fdid;

/// What the socket is called in there.
const SOCKET: &str = "vfio-user.sock";
/// Nobody but the owner reads it, or passes through.
const MODE: u32 = 0o700;

/// A folder; removed on drop, after the socket in it.
pub(super) struct LeaseFolder(PathBuf);

impl LeaseFolder {
    /// Makes the folder of this lease below `sockets`. One that a killed daemon has left is taken.
    pub(super) fn make(sockets: &Path, fdid: Fdid) -> Result<Self, VerbError> {
        let path = sockets.join(fdid.to_string());
        match make(&path) {
            Ok(()) => Ok(Self(path)),
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

    pub(super) fn socket(&self) -> PathBuf {
        self.0.join(SOCKET)
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
        let fdid: Fdid = "44a01".parse().unwrap();
        let path = dir.path().join("44a01");
        let folder = LeaseFolder::make(dir.path(), fdid).unwrap();
        assert_eq!(folder.socket(), path.join("vfio-user.sock"));
        assert_eq!(mode(&path), 0o700);
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn folder_that_was_left_is_taken_and_closed_and_a_link_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let fdid: Fdid = "44a01".parse().unwrap();
        let path = dir.path().join("44a01");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        drop(LeaseFolder::make(dir.path(), fdid).map(|_| assert_eq!(mode(&path), 0o700)));
        assert!(!path.exists());
        std::os::unix::fs::symlink("/tmp", &path).unwrap();
        let refused = LeaseFolder::make(dir.path(), fdid).map(drop).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Socket);
        assert!(
            refused.text.contains("name another place with --socket"),
            "{refused}"
        );
    }
}
