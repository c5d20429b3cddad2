//! When the link between the halves is up: both enabled, trained, and not held down by hand.

use std::time::{Duration, Instant};

/// The link's own state; what the halves show follows it.
#[derive(Debug)]
pub struct Link {
    training: Duration,
    /// Since when both halves have wanted the link.
    wanted_since: Option<Instant>,
    held_down: bool,
    /// A hold that ends by itself.
    hold_until: Option<Instant>,
    up: bool,
}

impl Link {
    /// A link that trains for `training` after both halves are enabled.
    pub fn new(training: Duration) -> Self {
        Self {
            training,
            wanted_since: None,
            held_down: false,
            hold_until: None,
            up: false,
        }
    }

    /// True while the link is up.
    pub fn is_up(&self) -> bool {
        self.up
    }

    /// Holds the link down until told otherwise, or lets go of it.
    pub fn hold(&mut self, down: bool) {
        self.held_down = down;
        self.hold_until = None;
    }

    /// Holds the link down until `until`.
    pub fn flap(&mut self, until: Instant) {
        self.hold_until = Some(until);
    }

    /// Takes what the halves want; returns the new state when the link changed.
    pub fn update(&mut self, wanted: bool, now: Instant) -> Option<bool> {
        self.wanted_since = if wanted {
            self.wanted_since.or(Some(now))
        } else {
            None
        };
        if self.hold_until.is_some_and(|until| until <= now) {
            self.hold_until = None;
        }
        let held = self.held_down || self.hold_until.is_some();
        let trained = self
            .wanted_since
            .is_some_and(|since| since + self.training <= now);
        let up = trained && !held;
        if up == self.up {
            return None;
        }
        self.up = up;
        Some(up)
    }

    /// When [`Link::update`] should be called again without anything else happening.
    pub fn deadline(&self) -> Option<Instant> {
        if let Some(until) = self.hold_until {
            return Some(until);
        }
        let since = self.wanted_since?;
        (!self.up && !self.held_down).then(|| since + self.training)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn link_is_up_at_once_when_both_halves_want_it_and_down_when_one_does_not() {
        let now = Instant::now();
        let mut link = Link::new(Duration::ZERO);
        assert_eq!(link.update(true, now), Some(true));
        assert_eq!(link.update(true, now), None);
        assert_eq!(link.update(false, now), Some(false));
        assert_eq!(link.deadline(), None);
    }

    #[test]
    fn late_link_trains_from_the_moment_both_want_it() {
        let now = Instant::now();
        let mut link = Link::new(10 * MS);
        assert_eq!(link.update(true, now), None);
        assert_eq!(link.deadline(), Some(now + 10 * MS));
        assert_eq!(link.update(true, now + 9 * MS), None);
        assert_eq!(link.update(true, now + 10 * MS), Some(true));
        assert_eq!(link.update(false, now + 11 * MS), Some(false));
        assert_eq!(link.update(true, now + 12 * MS), None);
    }

    #[test]
    fn flap_takes_the_link_down_and_up_again() {
        let now = Instant::now();
        let mut link = Link::new(Duration::ZERO);
        assert_eq!(link.update(true, now), Some(true));
        link.flap(now + 5 * MS);
        assert_eq!(link.update(true, now), Some(false));
        assert_eq!(link.deadline(), Some(now + 5 * MS));
        assert_eq!(link.update(true, now + 5 * MS), Some(true));
    }

    #[test]
    fn held_link_stays_down_until_it_is_let_go() {
        let now = Instant::now();
        let mut link = Link::new(Duration::ZERO);
        link.hold(true);
        assert_eq!(link.update(true, now), None);
        assert_eq!(link.deadline(), None);
        link.hold(false);
        assert_eq!(link.update(true, now), Some(true));
    }
}
