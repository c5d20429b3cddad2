//! The daemon's life: configuration, control socket, signals, host, and all of it back again.

use super::{
    Host,
    control::{Deadlines, serve},
    host::{self, HostError, Workers},
    router,
    socket::{ControlSocket, SocketError},
    vocabulary::{ErrorCode, VerbError},
};
use crate::config::{Config, ConfigError};
use signal_hook::{
    SigId,
    consts::{SIGINT, SIGTERM},
    low_level,
};
use std::{error::Error, io, os::fd::AsFd, os::unix::net::UnixStream, path::Path, sync::Arc};

/// Why the daemon could not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The control socket could not be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
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
            DaemonError::Kernel { .. } => ErrorCode::Kernel,
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

/// Runs the daemon until SIGTERM or SIGINT; its ports are processes of their own.
pub fn run(file: &Path) -> Result<(), DaemonError> {
    let config = Config::load(file)?;
    run_with(&config, |config| router::start(config, file))
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
    // The socket first: a second daemon is refused before it touches a port.
    let socket = ControlSocket::claim(&config.control)?;
    let signals = Signals::register().map_err(|source| DaemonError::Kernel {
        act: "take signals",
        source,
    })?;
    let host = start(config)?;
    tracing::info!(node = config.node_id, control = %config.control.display(), "serving");
    let served = serve(&socket, &host, signals.stop.as_fd(), Deadlines::default());
    tracing::info!("stopped");
    served.map_err(|source| DaemonError::Kernel {
        act: "serve the control socket",
        source,
    })
}

/// SIGTERM and SIGINT as a readable fd, as long as this lives.
pub(crate) struct Signals {
    pub(crate) stop: UnixStream,
    ids: [SigId; 2],
}

impl Signals {
    pub(crate) fn register() -> io::Result<Self> {
        let (stop, write) = UnixStream::pair()?;
        let term = low_level::pipe::register(SIGTERM, write.try_clone()?)?;
        let int = low_level::pipe::register(SIGINT, write)?;
        let ids = [term, int];
        Ok(Self { stop, ids })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.ids {
            low_level::unregister(id);
        }
    }
}
