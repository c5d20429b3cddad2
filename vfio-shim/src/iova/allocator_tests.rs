//! The allocator against a table of pages: it finds room wherever there is some, and starts agree wherever that is sure.

use super::*;
use proptest::prelude::*;

const SIZE: u64 = 1 << 22;
const PAGES: usize = (SIZE / GRANULE) as usize;
const MODULI: [u64; 3] = [1 << 20, 1 << 15, GRANULE];

#[test]
fn a_start_agrees_with_its_model_where_there_is_room() {
    let mut spans = SpanAllocator::new(4 << 30, 0x10000);
    let moduli = [1 << 30, 1 << 21, GRANULE];
    let at = spans.allocate(1u8, 1 << 27, 0x10_0000, &moduli).unwrap();
    assert_eq!(at.start() % (1 << 30), 0x10_0000);
    let low = spans.allocate(1, 0xa0000, 0, &moduli).unwrap();
    assert_eq!(low.start(), 1 << 30);
}

#[test]
fn a_reservation_serves_its_owner_alone() {
    let mut spans = SpanAllocator::new(SIZE, 0);
    spans.reserve(1u8, SIZE, &[GRANULE]).unwrap();
    let (wanted, free) = (GRANULE, 0);
    assert_eq!(
        spans.allocate(2, wanted, 0, &[GRANULE]),
        Err(SpanError::Full { wanted, free })
    );
    spans.allocate(1, SIZE, 0, &[GRANULE]).unwrap();
    spans.free_all(1);
    assert_eq!(spans.free_bytes(), SIZE);
}

#[test]
fn another_owners_span_is_not_freed() {
    let mut spans = SpanAllocator::new(SIZE, 0);
    let at = spans.allocate(1u8, GRANULE, 0, &[GRANULE]).unwrap();
    assert!(!spans.free(2, at.start()));
    assert!(spans.free(1, at.start()));
    assert!(!spans.free(1, at.start()));
}

#[test]
fn what_is_no_whole_page_is_rounded_up_and_what_is_absurd_is_refused() {
    let mut spans = SpanAllocator::new(SIZE + 1, 1);
    assert_eq!(spans.free_bytes(), SIZE - GRANULE);
    let at = spans.allocate(1u8, 1, 0, &[GRANULE]).unwrap();
    assert_eq!((at.start(), at.len()), (GRANULE, GRANULE));
    for len in [0, u64::MAX, u64::MAX - GRANULE] {
        let refused = spans.allocate(1, len, u64::MAX, &MODULI);
        assert!(matches!(refused, Err(SpanError::Full { .. })), "{len:#x}");
        assert!(spans.reserve(2, len, &MODULI).is_err(), "{len:#x}");
    }
    assert_eq!(spans.live_count(), 1);
}

#[test]
fn live_spans_end_at_their_most() {
    let mut spans = SpanAllocator::new((LIVE_MAX as u64 + 8) * GRANULE, 0);
    for page in 0..LIVE_MAX {
        let at = spans.allocate((page % 2) as u8, GRANULE, 0, &[GRANULE]);
        assert!(at.is_ok(), "{page}");
    }
    let over = spans.allocate(0, GRANULE, 0, &[GRANULE]);
    assert_eq!(over, Err(SpanError::TooMany));
    spans.free_all(1);
    assert_eq!(spans.live_count(), LIVE_MAX / 2);
    assert!(spans.allocate(0, GRANULE, 0, &[GRANULE]).is_ok());
}

/// Where nothing is but short holes, each at the one place that does not agree, the start that
/// agrees is found all the same, in the longest run.
#[test]
fn holes_that_do_not_agree_hide_no_room_that_does() {
    let mut spans = SpanAllocator::new(1 << 30, 0);
    let held: Vec<_> = (0..4 * super::super::runs::PROBES_MAX)
        .map(|_| spans.allocate(1u8, 1 << 16, 1 << 16, &[1 << 21]).unwrap())
        .collect();
    for (at, span) in held.iter().enumerate() {
        if at % 2 == 0 {
            spans.free(1, span.start());
        }
    }
    let at = spans.allocate(1, 1 << 16, 1 << 20, &[1 << 21]).unwrap();
    assert_eq!(at.start() % (1 << 21), 1 << 20);
}

/// Who may have each page, and who has it.
#[derive(Clone)]
struct Pages {
    pool: Vec<Option<u8>>,
    live: Vec<Option<u8>>,
}

impl Pages {
    /// The longest run of free pages of one pool.
    fn longest(&self, pool: Option<u8>) -> u64 {
        let (mut longest, mut run) = (0, 0);
        for page in 0..PAGES {
            let free = self.pool[page] == pool && self.live[page].is_none() && page != 0;
            run = if free { run + 1 } else { 0 };
            longest = longest.max(run);
        }
        longest * GRANULE
    }

    fn free_bytes(&self) -> u64 {
        let free =
            (1..PAGES).filter(|&page| self.pool[page].is_none() && self.live[page].is_none());
        free.count() as u64 * GRANULE
    }

    fn pages(span: Span) -> std::ops::Range<usize> {
        (span.start() / GRANULE) as usize..(span.end() / GRANULE) as usize
    }

    /// Judges what the allocator gave, and takes it in.
    fn allocated(&mut self, owner: u8, len: u64, like: u64, given: Result<Span, SpanError>) {
        let longest = self.longest(None).max(self.longest(Some(owner)));
        let Ok(span) = given else {
            assert!(len == 0 || longest < len, "{len:#x} fit and were refused");
            return;
        };
        assert_eq!(span.len(), len);
        for page in Self::pages(span) {
            assert!(
                page != 0 && self.live[page].is_none(),
                "page {page} is taken"
            );
            assert!(
                self.pool[page].is_none_or(|pool| pool == owner),
                "page {page}"
            );
            self.live[page] = Some(owner);
        }
        let agrees = |modulus: u64| span.start() % modulus == like % modulus;
        let sure = MODULI
            .into_iter()
            .find(|modulus| len + modulus - GRANULE <= longest);
        let coarsest = MODULI.into_iter().find(|modulus| agrees(*modulus));
        assert!(coarsest >= sure, "{coarsest:?} where {sure:?} was sure");
    }

    fn reserved(&mut self, owner: u8, len: u64, given: Result<Span, SpanError>) {
        let held = self.pool.contains(&Some(owner));
        match given {
            Ok(span) => {
                assert!(!held && span.len() == len);
                for page in Self::pages(span) {
                    assert!(self.pool[page].is_none() && self.live[page].is_none());
                    self.pool[page] = Some(owner);
                }
            }
            Err(SpanError::Reserved) => assert!(held),
            Err(_) => assert!(self.longest(None) < len),
        }
    }

    fn freed_all(&mut self, owner: u8) {
        let gone = |slot: &mut Option<u8>| *slot = slot.filter(|holder| *holder != owner);
        self.live.iter_mut().for_each(gone);
        self.pool.iter_mut().for_each(gone);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn every_step_does_what_a_table_of_pages_allows(
        steps in proptest::collection::vec((0u8..5, 0u8..4, 1u64..256, 0u64..512), 1..120),
    ) {
        let mut spans = SpanAllocator::new(SIZE, GRANULE);
        let mut table = Pages { pool: vec![None; PAGES], live: vec![None; PAGES] };
        let mut live: Vec<(u8, Span)> = Vec::new();
        for (kind, owner, pages, like) in steps {
            let (len, like) = (pages * GRANULE, like * GRANULE);
            match kind {
                0..=2 => {
                    let len = if kind == 0 { len } else { len % (8 * GRANULE) };
                    let given = spans.allocate(owner, len, like, &MODULI);
                    live.extend(given.clone().ok().map(|span| (owner, span)));
                    table.allocated(owner, len, like, given);
                }
                3 if pages % 4 == 0 => {
                    let given = spans.reserve(owner, len, &MODULI);
                    table.reserved(owner, len, given);
                }
                3 if pages % 16 == 1 => {
                    spans.free_all(owner);
                    table.freed_all(owner);
                    live.retain(|(holder, _)| *holder != owner);
                }
                _ if !live.is_empty() => {
                    let (holder, span) = live.swap_remove(like as usize / 4096 % live.len());
                    prop_assert!(spans.free(holder, span.start()));
                    table.live[Pages::pages(span)].fill(None);
                }
                _ => {}
            }
            prop_assert_eq!(spans.live_count(), live.len());
            prop_assert_eq!(spans.free_bytes(), table.free_bytes());
        }
        for owner in 0..4 {
            spans.free_all(owner);
        }
        prop_assert_eq!(spans.common.iter().collect::<Vec<_>>(), [(GRANULE, SIZE - GRANULE)]);
    }
}
