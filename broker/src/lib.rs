//! Policy and the operators' side: configuration, verbs, the control socket, the daemon.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod daemon;
#[cfg(target_arch = "x86_64")]
pub mod demo;
pub mod ipc;
pub mod jail;
pub mod keeper;
pub mod line;
pub mod names;
pub mod pool;
pub mod port;
pub mod warden;
pub mod worker;

/// Of which build this is: what whoever builds it says by `SUBLET_BUILD` (a package's version, a
/// commit), else the crate's version. Told by `--version`, `status`, and a port to its daemon.
pub const BUILD: &str = match option_env!("SUBLET_BUILD") {
    Some(build) => build,
    None => env!("CARGO_PKG_VERSION"),
};
