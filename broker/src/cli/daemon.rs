//! `sublet daemon`: runs this host's daemon.

use crate::daemon::{self, vocabulary::VerbError};
use std::{io, path::PathBuf};
use tracing_subscriber::EnvFilter;

/// Run this host's daemon until SIGTERM or SIGINT. Logs to stderr; SUBLET_LOG=debug tells more.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// All roles as threads of one process (the only way there is so far).
    #[arg(long, required = true)]
    in_process: bool,
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Args {
    pub fn run(&self) -> Result<(), VerbError> {
        let filter = EnvFilter::try_from_env("SUBLET_LOG").unwrap_or_else(|_| "info".into());
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr)
            .with_ansi(false)
            .init();
        daemon::run(&self.config).map_err(|error| VerbError::from(&error))
    }
}
