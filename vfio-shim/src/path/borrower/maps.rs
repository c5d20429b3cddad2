//! The steps of mapping and unmapping guest RAM, and in what order the lender is told.

use super::lease::{Mapped, Place};
use super::{
    Actions, Answer, Borrower, BorrowerAction, CallError, GuestMap, Op, Pin, Slice, Token, answer,
};
use crate::model::Span;
use crate::path::message::{LeaseId, MapRange, RANGES_MAX, Refusal, RefusalCode, Reply, Request};
use crate::path::plan::{Owner, SlicePool};
use std::collections::VecDeque;

impl Borrower {
    pub(super) fn map(
        &mut self,
        token: Token,
        lease: LeaseId,
        maps: Vec<GuestMap>,
        pool: &mut SlicePool,
    ) -> Result<Actions, CallError> {
        let limits = self.limits;
        let held = self.held(lease)?;
        held.check_new(&maps, &limits)?;
        let mut pins = Vec::with_capacity(maps.len());
        let mut places = Vec::with_capacity(maps.len());
        // The large ones first: they have the most to gain from an offset that agrees with the
        // guest-physical address modulo 1 GiB.
        let mut order: Vec<GuestMap> = maps;
        order.sort_by_key(|map| std::cmp::Reverse(map.span.len()));
        for map in order {
            let (start, len, access) = (map.span.start(), map.span.len(), map.access);
            let offset = match pool.allocate_ram(Owner::Borrowed(lease), map.span) {
                Ok(offset) => offset,
                Err(refusal) => {
                    held.forget(&places, lease, pool);
                    return Err(refusal.into());
                }
            };
            held.insert(
                start,
                Mapped {
                    offset,
                    len,
                    access,
                    live: false,
                },
            );
            places.push((start, offset));
            pins.push(Pin { offset, map });
        }
        let step = self.step(Some(token), Op::MapPin { lease, places });
        Ok(vec![BorrowerAction::Pin(step, lease, pins)])
    }

    pub(super) fn unmap(
        &mut self,
        token: Token,
        lease: LeaseId,
        span: Span,
    ) -> Result<Actions, CallError> {
        let taken = self.held(lease)?.take_within(span)?;
        if taken.is_empty() {
            return Ok(answer(Some(token), Ok(Answer::Unmapped(0))));
        }
        let slices = taken.iter().map(|(_, slice)| *slice).collect();
        let step = self.step(Some(token), Op::Unpin { lease, taken });
        Ok(vec![BorrowerAction::Unpin(step, lease, slices)])
    }

    /// The next thing that the lender has to hear of a lease: unmaps first, as many as one message
    /// takes, then the maps that waited for them.
    pub(super) fn tell_next(&mut self, lease: LeaseId) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return Vec::new();
        };
        if held.telling {
            return Vec::new();
        }
        if held.untold.is_empty() {
            let pinned = std::mem::take(&mut held.pinned);
            let tell = |(token, places)| self.tell_map(token, lease, places);
            return pinned.into_iter().flat_map(tell).collect();
        }
        held.telling = true;
        let count = held.untold.len().min(RANGES_MAX);
        let (spans, freed) = held.untold.drain(..count).unzip();
        self.send(
            None,
            Op::UnmapTell { lease, freed },
            Request::Unmap { lease, spans },
        )
    }

    /// The lender has answered an unmap. Where it refused, the function may still reach the slices:
    /// they stay in quarantine until the lease or the session is over.
    pub(super) fn unmap_told(
        &mut self,
        lease: LeaseId,
        freed: Vec<Slice>,
        result: Result<Reply, Refusal>,
        pool: &mut SlicePool,
    ) -> Actions {
        for slice in freed {
            if result.is_ok() && !self.is_left(slice) {
                pool.free(Owner::Borrowed(lease), slice.0);
            }
        }
        if let Some(held) = self.leases.get_mut(&lease) {
            held.telling = false;
        }
        // A lender that takes no more now is told the rest behind the next map or unmap.
        match result {
            Err(refusal) if refusal.code == RefusalCode::Limit => Vec::new(),
            _ => self.tell_next(lease),
        }
    }

    pub(super) fn tell(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        places: Vec<Place>,
    ) -> Actions {
        match self.leases.get_mut(&lease) {
            Some(held) => held.pinned.push_back((token, places)),
            None => return answer(token, Err(CallError::Gone("the lease is over".into()))),
        }
        self.tell_next(lease)
    }

    fn tell_map(&mut self, token: Option<Token>, lease: LeaseId, places: Vec<Place>) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return answer(token, Err(CallError::Gone("the lease is over".into())));
        };
        let mut sorted = places.clone();
        sorted.sort_unstable();
        let range = |place: &Place| {
            let map = held.at(*place)?;
            let span = Span::new(place.0, map.len)?;
            Some(MapRange {
                span,
                offset: map.offset,
                access: map.access,
            })
        };
        let ranges: Vec<MapRange> = sorted.iter().filter_map(range).collect();
        let rest = ranges
            .chunks(RANGES_MAX)
            .map(<[MapRange]>::to_vec)
            .collect();
        self.tell_ranges(token, lease, (places, rest))
    }

    /// Tells the next message's worth of what is still mapped: what was unmapped meanwhile must
    /// not be told any more, as its slice may be given anew.
    fn tell_ranges(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        (places, mut rest): (Vec<Place>, VecDeque<Vec<MapRange>>),
    ) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return answer(token, Err(CallError::Gone("the lease is over".into())));
        };
        while let Some(mut ranges) = rest.pop_front() {
            ranges.retain(|range| held.at((range.span.start(), range.offset)).is_some());
            if ranges.is_empty() {
                continue;
            }
            let op = Op::MapTell {
                lease,
                places,
                rest,
            };
            return self.send(token, op, Request::Map { lease, ranges });
        }
        for place in &places {
            if let Some(map) = held.at_mut(*place) {
                map.live = true;
            }
        }
        answer(token, Ok(Answer::Done))
    }

    pub(super) fn map_told(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        (places, rest): (Vec<Place>, VecDeque<Vec<MapRange>>),
        result: Result<Reply, Refusal>,
    ) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return answer(token, Err(CallError::Gone("the lease is over".into())));
        };
        if let Err(refusal) = result {
            // The lender has some of it mapped, or none: it is told to unmap all, as of any unmap,
            // and only when it has confirmed that are the slices free.
            let taken = held.take_places(&places);
            let slices = taken.iter().map(|(_, slice)| *slice).collect();
            let cause = CallError::Refused(refusal);
            let op = Op::MapUndo {
                lease,
                taken,
                cause,
            };
            return vec![BorrowerAction::Unpin(self.step(token, op), lease, slices)];
        }
        self.tell_ranges(token, lease, (places, rest))
    }
}
