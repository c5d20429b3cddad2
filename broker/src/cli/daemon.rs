//! `sublet daemon`: runs this host's daemon.

use crate::{
    daemon::{self, vocabulary::VerbError},
    jail::Sandbox,
};
use std::{io, path::PathBuf};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt,
    prelude::*,
    registry,
};

/// What is logged where nobody says more.
const LEVEL: LevelFilter = LevelFilter::INFO;

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

/// To stderr, as much as SUBLET_LOG says.
pub(super) fn log() {
    let asked = std::env::var("SUBLET_LOG").unwrap_or_else(|_| LEVEL.to_string());
    let (told, misread) = match asked.parse::<Targets>() {
        Ok(told) => (told, None),
        Err(error) => (Targets::new().with_default(LEVEL), Some(error)),
    };
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(false);
    registry().with(lines).with(told).init();
    if let Some(error) = misread {
        tracing::warn!(
            "SUBLET_LOG={asked} is not understood ({error}), so {LEVEL} it is: say error, warn, info, debug or trace, for all or as in `info,vfio_shim=debug`"
        );
    }
}
