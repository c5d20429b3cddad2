//! Claims: a verb that waits has its function for itself, without holding the state's lock.

use super::{LocalHost, refuse};
use crate::daemon::vocabulary::{ErrorCode, VerbError};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use vfio_shim::model::{Bdf, Fdid};

/// What a verb can have for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Named {
    Local(Bdf),
    Far(Fdid),
}

/// What verbs under way have for themselves.
#[derive(Default)]
pub(super) struct Claims {
    held: BTreeSet<Named>,
    closed: bool,
}

#[cfg(test)]
impl Claims {
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// A function that one verb has for itself; given back on drop.
pub(super) struct Claim<'a> {
    host: &'a LocalHost,
    named: Named,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.host.state().claims.held.remove(&self.named);
        self.host.unclaimed.notify_all();
    }
}

impl LocalHost {
    /// Refused while another verb has it, and once the daemon is going down.
    pub(super) fn claim(&self, named: Named) -> Result<Claim<'_>, VerbError> {
        let mut state = self.state();
        if state.claims.closed {
            let text = "the daemon is going down: try again when it is back";
            return Err(refuse(ErrorCode::Stopping, text));
        }
        if !state.claims.held.insert(named) {
            let text = match named {
                Named::Local(bdf) => bdf.to_string(),
                Named::Far(fdid) => fdid.to_string(),
            };
            let text = format!("another verb is at work on {text}: try again in a moment");
            return Err(refuse(ErrorCode::Busy, text));
        }
        Ok(Claim { host: self, named })
    }

    /// Takes no new claim, and waits until the held ones are gone; false if they are not in time.
    pub(super) fn close_claims(&self, wait: Duration) -> bool {
        let start = Instant::now();
        let mut state = self.state();
        state.claims.closed = true;
        while !state.claims.held.is_empty() {
            let left = wait.saturating_sub(start.elapsed());
            if left.is_zero() {
                return false;
            }
            // Bounded, as a wait for ever has no form here; the loop looks again.
            let left = left.min(Duration::from_secs(60));
            let woken = self.unclaimed.wait_timeout(state, left);
            state = woken.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        true
    }
}
