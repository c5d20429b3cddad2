//! Resource limits of a role: what a process that went mad can take from others.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;

/// At most so much, soft and hard. No role leaves a core file: its memory is its tenants'.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Numbers of open descriptors.
    pub descriptors: u64,
    /// Bytes of private memory, stacks of threads included.
    pub data_bytes: u64,
    /// Whether it may lock as much memory as its supervisor lets it; else none.
    pub locks_memory: bool,
}

/// Sets them; a hard limit that is lower already stays.
pub(super) fn set(limits: &Limits) -> io::Result<()> {
    at_most(Resource::Nofile, limits.descriptors)?;
    at_most(Resource::Data, limits.data_bytes)?;
    at_most(Resource::Core, 0)?;
    match limits.locks_memory {
        true => Ok(()),
        false => at_most(Resource::Memlock, 0),
    }
}

fn at_most(resource: Resource, max: u64) -> io::Result<()> {
    let hard = getrlimit(resource).maximum.unwrap_or(u64::MAX);
    let max = Some(max.min(hard));
    let limit = Rlimit {
        current: max,
        maximum: max,
    };
    Ok(setrlimit(resource, limit)?)
}
