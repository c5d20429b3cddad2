//! A scenario's checks: one line each, counted against the number that the scenario declares.

use anyhow::Result;
use std::fmt::Display;
use std::time::Instant;

/// The checks of one run of a scenario.
pub struct Checks {
    declared: usize,
    passed: usize,
    failed: usize,
}

impl Checks {
    /// A scenario that will make this many checks.
    pub fn new(declared: usize) -> Self {
        Checks {
            declared,
            passed: 0,
            failed: 0,
        }
    }

    /// Makes a check and prints its line; what it gives back is the line's detail. The scenario
    /// goes on after a failure, and has none of the value.
    pub fn check<T: Display>(&mut self, name: &str, act: impl FnOnce() -> Result<T>) -> Option<T> {
        self.must(name, act).ok()
    }

    /// The same, for what the rest of the scenario cannot do without.
    pub fn must<T: Display>(&mut self, name: &str, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let since = Instant::now();
        let outcome = act();
        let seconds = since.elapsed().as_secs_f64();
        match &outcome {
            Ok(detail) => {
                self.passed += 1;
                let detail = detail.to_string().replace('\n', " ");
                println!("ok   {name} ({seconds:.1} s) {detail}");
            }
            Err(error) => {
                self.failed += 1;
                println!("FAIL {name} ({seconds:.1} s) {error:#}");
            }
        }
        outcome
    }

    /// Checks that passed, and those that failed; one that was never made counts as failed.
    pub fn counts(&self) -> (usize, usize) {
        let made = self.passed + self.failed;
        (
            self.passed,
            self.failed + self.declared.saturating_sub(made),
        )
    }

    /// How many checks were not made, or made without having been declared.
    pub fn miscounted(&self) -> isize {
        self.declared as isize - (self.passed + self.failed) as isize
    }
}

#[cfg(test)]
mod tests {
    use super::Checks;

    #[test]
    fn check_that_is_never_made_counts_as_failed() {
        let mut checks = Checks::new(3);
        checks.check("one", || Ok("")).unwrap();
        assert!(
            checks
                .check::<String>("two", || anyhow::bail!("no"))
                .is_none()
        );
        assert_eq!(checks.counts(), (1, 2));
        assert_eq!(checks.miscounted(), 1);
    }
}
