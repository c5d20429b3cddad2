//! SIGINT and SIGTERM end the demonstration between two looks, so that nothing of it stays behind.

use super::claim::{Claim, DemoError, setup};
use signal_hook::SigId;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(1);
/// How long a condition may take. None takes this long but one that does not come true.
const WAIT: Duration = Duration::from_secs(10);

/// The two signals, taken as long as this lives.
pub(super) struct Stop {
    flag: Arc<AtomicBool>,
    ids: Vec<SigId>,
}

impl Stop {
    pub(super) fn register() -> Result<Self, DemoError> {
        let mut this = Self {
            flag: Arc::default(),
            ids: Vec::new(),
        };
        for signal in [SIGINT, SIGTERM] {
            let id = signal_hook::flag::register(signal, Arc::clone(&this.flag));
            this.ids.push(id.map_err(setup("take signals"))?);
        }
        Ok(this)
    }

    /// An error once a signal came.
    pub(super) fn check(&self) -> Result<(), DemoError> {
        match self.flag.load(Ordering::Relaxed) {
            true => Err(DemoError::Signal),
            false => Ok(()),
        }
    }

    /// Looks until there is something, or until it is too late: then the claim is broken by what
    /// `missing` says.
    pub(super) fn until<T>(
        &self,
        claim: Claim,
        mut look: impl FnMut() -> Result<Option<T>, DemoError>,
        missing: impl FnOnce() -> String,
    ) -> Result<T, DemoError> {
        let deadline = Instant::now() + WAIT;
        loop {
            if let Some(seen) = look()? {
                return Ok(seen);
            }
            self.check()?;
            if Instant::now() >= deadline {
                return Err(claim.broken(missing()));
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}
