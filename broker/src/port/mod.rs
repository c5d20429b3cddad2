//! The port as a process: one NTB with its engine, its functions and its workers, which outlives the daemon.
//!
//! ```text
//! configuration --its own [[port]]--> both sockets claimed --warden started--> confined and sealed
//!               --NTB opened--> serving --SIGTERM--> gone
//! ```
//! It faces its daemon, and only that, on two sockets in a folder of its own, which its user alone
//! may enter: verbs as they come over the control socket, and the line of leases (`line`). What a
//! daemon asks for is checked here once more, by the port's own configuration: limits, the list of
//! what may be lent, trust. When the daemon goes, everything goes on; when the port goes, its
//! workers go with it.

mod leases;
mod ledger;
mod role;

pub use leases::PortLeases;
pub use ledger::{ENDED_MAX, Ledger};
pub use role::{ROLE, kept};

use crate::config::Config;
use crate::daemon::control::{Deadlines, serve};
use crate::daemon::host::{self, HostError, Workers};
use crate::daemon::socket::ControlSocket;
use crate::daemon::{DaemonError, Host, Signals};
use crate::jail::{Kept, Role, confine_but};
use crate::keeper::is_own_folder;
use crate::warden::{OwnVmms, Programs, Warden, holders_folder};
use rustix::process::geteuid;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vfio_shim::path::LeasePool;

/// The socket of a port that takes verbs, in its folder.
pub fn verbs_socket(config: &Config, name: &str) -> PathBuf {
    config.port_folder(name).join("control.sock")
}

/// The socket of a port's line, in its folder.
pub fn leases_socket(config: &Config, name: &str) -> PathBuf {
    config.port_folder(name).join("leases.sock")
}

/// Runs a port until SIGTERM or SIGINT, with no rights but those of its role. For the only thread
/// of a process.
pub fn run(
    config: &Path,
    name: &str,
    programs: &Programs<'_>,
    role: &'static Role,
) -> Result<(), DaemonError> {
    let config = Config::load(config)?;
    let signals = Signals::register().map_err(kernel("take signals"))?;
    let claimed = Claimed::by(&config, name)?;
    let holders = holders_folder(&config.port_folder(name));
    let warden = Warden::start(programs, Some(&holders)).map_err(kernel("start its warden"))?;
    // Before the right to do that goes.
    host::raise_locked_memory();
    let own = claimed.descriptors().into_iter().chain([0, 1, 2]);
    let own = own
        .chain(signals.descriptors())
        .chain([warden.descriptor()]);
    let own: Vec<RawFd> = own.collect();
    let confined = confine_but(role, programs.sandbox, &own, &claimed.kept())?;
    let sandbox = confined.seal_before_threads()?;
    tracing::info!(?sandbox, "shut in");
    let workers = Workers::Processes(warden);
    claimed.serve(signals.stop.as_fd(), |config, at, leases| {
        host::start_own_port(config, at, (workers, Some(sandbox)), leases)
    })
}

fn kernel(act: &'static str) -> impl Fn(io::Error) -> DaemonError {
    move |source| DaemonError::Kernel { act, source }
}

/// What a port has before it opens its NTB.
pub struct Claimed<'a> {
    config: &'a Config,
    /// Which of the configuration's ports it is.
    at: usize,
    verbs: ControlSocket,
    line: ControlSocket,
    /// Behind the sockets in it.
    folder: Folder,
}

impl<'a> Claimed<'a> {
    /// The port of this name has its sockets, and nobody else has its NTB's window.
    pub fn by(config: &'a Config, name: &str) -> Result<Self, DaemonError> {
        let known = || config.ports.iter().map(|port| port.name.clone());
        let at = known().position(|known| known == name);
        let at = at.ok_or_else(|| DaemonError::UnknownPort {
            name: name.to_owned(),
            known: known().collect(),
        })?;
        // The sockets first: a second process is refused before it touches the NTB, and where
        // nobody listens no lease is in force.
        let folder = Folder::make(&config.port_folder(name)).map_err(kernel("make its folder"))?;
        let claimed = Self {
            config,
            at,
            verbs: ControlSocket::claim(&verbs_socket(config, name))?,
            line: ControlSocket::claim_packets(&leases_socket(config, name))?,
            folder,
        };
        // No other port serves this NTB now: who has its window has it from one that is no more.
        let left = OwnVmms::new(Some(holders_folder(&config.port_folder(name))));
        left.end_left_behind().map_err(HostError::from)?;
        Ok(claimed)
    }

    /// All that it holds.
    pub fn descriptors(&self) -> [RawFd; 2] {
        [&self.verbs, &self.line].map(|socket| socket.listener().as_raw_fd())
    }

    /// What it needs of the file system.
    pub fn kept(&self) -> Kept {
        let folder = self.config.port_folder(&self.config.ports[self.at].name);
        role::kept(&folder, &self.folder.made, !host::opens_by_itself())
    }

    /// Serves until `stop` is readable, with whatever `start` gives for the host of the
    /// configuration's port of that index.
    pub fn serve(
        self,
        stop: BorrowedFd<'_>,
        start: impl FnOnce(&Config, usize, Arc<dyn LeasePool>) -> Result<Arc<dyn Host>, HostError>,
    ) -> Result<(), DaemonError> {
        let (node, name) = (self.config.node_id, &self.config.ports[self.at].name);
        let leases = PortLeases::start(node, name, self.line);
        let leases = leases.map_err(kernel("wait for a daemon"))?;
        let host = start(self.config, self.at, leases.clone())?;
        tracing::info!(node, port = name, "serving");
        let served = serve(&self.verbs, &host, stop, Deadlines::default());
        tracing::info!("stopped");
        served.map_err(kernel("serve the daemon"))
    }
}

/// The folder of a port's sockets, for its user alone; what was made for it goes with it, if
/// nobody else is there.
struct Folder {
    made: Vec<PathBuf>,
}

impl Folder {
    fn make(path: &Path) -> io::Result<Self> {
        let missing = path.ancestors().take_while(|folder| !folder.exists());
        let made = missing.map(Path::to_owned).collect();
        // Somebody else may make those above at the same time.
        let above = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(above)?;
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        ensure_own(path)?;
        Ok(Self { made })
    }
}

/// Whoever else could write there could name processes that this port ends, and take its sockets.
fn ensure_own(folder: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(folder)?;
    if is_own_folder(&found) {
        return Ok(());
    }
    let (path, owner, own) = (folder.display(), found.uid(), geteuid().as_raw());
    Err(io::Error::other(format!(
        "{path} belongs to user {owner} or can be written by others than its owner: it must be a \
         folder of this process's own (user {own}), mode 0700. Remove it, and start the port again"
    )))
}

impl Drop for Folder {
    fn drop(&mut self) {
        for folder in &self.made {
            // Refused while somebody else has files there, and rightly.
            let _ = fs::remove_dir(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn folder_that_others_can_write_or_that_is_behind_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("ntb0");
        drop(Folder::make(&folder).unwrap());
        fs::create_dir(&folder).unwrap();
        drop(Folder::make(&folder).unwrap());
        let link = dir.path().join("ntb1");
        symlink(&folder, &link).unwrap();
        assert!(Folder::make(&link).is_err());
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o775)).unwrap();
        let refused = Folder::make(&folder).err().unwrap().to_string();
        assert!(refused.contains("mode 0700"), "{refused}");
    }
}
