//! What goes wrong on the soft fabric, and when: the n-th operation of a kind, or by chance from a seed; pure.

use std::collections::BTreeMap;

/// What a [`Fault`] can strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// `AddressSpace::map`.
    Map,
    /// `AddressSpace::unmap`.
    Unmap,
    /// `Function::set_irqs`.
    SetIrqs,
    /// `Function::reset`.
    Reset,
    /// A function's config space, read or written.
    Config,
    /// A store through an outbound window.
    Store,
    /// Such a store of a device.
    Dma,
    /// A ring of the peer's doorbell.
    Bell,
}

/// Something that goes wrong with one operation. Delays are counted in operations of either port
/// of the link: the fabric has no clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// A map is refused; nothing is mapped.
    MapFails,
    /// An unmap is refused; all stays mapped.
    UnmapFails,
    /// Triggers are refused; the old ones stay.
    SetIrqsFails,
    /// A reset is refused; nothing is reset.
    ResetFails,
    /// An access to config space is refused.
    ConfigFails,
    /// A bell never arrives.
    BellLost,
    /// A bell arrives so many operations later.
    BellLate(u32),
    /// A store stays behind for so many operations, or until its host loads through a window.
    /// Bells overtake it, and so do stores of other requesters: a host's processors are one, each
    /// of its devices is another, and only the stores of one requester keep their order.
    StoreHeld(u32),
    /// A device's store stays behind in the same way, while those of the processors and bells keep
    /// their order: all that a port promises whose bells stay behind stores.
    DmaHeld(u32),
    /// A device's store never arrives.
    DmaLost,
    /// The link goes down at a store, which is lost with all that is under way, and comes back
    /// so many operations later.
    FlapAtStore(u32),
    /// The same at a bell.
    FlapAtBell(u32),
}

impl Fault {
    /// What it strikes.
    pub fn operation(self) -> Operation {
        match self {
            Self::MapFails => Operation::Map,
            Self::UnmapFails => Operation::Unmap,
            Self::SetIrqsFails => Operation::SetIrqs,
            Self::ResetFails => Operation::Reset,
            Self::ConfigFails => Operation::Config,
            Self::BellLost | Self::BellLate(_) | Self::FlapAtBell(_) => Operation::Bell,
            Self::StoreHeld(_) | Self::FlapAtStore(_) => Operation::Store,
            Self::DmaHeld(_) | Self::DmaLost => Operation::Dma,
        }
    }
}

/// Which faults strike, and when. The default is none at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    seed: u64,
    scheduled: Vec<(Fault, u64)>,
    chances: Vec<(Fault, u32)>,
}

/// What a chance of 1 is counted in.
pub const CHANCE_ONE: u32 = 1024;

impl FaultPlan {
    /// No faults yet; chances will follow from this seed.
    pub fn seeded(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    /// `fault` strikes the `nth` operation that it can strike, counted from 1 when armed.
    #[must_use]
    pub fn nth(mut self, fault: Fault, nth: u64) -> Self {
        self.scheduled.push((fault, nth));
        self
    }

    /// `fault` strikes each operation that it can strike with a chance of `chance` of
    /// [`CHANCE_ONE`]. Of several that would strike one operation, the first does.
    #[must_use]
    pub fn chance(mut self, fault: Fault, chance: u32) -> Self {
        self.chances.push((fault, chance));
        self
    }

    /// Whether it never strikes.
    pub fn is_empty(&self) -> bool {
        self.faults().next().is_none()
    }

    /// Whether it may hold any store back, so that a bell overtakes it.
    pub fn holds_stores(&self) -> bool {
        self.faults().any(|f| matches!(f, Fault::StoreHeld(_)))
    }

    /// Whether it may hold back stores of devices.
    pub fn holds_dma(&self) -> bool {
        self.faults().any(|f| matches!(f, Fault::DmaHeld(_))) || self.holds_stores()
    }

    fn faults(&self) -> impl Iterator<Item = Fault> {
        let chances = self.chances.iter().filter(|(_, chance)| *chance != 0);
        let scheduled = self.scheduled.iter().map(|(fault, _)| *fault);
        scheduled.chain(chances.map(|(fault, _)| *fault))
    }
}

/// A plan at work.
#[derive(Clone, Debug, Default)]
pub struct FaultDice {
    plan: FaultPlan,
    random: u64,
    seen: BTreeMap<Operation, u64>,
    struck: BTreeMap<Fault, u64>,
}

impl FaultDice {
    /// At its beginning.
    pub fn new(plan: FaultPlan) -> Self {
        Self {
            random: plan.seed,
            plan,
            ..Self::default()
        }
    }

    /// An operation is about to happen: what strikes it.
    pub fn roll(&mut self, operation: Operation) -> Option<Fault> {
        let seen = self.seen.entry(operation).or_default();
        *seen += 1;
        let nth = *seen;
        let due = |(fault, at): &&(Fault, u64)| fault.operation() == operation && *at == nth;
        let scheduled = self
            .plan
            .scheduled
            .iter()
            .find(due)
            .map(|(fault, _)| *fault);
        let fault = scheduled.or_else(|| self.by_chance(operation))?;
        *self.struck.entry(fault).or_default() += 1;
        Some(fault)
    }

    fn by_chance(&mut self, operation: Operation) -> Option<Fault> {
        let random = &mut self.random;
        let chances = self.plan.chances.iter();
        let mut fitting = chances.filter(|(fault, _)| fault.operation() == operation);
        let hit =
            fitting.find(|(_, chance)| draw(random) % u64::from(CHANCE_ONE) < (*chance).into());
        hit.map(|(fault, _)| *fault)
    }

    /// What has struck so far, and how often.
    pub fn struck(&self) -> &BTreeMap<Fault, u64> {
        &self.struck
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn story(plan: &FaultPlan) -> Vec<Option<Fault>> {
        let mut dice = FaultDice::new(plan.clone());
        let operations = [Operation::Bell, Operation::Store, Operation::Map];
        let all = operations.into_iter().cycle().take(3000);
        all.map(|operation| dice.roll(operation)).collect()
    }

    #[test]
    fn default_plan_never_strikes() {
        let plan = FaultPlan::default();
        assert!(plan.is_empty() && story(&plan).iter().all(Option::is_none));
    }

    #[test]
    fn nth_operation_is_struck_once_and_others_are_not_counted() {
        let mut dice = FaultDice::new(FaultPlan::default().nth(Fault::MapFails, 2));
        let rolls = [
            Operation::Unmap,
            Operation::Map,
            Operation::Map,
            Operation::Map,
        ];
        let struck = rolls.map(|operation| dice.roll(operation));
        assert_eq!(struck, [None, None, Some(Fault::MapFails), None]);
        assert_eq!(dice.struck()[&Fault::MapFails], 1);
    }

    #[test]
    fn same_seed_tells_the_same_story_and_another_seed_another() {
        let plan = |seed| {
            FaultPlan::seeded(seed)
                .chance(Fault::BellLost, 256)
                .chance(Fault::StoreHeld(4), 512)
        };
        let [one, again, other] = [7, 7, 8].map(|seed| story(&plan(seed)));
        assert_eq!(one, again);
        assert_ne!(one, other);
        let lost = one.iter().filter(|f| **f == Some(Fault::BellLost)).count();
        assert!(
            (200..300).contains(&lost),
            "{lost} of 1000 at a chance of 1/4"
        );
        assert!(plan(7).holds_stores());
    }
}
