//! Who is told of a VMM before it is given a descriptor of the window.

use std::{fmt, os::fd::OwnedFd};

/// A VMM's process.
#[derive(Debug)]
pub struct Vmm {
    /// Its number; 0 if that is in a PID namespace that this process does not see.
    pub pid: i32,
    /// Its pidfd, of the very process that connected.
    pub process: OwnedFd,
}

/// Keeps account of the processes that hold the window. What a VMM has mapped outlives its socket:
/// what lies behind goes to somebody else only when the process is gone.
pub trait Holders: Send + Sync {
    /// Called before `vmm` is served with [`BarMode::Mapped`](super::BarMode::Mapped). An error, in
    /// words, sends it away.
    fn begins(&self, vmm: Vmm) -> Result<(), String>;
}

impl fmt::Debug for dyn Holders + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Holders")
    }
}
