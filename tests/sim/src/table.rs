//! Which operations met which faults: an empty cell means that something was not tried.

use crate::steps::Step;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use vfio_shim::ntb::soft::Fault;

/// What a schedule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Op {
    Lend,
    Unlend,
    Borrow,
    Return,
    Revoke,
    Connect,
    Map,
    Unmap,
    Interrupt,
    Rogue,
    Store,
    Mask,
    Unmask,
    Swap,
    Rearm,
    Reset,
    Reboot,
    KillVmm,
    HangUp,
    KillBoth,
    KillPort,
    KillDaemon,
    PowerOff,
    Restart,
    FreezeHost,
    ThawHost,
    FreezeDaemon,
    ThawDaemon,
    FreezeVmm,
    ThawVmm,
    KillWorker,
    FreezeWorker,
    ThawWorker,
    CutCable,
    PlugCable,
    Forge,
}

impl Op {
    /// All of them, with how often each is chosen.
    pub const ALL: [(Self, usize); 36] = [
        (Self::Lend, 6),
        (Self::Unlend, 1),
        (Self::Borrow, 14),
        (Self::Return, 3),
        (Self::Revoke, 2),
        (Self::Connect, 20),
        (Self::Map, 14),
        (Self::Unmap, 12),
        (Self::Interrupt, 50),
        (Self::Rogue, 5),
        (Self::Store, 7),
        (Self::Mask, 9),
        (Self::Unmask, 16),
        (Self::Swap, 9),
        (Self::Rearm, 3),
        (Self::Reset, 4),
        (Self::Reboot, 3),
        (Self::KillVmm, 2),
        (Self::HangUp, 2),
        (Self::KillBoth, 1),
        (Self::KillPort, 1),
        (Self::KillDaemon, 2),
        (Self::PowerOff, 1),
        (Self::Restart, 40),
        (Self::FreezeHost, 2),
        (Self::ThawHost, 30),
        (Self::FreezeDaemon, 2),
        (Self::ThawDaemon, 16),
        (Self::FreezeVmm, 3),
        (Self::ThawVmm, 20),
        (Self::KillWorker, 2),
        (Self::FreezeWorker, 4),
        (Self::ThawWorker, 16),
        (Self::CutCable, 1),
        (Self::PlugCable, 40),
        (Self::Forge, 60),
    ];
}

/// What goes wrong meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Trouble {
    BellLost,
    BellLate,
    StoreHeld,
    DmaHeld,
    FlapAtStore,
    FlapAtBell,
    MapFails,
    UnmapFails,
    SetIrqsFails,
    ResetFails,
    ConfigFails,
    StoreFails,
    StoreUnsure,
    HostFrozen,
    DaemonFrozen,
    KeeperFrozen,
    VmmFrozen,
    WorkerFrozen,
    WorkerDead,
    HostDown,
    PortDown,
    DaemonDown,
    KeeperDown,
    CableOut,
    LeaseExpired,
    PeerForges,
}

impl Trouble {
    /// All of them.
    pub const ALL: [Self; 26] = [
        Self::BellLost,
        Self::BellLate,
        Self::StoreHeld,
        Self::DmaHeld,
        Self::FlapAtStore,
        Self::FlapAtBell,
        Self::MapFails,
        Self::UnmapFails,
        Self::SetIrqsFails,
        Self::ResetFails,
        Self::ConfigFails,
        Self::StoreFails,
        Self::StoreUnsure,
        Self::HostFrozen,
        Self::DaemonFrozen,
        Self::KeeperFrozen,
        Self::VmmFrozen,
        Self::WorkerFrozen,
        Self::WorkerDead,
        Self::HostDown,
        Self::PortDown,
        Self::DaemonDown,
        Self::KeeperDown,
        Self::CableOut,
        Self::LeaseExpired,
        Self::PeerForges,
    ];
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::BellLost => Self::BellLost,
            Fault::BellLate(_) => Self::BellLate,
            Fault::StoreHeld(_) => Self::StoreHeld,
            // No fabric that keeps PCIe's promises loses one: schedules plan none.
            Fault::DmaHeld(_) | Fault::DmaLost => Self::DmaHeld,
            Fault::FlapAtStore(_) => Self::FlapAtStore,
            Fault::FlapAtBell(_) => Self::FlapAtBell,
            Fault::MapFails => Self::MapFails,
            Fault::UnmapFails => Self::UnmapFails,
            Fault::SetIrqsFails => Self::SetIrqsFails,
            Fault::ResetFails => Self::ResetFails,
            Fault::ConfigFails => Self::ConfigFails,
        }
    }
}

/// How many of the last operations, and of the next, a fault meets.
const RECENT: usize = 4;

/// Operations by faults.
#[derive(Clone, Debug, Default)]
pub struct Table {
    cells: BTreeMap<(Op, Trouble), u64>,
    recent: VecDeque<Op>,
    /// How many operations were begun.
    begun: u64,
    /// At which of them each fault was met last.
    met: BTreeMap<Trouble, u64>,
    /// What had struck at the last look, for each thing that has a plan.
    seen: BTreeMap<usize, BTreeMap<Fault, u64>>,
    /// How often a process was killed at each step that has a name.
    kills: BTreeMap<Step, u64>,
}

impl Table {
    /// An operation begins.
    pub fn begin(&mut self, op: Op) {
        self.begun += 1;
        let begun = self.begun;
        let still = self
            .met
            .iter()
            .filter(|(_, at)| begun - **at <= RECENT as u64);
        for trouble in still.map(|(trouble, _)| *trouble).collect::<Vec<_>>() {
            *self.cells.entry((op, trouble)).or_default() += 1;
        }
        self.recent.push_back(op);
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    /// Something went wrong, or is wrong, while these were under way.
    pub fn meet(&mut self, trouble: Trouble, count: u64) {
        self.met.insert(trouble, self.begun);
        for op in &self.recent {
            *self.cells.entry((*op, trouble)).or_default() += count;
        }
    }

    /// What a plan has struck until now; returns what is new.
    pub fn struck(&mut self, plan: usize, struck: BTreeMap<Fault, u64>) -> Vec<(Trouble, u64)> {
        let seen = self.seen.entry(plan).or_default();
        let new = |(fault, count): (&Fault, &u64)| {
            let more = count - seen.get(fault).copied().unwrap_or(0);
            (more != 0).then_some((Trouble::from(*fault), more))
        };
        let new: Vec<_> = struck.iter().filter_map(new).collect();
        self.seen.insert(plan, struck);
        for (trouble, count) in &new {
            self.meet(*trouble, *count);
        }
        new
    }

    /// A plan is about to be replaced, and will count from 0.
    pub fn rearmed(&mut self, plan: usize) {
        self.seen.remove(&plan);
    }

    /// A process was killed at this step.
    pub fn killed(&mut self, step: Step) {
        self.kill(step, 1);
    }

    /// So often.
    pub fn kill(&mut self, step: Step, count: u64) {
        *self.kills.entry(step).or_default() += count;
    }

    /// How often a process was killed at each step that has a name, in order.
    pub fn kills(&self) -> impl Iterator<Item = (Step, u64)> + '_ {
        Step::all().map(|step| (step, self.kills.get(&step).copied().unwrap_or(0)))
    }

    /// Adds another's.
    pub fn add(&mut self, other: &Self) {
        for (step, count) in &other.kills {
            self.kill(*step, *count);
        }
        for (cell, count) in &other.cells {
            *self.cells.entry(*cell).or_default() += count;
        }
    }

    /// How often they met.
    pub fn met(&self, op: Op, trouble: Trouble) -> u64 {
        self.cells.get(&(op, trouble)).copied().unwrap_or(0)
    }

    /// Of so many schedules each.
    pub fn cell(&mut self, op: Op, trouble: Trouble, count: u64) {
        *self.cells.entry((op, trouble)).or_default() += count;
    }

    /// Row by row, for another process.
    pub fn cells(&self) -> impl Iterator<Item = u64> + '_ {
        let all = Op::ALL
            .iter()
            .flat_map(|(op, _)| Trouble::ALL.map(|t| (*op, t)));
        all.map(|cell| self.cells.get(&cell).copied().unwrap_or(0))
    }

    /// What was not tried.
    pub fn empty(&self) -> Vec<(Op, Trouble)> {
        let all = Op::ALL
            .iter()
            .flat_map(|(op, _)| Trouble::ALL.map(|t| (*op, t)));
        all.filter(|cell| !self.cells.contains_key(cell)).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12}", "")?;
        for trouble in Trouble::ALL {
            write!(f, " {:>12}", format!("{trouble:?}"))?;
        }
        for (op, _) in Op::ALL {
            write!(f, "\n{:>12}", format!("{op:?}"))?;
            for trouble in Trouble::ALL {
                let count = self.met(op, trouble);
                write!(f, " {count:>12}")?;
            }
        }
        write!(f, "\nkilled at:")?;
        for (step, count) in self.kills() {
            write!(f, " {step} {count}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_meets_the_last_operations_and_leaves_other_cells_empty() {
        let mut table = Table::default();
        for op in [Op::Lend, Op::Borrow, Op::Map, Op::Unmap, Op::Mask] {
            table.begin(op);
        }
        let struck = BTreeMap::from([(Fault::BellLate(3), 2)]);
        assert_eq!(table.struck(0, struck.clone()), [(Trouble::BellLate, 2)]);
        assert_eq!(table.struck(0, struck), []);
        let empty = table.empty();
        assert!(empty.contains(&(Op::Lend, Trouble::BellLate)));
        assert!(!empty.contains(&(Op::Borrow, Trouble::BellLate)));
        assert_eq!(empty.len(), 36 * 26 - 4);
    }
}
