//! `sublet keeper`: the only process of a host that needs root.

use super::daemon::log;
use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    jail::Sandbox,
    keeper::{self, Ground, KeeperError},
};
use std::path::{Path, PathBuf};

/// Bind and open functions for a daemon that is not root, until SIGTERM or SIGINT. Run it as root.
/// Logs to stderr; SUBLET_LOG=debug tells more.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Whether it gives up its rights but those it needs.
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t)]
    sandbox: Sandbox,
    /// The configuration; what it may open is read from it once.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Look at processes' memory maps; started by `sublet keeper` alone.
#[derive(Debug, clap::Args)]
pub(super) struct ChecksArgs {
    /// The keeper's process, with which this one dies.
    #[arg(long, value_name = "PID")]
    parent: i32,
    /// The user whose processes may ask.
    #[arg(long, value_name = "UID")]
    user: u32,
    /// Whether it gives up its rights.
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t)]
    sandbox: Sandbox,
}

fn refusal(error: &KeeperError) -> VerbError {
    let code = match error {
        KeeperError::Config(_) | KeeperError::User { .. } => ErrorCode::Config,
        KeeperError::Socket(_) => ErrorCode::Socket,
        _ => ErrorCode::Kernel,
    };
    VerbError::new(code, vfio_shim::path::words(error))
}

impl Args {
    pub fn run(&self) -> Result<(), VerbError> {
        log();
        // The process beside it is of the same build, whatever lies at its path by then.
        let program = Path::new("/proc/self/exe");
        let ground = Ground::of_the_kernel();
        let ended = keeper::run(&self.config, ground, program, self.sandbox, &keeper::ROLE);
        ended.map_err(|error| refusal(&error))
    }
}

impl ChecksArgs {
    pub fn run(&self) -> Result<(), VerbError> {
        log();
        let ended = keeper::run_checks(self.parent, self.user, self.sandbox, &keeper::CHECKS);
        ended.map_err(|error| refusal(&error))
    }
}
