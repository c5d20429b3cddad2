//! The steps of mapping and unmapping guest RAM, and in what order the lender is told.

use super::lease::Mapped;
use super::{
    Actions, Answer, Borrower, BorrowerAction, CallError, GuestMap, Op, Pin, Slice, Token, answer,
};
use crate::model::Span;
use crate::path::message::{LeaseId, MapRange, RANGES_MAX, Refusal, Reply, Request};
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
        let held = self.held(lease)?;
        held.check_new(&maps)?;
        let mut pins = Vec::with_capacity(maps.len());
        let mut starts = Vec::with_capacity(maps.len());
        // The large ones first: they have the most to gain from an offset that agrees with the
        // guest-physical address modulo 1 GiB.
        let mut order: Vec<GuestMap> = maps;
        order.sort_by_key(|map| std::cmp::Reverse(map.span.len()));
        for map in order {
            let (start, len, access) = (map.span.start(), map.span.len(), map.access);
            let offset = match pool.allocate_ram(Owner::Borrowed(lease), map.span) {
                Ok(offset) => offset,
                Err(refusal) => {
                    held.forget(&starts, lease, pool);
                    return Err(refusal.into());
                }
            };
            held.maps.insert(
                start,
                Mapped {
                    offset,
                    len,
                    access,
                    live: false,
                },
            );
            starts.push(start);
            pins.push(Pin { offset, map });
        }
        let step = self.step(Some(token), Op::MapPin { lease, starts });
        Ok(vec![BorrowerAction::Pin(step, pins)])
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
        Ok(vec![BorrowerAction::Unpin(step, slices)])
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
            let tell = |(token, starts)| self.tell_map(token, lease, starts);
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

    pub(super) fn unmap_told(
        &mut self,
        lease: LeaseId,
        freed: Vec<Slice>,
        pool: &mut SlicePool,
    ) -> Actions {
        for (offset, _) in freed {
            pool.free(Owner::Borrowed(lease), offset);
        }
        if let Some(held) = self.leases.get_mut(&lease) {
            held.telling = false;
        }
        self.tell_next(lease)
    }

    pub(super) fn tell(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        starts: Vec<u64>,
    ) -> Actions {
        match self.leases.get_mut(&lease) {
            Some(held) => held.pinned.push_back((token, starts)),
            None => return answer(token, Err(CallError::Gone("the lease is over".into()))),
        }
        self.tell_next(lease)
    }

    pub(super) fn tell_map(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        starts: Vec<u64>,
    ) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return answer(token, Err(CallError::Gone("the lease is over".into())));
        };
        let mut sorted = starts.clone();
        sorted.sort_unstable();
        let range = |start: &u64| {
            let map = held.maps.get(start)?;
            let span = Span::new(*start, map.len)?;
            Some(MapRange {
                span,
                offset: map.offset,
                access: map.access,
            })
        };
        let ranges: Vec<MapRange> = sorted.iter().filter_map(range).collect();
        let mut rest: VecDeque<Vec<MapRange>> = ranges
            .chunks(RANGES_MAX)
            .map(<[MapRange]>::to_vec)
            .collect();
        let Some(ranges) = rest.pop_front() else {
            return answer(token, Ok(Answer::Done));
        };
        let told = ranges.iter().map(|range| range.span).collect();
        let op = Op::MapTell {
            lease,
            starts,
            rest,
            told,
        };
        self.send(token, op, Request::Map { lease, ranges })
    }

    pub(super) fn map_told(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        (starts, mut rest, mut told): (Vec<u64>, VecDeque<Vec<MapRange>>, Vec<Span>),
        result: Result<Reply, Refusal>,
    ) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return answer(token, Err(CallError::Gone("the lease is over".into())));
        };
        // What was unmapped meanwhile must not be told any more: its slice may be given anew.
        for ranges in &mut rest {
            let still = |range: &MapRange| {
                held.maps
                    .get(&range.span.start())
                    .is_some_and(|map| map.offset == range.offset)
            };
            ranges.retain(still);
        }
        rest.retain(|ranges| !ranges.is_empty());
        match result {
            Ok(_) => match rest.pop_front() {
                None => {
                    for start in &starts {
                        if let Some(map) = held.maps.get_mut(start) {
                            map.live = true;
                        }
                    }
                    answer(token, Ok(Answer::Done))
                }
                Some(ranges) => {
                    told.extend(ranges.iter().map(|range| range.span));
                    let op = Op::MapTell {
                        lease,
                        starts,
                        rest,
                        told,
                    };
                    self.send(token, op, Request::Map { lease, ranges })
                }
            },
            Err(refusal) => {
                let last = RANGES_MAX.min(told.len());
                told.truncate(told.len() - last);
                let offsets = held.offsets_of(&starts);
                let cause = CallError::Refused(refusal);
                let mut actions = Vec::new();
                for spans in told.chunks(RANGES_MAX) {
                    let request = Request::Unmap {
                        lease,
                        spans: spans.to_vec(),
                    };
                    actions.extend(self.send(None, Op::Forward, request));
                }
                let step = self.step(
                    token,
                    Op::MapUndo {
                        lease,
                        starts,
                        cause,
                    },
                );
                actions.push(BorrowerAction::Unpin(step, offsets));
                actions
            }
        }
    }
}
