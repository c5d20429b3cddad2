//! Capabilities given up for good: bounding, ambient, permitted, effective, inheritable; and no way back by exec.

use rustix::{
    io::Errno,
    thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};
use std::io;

/// Leaves this thread, and all that it makes, without any capability but those kept.
pub(super) fn give_up(kept: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    // The bounding set before the others: to shrink it takes one of them.
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(one) {
            Ok(()) => {}
            // Behind the last capability that this kernel knows.
            Err(Errno::INVAL) => break,
            // Without CAP_SETPCAP there is nothing to bound: with no_new_privs, no exec adds any.
            Err(Errno::PERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    clear_ambient_capability_set()?;
    let left = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, left)?)
}
