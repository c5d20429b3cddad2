//! The keeper: the only process that needs root. It binds and opens what its configuration names, for one user's processes.
//!
//! ```text
//! sublet keeper --functions.sock--> a thread for each connection: bind, open, hand over, stop, give back
//!   (root, no capability, Landlock: sysfs and /dev/vfio)
//!   \- sublet keeper-checks --checks.sock--> whether a process maps memory shared
//!        (root, CAP_SYS_PTRACE alone, sees /proc and nothing else)
//! ```
//! It holds no function itself: clients have the descriptors, and go on without it. What it has
//! bound is written down, so that the next keeper undoes what the last one could not.

mod checks;
mod client;
mod holds;
mod journal;
mod message;
#[cfg(test)]
mod message_tests;
mod role;
#[cfg(test)]
mod schedule_tests;
mod serve;
mod serving;
mod socket;
#[cfg(test)]
mod stop_tests;
#[cfg(test)]
pub(crate) mod tests;
mod user;

pub use checks::run as run_checks;
pub use client::{Keeper, Stopper};
pub use holds::{Ground, Opener, Waits};
pub use message::{FromKeeper, ToKeeper};
pub(crate) use message::{get_refusal, put_refusal};
pub use role::{CHECKS, ROLE};
pub use serve::CONNECTIONS_MAX;
pub use serving::{Claimed, Serving};
pub use socket::SocketError;
pub(crate) use socket::is_own_folder;

use crate::{
    config::{Config, ConfigError},
    jail::{JailError, Kept, Reach, Role, Sandbox, confine_but},
};
use checks::Checks;
use rustix::fs::Mode;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    low_level::pipe,
};
use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
};
use vfio_shim::model::OsRuntime;

/// Why a keeper cannot run.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no such user.
    #[error("the user `{user}` of [keeper] cannot be found: make that user, or write its number")]
    User {
        /// As the configuration says.
        user: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// It cannot give its rights up.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The process beside it has ended.
    #[error("`sublet keeper-checks` has ended: its log says why; start the keeper again")]
    ChecksEnded,
    /// The kernel refused.
    #[error("cannot {act}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

fn kernel<E: Into<io::Error>>(act: &'static str) -> impl Fn(E) -> KeeperError {
    move |error| KeeperError::Kernel {
        act,
        source: error.into(),
    }
}

/// Where functions are opened.
pub(crate) fn functions_socket(folder: &Path) -> PathBuf {
    folder.join("functions.sock")
}

/// Where memory is looked at.
pub(crate) fn checks_socket(folder: &Path) -> PathBuf {
    folder.join("checks.sock")
}

fn journal_folder(folder: &Path) -> PathBuf {
    folder.join("bound")
}

/// What the keeper reads and writes below `top`, and nothing else: of sysfs what binds, stops and
/// tells, and VFIO.
fn kept(folder: &Path, top: &Path) -> Kept {
    let reach = [
        (Reach::Read as fn(PathBuf) -> Reach, "sys"),
        (Reach::Write, "sys/bus/pci"),
        (Reach::Write, "sys/devices"),
        (Reach::Device, "dev/vfio"),
    ];
    let there = reach.into_iter().filter_map(|(how, below)| {
        let path = top.join(below);
        if !path.exists() {
            let path = path.display();
            tracing::warn!("there is no {path}: modprobe vfio-pci, and start the keeper again");
            return None;
        }
        Some(how(path))
    });
    let own = Reach::Own(folder.to_owned());
    Kept {
        reach: there.chain([own]).collect(),
        ..Kept::default()
    }
}

/// Runs the keeper until SIGTERM or SIGINT. What it has bound stays so: clients go on. `program`
/// is `sublet`, for the process beside it.
pub fn run(
    config: &Path,
    ground: Ground,
    program: &Path,
    sandbox: Sandbox,
    role: &'static Role,
) -> Result<(), KeeperError> {
    let config = Config::load(config)?;
    let user = &config.keeper.user;
    let uid = user::uid(user).map_err(|source| KeeperError::User {
        user: user.clone(),
        source,
    })?;
    let folder = config.keeper.folder.clone();
    // What it makes is for its owner to write, whoever started it.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    let claimed = Claimed::at(&folder, uid)?;
    let checks = Checks::start(program, sandbox, &checks_socket(&folder), uid)?;
    let own = [claimed.socket(), checks.process().as_fd()].map(|fd| fd.as_raw_fd());
    let own: Vec<i32> = own.into_iter().chain([0, 1, 2]).collect();
    let confined = confine_but(role, sandbox, &own, &kept(&folder, &ground.top))?;
    let stop = stop_signals().map_err(kernel("take signals"))?;
    let runtime = Arc::new(OsRuntime);
    let serving = claimed.take_over(runtime, config, ground, Waits::default())?;
    let report = confined.seal()?;
    tracing::info!(uid, folder = %folder.display(), ?report, "serving");
    let ends = [stop.as_fd(), checks.process().as_fd()];
    let served = serving.serve(&ends);
    for path in [functions_socket(&folder), checks_socket(&folder)] {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "a socket stays behind");
        }
    }
    served.map_err(kernel("serve its socket"))?;
    match checks.has_ended() {
        true => Err(KeeperError::ChecksEnded),
        false => Ok(()),
    }
}

/// SIGTERM and SIGINT as a readable descriptor.
fn stop_signals() -> io::Result<OwnedFd> {
    let (stop, write) = UnixStream::pair()?;
    pipe::register(SIGTERM, write.try_clone()?)?;
    pipe::register(SIGINT, write)?;
    Ok(stop.into())
}
