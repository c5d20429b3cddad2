//! A VMM's thread: sets the function up over its socket, then does what its guest is told, one thing after the other.

use crate::coroutine::is_dying;
use crate::guest::{Command as Act, Guest, Life, next_command, trigger};
use crate::memory::{BLOCK_BYTES, BLOCKS, CONTROL, READ_ONLY, SLOT_BYTES, Slot, address, block_at};
use crate::wire::{Gone, Wire};
use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use vfio_shim::ntb::soft::{ARC_DOORBELL, ARC_SCRATCH, ARC_SOURCE, DOORBELL, SCRATCH, SOURCE};
use vmm_glue::vfio_user::wire::{Command, DmaMap, DmaUnmap, IrqSet, RegionAccess, Version};
use zerocopy::IntoBytes;

const CONFIG: u32 = 7;
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 6;
/// VFIO_IRQ_SET_*: data is none or an eventfd; what is done is mask, unmask, trigger.
const NONE: u32 = 1;
const EVENTFD: u32 = 1 << 2;
const MASK: u32 = 1 << 3;
const UNMASK: u32 = 1 << 4;
const TRIGGER: u32 = 1 << 5;
/// Blocks that are mapped from the start.
const AT_START: [usize; 5] = [CONTROL, 1, 2, 4, READ_ONLY];

type Shared = Rc<RefCell<Guest>>;

/// The whole life of a VMM.
pub fn run(guest: &Shared, socket: &Path) {
    let mut vmm = Vmm {
        guest: Rc::clone(guest),
        socket: socket.to_owned(),
        wire: None,
    };
    // Gone = the server has ended the session, of which the guest knows no more.
    let _ = vmm.live();
    if !is_dying() {
        guest.borrow_mut().end();
    }
}

struct Vmm {
    guest: Shared,
    socket: PathBuf,
    wire: Option<Wire>,
}

impl Vmm {
    fn live(&mut self) -> Result<(), Gone> {
        self.set_up()?;
        loop {
            let closed = || self.wire.as_ref().is_none_or(Wire::is_closed);
            let Some(act) = next_command(&self.guest, closed) else {
                return Ok(());
            };
            if !self.act(act)? {
                return Ok(());
            }
            self.guest.borrow_mut().doing = None;
        }
    }

    fn ask(&mut self, command: Command, body: &[&[u8]]) -> Result<bool, Gone> {
        self.wire.as_mut().ok_or(Gone)?.ask(command, body, &[])
    }

    /// What firmware and driver do first.
    fn set_up(&mut self) -> Result<(), Gone> {
        self.wire = Some(Wire::connect(&self.socket)?);
        let version = Version {
            major: 0.into(),
            minor: 1.into(),
        };
        if !self.ask(Command::Version, &[version.as_bytes(), b"{}\0"])? {
            return Err(Gone);
        }
        // It is answered when nothing of a session before is left.
        self.guest.borrow_mut().undo();
        self.guest.borrow_mut().undone = false;
        self.guest.borrow_mut().prepare_control();
        for block in AT_START {
            self.map(block)?;
        }
        self.master()?;
        self.arm()?;
        self.guest.borrow_mut().life = Life::Running;
        Ok(())
    }

    /// False when the VMM ends.
    fn act(&mut self, act: Act) -> Result<bool, Gone> {
        match act {
            Act::Map(block) => self.map(block)?,
            Act::Unmap(block) => self.unmap(block)?,
            Act::Copy { from, to, vector } => self.copy(from, to, vector)?,
            Act::Rogue { to, vector } => self.rogue(to, vector)?,
            Act::Store => self.store()?,
            Act::Mask(vector) => self.mask(vector, true)?,
            Act::Unmask(vector) => self.mask(vector, false)?,
            Act::Swap(vector) => self.swap(vector)?,
            Act::Rearm => self.rearm()?,
            Act::Reset => return self.reset(),
            Act::Reboot => {
                self.wire = None;
                self.guest.borrow_mut().end();
                self.guest.borrow_mut().life = Life::Starting;
                self.set_up()?;
            }
            Act::HangUp => {
                if let Some(wire) = &mut self.wire {
                    wire.cut_short(Command::RegionWrite, &[&[0; 24]], 20);
                }
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn map(&mut self, block: usize) -> Result<(), Gone> {
        let flags = if block == READ_ONLY { 1u32 } else { 3 };
        let map = DmaMap {
            argsz: (size_of::<DmaMap>() as u32).into(),
            flags: flags.into(),
            offset: (block as u64 * BLOCK_BYTES).into(),
            iova: address(block).into(),
            len: BLOCK_BYTES.into(),
        };
        self.guest.borrow_mut().mapping(block);
        let fd = self
            .guest
            .borrow()
            .ram
            .fd()
            .try_clone_to_owned()
            .expect("an fd");
        let wire = self.wire.as_mut().ok_or(Gone)?;
        let mapped = wire.ask(Command::DmaMap, &[map.as_bytes()], &[fd.as_fd()])?;
        self.guest.borrow_mut().mapped[block] = Some(mapped);
        Ok(())
    }

    /// When the answer is there, no device writes into the block.
    fn unmap(&mut self, block: usize) -> Result<(), Gone> {
        let unmap = DmaUnmap {
            argsz: (size_of::<DmaUnmap>() as u32).into(),
            flags: 0.into(),
            iova: address(block).into(),
            len: BLOCK_BYTES.into(),
        };
        self.guest.borrow_mut().unmapping(block);
        let unmapped = self.ask(Command::DmaUnmap, &[unmap.as_bytes()])?;
        let mut guest = self.guest.borrow_mut();
        if unmapped {
            guest.ram.freeze(block);
        }
        guest.mapped[block] = Some(!unmapped);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<bool, Gone> {
        let access = RegionAccess {
            offset: offset.into(),
            region: region.into(),
            count: (data.len() as u32).into(),
        };
        self.ask(Command::RegionWrite, &[access.as_bytes(), data])
    }

    fn master(&mut self) -> Result<(), Gone> {
        self.write(CONFIG, COMMAND, &MEMORY_AND_MASTER.to_le_bytes())?;
        self.guest.borrow_mut().master = true;
        Ok(())
    }

    fn copy(&mut self, from: Slot, to: Slot, vector: usize) -> Result<(), Gone> {
        {
            let mut guest = self.guest.borrow_mut();
            // What was true when the guest was told may not be so any more.
            let free = guest.ram.is_free(from) && guest.ram.is_free(to);
            if guest.mapped[from.0] != Some(true) || !free {
                return Ok(());
            }
            guest.reusing(to);
            let lands = guest.writable(to.0) && guest.master;
            guest.begin(Some(from), lands.then_some(to), vector);
        }
        self.transfer(from.address(), to.address(), vector)
    }

    /// Nothing is expected of it anywhere.
    fn rogue(&mut self, to: u64, vector: usize) -> Result<(), Gone> {
        let from = Slot(CONTROL, SLOT_FROM_CONTROL);
        {
            let mut guest = self.guest.borrow_mut();
            let there = block_at(to).filter(|block| *block != READ_ONLY);
            if there.is_some_and(|block| guest.mapped[block] != Some(false)) {
                return Ok(());
            }
            guest.begin(None, None, vector);
        }
        self.transfer(from.address(), to, vector)
    }

    /// The engine takes its vector and an Arc the address of its memirq page.
    fn transfer(&mut self, from: u64, to: u64, vector: usize) -> Result<(), Gone> {
        let arc = self.guest.borrow().arc;
        let mut registers = [from.to_le_bytes(), to.to_le_bytes()].concat();
        registers.extend((SLOT_BYTES as u32).to_le_bytes());
        let (start, doorbell) = if arc {
            registers.extend(0u32.to_le_bytes());
            registers.extend(address(CONTROL_PAGE).to_le_bytes());
            (ARC_SOURCE, ARC_DOORBELL)
        } else {
            registers.extend((vector as u32).to_le_bytes());
            (SOURCE, DOORBELL)
        };
        self.write(0, start, &registers)?;
        self.write(0, doorbell, &1u32.to_le_bytes())?;
        Ok(())
    }

    fn store(&mut self) -> Result<(), Gone> {
        let (value, register) = {
            let mut guest = self.guest.borrow_mut();
            let value = guest.value();
            let resets = guest.function.resets();
            guest.tags.push((value, resets));
            (value, if guest.arc { ARC_SCRATCH } else { SCRATCH })
        };
        self.write(0, register, &value.to_le_bytes())?;
        Ok(())
    }

    fn set_irqs(
        &mut self,
        flags: u32,
        start: usize,
        count: usize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<bool, Gone> {
        let set = IrqSet {
            argsz: (size_of::<IrqSet>() as u32).into(),
            flags: flags.into(),
            index: (self.guest.borrow().index() as u32).into(),
            start: (start as u32).into(),
            count: (count as u32).into(),
        };
        let wire = self.wire.as_mut().ok_or(Gone)?;
        wire.ask(Command::DeviceSetIrqs, &[set.as_bytes()], fds)
    }

    fn clones(&self) -> Vec<OwnedFd> {
        let guest = self.guest.borrow();
        let clone = |fd: &OwnedFd| fd.try_clone().expect("an fd");
        guest.vectors.iter().map(|v| clone(&v.event)).collect()
    }

    fn arm(&mut self) -> Result<(), Gone> {
        let events = self.clones();
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        let armed = self.set_irqs(EVENTFD | TRIGGER, 0, fds.len(), &fds)?;
        self.guest.borrow_mut().armed = armed;
        Ok(())
    }

    fn mask(&mut self, vector: usize, masked: bool) -> Result<(), Gone> {
        self.guest.borrow_mut().vectors[vector].masking = true;
        let action = if masked { MASK } else { UNMASK };
        let done = self.set_irqs(NONE | action, vector, 1, &[])?;
        let mut guest = self.guest.borrow_mut();
        // What was signalled before the answer was no fault.
        guest.collect();
        guest.tally.turns += 1;
        let vector = &mut guest.vectors[vector];
        // A refusal leaves open whether it is masked now.
        vector.masking = !done;
        vector.masked = masked;
        Ok(())
    }

    fn swap(&mut self, vector: usize) -> Result<(), Gone> {
        let new = trigger();
        let fd = new.try_clone().expect("an fd");
        let swapped = self.set_irqs(EVENTFD | TRIGGER, vector, 1, &[fd.as_fd()])?;
        let mut guest = self.guest.borrow_mut();
        guest.tally.turns += 1;
        guest.collect();
        // Also where the lender could not arm: the trigger is in place then.
        guest.vectors[vector].event = new;
        if !guest.armed {
            guest.forget_interrupts();
        }
        guest.armed = swapped;
        Ok(())
    }

    fn rearm(&mut self) -> Result<(), Gone> {
        self.guest.borrow_mut().unmasking();
        self.set_irqs(NONE | TRIGGER, 0, 0, &[])?;
        {
            let mut guest = self.guest.borrow_mut();
            guest.armed = false;
            for vector in &mut guest.vectors {
                (vector.masked, vector.masking) = (false, false);
            }
            guest.forget_interrupts();
        }
        self.arm()
    }

    /// A function that cannot be reset is of no use to its guest: the VMM ends.
    fn reset(&mut self) -> Result<bool, Gone> {
        self.guest.borrow_mut().armed = false;
        self.guest.borrow_mut().unmasking();
        self.guest.borrow_mut().forget_interrupts();
        if !self.ask(Command::DeviceReset, &[])? {
            return Ok(false);
        }
        {
            let mut guest = self.guest.borrow_mut();
            guest.ram.freeze_all();
            guest.expose_all();
            guest.prepare_control();
            for vector in &mut guest.vectors {
                (vector.masked, vector.masking) = (false, false);
            }
            guest.forget_interrupts();
        }
        self.master()?;
        self.arm()?;
        Ok(true)
    }
}

/// Where nothing that matters is read from.
const SLOT_FROM_CONTROL: usize = 12;
const CONTROL_PAGE: usize = CONTROL;

const _: () = assert!(BLOCKS > READ_ONLY);
