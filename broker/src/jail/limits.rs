//! Resource limits of a role: what a process that went mad can take from others.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;

/// One limit.
#[derive(Debug)]
pub struct Limit {
    /// Of what.
    pub resource: Resource,
    /// At most so much, soft and hard.
    pub max: u64,
}

/// Sets them; a hard limit that is lower already stays.
pub(super) fn set(limits: &[Limit]) -> io::Result<()> {
    for limit in limits {
        let hard = getrlimit(limit.resource).maximum.unwrap_or(u64::MAX);
        let max = Some(limit.max.min(hard));
        setrlimit(
            limit.resource,
            Rlimit {
                current: max,
                maximum: max,
            },
        )?;
    }
    Ok(())
}
