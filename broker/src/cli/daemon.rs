//! `sublet daemon`: runs this host's daemon.

use crate::{
    daemon::{self, host::Workers, vocabulary::VerbError},
    jail::Sandbox,
};
use std::{io, path::PathBuf};
use tracing_subscriber::EnvFilter;

/// Run this host's daemon until SIGTERM or SIGINT. Logs to stderr; SUBLET_LOG=debug tells more.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Serve VMMs by threads of this process: for tests, and where no VMM is hostile.
    #[arg(long, conflicts_with = "sandbox")]
    in_process: bool,
    /// Whether the workers, a process for each VMM, give up their rights.
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t)]
    sandbox: Sandbox,
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Args {
    pub fn run(&self) -> Result<(), VerbError> {
        log();
        let workers = match self.in_process {
            true => Workers::Threads,
            false => Workers::Processes {
                // Whatever lies at its path by then: a worker is of the same build.
                program: PathBuf::from("/proc/self/exe"),
                sandbox: self.sandbox,
            },
        };
        daemon::run(&self.config, workers).map_err(|error| VerbError::from(&error))
    }
}

/// To stderr, as much as SUBLET_LOG says.
pub(super) fn log() {
    let filter = EnvFilter::try_from_env("SUBLET_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
}
