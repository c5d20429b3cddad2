//! What a schedule does next: chosen by chance among what can be done now.

use crate::guest::{Command, Guest, Life};
use crate::lease::Server;
use crate::memory::{BLOCKS, CONTROL, READ_ONLY, SLOTS, Slot, address};
use crate::table::Op;
use crate::world::World;
use std::sync::atomic::Ordering;

/// A write there is an interrupt request on x86.
const MSI_ADDRESS: u64 = 0xfee0_0000;

impl World {
    /// Does something; returns what.
    pub fn act(&mut self) -> Op {
        loop {
            let op = self.choose();
            if self.perform(op) {
                self.table.begin(op);
                self.meet_states();
                return op;
            }
        }
    }

    fn choose(&mut self) -> Op {
        let all: usize = Op::ALL.iter().map(|(_, weight)| weight).sum();
        let mut at = self.random.below(all);
        for (op, weight) in Op::ALL {
            match at.checked_sub(weight) {
                Some(left) => at = left,
                None => return op,
            }
        }
        Op::Interrupt
    }

    /// False when it cannot be done now.
    fn perform(&mut self, op: Op) -> bool {
        match op {
            Op::Lend | Op::Unlend | Op::Revoke => self.lender_verb(op),
            Op::Borrow | Op::Return => self.borrower_verb(op),
            Op::Connect | Op::KillVmm | Op::FreezeVmm | Op::ThawVmm => self.vmm(op),
            Op::KillWorker | Op::FreezeWorker | Op::ThawWorker => self.worker(op),
            Op::KillBoth | Op::KillPort | Op::KillDaemon | Op::PowerOff | Op::Restart => {
                self.life(op)
            }
            Op::FreezeHost | Op::ThawHost => self.freezer(op),
            Op::FreezeDaemon | Op::ThawDaemon => self.freeze_some_daemon(op),
            Op::CutCable | Op::PlugCable => self.cable(op),
            Op::Forge => self.forge(),
            _ => self.guest(op),
        }
    }

    fn lender_verb(&mut self, op: Op) -> bool {
        let side = self.random.below(2);
        let function = self.random.below(2);
        let Some(engine) = self.hosts[side].engine.clone() else {
            return false;
        };
        let busy = |verb: &crate::lease::Verb| verb.side == side && verb.function == function;
        let lent = &self.hosts[side].functions[function];
        let (bdf, name) = (lent.bdf, self.hosts[side].name());
        let leased = self
            .held
            .iter()
            .any(|h| h.side != side && h.function == function);
        match op {
            Op::Revoke if !leased => return false,
            Op::Lend if lent.wanted && !lent.unopened && !self.random.once_in(12) => return false,
            Op::Revoke => engine.revoke(bdf, "revoked by the operator"),
            _ if self.verbs.iter().any(busy) => return false,
            Op::Lend => self.lend(side, function),
            _ => self.unlend(side, function),
        }
        self.trace
            .tell(op as u64, || format!("{name}: {op:?} function {function}"));
        true
    }

    fn borrower_verb(&mut self, op: Op) -> bool {
        let side = self.random.below(2);
        if self.hosts[side].engine.is_none() {
            return false;
        }
        let name = self.hosts[side].name();
        if op == Op::Borrow {
            // The daemon refuses what it holds or is about to hold already.
            let function = self.random.below(2);
            let held = self
                .held
                .iter()
                .any(|h| h.side == side && h.function == function);
            let verbs = self.verbs.iter();
            let asked = verbs.filter(|v| v.side == side && v.function == function);
            if held || asked.count() != 0 {
                return false;
            }
            let ram = self.random.once_in(3).then_some(2 << 20);
            self.trace
                .tell(1, || format!("{name}: borrows function {function}"));
            self.borrow(side, function, ram);
            return true;
        }
        let mine = |at: &usize| self.held[*at].side == side && !self.held[*at].returning;
        let held: Vec<usize> = (0..self.held.len()).filter(mine).collect();
        let Some(at) = self.random.pick(&held) else {
            return false;
        };
        let lease = self.held[at].lease;
        self.trace
            .tell(lease.0, || format!("{name}: returns lease {lease}"));
        self.give_back(at);
        true
    }

    fn vmm(&mut self, op: Op) -> bool {
        let all: Vec<usize> = (0..self.held.len()).collect();
        let Some(at) = self.random.pick(&all) else {
            return false;
        };
        let held = &self.held[at];
        let lease = held.lease;
        match (op, &held.vmm) {
            (Op::Connect, vmm) => {
                let free = vmm.as_ref().is_none_or(|vmm| {
                    vmm.ended.load(Ordering::Acquire) && vmm.guest.borrow().undone
                });
                let served = !held.server.ended() && !held.returning;
                if !free || !served {
                    return false;
                }
                self.connect(at);
            }
            (_, Some(vmm)) if !vmm.ended.load(Ordering::Acquire) => {
                let process = vmm.process;
                match op {
                    Op::KillVmm => {
                        vmm.guest.borrow_mut().end();
                        self.scheduler.kill(process);
                    }
                    Op::FreezeVmm => self.scheduler.freeze(process, true),
                    _ if self.scheduler.is_stopped(process) => {
                        self.scheduler.freeze(process, false);
                    }
                    _ => return false,
                }
            }
            _ => return false,
        }
        self.trace
            .tell(lease.0, || format!("lease {lease}: {op:?}"));
        true
    }

    fn worker(&mut self, op: Op) -> bool {
        let alive =
            |at: &usize| self.held[*at].worker().is_some() && !self.held[*at].server.ended();
        let all: Vec<usize> = (0..self.held.len()).filter(alive).collect();
        let Some(at) = self.random.pick(&all) else {
            return false;
        };
        let Some(process) = self.held[at].worker() else {
            return false;
        };
        match op {
            Op::KillWorker => self.scheduler.kill(process),
            Op::FreezeWorker if self.random.once_in(2) && self.stop_at_store(at) => {}
            Op::FreezeWorker => self.scheduler.freeze(process, true),
            _ if !self.scheduler.is_stopped(process) => return false,
            _ => self.scheduler.freeze(process, false),
        }
        let number = process.number;
        self.trace
            .tell(number, || format!("worker {number}: {op:?}"));
        true
    }

    /// A worker stands still just before a store of its guest. False where none is to come.
    pub fn stop_at_store(&mut self, at: usize) -> bool {
        let held = &self.held[at];
        let (Server::Worker { process, near, .. }, Some(guest)) = (&held.server, held.guest())
        else {
            return false;
        };
        let mut guest = guest.borrow_mut();
        if !near || guest.life != Life::Running {
            return false;
        }
        guest.commands.push_back(Command::Store);
        self.scheduler.core().stop_at_access(*process);
        self.scheduler.poke();
        true
    }

    fn life(&mut self, op: Op) -> bool {
        let side = self.random.below(2);
        let host = &self.hosts[side];
        let name = host.name();
        let (port, daemon) = (host.engine.is_some(), host.pool.is_some());
        match op {
            Op::Restart if self.start_some(side) => self.recover(),
            Op::KillBoth if port && daemon => self.kill(side),
            Op::KillPort if self.apart && port => self.kill_port(side),
            Op::KillDaemon if self.apart && daemon => self.kill_daemon(side),
            Op::PowerOff if port => self.power_off(side),
            _ => return false,
        }
        self.trace.tell(op as u64, || format!("{name}: {op:?}"));
        true
    }

    fn freezer(&mut self, op: Op) -> bool {
        let side = self.random.below(2);
        let name = self.hosts[side].name();
        let freeze = op == Op::FreezeHost;
        if self.scheduler.is_frozen_host(side) == freeze {
            return false;
        }
        self.scheduler.freeze_host(side, freeze);
        self.trace.tell(op as u64, || format!("{name}: {op:?}"));
        match freeze {
            // Long enough for the peer to notice, or not.
            true if self.random.once_in(2) => {
                let ms = 500 + self.random.below(3000) as u64;
                self.run_for(ms);
            }
            true => {}
            false => self.recover(),
        }
        true
    }

    fn freeze_some_daemon(&mut self, op: Op) -> bool {
        let side = self.random.below(2);
        let freeze = op == Op::FreezeDaemon;
        let host = &self.hosts[side];
        if !self.apart || host.pool.is_none() || self.scheduler.is_stopped(host.daemon) == freeze {
            return false;
        }
        let name = host.name();
        self.freeze_daemon(side, freeze);
        self.trace.tell(op as u64, || format!("{name}: {op:?}"));
        true
    }

    /// Mostly enough time for the next link session.
    fn recover(&mut self) {
        if !self.random.once_in(4) {
            let ms = 500 + self.random.below(2000) as u64;
            self.run_for(ms);
        }
    }

    fn cable(&mut self, op: Op) -> bool {
        let cut = op == Op::CutCable;
        if self.cut == cut {
            return false;
        }
        self.cut = cut;
        if cut {
            self.link.cut();
        } else {
            self.link.plug();
        }
        self.tell_downs();
        self.scheduler.poke();
        self.trace.tell(op as u64, || format!("{op:?}"));
        if !cut {
            self.recover();
        }
        true
    }

    fn guest(&mut self, op: Op) -> bool {
        let free = |at: &usize| {
            let guest = self.held[*at].guest();
            guest.is_some_and(|guest| {
                let guest = guest.borrow();
                guest.life == Life::Running && guest.commands.len() < 3
            })
        };
        let free: Vec<usize> = (0..self.held.len()).filter(free).collect();
        let Some(at) = self.random.pick(&free) else {
            return false;
        };
        let Some(guest) = self.held[at].guest().cloned() else {
            return false;
        };
        let command = self.command(op, &guest.borrow());
        let Some(command) = command else {
            return false;
        };
        let serial = guest.borrow().serial;
        self.trace
            .tell(serial, || format!("guest {serial}: {command:?}"));
        guest.borrow_mut().commands.push_back(command);
        self.scheduler.poke();
        true
    }

    fn command(&mut self, op: Op, guest: &Guest) -> Option<Command> {
        let random = &mut self.random;
        let vector = random.below(guest.vectors.len());
        let blocks = |mapped: bool| {
            let all = (1..BLOCKS).filter(move |block| *block != READ_ONLY);
            all.filter(|block| guest.mapped[*block] == Some(mapped))
                .collect::<Vec<usize>>()
        };
        Some(match op {
            Op::Map => Command::Map(random.pick(&blocks(false))?),
            Op::Unmap => Command::Unmap(random.pick(&blocks(true))?),
            Op::Interrupt => {
                let from = random.pick(&blocks(true)).unwrap_or(READ_ONLY);
                let to = random.pick(&blocks(true))?;
                Command::Copy {
                    from: Slot(from, SLOTS / 2 + random.below(SLOTS / 2)),
                    to: Slot(to, random.below(SLOTS / 2)),
                    vector,
                }
            }
            Op::Rogue => {
                let unmapped = random.pick(&blocks(false)).unwrap_or(READ_ONLY);
                let behind = address(BLOCKS - 1) + 4096;
                let to = [
                    address(unmapped),
                    address(READ_ONLY),
                    behind,
                    MSI_ADDRESS,
                    0,
                ];
                let to = random.pick(&to)?;
                Command::Rogue { to, vector }
            }
            Op::Store => Command::Store,
            Op::Mask if !guest.vectors[vector].masked => Command::Mask(vector),
            Op::Unmask if guest.vectors[vector].masked => Command::Unmask(vector),
            Op::Swap => Command::Swap(vector),
            Op::Rearm => Command::Rearm,
            Op::Reset => Command::Reset,
            Op::Reboot => Command::Reboot,
            Op::HangUp => Command::HangUp,
            _ => return None,
        })
    }
}

const _: () = assert!(CONTROL == 0);
