//! `sublet worker`: the process that faces one VMM; started by a port alone.

use super::daemon::log;
use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    jail::Sandbox,
    worker,
};

/// Serve one borrowed function; started by `sublet port` alone.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The port's process, with which this one dies.
    #[arg(long, value_name = "PID")]
    parent: i32,
    /// Whether it gives up its rights.
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t)]
    sandbox: Sandbox,
}

impl Args {
    pub fn run(&self) -> Result<(), VerbError> {
        log();
        let ended = worker::run(self.parent, self.sandbox, &worker::ROLE);
        ended.map_err(|error| VerbError::new(ErrorCode::Kernel, vfio_shim::path::words(&error)))
    }
}
