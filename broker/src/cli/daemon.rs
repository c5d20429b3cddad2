//! `sublet daemon`: runs this host's daemon.

use crate::{
    daemon::{self, host::Workers, vocabulary::VerbError},
    jail::Sandbox,
};
use std::{io, path::PathBuf};
use tracing_subscriber::EnvFilter;

/// Run this host's daemon until SIGTERM or SIGINT. Its ports are processes of their own: `sublet
/// port`. Logs to stderr; SUBLET_LOG=debug tells more.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Be the ports, too, and serve VMMs by threads of this one process: for tests, and where no
    /// VMM is hostile.
    #[arg(long)]
    in_process: bool,
    /// Whether it gives up its rights but those it needs. With --in-process it keeps them all.
    #[arg(
        long,
        value_enum,
        value_name = "WHETHER",
        default_value_t,
        conflicts_with = "in_process"
    )]
    sandbox: Sandbox,
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Args {
    pub fn run(&self) -> Result<(), VerbError> {
        log();
        let done = match self.in_process {
            true => daemon::run_in_process(&self.config),
            false => daemon::run(&self.config, self.sandbox, &daemon::ROLE),
        };
        done.map_err(|error| VerbError::from(&error))
    }
}

/// How a port serves VMMs.
#[derive(Debug, clap::Args)]
pub(super) struct WorkerArgs {
    /// Whether the workers, a process for each VMM, give up their rights.
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t)]
    sandbox: Sandbox,
}

impl WorkerArgs {
    pub(super) fn workers(&self) -> Workers {
        Workers::Processes {
            // Whatever lies at its path by then: a worker is of the same build.
            program: PathBuf::from("/proc/self/exe"),
            sandbox: self.sandbox,
        }
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
