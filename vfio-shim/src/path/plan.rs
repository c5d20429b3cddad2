//! What of a window goes to whom: BAR slices, RAM slices, reservations and interrupt words; pure, refusing in words.

use super::message::{LeaseId, Refusal, RefusalCode};
use super::wire::{IRQ_WORDS_MAX, MAILBOX_BYTES};
use crate::iova::{SpanAllocator, SpanError};
use crate::model::{BAR_COUNT, Span, WindowOffset};
use std::collections::BTreeMap;

const PAGE: u64 = 4096;
const TWO_MIB: u64 = 1 << 21;
const ONE_GIB: u64 = 1 << 30;
/// What a start agrees with, best first: 1 GiB lets both IOMMUs use their largest pages.
const MODULI: [u64; 3] = [ONE_GIB, TWO_MIB, PAGE];

/// Whose a slice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// A lease that this side lends: BAR slices.
    Lent(LeaseId),
    /// A lease that this side borrows: RAM slices.
    Borrowed(LeaseId),
}

/// What waits until the peer has confirmed that nothing maps it, or the next link session begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quarantine {
    /// Slices of the inbound window.
    pub slices: usize,
    /// Bytes of them, and of reservations whose lease is over.
    pub bytes: u64,
    /// Words of the own interrupt table, one for each vector.
    pub words: u32,
}

/// The slices of a port's inbound window. The mailbox is nobody's.
#[derive(Clone, Debug)]
pub struct SlicePool {
    spans: SpanAllocator<Owner>,
}

impl SlicePool {
    /// Before the peer has told its window's size: nothing fits.
    pub fn closed() -> Self {
        Self::open(0)
    }

    /// With so many usable bytes: the smaller of both halves' windows.
    pub fn open(usable_bytes: u64) -> Self {
        Self {
            spans: SpanAllocator::new(usable_bytes, MAILBOX_BYTES),
        }
    }

    /// The usable size of the window in bytes.
    pub fn usable_bytes(&self) -> u64 {
        self.spans.size()
    }

    /// Bytes neither in use nor reserved.
    pub fn free_bytes(&self) -> u64 {
        self.spans.free_bytes()
    }

    /// What nobody uses any more and nobody gets yet: the slices that are not in use, and what is
    /// left of the reservations of those that hold none.
    pub fn quarantine(
        &self,
        in_use: impl Fn(Owner, WindowOffset) -> bool,
        holds: impl Fn(Owner) -> bool,
    ) -> Quarantine {
        let mut held = Quarantine::default();
        for (span, owner) in self.spans.live() {
            if !in_use(owner, WindowOffset(span.start())) {
                held.slices += 1;
                held.bytes += span.len();
            }
        }
        let left = self.spans.reserved_free();
        let left = left.filter(|(owner, _)| !holds(*owner));
        held.bytes += left.map(|(_, bytes)| bytes).sum::<u64>();
        held
    }

    /// A slice for each BAR, aligned like the BAR itself (a power of two, at most 1 GiB).
    pub fn allocate_bars(
        &mut self,
        owner: Owner,
        sizes: &[u64; BAR_COUNT],
    ) -> Result<[Option<WindowOffset>; BAR_COUNT], Refusal> {
        let mut slices = [None; BAR_COUNT];
        let total = sizes.iter().sum();
        for (slice, &size) in slices.iter_mut().zip(sizes) {
            if size == 0 {
                continue;
            }
            let align = size.next_power_of_two().clamp(PAGE, ONE_GIB);
            let len = size.next_multiple_of(PAGE);
            match self.spans.allocate(owner, len, 0, &[align, PAGE]) {
                Ok(span) => *slice = Some(WindowOffset(span.start())),
                Err(error) => {
                    self.spans.free_all(owner);
                    return Err(self.refuse(error, total, "the function's BARs"));
                }
            }
        }
        Ok(slices)
    }

    /// A slice for one mapping of guest RAM at a guest-physical address.
    pub fn allocate_ram(&mut self, owner: Owner, gpa: Span) -> Result<WindowOffset, Refusal> {
        let given = self.spans.allocate(owner, gpa.len(), gpa.start(), &MODULI);
        given
            .map(|span| WindowOffset(span.start()))
            .map_err(|error| self.refuse(error, gpa.len(), "the guest's RAM"))
    }

    /// Sets room for `bytes` of guest RAM aside.
    pub fn reserve(&mut self, owner: Owner, bytes: u64) -> Result<(), Refusal> {
        let len = bytes
            .checked_next_multiple_of(TWO_MIB)
            .unwrap_or(u64::MAX - (TWO_MIB - 1));
        let reserved = self.spans.reserve(owner, len, &MODULI);
        reserved
            .map(|_| ())
            .map_err(|error| self.refuse(error, len, "the guest's RAM"))
    }

    /// Takes one slice back.
    pub fn free(&mut self, owner: Owner, offset: WindowOffset) {
        self.spans.free(owner, offset.0);
    }

    /// Takes all slices of an owner back.
    pub fn free_all(&mut self, owner: Owner) {
        self.spans.free_all(owner);
    }

    /// Whether a range of the *peer's* window may be put behind a lent function: inside the usable
    /// window, and never the mailbox.
    pub fn check_peer_range(&self, offset: WindowOffset, len: u64) -> Result<(), Refusal> {
        let usable = self.usable_bytes();
        let inside = offset.0.checked_add(len).is_some_and(|end| end <= usable);
        if inside && offset.0 >= MAILBOX_BYTES && len != 0 {
            return Ok(());
        }
        let text = format!(
            "window offsets {offset}+{len:#x} are outside {MAILBOX_BYTES:#x}..{usable:#x}, the \
             usable window behind the mailbox"
        );
        Err(Refusal {
            code: RefusalCode::OutOfRange,
            figure: usable,
            text,
        })
    }

    fn refuse(&self, error: SpanError, wanted: u64, what: &str) -> Refusal {
        let usable = self.usable_bytes();
        let SpanError::Full { free, .. } = error else {
            return Refusal {
                code: RefusalCode::Limit,
                figure: 0,
                text: error.to_string(),
            };
        };
        let used = usable.saturating_sub(free);
        let enough = used.saturating_add(wanted).max(usable.saturating_add(1));
        let enough = enough.checked_next_power_of_two().unwrap_or(1 << 63);
        let text = format!(
            "{what} needs {wanted} bytes of the NTB window; {free} of {usable} are free: a window \
             of {enough} bytes would do (set it in both hosts' firmware), or use less memory"
        );
        Refusal {
            code: RefusalCode::WindowFull,
            figure: enough,
            text,
        }
    }
}

/// Runs of words in the own interrupt table, by lease.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    runs: BTreeMap<u32, (u32, LeaseId)>,
}

impl Rows {
    /// The first word of a run of `count`.
    pub fn allocate(&mut self, lease: LeaseId, count: u32) -> Result<u32, Refusal> {
        // A function without vectors has a word all the same: a run of none would lie over others.
        let count = count.max(1);
        let mut first = 0u32;
        for (&start, &(len, _)) in &self.runs {
            if start - first >= count {
                break;
            }
            first = start + len;
        }
        if count > IRQ_WORDS_MAX - first {
            let text = format!(
                "{count} interrupt vectors do not fit the table of {IRQ_WORDS_MAX} words: return \
                 another function first"
            );
            let figure = u64::from(IRQ_WORDS_MAX);
            return Err(Refusal {
                code: RefusalCode::Limit,
                figure,
                text,
            });
        }
        self.runs.insert(first, (count, lease));
        Ok(first)
    }

    /// Words of leases that are not held any more.
    pub fn quarantine(&self, holds: impl Fn(LeaseId) -> bool) -> u32 {
        let over = self.runs.values().filter(|(_, lease)| !holds(*lease));
        over.map(|(count, _)| count).sum()
    }

    /// Frees a lease's run.
    pub fn free(&mut self, lease: LeaseId) {
        self.runs.retain(|_, (_, holder)| *holder != lease);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Owner = Owner::Borrowed(LeaseId(1));

    #[test]
    fn a_window_too_small_is_refused_with_the_figure_that_would_do() {
        let mut pool = SlicePool::open(256 << 20);
        let refusal = pool.reserve(LEASE, 256 << 20).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::WindowFull);
        assert_eq!(refusal.figure, 512 << 20);
        SlicePool::open(refusal.figure)
            .reserve(LEASE, 256 << 20)
            .unwrap();
    }

    /// At 64 KiB, behind the mailbox, both IOMMUs would take 4 KiB pages for all of a guest's RAM.
    #[test]
    fn reservation_without_room_at_a_gib_agrees_with_the_guest_modulo_2_mib() {
        let mut pool = SlicePool::open(256 << 20);
        pool.reserve(LEASE, 128 << 20).unwrap();
        let ram = Span::new(0, 128 << 20).unwrap();
        let offset = pool.allocate_ram(LEASE, ram).unwrap();
        assert_eq!(offset, WindowOffset(TWO_MIB));
    }

    #[test]
    fn absurd_sizes_are_refused_without_overflow() {
        let mut pool = SlicePool::open(256 << 20);
        assert_eq!(
            pool.reserve(LEASE, u64::MAX).unwrap_err().code,
            RefusalCode::WindowFull
        );
        assert!(pool.check_peer_range(WindowOffset(u64::MAX), 4096).is_err());
    }

    #[test]
    fn the_mailbox_is_never_put_behind_a_function() {
        let pool = SlicePool::open(256 << 20);
        assert!(
            pool.check_peer_range(WindowOffset(MAILBOX_BYTES - PAGE), 2 * PAGE)
                .is_err()
        );
        assert!(
            pool.check_peer_range(WindowOffset(MAILBOX_BYTES), PAGE)
                .is_ok()
        );
        assert!(
            pool.check_peer_range(WindowOffset((256 << 20) - PAGE), 2 * PAGE)
                .is_err()
        );
    }

    #[test]
    fn bars_that_do_not_fit_leave_nothing_allocated() {
        let mut pool = SlicePool::open(1 << 20);
        let free = pool.free_bytes();
        let mut sizes = [0; BAR_COUNT];
        (sizes[0], sizes[2]) = (0x4000, 1 << 30);
        assert!(pool.allocate_bars(LEASE, &sizes).is_err());
        assert_eq!(pool.free_bytes(), free);
    }

    #[test]
    fn what_of_a_reservation_nobody_holds_is_in_quarantine_with_its_slices() {
        let mut pool = SlicePool::open(64 << 20);
        pool.reserve(LEASE, 8 << 20).unwrap();
        let ram = Span::new(0, 2 << 20).unwrap();
        let mapped = pool.allocate_ram(LEASE, ram).unwrap();
        let other = Owner::Lent(LeaseId(1));
        let mut bars = [0; BAR_COUNT];
        bars[0] = 0x4000;
        pool.allocate_bars(other, &bars).unwrap();
        let in_use = |owner: Owner, offset| owner == other || offset == mapped;
        let held = pool.quarantine(in_use, |_| true);
        assert_eq!(held, Quarantine::default());
        let held = pool.quarantine(|owner, _| owner == other, |owner| owner != LEASE);
        assert_eq!((held.slices, held.bytes), (1, 8 << 20));
    }

    #[test]
    fn words_of_a_lease_that_is_not_held_are_in_quarantine() {
        let mut rows = Rows::default();
        rows.allocate(LeaseId(1), 9).unwrap();
        rows.allocate(LeaseId(2), 4).unwrap();
        assert_eq!(rows.quarantine(|lease| lease == LeaseId(2)), 9);
        rows.free(LeaseId(1));
        assert_eq!(rows.quarantine(|lease| lease == LeaseId(2)), 0);
    }

    #[test]
    fn function_without_vectors_takes_no_word_of_another() {
        let mut rows = Rows::default();
        assert_eq!(rows.allocate(LeaseId(1), 9), Ok(0));
        assert_eq!(rows.allocate(LeaseId(2), 0), Ok(9));
        rows.free(LeaseId(2));
        assert_eq!(rows.allocate(LeaseId(3), 9), Ok(9));
    }

    #[test]
    fn rows_are_reused_after_free_and_end_at_the_table() {
        let mut rows = Rows::default();
        assert_eq!(rows.allocate(LeaseId(1), 9), Ok(0));
        assert_eq!(rows.allocate(LeaseId(2), IRQ_WORDS_MAX - 9), Ok(9));
        assert!(rows.allocate(LeaseId(3), 1).is_err());
        rows.free(LeaseId(1));
        assert_eq!(rows.allocate(LeaseId(3), 9), Ok(0));
    }
}
