//! What a tenant may take of a port: mappings and bytes of guest memory, interrupts per second; and the bucket that holds it to a rate; pure.

use super::borrower::MAPS_MAX;

/// The highest rate of a vector's interrupts, per second.
pub const INTERRUPTS_PER_SECOND_MAX: u32 = 10_000_000;
/// The default: more than a driver takes, and less than one thread can relay.
pub const INTERRUPTS_PER_SECOND_DEFAULT: u32 = 100_000;
/// A bucket holds what its rate gives in this part of a second.
const BURSTS_PER_SECOND: u32 = 10;

/// What each tenant of a port may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Mappings of guest memory of one borrowed function; over [`MAPS_MAX`] is the same as that.
    pub guest_maps: u32,
    /// Bytes of them.
    pub guest_mapped_bytes: u64,
    /// Interrupts of one vector of a lent function that are relayed in a second.
    pub interrupts_per_second: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            guest_maps: MAPS_MAX as u32,
            guest_mapped_bytes: u64::MAX,
            interrupts_per_second: INTERRUPTS_PER_SECOND_DEFAULT,
        }
    }
}

/// Lets so many things a second happen, and a tenth of a second's worth of them at once.
///
/// ```text
/// take: one less --empty--> filled by the time that has gone --still empty--> wait until
/// ```
/// As long as it is not empty nobody looks at a clock: what is held to a rate pays one counter.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    per_second: u32,
    left: u32,
    filled_ms: u64,
}

impl Bucket {
    /// A full one.
    pub fn new(per_second: u32, now_ms: u64) -> Self {
        let mut bucket = Self {
            per_second: per_second.max(1),
            left: 0,
            filled_ms: now_ms,
        };
        bucket.left = bucket.burst();
        bucket
    }

    fn burst(&self) -> u32 {
        (self.per_second / BURSTS_PER_SECOND).max(1)
    }

    /// Takes one. Where there is none: the time at which to come back, when half of the bucket is
    /// there again.
    pub fn take(&mut self, now_ms: impl FnOnce() -> u64) -> Result<(), u64> {
        if self.left == 0 {
            self.fill(now_ms());
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(self.half_full_ms()),
        }
    }

    fn fill(&mut self, now_ms: u64) {
        let rate = u64::from(self.per_second);
        let gone_ms = now_ms.saturating_sub(self.filled_ms);
        let gained = gone_ms.saturating_mul(rate) / 1000;
        if gained >= u64::from(self.burst()) {
            self.left = self.burst();
            self.filled_ms = now_ms;
        } else {
            self.left = gained as u32;
            // The part of a thing that is not whole yet is not lost.
            self.filled_ms += (gained * 1000).div_ceil(rate);
        }
    }

    fn half_full_ms(&self) -> u64 {
        let half = u64::from((self.burst() / 2).max(1));
        let wait_ms = (half * 1000).div_ceil(u64::from(self.per_second));
        self.filled_ms.saturating_add(wait_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(bucket: &mut Bucket, now_ms: u64) -> Result<(), u64> {
        bucket.take(|| now_ms)
    }

    #[test]
    fn a_full_bucket_gives_a_tenth_of_its_rate_at_once_and_not_one_more() {
        for (rate, burst) in [(1, 1), (10, 1), (20, 2), (100_000, 10_000)] {
            let mut bucket = Bucket::new(rate, 7);
            assert!((0..burst).all(|_| take(&mut bucket, 7).is_ok()), "{rate}");
            assert!(take(&mut bucket, 7).is_err(), "{rate}");
        }
    }

    #[test]
    fn nobody_looks_at_the_clock_while_there_is_something_in_it() {
        let mut bucket = Bucket::new(20, 0);
        for _ in 0..2 {
            bucket.take(|| panic!("looked at the clock")).unwrap();
        }
        assert!(take(&mut bucket, 0).is_err());
    }

    #[test]
    fn whoever_comes_back_when_told_finds_half_a_bucket() {
        let mut bucket = Bucket::new(1_000, 0);
        let ready_ms = (0..).find_map(|_| take(&mut bucket, 0).err()).unwrap();
        assert_eq!(ready_ms, 50);
        assert!(take(&mut bucket, ready_ms).is_ok());
        let more = (0..).take_while(|_| take(&mut bucket, ready_ms).is_ok());
        assert_eq!(more.count(), 49);
    }

    #[test]
    fn a_clock_that_goes_back_or_far_ahead_does_no_harm() {
        let mut bucket = Bucket::new(u32::MAX, u64::MAX - 1);
        bucket.left = 0;
        assert!(take(&mut bucket, 0).is_err());
        assert!(take(&mut bucket, u64::MAX).is_ok());
        assert_eq!(Bucket::new(0, 0).per_second, 1);
    }

    proptest! {
        #[test]
        fn no_more_than_burst_and_rate_come_through(
            rate in 1u32..5_000,
            steps in prop::collection::vec((0u64..40, 0usize..200), 1..60),
        ) {
            let mut bucket = Bucket::new(rate, 0);
            let (mut now, mut taken) = (0, 0u64);
            for (wait_ms, tries) in steps {
                now += wait_ms;
                taken += (0..tries).filter(|_| take(&mut bucket, now).is_ok()).count() as u64;
                let most = u64::from(bucket.burst()) + now * u64::from(rate) / 1000;
                prop_assert!(taken <= most, "{taken} of {most} in {now} ms");
            }
        }

        #[test]
        fn a_thing_that_waits_as_told_always_goes_on(rate in 1u32..100_000, start in 0u64..1_000_000) {
            let mut bucket = Bucket::new(rate, start);
            let mut now = start;
            for _ in 0..1000 {
                if let Err(ready) = take(&mut bucket, now) {
                    prop_assert!(ready > now);
                    now = ready;
                    prop_assert!(take(&mut bucket, now).is_ok());
                }
            }
        }
    }
}
