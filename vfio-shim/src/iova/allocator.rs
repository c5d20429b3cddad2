//! Spans of one address range with owners: allocation by first fit at a congruent start, reservations, free.
//!
//! ```text
//! 0                                                                  size
//! | live a |  free  |  reserved for b: | live b |  free for b  |  free  |
//! ```
//! Free runs are kept merged, by start, per pool: the common one, and one per reservation.

use crate::model::Span;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// How many live spans one allocator holds at most.
pub const LIVE_MAX: usize = 1 << 20;

/// There is no room.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// No free run is large enough.
    #[error("{free} bytes are free, {wanted} in one piece are needed")]
    Full {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes free to this owner.
        free: u64,
    },
    /// Too many live spans.
    #[error("{LIVE_MAX} spans are the most that one window holds")]
    TooMany,
    /// The owner has a reservation already.
    #[error("a reservation is there already")]
    Reserved,
}

#[derive(Clone, Debug, Default)]
struct FreeRuns(BTreeMap<u64, u64>);

impl FreeRuns {
    fn total(&self) -> u64 {
        self.0.values().sum()
    }

    fn take(&mut self, run: u64, at: u64, len: u64) {
        let Some(run_len) = self.0.remove(&run) else {
            return;
        };
        if at > run {
            self.0.insert(run, at - run);
        }
        if run + run_len > at + len {
            self.0.insert(at + len, run + run_len - at - len);
        }
    }

    fn give(&mut self, mut start: u64, mut len: u64) {
        if let Some((&before, &before_len)) = self.0.range(..start).next_back()
            && before + before_len == start
        {
            self.0.remove(&before);
            start = before;
            len += before_len;
        }
        if let Some(after_len) = self.0.remove(&(start + len)) {
            len += after_len;
        }
        self.0.insert(start, len);
    }

    /// The first run that holds `len` bytes at a start congruent to `like` modulo `modulus`.
    fn find(&self, len: u64, like: u64, modulus: u64) -> Option<(u64, u64)> {
        let want = like % modulus;
        self.0.iter().find_map(|(&run, &run_len)| {
            let skip = (want + modulus - run % modulus) % modulus;
            (skip.checked_add(len)? <= run_len).then_some((run, run + skip))
        })
    }
}

/// Spans of `0..size`, each with an owner.
#[derive(Clone, Debug)]
pub struct SpanAllocator<O> {
    size: u64,
    common: FreeRuns,
    reserved: BTreeMap<O, (Span, FreeRuns)>,
    live: BTreeMap<u64, (u64, O)>,
}

impl<O: Copy + Ord + Debug> SpanAllocator<O> {
    /// All of `0..size` but the first `taken` bytes is free.
    pub fn new(size: u64, taken: u64) -> Self {
        let mut common = FreeRuns::default();
        if size > taken {
            common.give(taken, size - taken);
        }
        Self {
            size,
            common,
            reserved: BTreeMap::new(),
            live: BTreeMap::new(),
        }
    }

    /// The range's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that are neither live nor reserved.
    pub fn free_bytes(&self) -> u64 {
        self.common.total()
    }

    /// Bytes that this owner can still have: the free ones and those of its reservation.
    pub fn free_to(&self, owner: O) -> u64 {
        self.common.total()
            + self
                .reserved
                .get(&owner)
                .map_or(0, |(_, free)| free.total())
    }

    /// Live spans.
    pub fn live_count(&self) -> usize {
        self.live.len()
    }

    /// Every live span and whose it is.
    pub fn live(&self) -> impl Iterator<Item = (Span, O)> + '_ {
        let span =
            |(&start, &(len, owner)): (&u64, &(u64, O))| Some((Span::new(start, len)?, owner));
        self.live.iter().filter_map(span)
    }

    /// What of each reservation is not live, in bytes.
    pub fn reserved_free(&self) -> impl Iterator<Item = (O, u64)> + '_ {
        let free = |(&owner, (_, free)): (&O, &(Span, FreeRuns))| (owner, free.total());
        self.reserved.iter().map(free)
    }

    /// Gives `len` bytes whose start agrees with `like` modulo the first of `moduli` (powers of
    /// two, largest first) for which there is room; from the owner's reservation first.
    pub fn allocate(
        &mut self,
        owner: O,
        len: u64,
        like: u64,
        moduli: &[u64],
    ) -> Result<Span, SpanError> {
        if self.live.len() >= LIVE_MAX {
            return Err(SpanError::TooMany);
        }
        let full = SpanError::Full {
            wanted: len,
            free: self.free_to(owner),
        };
        if len == 0 {
            return Err(full);
        }
        for &modulus in moduli {
            let own = self.reserved.get_mut(&owner).map(|(_, free)| free);
            for free in own.into_iter().chain([&mut self.common]) {
                if let Some((run, at)) = free.find(len, like, modulus) {
                    free.take(run, at, len);
                    self.live.insert(at, (len, owner));
                    return Span::new(at, len).ok_or(full);
                }
            }
        }
        Err(full)
    }

    /// Sets `len` contiguous bytes aside for one owner.
    pub fn reserve(&mut self, owner: O, len: u64, modulus: u64) -> Result<Span, SpanError> {
        if self.reserved.contains_key(&owner) {
            return Err(SpanError::Reserved);
        }
        let full = SpanError::Full {
            wanted: len,
            free: self.free_bytes(),
        };
        let found = self
            .common
            .find(len, 0, modulus)
            .or_else(|| self.common.find(len, 0, 4096));
        let Some((run, at)) = found.filter(|_| len != 0) else {
            return Err(full);
        };
        let span = Span::new(at, len).ok_or(full)?;
        self.common.take(run, at, len);
        let mut free = FreeRuns::default();
        free.give(at, len);
        self.reserved.insert(owner, (span, free));
        Ok(span)
    }

    /// Takes one span back; true if the owner had it.
    pub fn free(&mut self, owner: O, start: u64) -> bool {
        match self.live.get(&start) {
            Some(&(len, holder)) if holder == owner => {
                self.live.remove(&start);
                self.give_back(owner, start, len);
                true
            }
            _ => false,
        }
    }

    fn give_back(&mut self, owner: O, start: u64, len: u64) {
        match self.reserved.get_mut(&owner) {
            Some((span, free)) if start >= span.start() && start < span.end() => {
                free.give(start, len);
            }
            _ => self.common.give(start, len),
        }
    }

    /// Takes all spans of an owner back, and its reservation.
    pub fn free_all(&mut self, owner: O) {
        let live = self.live.iter().filter(|(_, (_, holder))| *holder == owner);
        let starts: Vec<u64> = live.map(|(start, _)| *start).collect();
        for start in starts {
            self.free(owner, start);
        }
        if let Some((_, free)) = self.reserved.remove(&owner) {
            for (start, len) in free.0 {
                self.common.give(start, len);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 24;

    #[test]
    fn a_start_agrees_with_its_model_where_there_is_room() {
        let mut spans = SpanAllocator::new(4 << 30, 0x10000);
        let at = spans
            .allocate(1u8, 1 << 27, 0x10_0000, &[1 << 30, 1 << 21, 4096])
            .unwrap();
        assert_eq!(at.start() % (1 << 30), 0x10_0000);
        let low = spans
            .allocate(1, 0xa0000, 0, &[1 << 30, 1 << 21, 4096])
            .unwrap();
        assert_eq!(low.start(), 1 << 30);
    }

    #[test]
    fn a_reservation_serves_its_owner_alone() {
        let mut spans = SpanAllocator::new(SIZE, 0);
        spans.reserve(1u8, SIZE, 4096).unwrap();
        assert_eq!(
            spans.allocate(2, 4096, 0, &[4096]),
            Err(SpanError::Full {
                wanted: 4096,
                free: 0
            })
        );
        spans.allocate(1, SIZE, 0, &[4096]).unwrap();
        spans.free_all(1);
        assert_eq!(spans.free_bytes(), SIZE);
    }

    #[test]
    fn another_owners_span_is_not_freed() {
        let mut spans = SpanAllocator::new(SIZE, 0);
        let at = spans.allocate(1u8, 4096, 0, &[4096]).unwrap();
        assert!(!spans.free(2, at.start()));
        assert!(spans.free(1, at.start()));
        assert!(!spans.free(1, at.start()));
    }

    proptest! {
        #[test]
        fn live_spans_never_overlap_and_no_byte_is_lost(
            steps in proptest::collection::vec((0u8..4, 0u8..4, 1u64..64, 0u64..512), 1..200),
        ) {
            let mut spans = SpanAllocator::new(SIZE, 4096);
            let mut live: Vec<(u8, Span)> = Vec::new();
            for (kind, owner, pages, like) in steps {
                match kind {
                    0 | 1 => {
                        let moduli = [1 << 22, 1 << 16, 4096];
                        if let Ok(at) = spans.allocate(owner, pages << 12, like << 12, &moduli) {
                            prop_assert!(live.iter().all(|(_, held)| !held.overlaps(at)));
                            prop_assert!(at.start() >= 4096 && at.end() <= SIZE);
                            live.push((owner, at));
                        }
                    }
                    2 => { let _ = spans.reserve(owner, pages << 14, 1 << 16); }
                    _ if pages % 4 == 0 => {
                        spans.free_all(owner);
                        live.retain(|(holder, _)| *holder != owner);
                    }
                    _ => {
                        if let Some(at) = live.iter().position(|(holder, _)| *holder == owner) {
                            let (_, span) = live.remove(at);
                            prop_assert!(spans.free(owner, span.start()));
                        }
                    }
                }
                prop_assert_eq!(spans.live_count(), live.len());
            }
            for owner in 0..4 {
                spans.free_all(owner);
            }
            prop_assert_eq!(spans.free_bytes(), SIZE - 4096);
            prop_assert_eq!(spans.common.0.len(), 1);
        }
    }
}
