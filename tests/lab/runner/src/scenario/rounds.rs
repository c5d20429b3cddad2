//! A guest's checksummed I/O, round after round in a thread of its own, while something else is done.

use anyhow::{Result, anyhow, ensure};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Whole rounds that are waited for: the one under way may have begun before.
const ROUNDS: u64 = 2;
const TIMEOUT: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(100);

/// How far it is.
#[derive(Default)]
pub struct Rounds {
    stop: AtomicBool,
    done: AtomicU64,
    failed: AtomicBool,
}

impl Rounds {
    /// Does something beside rounds, each of which has its number; how many were right.
    pub fn beside<T>(
        round: impl Fn(u64) -> Result<String> + Sync,
        act: impl FnOnce(&Rounds) -> T,
    ) -> (T, Result<u64>) {
        let rounds = Rounds::default();
        std::thread::scope(|scope| {
            let working = scope.spawn(|| rounds.run(&round));
            let done = act(&rounds);
            rounds.stop.store(true, Ordering::Relaxed);
            let ended = working.join();
            (
                done,
                ended.unwrap_or_else(|_| Err(anyhow!("the guest's I/O panicked"))),
            )
        })
    }

    fn run(&self, round: impl Fn(u64) -> Result<String>) -> Result<u64> {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.done.load(Ordering::Relaxed) + 1;
            round(number).inspect_err(|_| self.failed.store(true, Ordering::Relaxed))?;
            self.done.store(number, Ordering::Relaxed);
        }
        Ok(self.done.load(Ordering::Relaxed))
    }

    /// Returns after some whole rounds, begun from now on.
    pub fn go_on(&self) -> Result<String> {
        let (from, since) = (self.done.load(Ordering::Relaxed), Instant::now());
        loop {
            let more = self.done.load(Ordering::Relaxed) - from;
            if more > ROUNDS {
                return Ok(format!("{more} rounds"));
            }
            let failed = self.failed.load(Ordering::Relaxed);
            ensure!(!failed, "the guest's I/O failed");
            ensure!(since.elapsed() < TIMEOUT, "the guest's I/O stands still");
            std::thread::sleep(POLL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Rounds;
    use anyhow::bail;

    #[test]
    fn rounds_are_counted_until_what_is_beside_them_is_done() {
        let (told, counted) = Rounds::beside(|number| Ok(number.to_string()), Rounds::go_on);
        assert!(counted.unwrap() > 2, "{told:?}");
        told.unwrap();
    }

    #[test]
    fn a_round_that_fails_fails_what_waits_for_more() {
        let round = |number| {
            if number > 3 {
                bail!("wrong")
            } else {
                Ok(String::new())
            }
        };
        let (told, counted) = Rounds::beside(round, |rounds| {
            while rounds.go_on().is_ok() {}
            rounds.go_on()
        });
        assert!(told.is_err());
        assert!(counted.is_err());
    }
}
