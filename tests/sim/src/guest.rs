//! A guest and its VMM: what its driver does with a borrowed function, and what it must find in return.

use crate::coroutine::{Pause, pause};
use crate::memory::{CONTROL, Exposed, READ_ONLY, Ram, Slot};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use vfio_shim::model::{IrqIndex, Wait};
use vfio_shim::ntb::soft::{ARC_MEMIRQ_ENABLE, ARC_MEMIRQ_SOURCE, ARC_MEMIRQ_STATUS, SoftFunction};

/// What a guest is told to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Map a block for the device.
    Map(usize),
    /// Unmap it.
    Unmap(usize),
    /// Copy from a slot to a slot, and interrupt at this vector.
    Copy {
        /// From.
        from: Slot,
        /// To.
        to: Slot,
        /// The vector.
        vector: usize,
    },
    /// Have the device write where nothing of this guest is mapped.
    Rogue {
        /// A DMA address.
        to: u64,
        /// The vector.
        vector: usize,
    },
    /// Store into the function's scratch register.
    Store,
    /// Mask a vector.
    Mask(usize),
    /// Unmask it.
    Unmask(usize),
    /// Give a vector a new trigger.
    Swap(usize),
    /// All triggers away, and back.
    Rearm,
    /// Reset the function.
    Reset,
    /// Hang up, and connect again, as a reboot under cloud-hypervisor does.
    Reboot,
    /// Hang up in the middle of a message, and end.
    HangUp,
}

/// Where a guest stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// The VMM sets the function up.
    Starting,
    /// Its driver runs.
    Running,
    /// The server has hung up, or it has itself.
    Ended,
}

/// A transfer whose interrupt has not come yet.
#[derive(Clone, Copy, Debug)]
pub struct Owed {
    value: u64,
    /// Where its data is to be; `None` for one that must write nothing.
    to: Option<Slot>,
    /// How often a link had gone down when it was begun.
    downs: u64,
    /// Nothing else was owed on this vector, so the next signal is this one's.
    clean: bool,
}

/// A vector as the guest has it.
pub struct Vector {
    pub(crate) event: OwnedFd,
    pub(crate) masked: bool,
    /// A mask or unmask is under way.
    pub(crate) masking: bool,
    pub(crate) owed: Vec<Owed>,
    /// All that was owed before has come.
    pub(crate) quiet: bool,
}

/// What is counted over all schedules.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Interrupts begun by a transfer.
    pub raises: u64,
    /// Signals seen.
    pub signals: u64,
    /// Signals whose data was looked at.
    pub looked: u64,
    /// Masks, unmasks and swaps.
    pub turns: u64,
}

/// A guest.
pub struct Guest {
    /// Which one.
    pub serial: u64,
    /// Its memory.
    pub ram: Ram,
    /// Which blocks the device has; `None` while that changes.
    pub mapped: Vec<Option<bool>>,
    /// Its vectors.
    pub vectors: Vec<Vector>,
    /// Whether all vectors have a trigger, and the lender has armed them.
    pub armed: bool,
    /// Where it stands.
    pub life: Life,
    /// Whether its device may do DMA.
    pub master: bool,
    /// Nothing of its last session is left, so nothing arrives any more.
    pub undone: bool,
    /// The far function, of which only what hardware shows is looked at.
    pub function: Arc<SoftFunction>,
    /// Whether that is of an Arc's shape.
    pub arc: bool,
    /// What it is to do.
    pub commands: VecDeque<Command>,
    /// What it does.
    pub doing: Option<Command>,
    /// What it stored into scratch registers, and how often the function was reset before.
    pub tags: Vec<(u64, u64)>,
    /// What was counted.
    pub tally: Tally,
    pub(crate) values_last: u64,
    /// How often a link has gone down so far.
    pub downs: u64,
    /// A host forges: interrupts come as it likes, and memory that a device has holds anything.
    pub forged: bool,
    /// The link has gone down in this session: the device may have been given half a command.
    pub(crate) torn: bool,
}

/// A fresh trigger.
pub fn trigger() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

impl Guest {
    /// Not connected yet.
    pub fn new(serial: u64, function: Arc<SoftFunction>, arc: bool, vectors: usize) -> Self {
        let vector = |_| Vector {
            event: trigger(),
            masked: false,
            masking: false,
            owed: Vec::new(),
            quiet: false,
        };
        Self {
            serial,
            ram: Ram::new(serial),
            mapped: vec![Some(false); crate::memory::BLOCKS],
            vectors: (0..vectors).map(vector).collect(),
            armed: false,
            life: Life::Starting,
            master: false,
            undone: true,
            function,
            arc,
            commands: VecDeque::new(),
            doing: None,
            tags: Vec::new(),
            tally: Tally::default(),
            values_last: 0,
            downs: 0,
            forged: false,
            torn: false,
        }
    }

    /// A host has forged something.
    pub fn forged_at(&mut self) {
        self.forged = true;
        self.expose_all();
    }

    /// How often a link has gone down.
    pub fn downs_are(&mut self, downs: u64) {
        if std::mem::replace(&mut self.downs, downs) != downs && !self.undone {
            self.torn = true;
            self.expose_all();
        }
    }

    /// What the device has may hold more from now on than was asked for, if anything is amiss.
    pub fn expose_all(&mut self) {
        let exposed = self.exposed();
        for block in (0..self.mapped.len()).filter(|block| self.mapped[*block] != Some(false)) {
            self.ram.expose(block, exposed);
        }
    }

    /// The device is about to have a block.
    pub fn mapping(&mut self, block: usize) {
        self.mapped[block] = None;
        self.ram.expose(block, self.exposed());
    }

    fn exposed(&self) -> Exposed {
        match (self.forged, self.torn) {
            (true, _) => Exposed::ToAnything,
            (false, true) => Exposed::ToOwn,
            (false, false) => Exposed::Not,
        }
    }

    /// The index of its vectors.
    pub fn index(&self) -> IrqIndex {
        if self.arc {
            IrqIndex::Msi
        } else {
            IrqIndex::Msix
        }
    }

    /// A number that nobody else writes anywhere.
    pub fn value(&mut self) -> u64 {
        self.values_last += 1;
        self.serial << 32 | self.values_last
    }

    /// Whether the device may write into this block.
    pub fn writable(&self, block: usize) -> bool {
        self.mapped[block] == Some(true) && ![CONTROL, READ_ONLY].contains(&block)
    }

    /// A transfer is about to be begun. Returns what it copies.
    pub fn begin(&mut self, from: Option<Slot>, to: Option<Slot>, vector: usize) -> u64 {
        let value = self.value();
        if let Some(from) = from {
            self.ram.fill(from, value);
        }
        if let (Some(from), Some(to)) = (from, to) {
            self.ram.expect(from, to, value);
        }
        let downs = self.downs;
        let vector = &mut self.vectors[vector];
        let clean = vector.quiet && vector.owed.is_empty();
        vector.owed.push(Owed {
            value,
            to,
            downs,
            clean,
        });
        self.tally.raises += 1;
        value
    }

    /// Takes the signals that have come, and looks at the data that each must find.
    pub fn collect(&mut self) {
        for at in 0..self.vectors.len() {
            let mut count = [0; 8];
            if rustix::io::read(&self.vectors[at].event, &mut count).is_ok() {
                self.signalled(at, u64::from_ne_bytes(count));
            }
        }
    }

    fn signalled(&mut self, at: usize, count: u64) {
        let vector = &mut self.vectors[at];
        let mute = vector.masked && !vector.masking;
        assert!(
            !mute,
            "INVARIANT mask: vector {at} of guest {} came {count} times while it was masked",
            self.serial
        );
        self.tally.signals += count;
        let owed = std::mem::take(&mut vector.owed);
        // Of several, one may still come.
        vector.quiet &= owed.len() == 1 && count == 1;
        let &[
            Owed {
                value,
                to,
                downs,
                clean: true,
            },
        ] = owed.as_slice()
        else {
            return;
        };
        if downs != self.downs || !self.master || self.forged {
            return;
        }
        if let Some(to) = to
            && self.writable(to.0)
        {
            self.tally.looked += 1;
            assert!(
                self.ram.arrived(to, value),
                "INVARIANT order: interrupt {at} of guest {} overtook its data: slot {to:?} holds {:#x}, not {value:#x}",
                self.serial,
                self.ram.look(to)
            );
        }
        if self.arc && self.mapped[CONTROL] == Some(true) {
            let read = [ARC_MEMIRQ_SOURCE, ARC_MEMIRQ_STATUS].map(|at| self.ram.control(at));
            assert_eq!(
                read, [0xff; 2],
                "INVARIANT order: the MSI of guest {} overtook its memirq",
                self.serial
            );
            self.ram.set_control(ARC_MEMIRQ_SOURCE, &[0]);
            self.ram.set_control(ARC_MEMIRQ_STATUS, &[0]);
        }
    }

    /// All is delivered that can be: what is owed now is lost.
    pub fn check_nothing_lost(&mut self) {
        let live = self.life == Life::Running && self.armed && self.master && !self.forged;
        for (at, vector) in self.vectors.iter_mut().enumerate() {
            if !live || vector.masked || vector.masking {
                continue;
            }
            let lost = vector.owed.iter().find(|owed| owed.downs == self.downs);
            assert!(
                lost.is_none(),
                "INVARIANT interrupts: vector {at} of guest {} never came for {lost:x?}",
                self.serial
            );
            vector.owed.clear();
            vector.quiet = true;
        }
    }

    /// A block is about to be taken away: transfers under way may read ones now.
    pub fn unmapping(&mut self, block: usize) {
        self.mapped[block] = None;
        let owed = self.vectors.iter_mut().flat_map(|v| &mut v.owed);
        owed.for_each(|owed| owed.clean = false);
    }

    /// A slot is about to be written again, whatever interrupt of it is still to come.
    pub fn reusing(&mut self, slot: Slot) {
        let owed = self.vectors.iter_mut().flat_map(|v| &mut v.owed);
        let same = owed.filter(|owed| owed.to == Some(slot));
        same.for_each(|owed| owed.clean = false);
    }

    /// Masks are about to go: signals of vectors that were masked may come now.
    pub fn unmasking(&mut self) {
        self.vectors.iter_mut().for_each(|v| v.masking = true);
    }

    /// The interrupts of before are nobody's any more.
    pub fn forget_interrupts(&mut self) {
        for vector in &mut self.vectors {
            vector.owed.clear();
            vector.quiet = false;
        }
    }

    /// Nothing of its session is left: until now the device has had what was mapped.
    pub fn undo(&mut self) {
        if !self.undone {
            self.ram.freeze_all();
            self.mapped.fill(Some(false));
            self.torn = false;
            self.undone = true;
        }
    }

    /// The server has hung up.
    pub fn end(&mut self) {
        self.life = Life::Ended;
        self.master = false;
        self.armed = false;
        self.doing = None;
        self.commands.clear();
        for vector in &mut self.vectors {
            (vector.masked, vector.masking) = (false, false);
        }
        self.forget_interrupts();
    }

    /// What the guest's driver sets in the memirq page.
    pub fn prepare_control(&mut self) {
        let clear = vec![0; 0x800];
        self.ram.set_control(0, &clear);
        self.ram.set_control(ARC_MEMIRQ_ENABLE, &1u32.to_le_bytes());
    }
}

/// Waits for the next command.
pub fn next_command(guest: &Rc<RefCell<Guest>>, closed: impl Fn() -> bool) -> Option<Command> {
    let mut again = false;
    loop {
        let command = guest.borrow_mut().commands.pop_front();
        if command.is_some() {
            guest.borrow_mut().doing = command;
            return command;
        }
        if closed() {
            return None;
        }
        pause(Pause::Idle(Wait {
            until_ms: None,
            again,
            fds: true,
        }));
        again = true;
    }
}
