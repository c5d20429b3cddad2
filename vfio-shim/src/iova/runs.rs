//! Free runs of an address range, kept merged: by start for giving back, by length for finding room.

use std::collections::{BTreeMap, BTreeSet};

/// What starts and lengths are made of.
pub(super) const GRANULE: u64 = 4096;
/// How many runs of either end are looked at for a start that agrees.
pub(super) const PROBES_MAX: usize = 32;

/// The free runs. Every step is logarithmic in their number.
#[derive(Clone, Debug, Default)]
pub(super) struct FreeRuns {
    by_start: BTreeMap<u64, u64>,
    /// (length, start), so that runs long enough are one range.
    by_len: BTreeSet<(u64, u64)>,
    total: u64,
}

impl FreeRuns {
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.by_start.iter().map(|(start, len)| (*start, *len))
    }

    fn insert(&mut self, start: u64, len: u64) {
        self.by_start.insert(start, len);
        self.by_len.insert((len, start));
        self.total += len;
    }

    fn remove(&mut self, start: u64) -> Option<u64> {
        let len = self.by_start.remove(&start)?;
        self.by_len.remove(&(len, start));
        self.total -= len;
        Some(len)
    }

    /// Takes `len` bytes at `at` out of the run that begins at `run`.
    pub(super) fn take(&mut self, run: u64, at: u64, len: u64) {
        let Some(run_len) = self.remove(run) else {
            return;
        };
        if at > run {
            self.insert(run, at - run);
        }
        if run + run_len > at + len {
            self.insert(at + len, run + run_len - at - len);
        }
    }

    /// Takes bytes in that nobody has any more.
    pub(super) fn give(&mut self, mut start: u64, mut len: u64) {
        let before = self.by_start.range(..start).next_back();
        let before = before.filter(|(before, before_len)| *before + *before_len == start);
        if let Some((before, before_len)) = before.map(|(at, len)| (*at, *len)) {
            self.remove(before);
            start = before;
            len += before_len;
        }
        if let Some(after_len) = self.remove(start + len) {
            len += after_len;
        }
        self.insert(start, len);
    }

    /// A run that holds `len` bytes at a start congruent to `like` modulo `modulus`, and that start.
    ///
    /// The shortest runs that are long enough are looked at first, then the longest: one that is
    /// longer by a modulus is sure to have such a start. Modulo one granule, every run that is
    /// long enough has one.
    pub(super) fn find(&self, len: u64, like: u64, modulus: u64) -> Option<(u64, u64)> {
        let want = like % modulus;
        let fits = |&(run_len, run): &(u64, u64)| {
            let skip = (want + modulus - run % modulus) % modulus;
            (skip.checked_add(len)? <= run_len).then_some((run, run + skip))
        };
        let long = || self.by_len.range((len, 0)..);
        let tight = long().take(PROBES_MAX).find_map(fits);
        let longest = || long().rev().take(PROBES_MAX).find_map(fits);
        tight.or_else(longest)
    }
}
