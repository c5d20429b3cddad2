//! The daemon's life: configuration, control socket, signals, host, and all of it back again.

use super::{
    Host,
    control::{Deadlines, serve},
    host::{self, HostError, Workers},
    role, router,
    socket::{ControlSocket, SocketError},
    vocabulary::{ErrorCode, VerbError},
};
use crate::config::{Config, ConfigError};
use crate::jail::{JailError, Role, Sandbox, confine_but};
use crate::pool::RedbStore;
use signal_hook::{
    SigId,
    consts::{SIGINT, SIGTERM},
    low_level,
};
use std::{
    error::Error,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
};

/// Why the daemon could not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The control socket could not be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// It cannot give its rights up.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The host could not start.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The configuration has no such port.
    #[error("there is no port `{name}` in the configuration: name one of {}", known.join(", "))]
    UnknownPort {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The kernel refused something that everything rests on.
    #[error("cannot {act}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

impl From<&DaemonError> for VerbError {
    /// In words, with all causes.
    fn from(error: &DaemonError) -> Self {
        let code = match error {
            DaemonError::Config(_) | DaemonError::UnknownPort { .. } => ErrorCode::Config,
            DaemonError::Socket(SocketError::Running { .. } | SocketError::Starting(_)) => {
                ErrorCode::DaemonRunning
            }
            DaemonError::Socket(_) => ErrorCode::Socket,
            DaemonError::Host(HostError::Store(_)) => ErrorCode::Store,
            DaemonError::Host(_) => ErrorCode::Port,
            DaemonError::Jail(_) | DaemonError::Kernel { .. } => ErrorCode::Kernel,
        };
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            text.push_str(&format!(": {source}"));
            cause = source.source();
        }
        Self { code, text }
    }
}

/// Runs the daemon until SIGTERM or SIGINT, with no rights but those of its role; its ports are
/// processes of their own. For the only thread of a process.
pub fn run(file: &Path, sandbox: Sandbox, role: &'static Role) -> Result<(), DaemonError> {
    let config = Config::load(file)?;
    let claimed = Claimed::by(&config)?;
    RedbStore::make_folder(&config.state).map_err(HostError::from)?;
    let kept = role::kept(&config, claimed.socket.made());
    let confined = confine_but(role, sandbox, &claimed.descriptors(), &kept)?;
    let report = confined.seal_before_threads()?;
    tracing::info!(?report, "shut in");
    let host = router::start(&config, file, report)?;
    claimed.serve(&config, &host)
}

/// The same with its ports and workers in this process.
pub fn run_in_process(file: &Path) -> Result<(), DaemonError> {
    let config = Config::load(file)?;
    run_with(&config, |config| host::start(config, Workers::Threads))
}

/// Runs the daemon with whatever `start` gives for a host.
pub fn run_with(
    config: &Config,
    start: impl FnOnce(&Config) -> Result<Arc<dyn Host>, HostError>,
) -> Result<(), DaemonError> {
    let claimed = Claimed::by(config)?;
    let host = start(config)?;
    claimed.serve(config, &host)
}

/// What a daemon has before it has a host.
struct Claimed {
    socket: ControlSocket,
    signals: Signals,
}

impl Claimed {
    fn by(config: &Config) -> Result<Self, DaemonError> {
        // The socket first: a second daemon is refused before it touches a port.
        let socket = ControlSocket::claim(&config.control)?;
        let signals = Signals::register().map_err(|source| DaemonError::Kernel {
            act: "take signals",
            source,
        })?;
        Ok(Self { socket, signals })
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let listener = self.socket.listener().as_raw_fd();
        let signals = self.signals.descriptors().into_iter();
        signals.chain([0, 1, 2, listener]).collect()
    }

    fn serve(self, config: &Config, host: &Arc<dyn Host>) -> Result<(), DaemonError> {
        let (socket, stop) = (&self.socket, self.signals.stop.as_fd());
        tracing::info!(node = config.node_id, control = %config.control.display(), "serving");
        let served = serve(socket, host, stop, Deadlines::default());
        tracing::info!("stopped");
        served.map_err(|source| DaemonError::Kernel {
            act: "serve the control socket",
            source,
        })
    }
}

/// SIGTERM and SIGINT as a readable fd, as long as this lives.
pub(crate) struct Signals {
    pub(crate) stop: UnixStream,
    ids: [SigId; 2],
    /// What the two handlers write to.
    written: [RawFd; 2],
}

impl Signals {
    pub(crate) fn register() -> io::Result<Self> {
        let (stop, write) = UnixStream::pair()?;
        let again = write.try_clone()?;
        let written = [again.as_raw_fd(), write.as_raw_fd()];
        let term = low_level::pipe::register(SIGTERM, again)?;
        let int = low_level::pipe::register(SIGINT, write)?;
        let ids = [term, int];
        Ok(Self { stop, ids, written })
    }

    /// All that it holds.
    pub(crate) fn descriptors(&self) -> [RawFd; 3] {
        [self.stop.as_raw_fd(), self.written[0], self.written[1]]
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.ids {
            low_level::unregister(id);
        }
    }
}
