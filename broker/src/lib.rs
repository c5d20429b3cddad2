//! Policy and the operators' side: configuration, verbs, the control socket, the daemon.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod daemon;
pub mod jail;
pub mod names;
