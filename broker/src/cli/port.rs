//! `sublet port`: runs one port of this host.

use super::daemon::{WorkerArgs, log};
use crate::{daemon::vocabulary::VerbError, port};
use std::path::PathBuf;

/// Run one port of this host until SIGTERM or SIGINT: an NTB with all functions that are lent and
/// borrowed through it. It outlives the daemon. Logs to stderr; SUBLET_LOG=debug tells more.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The port, as the configuration names it.
    name: String,
    #[command(flatten)]
    workers: WorkerArgs,
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Args {
    pub fn run(&self) -> Result<(), VerbError> {
        log();
        let ended = port::run(&self.config, &self.name, self.workers.workers());
        ended.map_err(|error| VerbError::from(&error))
    }
}
