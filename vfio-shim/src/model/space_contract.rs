//! What every DMA address space keeps to, whatever is behind it: generic checks over one with nothing mapped.
//!
//! They hold where a device can be made to look, as a function's contract does, and where it
//! cannot, as with a container of the kernel's alone.
#![allow(missing_docs, reason = "the names of the checks are sentences")]

use super::{Access, AddressSpace, DmaMap, MapError, Memory, Span};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};

const PAGE: u64 = 4096;
const RAM_BYTES: u64 = 16 * PAGE;
/// Where x86 takes writes for interrupts (Intel SDM 3A, 12.11).
const INTERRUPTS: u64 = 0xfee0_0000;

fn span(start: u64, len: u64) -> Span {
    Span::new(start, len).unwrap()
}

/// Memory to be mapped.
struct Ram(OwnedFd);

impl Ram {
    fn new() -> Self {
        let fd = memfd_create("contract", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, RAM_BYTES).unwrap();
        Self(fd)
    }

    fn at(&self, start: u64, pages: u64) -> DmaMap<'_> {
        DmaMap {
            span: span(start, pages * PAGE),
            access: Access::READ_WRITE,
            memory: Memory::Fd(self.0.as_fd(), 0),
        }
    }
}

fn all(space: &dyn AddressSpace) -> u64 {
    let ranges = space.usable();
    ranges
        .iter()
        .map(|range| space.unmap(*range).unwrap())
        .sum()
}

pub fn usable_ranges_are_sorted_apart_and_leave_interrupts_out(space: &dyn AddressSpace) {
    let usable = space.usable();
    assert!(!usable.is_empty());
    assert!(usable.windows(2).all(|two| two[0].end() < two[1].start()));
    let interrupts = span(INTERRUPTS, 1 << 20);
    assert!(usable.iter().all(|range| !range.overlaps(interrupts)));
}

pub fn what_was_mapped_is_unmapped_and_leaves_as_much_room(space: &dyn AddressSpace) {
    let ram = Ram::new();
    let room = space.available();
    space.map(&[ram.at(0, 4), ram.at(1 << 32, 2)]).unwrap();
    assert_eq!(space.unmap(span(0, 4 * PAGE)).unwrap(), 4 * PAGE);
    assert_eq!(space.unmap(span(0, 4 * PAGE)).unwrap(), 0, "once");
    assert_eq!(all(space), 2 * PAGE);
    assert_eq!(space.available(), room);
}

pub fn unmap_takes_every_whole_map_in_its_range_and_none_beside_it(space: &dyn AddressSpace) {
    let ram = Ram::new();
    let maps = [0, 2, 4, 6].map(|page| ram.at(page * PAGE, 1));
    space.map(&maps).unwrap();
    assert_eq!(space.unmap(span(PAGE, 4 * PAGE)).unwrap(), 2 * PAGE);
    assert_eq!(all(space), 2 * PAGE);
}

pub fn unmap_that_would_cut_a_map_is_refused_and_changes_nothing(space: &dyn AddressSpace) {
    let ram = Ram::new();
    space.map(&[ram.at(0, 4), ram.at(8 * PAGE, 1)]).unwrap();
    for cut in [span(0, PAGE), span(PAGE, PAGE), span(2 * PAGE, 7 * PAGE)] {
        let refused = space.unmap(cut);
        assert!(
            matches!(refused, Err(MapError::Bisect(_))),
            "{cut}: {refused:?}"
        );
    }
    assert_eq!(all(space), 5 * PAGE);
}

pub fn map_over_another_is_refused_also_within_one_call(space: &dyn AddressSpace) {
    let ram = Ram::new();
    space.map(&[ram.at(4 * PAGE, 4)]).unwrap();
    for (start, pages) in [(4, 4), (0, 5), (7, 1), (5, 2), (0, 16)] {
        let refused = space.map(&[ram.at(start * PAGE, pages)]);
        assert!(
            matches!(refused, Err(MapError::Overlap(_))),
            "{start}+{pages}"
        );
    }
    let both = space.map(&[ram.at(0, 2), ram.at(PAGE, 2)]);
    assert!(matches!(both, Err(MapError::Overlap(_))), "{both:?}");
    assert_eq!(all(space), 4 * PAGE, "nothing of what was refused");
}

pub fn maps_are_all_or_none(space: &dyn AddressSpace) {
    let ram = Ram::new();
    let room = space.available();
    let bad = [
        (INTERRUPTS - PAGE, 2),
        (INTERRUPTS, 1),
        (u64::MAX - 16 * PAGE + 1, 1),
    ];
    for (start, pages) in bad {
        let refused = space.map(&[ram.at(0, 1), ram.at(start, pages)]);
        assert!(refused.is_err(), "{start:#x}");
        assert_eq!(all(space), 0, "{start:#x}");
    }
    assert_eq!(space.available(), room);
}

pub fn maps_that_are_no_whole_pages_are_refused(space: &dyn AddressSpace) {
    let ram = Ram::new();
    for (start, len) in [(0, 0), (0, 100), (8, PAGE), (PAGE / 2, PAGE)] {
        let map = DmaMap {
            span: span(start, len),
            ..ram.at(0, 1)
        };
        let refused = space.map(&[map]);
        assert!(matches!(refused, Err(MapError::Align(_))), "{start}+{len}");
    }
    assert_eq!(all(space), 0);
}

pub fn memory_that_is_shorter_than_its_map_is_refused(space: &dyn AddressSpace) {
    let ram = Ram::new();
    assert!(space.map(&[ram.at(0, 17)]).is_err());
    assert_eq!(all(space), 0);
}

/// Names all checks to a macro.
#[macro_export]
macro_rules! space_contract {
    ($with:ident) => {
        $with! {
            usable_ranges_are_sorted_apart_and_leave_interrupts_out
            what_was_mapped_is_unmapped_and_leaves_as_much_room
            unmap_takes_every_whole_map_in_its_range_and_none_beside_it
            unmap_that_would_cut_a_map_is_refused_and_changes_nothing
            map_over_another_is_refused_also_within_one_call
            maps_are_all_or_none
            maps_that_are_no_whole_pages_are_refused
            memory_that_is_shorter_than_its_map_is_refused
        }
    };
}
