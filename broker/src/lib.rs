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
