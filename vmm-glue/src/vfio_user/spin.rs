//! Whether to wait awake for a VMM's next message: a pure policy over past gaps, and how many may do so at once.
//!
//! Most of a trapped access is two wake-ups: the server's and the VMM's. A server that waits awake
//! saves its own. It does so only after messages that came close upon each other, for a few times
//! as long as they took, and never beside more than a host's cores but one: a guest that is idle,
//! or thinks for milliseconds, costs nothing.

use std::{
    num::NonZero,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{available_parallelism, yield_now},
};
use vfio_shim::model::Runtime;

/// The longest gap that is waited awake for, nanoseconds. A wake-up is 2 to 50 us.
pub const SPIN_NS_MAX: u64 = 500_000;
const SPIN_NS_MIN: u64 = 20_000;
/// Of the last eight gaps so many were short before one is waited awake for.
const SHORT_GAPS: u32 = 6;
/// So many times the usual gap is waited awake.
const PATIENCE: u64 = 4;
/// Somebody else ran on this core for so long: who sleeps is then woken sooner than who yields.
const CONTENDED_NS: u64 = 50_000;
/// The most threads of a process that wait awake at once, however many cores there are.
pub const SPINNERS_MAX: usize = 8;

/// The gaps between a reply and the next message, and what follows from them.
#[derive(Clone, Copy, Debug, Default)]
pub struct SpinPolicy {
    /// The last eight gaps, the newest in bit 0; set = short.
    short: u8,
    /// The usual length of a short one.
    gap_ns: u64,
}

impl SpinPolicy {
    /// A message came so long after the reply before it.
    pub fn gap(&mut self, ns: u64) {
        let short = ns <= SPIN_NS_MAX;
        self.short = self.short << 1 | u8::from(short);
        if short {
            self.gap_ns = (3 * self.gap_ns + ns) / 4;
        }
    }

    /// Others need the core that was waited on.
    pub fn contended(&mut self) {
        self.short <<= 1;
    }

    /// How long to wait awake for the next message; 0 = not at all.
    pub fn spin_ns(&self) -> u64 {
        if self.short.count_ones() < SHORT_GAPS {
            return 0;
        }
        (PATIENCE * self.gap_ns).clamp(SPIN_NS_MIN, SPIN_NS_MAX)
    }
}

/// How many threads wait awake.
struct Slots {
    taken: AtomicUsize,
}

/// Those of this process.
static SLOTS: Slots = Slots::new();

impl Slots {
    const fn new() -> Self {
        let taken = AtomicUsize::new(0);
        Self { taken }
    }

    fn take(&'static self, most: usize) -> Option<Slot> {
        let one_more = |taken: usize| (taken < most).then_some(taken + 1);
        let taken = self.taken.fetch_update(Relaxed, Relaxed, one_more);
        taken.is_ok().then(|| Slot(self))
    }
}

/// One that waits awake; gives its place up when dropped.
struct Slot(&'static Slots);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Relaxed);
    }
}

/// All cores but one, so that whoever is waited for has one.
pub fn spinners_max() -> usize {
    // To ask reads files of the cgroup.
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = CORES.get_or_init(|| available_parallelism().map_or(1, NonZero::get));
    (*cores - 1).min(SPINNERS_MAX)
}

/// What came of a moment of waiting awake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// Look again.
    Again,
    /// It took too long.
    Over,
    /// The core is wanted by others.
    Contended,
}

/// A wait that is awake.
pub(super) struct Spin {
    /// Of the runtime's clock.
    until_ns: u64,
    last_ns: Option<u64>,
    _slot: Slot,
}

impl Spin {
    /// None where the policy says so, or where the most wait awake already.
    pub(super) fn begin(policy: &SpinPolicy, since_ns: u64, most: usize) -> Option<Self> {
        let until_ns = match policy.spin_ns() {
            0 => return None,
            ns => since_ns.saturating_add(ns),
        };
        let slot = SLOTS.take(most)?;
        Some(Self {
            until_ns,
            last_ns: None,
            _slot: slot,
        })
    }

    /// Lets others run, and tells whether to look again.
    pub(super) fn pause(&mut self, runtime: &dyn Runtime) -> Pause {
        yield_now();
        let Some(now) = runtime.spin_clock_ns() else {
            return Pause::Over;
        };
        let away = now.saturating_sub(self.last_ns.replace(now).unwrap_or(now));
        if now >= self.until_ns {
            Pause::Over
        } else if away >= CONTENDED_NS {
            Pause::Contended
        } else {
            Pause::Again
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn after(gaps: impl IntoIterator<Item = u64>) -> SpinPolicy {
        let mut policy = SpinPolicy::default();
        gaps.into_iter().for_each(|ns| policy.gap(ns));
        policy
    }

    #[test]
    fn nobody_waits_awake_before_messages_came_close_upon_each_other() {
        assert_eq!(SpinPolicy::default().spin_ns(), 0);
        assert_eq!(after([5_000; 5]).spin_ns(), 0);
        assert!(after([5_000; 6]).spin_ns() > 0);
    }

    #[test]
    fn think_time_of_milliseconds_is_slept_through_and_what_was_short_before_is_forgotten() {
        assert_eq!(after([10_000_000; 100]).spin_ns(), 0);
        let busy_then_slow = |slow: usize| {
            let gaps = [5_000u64; 50].into_iter();
            after(gaps.chain(vec![10_000_000; slow])).spin_ns()
        };
        assert!(busy_then_slow(2) > 0);
        assert_eq!(busy_then_slow(3), 0);
    }

    #[test]
    fn one_waits_a_few_gaps_and_never_longer_than_the_most() {
        assert_eq!(after([1_000; 20]).spin_ns(), SPIN_NS_MIN);
        let usual = after([20_000; 30]).spin_ns();
        assert!((70_000..=80_000).contains(&usual), "{usual}");
        assert_eq!(after([300_000; 30]).spin_ns(), SPIN_NS_MAX);
        assert_eq!(after([SPIN_NS_MAX; 30]).spin_ns(), SPIN_NS_MAX);
        assert_eq!(after([SPIN_NS_MAX + 1; 30]).spin_ns(), 0);
    }

    #[test]
    fn a_core_that_others_want_is_left_to_them() {
        let mut policy = after([5_000; 50]);
        (0..3).for_each(|_| policy.contended());
        assert_eq!(policy.spin_ns(), 0);
    }

    #[test]
    fn no_more_than_the_most_wait_awake_and_a_place_is_given_up() {
        static SLOTS: Slots = Slots::new();
        let held: Vec<_> = (0..3).map(|_| SLOTS.take(3).unwrap()).collect();
        assert!(SLOTS.take(3).is_none());
        drop(held);
        assert!(SLOTS.take(1).is_some());
        assert!(SLOTS.take(0).is_none());
        assert!(spinners_max() <= SPINNERS_MAX);
    }

    proptest! {
        /// What waiting awake for nothing costs: whatever the gaps, at most three waits in a row
        /// are for nothing before one is slept through.
        #[test]
        fn long_gaps_are_waited_awake_for_three_times_at_most(gaps in proptest::collection::vec(0u64..2 * SPIN_NS_MAX, 0..64)) {
            let mut policy = after(gaps);
            let awake = (0..8).filter(|_| {
                let awake = policy.spin_ns() != 0;
                policy.gap(u64::MAX);
                awake
            });
            prop_assert!(awake.count() <= 3);
        }
    }
}
