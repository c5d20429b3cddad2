//! Which faults a schedule plans, and what of them has struck.

use crate::lease::Held;
use crate::steps::Step;
use crate::table::Trouble;
use crate::world::World;
use sublet::pool::When;
use vfio_shim::ntb::soft::{CHANCE_ONE, Fault, FaultPlan};

/// Of which kind a fabric is: what stores it can hold back at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fabric {
    /// None: bells and stores keep their order.
    Ordered,
    /// Those of devices.
    LateDma,
    /// All: bells overtake them.
    Overtaking,
}

impl Fabric {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ordered, Self::LateDma, Self::Overtaking];

    /// The plan that a link of this kind has to be made with.
    pub fn plan(self) -> FaultPlan {
        match self {
            Self::Ordered => FaultPlan::default(),
            Self::LateDma => FaultPlan::default().nth(Fault::DmaHeld(1), u64::MAX),
            Self::Overtaking => FaultPlan::default().nth(Fault::StoreHeld(1), u64::MAX),
        }
    }
}

/// How many plans there are for one that kills at a step that has a name.
const KILL_AT_STEP_ONCE_IN: usize = 4;
/// The link's plan in the table; functions and spaces come behind it.
const LINK: usize = 0;

impl World {
    /// A plan for the cable.
    pub fn plan_link(&mut self, fabric: Fabric) {
        let random = &mut self.random;
        let mut plan = FaultPlan::seeded(random.draw());
        let late = 1 + random.below(200) as u32;
        let often = 1 + random.below(CHANCE_ONE as usize / 2) as u32;
        plan = match fabric {
            Fabric::Ordered => plan,
            Fabric::LateDma => plan.chance(Fault::DmaHeld(late), often),
            Fabric::Overtaking if random.once_in(3) => plan.chance(Fault::DmaHeld(late), often),
            Fabric::Overtaking => plan.chance(Fault::StoreHeld(late), often),
        };
        let bells = 1 + random.below(CHANCE_ONE as usize / 2) as u32;
        plan = match random.below(4) {
            0 => plan.chance(Fault::BellLost, bells),
            1 => plan.chance(Fault::BellLate(late), bells),
            _ => plan,
        };
        let nth = 1 + random.below(400) as u64;
        let away = random.below(30) as u32;
        plan = match random.below(8) {
            0 => plan.nth(Fault::FlapAtStore(away), nth),
            1 => plan.nth(Fault::FlapAtBell(away), nth / 8 + 1),
            _ => plan,
        };
        self.note_struck();
        self.table.rearmed(LINK);
        let armed = self.link.arm(plan.clone());
        armed.expect("a link that can hold these stores");
        self.trace.tell(1, || format!("the cable's plan: {plan:?}"));
    }

    /// A plan for functions and containers: now and then one operation fails.
    pub fn plan_failures(&mut self) {
        let faults = [
            Fault::MapFails,
            Fault::UnmapFails,
            Fault::SetIrqsFails,
            Fault::ResetFails,
            Fault::ConfigFails,
        ];
        let fault = faults[self.random.below(faults.len())];
        let late = if fault == Fault::SetIrqsFails { 2 } else { 6 };
        let nth = 1 + self.random.below(late) as u64;
        let side = self.random.below(2);
        let function = self.random.below(2);
        let plan = FaultPlan::default().nth(fault, nth);
        self.note_struck();
        let host = &self.hosts[side];
        let of_port = self.random.once_in(2);
        if host.engine.is_none() {
            // Its kernel closes everything, and is not to fail.
            return;
        }
        let name = host.name();
        match fault {
            Fault::MapFails | Fault::UnmapFails if of_port => {
                host.port.space().arm(plan);
                self.table.rearmed(port_plan(side));
            }
            Fault::MapFails | Fault::UnmapFails => {
                host.functions[function].soft.space().arm(plan);
                self.table.rearmed(space_plan(side, function));
            }
            _ => {
                host.functions[function].soft.arm(plan);
                self.table.rearmed(function_plan(side, function));
            }
        }
        self.trace.tell(nth, || {
            format!("{name}: {fault:?} is planned for operation {nth} (port: {of_port}, function {function})")
        });
    }

    /// A plan for a host's disk: now and then one write of a lease fails.
    pub fn plan_store(&mut self) {
        let side = self.random.below(2);
        let nth = self.random.below(8) as u64;
        let when = [When::Before, When::After][self.random.below(2)];
        let wanted = self.random.once_in(2);
        self.note_struck();
        let host = &mut self.hosts[side];
        match wanted {
            true => host.disk.plan(nth, when),
            false => host.disk.plan_nothing(),
        }
        let name = host.name();
        self.trace.tell(nth, || {
            format!("{name}: write {nth} fails {when:?} it reached the disk: {wanted}")
        });
    }

    /// Now and then whoever comes to a step that has a name is killed there.
    pub fn plan_kill(&mut self) {
        let step = Step::all().nth(self.random.below(Step::OF_PATHS));
        let wanted = self.random.once_in(KILL_AT_STEP_ONCE_IN);
        self.scheduler.core().kill_at(step.filter(|_| wanted));
    }

    /// No faults any more.
    pub fn plan_nothing(&mut self) {
        self.scheduler.core().kill_at(None);
        self.note_struck();
        self.table.rearmed(LINK);
        self.link.arm(FaultPlan::default()).expect("no faults");
        for side in 0..2 {
            self.hosts[side].disk.plan_nothing();
            self.hosts[side].port.space().arm(FaultPlan::default());
            self.table.rearmed(port_plan(side));
            for function in 0..self.hosts[side].functions.len() {
                let soft = &self.hosts[side].functions[function].soft;
                soft.arm(FaultPlan::default());
                soft.space().arm(FaultPlan::default());
                self.table.rearmed(space_plan(side, function));
                self.table.rearmed(function_plan(side, function));
            }
        }
    }

    /// Looks at what has struck since the last look.
    pub fn note_struck(&mut self) {
        let mut new = self.table.struck(LINK, self.link.struck());
        for side in 0..2 {
            let struck = self.hosts[side].port.space().struck();
            let of_port = self.table.struck(port_plan(side), struck);
            self.taint(&of_port);
            new.extend(of_port);
            for function in 0..self.hosts[side].functions.len() {
                let soft = &self.hosts[side].functions[function].soft;
                let (space, own) = (soft.space().struck(), soft.struck());
                let mut of_function = self.table.struck(space_plan(side, function), space);
                of_function.extend(self.table.struck(function_plan(side, function), own));
                self.taint(&of_function);
                new.extend(of_function);
            }
        }
        for side in 0..2 {
            if let Some((trouble, count)) = self.hosts[side].disk.struck() {
                self.table.meet(trouble, count);
                new.push((trouble, count));
            }
        }
        for side in 0..2 {
            let expired = self.hosts[side].disk.expired();
            if expired != 0 {
                self.table.meet(Trouble::LeaseExpired, expired);
                new.push((Trouble::LeaseExpired, expired));
            }
        }
        for (trouble, count) in new {
            self.trace
                .tell(count, || format!("struck: {trouble:?}, {count} times"));
        }
        self.tell_downs();
    }

    /// What could not be mapped, taken away or put back leaves figures off until the daemons start again.
    fn taint(&mut self, struck: &[(Trouble, u64)]) {
        let leaves = |(trouble, _): &(Trouble, u64)| {
            matches!(
                trouble,
                Trouble::MapFails
                    | Trouble::UnmapFails
                    | Trouble::ResetFails
                    | Trouble::ConfigFails
            )
        };
        if struck.iter().any(leaves) {
            self.hosts.iter_mut().for_each(|host| host.tainted = true);
        }
    }

    /// What is wrong without a plan meets the operations of now as well.
    pub fn meet_states(&mut self) {
        let frozen_hosts = self.scheduler.frozen_hosts();
        if frozen_hosts {
            self.table.meet(Trouble::HostFrozen, 1);
        }
        let workers = self.held.iter().filter_map(Held::worker);
        let [mut frozen, mut dead] = [0; 2];
        let daemons = self.hosts.iter().filter(|host| host.line.is_some());
        let daemons = daemons.filter(|host| self.scheduler.is_stopped(host.daemon));
        let daemons = daemons.count();
        let keepers = self.hosts.iter().filter_map(|host| host.keeper.as_ref());
        let [mut keepers_frozen, mut keepers_dead] = [0; 2];
        for keeper in keepers {
            match keeper.process {
                Some(process) => {
                    keepers_frozen += usize::from(self.scheduler.is_stopped(process));
                }
                None => keepers_dead += 1,
            }
        }
        for worker in workers {
            frozen += usize::from(self.scheduler.is_stopped(worker));
            dead += usize::from(self.scheduler.core().is_dead(worker));
        }
        for (count, trouble) in [
            (frozen, Trouble::WorkerFrozen),
            (dead, Trouble::WorkerDead),
            (daemons, Trouble::DaemonFrozen),
            (keepers_frozen, Trouble::KeeperFrozen),
            (keepers_dead, Trouble::KeeperDown),
            (
                self.scheduler.stopped() - frozen - daemons - keepers_frozen,
                Trouble::VmmFrozen,
            ),
        ] {
            if count != 0 && !frozen_hosts {
                self.table.meet(trouble, 1);
            }
        }
        for down in [0, 1].map(|side| self.down(side)).into_iter().flatten() {
            self.table.meet(down, 1);
        }
        if self.cut {
            self.table.meet(Trouble::CableOut, 1);
        }
        if self.is_forged() {
            self.table.meet(Trouble::PeerForges, 1);
        }
    }
}

fn port_plan(side: usize) -> usize {
    1 + side
}

fn space_plan(side: usize, function: usize) -> usize {
    3 + 2 * side + function
}

fn function_plan(side: usize, function: usize) -> usize {
    7 + 2 * side + function
}
