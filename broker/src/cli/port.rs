//! `sublet port`: runs one port of this host.

use super::daemon::log;
use crate::{daemon::vocabulary::VerbError, jail::Sandbox, port, warden::Programs};
use std::path::{Path, PathBuf};

/// Run one port of this host until SIGTERM or SIGINT: an NTB with all functions that are lent and
/// borrowed through it. It outlives the daemon. Logs to stderr; SUBLET_LOG=debug tells more.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The port, as the configuration names it.
    name: String,
    /// Whether it and the processes beside it, its warden and a worker for each VMM, give up their
    /// rights.
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t)]
    sandbox: Sandbox,
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Args {
    pub fn run(&self) -> Result<(), VerbError> {
        log();
        // Whatever lies at its path by then: the processes beside it are of the same build.
        let own = Path::new("/proc/self/exe");
        let programs = Programs {
            warden: own,
            worker: own,
            sandbox: self.sandbox,
        };
        let ended = port::run(&self.config, &self.name, &programs, &port::ROLE);
        ended.map_err(|error| VerbError::from(&error))
    }
}
