//! `sublet warden`: the process beside a port; started by the port alone.

use super::daemon::log;
use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    jail::Sandbox,
    warden,
};
use std::path::PathBuf;

/// Start workers and look at VMMs for a port; started by `sublet port` alone.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The program of the workers.
    #[arg(long, value_name = "FILE")]
    worker: PathBuf,
    /// Where VMMs with the port's window are written down.
    #[arg(long, value_name = "FOLDER")]
    holders: Option<PathBuf>,
    /// Whether it and its workers give up their rights.
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t)]
    sandbox: Sandbox,
}

impl Args {
    pub fn run(&self) -> Result<(), VerbError> {
        log();
        let ended = warden::run(&self.worker, self.holders.clone(), self.sandbox);
        ended.map_err(|error| VerbError::new(ErrorCode::Kernel, vfio_shim::path::words(&error)))
    }
}
