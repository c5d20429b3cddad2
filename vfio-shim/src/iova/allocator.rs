//! Spans of one address range with owners: allocation at a congruent start, reservations, free; every step logarithmic.
//!
//! ```text
//! 0                                                                  size
//! | live a |  free  |  reserved for b: | live b |  free for b  |  free  |
//! ```
//! Free runs are kept merged, per pool: the common one, and one per reservation.

use super::runs::{FreeRuns, GRANULE};
use crate::model::Span;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// How many live spans one allocator holds at most: all that a container maps (65,535), and as
/// many that wait until nothing maps them any more.
pub const LIVE_MAX: usize = 1 << 17;

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

/// Spans of `0..size`, each with an owner. Starts and lengths are whole pages of 4 KiB.
#[derive(Clone, Debug)]
pub struct SpanAllocator<O> {
    size: u64,
    common: FreeRuns,
    reserved: BTreeMap<O, (Span, FreeRuns)>,
    /// Lengths, by owner and start: an owner's spans are one range.
    live: BTreeMap<(O, u64), u64>,
}

impl<O: Copy + Ord + Debug> SpanAllocator<O> {
    /// All of `0..size` but the first `taken` bytes is free.
    pub fn new(size: u64, taken: u64) -> Self {
        let mut common = FreeRuns::default();
        let (first, end) = (taken.next_multiple_of(GRANULE), size & !(GRANULE - 1));
        if end > first {
            common.give(first, end - first);
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
        let own = self.reserved.get(&owner);
        self.common.total() + own.map_or(0, |(_, free)| free.total())
    }

    /// Live spans.
    pub fn live_count(&self) -> usize {
        self.live.len()
    }

    /// Every live span and whose it is.
    pub fn live(&self) -> impl Iterator<Item = (Span, O)> + '_ {
        let span =
            |(&(owner, start), &len): (&(O, u64), &u64)| Some((Span::new(start, len)?, owner));
        self.live.iter().filter_map(span)
    }

    /// What of each reservation is not live, in bytes.
    pub fn reserved_free(&self) -> impl Iterator<Item = (O, u64)> + '_ {
        let free = |(&owner, (_, free)): (&O, &(Span, FreeRuns))| (owner, free.total());
        self.reserved.iter().map(free)
    }

    /// Gives `len` bytes, rounded up to whole pages, whose start agrees with `like` modulo the
    /// first of `moduli` (powers of two from a page up, largest first) for which room is found;
    /// from the owner's reservation first. Modulo one page, room is found wherever there is some.
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
        let Some(len) = whole_pages(len) else {
            return Err(full);
        };
        let like = like & !(GRANULE - 1);
        for &modulus in moduli {
            let own = self.reserved.get_mut(&owner).map(|(_, free)| free);
            for free in own.into_iter().chain([&mut self.common]) {
                if let Some((run, at)) = free.find(len, like, modulus) {
                    free.take(run, at, len);
                    self.live.insert((owner, at), len);
                    return Span::new(at, len).ok_or(full);
                }
            }
        }
        Err(full)
    }

    /// Sets `len` contiguous bytes aside for one owner, at a multiple of the first of `moduli` (as
    /// of `allocate`) for which room is found.
    pub fn reserve(&mut self, owner: O, len: u64, moduli: &[u64]) -> Result<Span, SpanError> {
        if self.reserved.contains_key(&owner) {
            return Err(SpanError::Reserved);
        }
        let full = SpanError::Full {
            wanted: len,
            free: self.free_bytes(),
        };
        let Some(len) = whole_pages(len) else {
            return Err(full);
        };
        let mut moduli = moduli.iter();
        let Some((run, at)) = moduli.find_map(|&modulus| self.common.find(len, 0, modulus)) else {
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
        let Some(len) = self.live.remove(&(owner, start)) else {
            return false;
        };
        self.give_back(owner, start, len);
        true
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
        let owned = self.live.range((owner, 0)..=(owner, u64::MAX));
        let starts: Vec<u64> = owned.map(|((_, start), _)| *start).collect();
        for start in starts {
            self.free(owner, start);
        }
        if let Some((_, free)) = self.reserved.remove(&owner) {
            for (start, len) in free.iter() {
                self.common.give(start, len);
            }
        }
    }
}

fn whole_pages(len: u64) -> Option<u64> {
    let pages = len.checked_next_multiple_of(GRANULE);
    pages.filter(|len| *len != 0)
}

#[cfg(test)]
#[path = "allocator_tests.rs"]
mod tests;
