//! One lease that is held: its mappings of guest RAM, and what the lender has not been told yet.

use super::{CallError, GuestMap, Limits, MAPS_MAX, Slice, Token, limit};
use crate::model::{Access, Bdf, Span, WindowOffset, overlap_among};
use crate::path::message::{LeaseId, Secret};
use crate::path::plan::{Owner, SlicePool};
use crate::path::refused::Refused;
use std::collections::{BTreeMap, VecDeque};

/// What guest RAM is mapped in: 4 KiB.
const PAGE_BYTES: u64 = 4096;

#[derive(Clone, Debug)]
pub(super) struct Mapped {
    pub(super) offset: WindowOffset,
    pub(super) len: u64,
    pub(super) access: Access,
    pub(super) live: bool,
}

pub(super) struct Lease {
    pub(super) bdf: Bdf,
    pub(super) secret: Secret,
    pub(super) irq_count: u32,
    pub(super) closing: bool,
    pub(super) maps: BTreeMap<u64, Mapped>,
    /// Bytes of them.
    bytes: u64,
    /// Unmapped here, not told to the lender yet; one message of them is under way at a time.
    pub(super) untold: VecDeque<Taken>,
    pub(super) telling: bool,
    /// Maps that are pinned and wait for that, so that the lender hears all in order.
    pub(super) pinned: VecDeque<(Option<Token>, Vec<Place>)>,
    /// The slices of the lender's window that its BARs are reached through.
    pub(super) bars: Vec<Span>,
    /// What the peer said of it, and was not done.
    pub(super) refused: Refused,
}

/// One mapping and no later one at the same address: its guest-physical address and its slice,
/// which is not given out again before the lender has confirmed that nothing maps it.
pub(super) type Place = (u64, WindowOffset);

/// A mapping that was taken out: its guest-physical addresses and its slice.
pub(super) type Taken = (Span, Slice);

impl Lease {
    pub(super) fn new(bdf: Bdf, secret: Secret, irq_count: u32) -> Self {
        Self {
            bdf,
            secret,
            irq_count,
            closing: false,
            maps: BTreeMap::new(),
            bytes: 0,
            untold: VecDeque::new(),
            telling: false,
            pinned: VecDeque::new(),
            bars: Vec::new(),
            refused: Refused::default(),
        }
    }

    pub(super) fn check_new(&self, maps: &[GuestMap], limits: &Limits) -> Result<(), CallError> {
        let most = MAPS_MAX.min(limits.guest_maps as usize);
        if self.maps.len() + maps.len() > most {
            let text = format!("a guest has at most {most} mappings: give it larger pages");
            return Err(limit(most as u64, text));
        }
        let new = maps.iter().map(|map| map.span.len());
        let bytes = new.fold(self.bytes, u64::saturating_add);
        let most = limits.guest_mapped_bytes;
        if bytes > most {
            let text = format!(
                "the guest would have {bytes} bytes of memory mapped, and {most} are the most it \
                 may have: give it less memory"
            );
            return Err(limit(most, text));
        }
        if let Some(span) = overlap_among(maps.iter().map(|map| map.span)) {
            return Err(CallError::Overlap(span));
        }
        for map in maps {
            if map.span.is_empty() || !map.span.is_aligned(PAGE_BYTES) {
                return Err(CallError::Align(map.span));
            }
            let before = self.maps.range(..map.span.end()).next_back();
            if before.is_some_and(|(start, old)| start + old.len > map.span.start()) {
                return Err(CallError::Overlap(map.span));
            }
        }
        Ok(())
    }

    pub(super) fn insert(&mut self, start: u64, map: Mapped) {
        self.bytes += map.len;
        self.maps.insert(start, map);
    }

    pub(super) fn at(&self, (start, offset): Place) -> Option<&Mapped> {
        self.maps.get(&start).filter(|map| map.offset == offset)
    }

    pub(super) fn at_mut(&mut self, (start, offset): Place) -> Option<&mut Mapped> {
        let map = self.maps.get_mut(&start);
        map.filter(|map| map.offset == offset)
    }

    /// Takes out those of the places that are still there.
    pub(super) fn take_places(&mut self, places: &[Place]) -> Vec<Taken> {
        let mut taken = Vec::with_capacity(places.len());
        for &place in places {
            let Some(len) = self.at(place).map(|map| map.len) else {
                continue;
            };
            self.maps.remove(&place.0);
            self.bytes -= len;
            taken.extend(Span::new(place.0, len).map(|span| (span, (place.1, len))));
        }
        taken
    }

    /// Takes them out where nobody but this side ever knew of them.
    pub(super) fn forget(&mut self, places: &[Place], lease: LeaseId, pool: &mut SlicePool) {
        for (_, (offset, _)) in self.take_places(places) {
            pool.free(Owner::Borrowed(lease), offset);
        }
    }

    /// Takes all mappings that lie whole within `span`; a cut one is an error and nothing is taken.
    pub(super) fn take_within(&mut self, span: Span) -> Result<Vec<Taken>, CallError> {
        let before = self.maps.range(..span.start()).next_back();
        let from = before.map_or(span.start(), |(start, _)| *start);
        let mut taken = Vec::new();
        for (start, map) in self.maps.range(from..span.end()) {
            let held = Span::new(*start, map.len).filter(|held| held.overlaps(span));
            match held {
                None => {}
                Some(held) if span.contains(held) => taken.push((held, (map.offset, map.len))),
                Some(_) => return Err(CallError::Bisect(span)),
            }
        }
        for (held, _) in &taken {
            self.maps.remove(&held.start());
            self.bytes -= held.len();
        }
        Ok(taken)
    }

    pub(super) fn take_all(&mut self) -> Vec<Slice> {
        self.bytes = 0;
        std::mem::take(&mut self.maps)
            .into_values()
            .map(|map| (map.offset, map.len))
            .collect()
    }
}
