//! What a warden is left with: limits, and where it is root's, three of root's rights.

use crate::jail::{Limits, Role};
use rustix::thread::CapabilitySet;

/// What workers may have, who are started with what is left here.
const DESCRIPTORS_MAX: u64 = 8192;
/// Private memory: the memory maps of as many processes as are looked at, at once.
const DATA_BYTES_MAX: u64 = 4 << 30;

/// Where it was started with them: to look at VMMs of other users and end them, and to open the
/// kernel's log.
pub(super) const CAPABILITIES: CapabilitySet = CapabilitySet::SYS_PTRACE
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SYSLOG);

/// A warden. It has no list of system calls: the workers that it starts would be held to it.
pub static ROLE: Role = Role {
    name: "warden",
    limits: Limits {
        descriptors: DESCRIPTORS_MAX,
        data_bytes: DATA_BYTES_MAX,
        locks_memory: false,
    },
    calls: &[],
};
