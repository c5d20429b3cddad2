//! A guest's memory, of which the simulation knows at every moment what may stand in each piece.

use crate::rig::memfd;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vfio_shim::model::Aperture;
use vfio_shim::vfio::MappedAperture;

/// What is mapped and unmapped in one piece: a page.
pub const BLOCK_BYTES: u64 = 4096;
/// How many of them a guest has.
pub const BLOCKS: usize = 8;
/// The block of the memirq page: no slots are in it.
pub const CONTROL: usize = 0;
/// The block that the device may only read.
pub const READ_ONLY: usize = 7;
/// What one transfer copies.
pub const SLOT_BYTES: u64 = 256;
const SLOT_WORDS: usize = SLOT_BYTES as usize / 8;
/// Slots of a block: the lower half is copied to, the upper half from.
pub const SLOTS: usize = (BLOCK_BYTES / SLOT_BYTES) as usize;
/// Not 0, which an Arc takes for no memirq page.
const LOW: u64 = 1 << 16;
/// Guests have the upper half of their blocks above 4 GiB.
const HIGH: u64 = 1 << 32;

/// A slot: its block, and its place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub usize, pub usize);

impl Slot {
    fn index(self) -> usize {
        self.0 * SLOTS + self.1
    }

    fn offset(self) -> u64 {
        self.index() as u64 * SLOT_BYTES
    }

    /// Its guest-physical address.
    pub fn address(self) -> u64 {
        address(self.0) + self.1 as u64 * SLOT_BYTES
    }
}

/// The block at a guest-physical address.
pub fn block_at(gpa: u64) -> Option<usize> {
    (0..BLOCKS).find(|block| (address(*block)..address(*block) + BLOCK_BYTES).contains(&gpa))
}

/// Guest-physical address of a block.
pub fn address(block: usize) -> u64 {
    let low = LOW + block as u64 * BLOCK_BYTES;
    if block < BLOCKS / 2 { low } else { HIGH + low }
}

#[derive(Clone, Debug, Default)]
struct Content {
    /// What stands there, as far as is known.
    settled: u64,
    /// What transfers under way may still write.
    pending: Vec<u64>,
}

/// What a block may hold while a device has it, besides what its guest asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exposed {
    /// Nothing.
    #[default]
    Not,
    /// Anything of this guest's own: the link has gone down, and of a burst of stores that is a
    /// command one may be lost and the next ones arrive, until the lender has ended the session.
    ToOwn,
    /// Anything: its host, or the function's, forges.
    ToAnything,
}

/// A guest's memory.
pub struct Ram {
    guest: u64,
    fd: OwnedFd,
    mapped: MappedAperture,
    slots: Vec<Content>,
    /// What a device may write into each block besides what was asked for.
    exposed: [Exposed; BLOCKS],
    /// What was written last where nobody could write any more.
    sealed_last: u64,
    /// Transfers under way: from where, to where, and what.
    under_way: Vec<(Slot, Slot, u64)>,
}

impl Ram {
    /// Filled with a pattern that no other guest has.
    pub fn new(guest: u64) -> Self {
        let bytes = BLOCKS as u64 * BLOCK_BYTES;
        let fd = memfd(bytes);
        let mapped = MappedAperture::memory(fd.as_fd(), 0, bytes).expect("guest memory");
        let mut ram = Self {
            guest,
            fd,
            mapped,
            slots: vec![Content::default(); BLOCKS * SLOTS],
            exposed: [Exposed::Not; BLOCKS],
            sealed_last: 0,
            under_way: Vec::new(),
        };
        for slot in slots() {
            ram.fill(slot, guest << 32 | 0x8000_0000 | slot.index() as u64);
        }
        ram
    }

    /// For the VMM's maps.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The guest itself writes a slot.
    pub fn fill(&mut self, slot: Slot, value: u64) {
        let words = [value.to_le_bytes(); SLOT_WORDS];
        self.mapped.write(slot.offset(), words.as_flattened());
        self.slots[slot.index()] = Content {
            settled: value,
            pending: Vec::new(),
        };
    }

    /// A transfer is begun; until its slot is frozen it may arrive at any time.
    pub fn expect(&mut self, from: Slot, to: Slot, value: u64) {
        self.slots[to.index()].pending.push(value);
        self.under_way.push((from, to, value));
    }

    /// Whether no transfer reads or writes this slot any more, as far as the guest can know.
    pub fn is_free(&mut self, slot: Slot) -> bool {
        let touches = |(from, to, _): &&(Slot, Slot, u64)| *from == slot || *to == slot;
        let touching: Vec<_> = self.under_way.iter().filter(touches).copied().collect();
        touching
            .iter()
            .all(|(_, to, value)| self.arrived(*to, *value))
    }

    /// What stands in a slot; a panic if it may not stand there.
    pub fn look(&self, slot: Slot) -> u64 {
        let mut words = [[0; 8]; SLOT_WORDS];
        self.mapped.read(slot.offset(), words.as_flattened_mut());
        let value = u64::from_le_bytes(words[0]);
        match self.exposed[slot.0] {
            Exposed::Not => {}
            Exposed::ToOwn => {
                self.check_own(slot, &words);
                return value;
            }
            Exposed::ToAnything => return value,
        }
        let content = &self.slots[slot.index()];
        // A device that reads what is not there any more reads ones, and writes them.
        let ones = value == u64::MAX && !content.pending.is_empty();
        let known = value == content.settled || content.pending.contains(&value) || ones;
        assert!(
            known,
            "INVARIANT memory: guest {} finds {value:#x} in slot {slot:?}, where {:#x} or one of {:x?} may be",
            self.guest, content.settled, content.pending
        );
        let whole = words.iter().all(|word| *word == words[0]);
        assert!(
            whole,
            "INVARIANT memory: guest {} finds slot {slot:?} torn",
            self.guest
        );
        value
    }

    /// Half a command reads what this guest has, the page that its driver never looks at, or ones.
    fn check_own(&self, slot: Slot, words: &[[u8; 8]]) {
        let mut values = words.iter().map(|word| u64::from_le_bytes(*word));
        let foreign = values.find(|v| v >> 32 != self.guest && ![0, u64::MAX].contains(v));
        assert!(
            foreign.is_none(),
            "INVARIANT memory: guest {} finds {foreign:x?} in slot {slot:?}, which is nobody's of its own",
            self.guest
        );
    }

    /// As long as a device has this block, it may hold this.
    pub fn expose(&mut self, block: usize, to: Exposed) {
        if ![CONTROL, READ_ONLY].contains(&block) {
            self.exposed[block] = self.exposed[block].max(to);
        }
    }

    /// Nothing is written into this block by any device from now on.
    pub fn freeze(&mut self, block: usize) {
        if std::mem::take(&mut self.exposed[block]) != Exposed::Not {
            for slot in slots().filter(|slot| slot.0 == block) {
                self.sealed_last += 1;
                self.fill(slot, self.guest << 32 | 0x4000_0000 | self.sealed_last);
            }
        }
        for slot in slots().filter(|slot| slot.0 == block) {
            let settled = self.look(slot);
            let pending = Vec::new();
            self.slots[slot.index()] = Content { settled, pending };
        }
        self.under_way.retain(|(_, to, _)| to.0 != block);
    }

    /// The same of all blocks.
    pub fn freeze_all(&mut self) {
        (0..BLOCKS).for_each(|block| self.freeze(block));
    }

    /// What has arrived of this transfer is all that is under way into its slot.
    pub fn arrived(&mut self, slot: Slot, value: u64) -> bool {
        let there = self.look(slot) == value;
        if there {
            let content = &mut self.slots[slot.index()];
            content.settled = value;
            content.pending.retain(|other| *other != value);
            self.under_way.retain(|(_, _, other)| *other != value);
        }
        there
    }

    /// All of it holds what it may hold.
    pub fn check(&self) {
        slots().for_each(|slot| {
            self.look(slot);
        });
    }

    /// A byte of the memirq page.
    pub fn control(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.mapped.read(offset, &mut byte);
        byte[0]
    }

    /// The guest writes into the memirq page.
    pub fn set_control(&self, offset: u64, bytes: &[u8]) {
        self.mapped.write(offset, bytes);
    }
}

fn slots() -> impl Iterator<Item = Slot> {
    let blocks = (0..BLOCKS).filter(|block| *block != CONTROL);
    blocks.flat_map(|block| (0..SLOTS).map(move |slot| Slot(block, slot)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: u64 = 7;
    const SLOT: Slot = Slot(1, 3);

    fn torn() -> Ram {
        let mut ram = Ram::new(GUEST);
        ram.expose(SLOT.0, Exposed::ToOwn);
        ram
    }

    fn device_writes(ram: &mut Ram, value: u64) {
        ram.mapped.write(SLOT.offset(), &value.to_le_bytes());
    }

    #[test]
    fn half_a_command_leaves_anything_of_the_guests_own_until_its_session_is_undone() {
        let mut ram = torn();
        for value in [GUEST << 32 | 6, u64::MAX, 0] {
            device_writes(&mut ram, value);
            ram.check();
        }
        ram.freeze_all();
        device_writes(&mut ram, GUEST << 32 | 6);
        assert!(std::panic::catch_unwind(|| ram.check()).is_err());
    }

    #[test]
    #[should_panic = "INVARIANT memory: guest 7 finds Some(800000006)"]
    fn half_a_command_leaves_nothing_of_anybody_else() {
        let mut ram = torn();
        device_writes(&mut ram, (GUEST + 1) << 32 | 6);
        ram.check();
    }
}
