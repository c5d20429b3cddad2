//! Becomes another program of another user, as a supervisor starts one: without root's rights, with its limits.

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Returns only when it cannot.
pub fn run_as(uid: u32, program: &str, args: &[&str]) -> Result<()> {
    // Guests' memory is locked on behalf of whoever maps it.
    let any = Rlimit {
        current: None,
        maximum: None,
    };
    setrlimit(Resource::Memlock, any).context("the limit of locked memory")?;
    // No group of root's is left, and by the kernel's rule no capability.
    let error = Command::new(program).args(args).uid(uid).gid(uid).exec();
    Err(error).with_context(|| format!("cannot run {program} as user {uid}"))
}
