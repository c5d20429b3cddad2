//! Keepers that die, stand still and come back beside everything else, and what that must not change.

use crate::host::{HEARTBEAT_MS, LOST_AFTER_MS};
use crate::keeper::KeeperHost;
use crate::steps::{KeeperStep, Step};
use crate::world::World;

/// How long a death may take to be known everywhere.
const KNOWN_MS: u64 = LOST_AFTER_MS + 10 * HEARTBEAT_MS;

impl World {
    /// Both hosts have a keeper from now on, by which their ports open functions.
    pub fn start_keepers(&mut self) {
        for side in 0..2 {
            self.switch_keeper_on(side);
        }
    }

    /// A host with power, whose tree is as after every boot.
    pub fn switch_keeper_on(&mut self, side: usize) {
        self.trees += 1;
        let tree = self.dir.join(format!("tree-{}", self.trees));
        let keeper = KeeperHost::new(tree, &self.hosts[side].functions);
        self.hosts[side].keeper = Some(keeper);
        self.start_keeper(side);
    }

    /// Starts a keeper that is not there, where a host has one.
    pub fn start_keeper(&mut self, side: usize) {
        let host = &mut self.hosts[side];
        if let (Some(keeper), true) = (&mut host.keeper, host.powered)
            && keeper.process.is_none()
        {
            keeper.start(&mut self.scheduler, side);
        }
    }

    /// A host's keeper is killed where it stands.
    pub fn kill_keeper(&mut self, side: usize) {
        if let Some(keeper) = &mut self.hosts[side].keeper {
            keeper.kill(&mut self.scheduler);
        }
    }

    /// Something happens to a keeper, or nothing.
    pub fn act_on_keepers(&mut self) {
        if !self.kept {
            return;
        }
        let side = self.random.below(2);
        let name = self.hosts[side].name();
        let keeper = self.hosts[side].keeper.as_ref();
        let alive = keeper.and_then(|keeper| keeper.process);
        let what = match (self.random.below(40), alive) {
            (0, Some(_)) => {
                self.kill_keeper(side);
                "is killed"
            }
            (1, Some(process)) => {
                self.scheduler.freeze(process, true);
                "stands still"
            }
            (2..6, Some(process)) if self.scheduler.is_stopped(process) => {
                self.scheduler.freeze(process, false);
                "goes on"
            }
            (6..10, Some(_)) => {
                let step = KeeperStep::ALL[self.random.below(KeeperStep::ALL.len())];
                let step = Some(Step::Keeper(step));
                self.scheduler.core().kill_at(step);
                "is to be killed at its next step"
            }
            (10..20, None) if self.hosts[side].powered => {
                self.start_keeper(side);
                "is started again"
            }
            _ => return,
        };
        self.trace.tell(12, || format!("{name}: the keeper {what}"));
    }

    /// Lends what no keeper has opened for its port yet.
    pub fn lend_unopened(&mut self) {
        for side in 0..2 {
            for function in 0..self.hosts[side].functions.len() {
                let mut verbs = self.verbs.iter();
                let busy = verbs.any(|verb| verb.side == side && verb.function == function);
                let host = &self.hosts[side];
                if host.functions[function].unopened && host.engine.is_some() && !busy {
                    self.lend(side, function);
                }
            }
        }
    }

    /// Of each host, a keeper lives; what its port offers it has bound, and nothing else.
    pub fn keepers_rest(&mut self) -> bool {
        !self.kept || (0..2).all(|side| self.unrest(side).is_none())
    }

    /// What of a host's keeper is not as it is to be when all is quiet.
    pub fn unrest(&mut self, side: usize) -> Option<String> {
        let lent = self.status(side)?.lent.into_iter();
        let offered: Vec<_> = lent.map(|lent| lent.offer.entry.bdf).collect();
        let host = &self.hosts[side];
        let keeper = host.keeper.as_ref()?;
        if keeper.process.is_none() {
            return Some("it does not live".to_owned());
        }
        let mut functions = host.functions.iter().map(|lent| {
            let is_open = lent.device.lock().is_ok_and(|device| device.is_some());
            let is_offered = offered.contains(&lent.bdf);
            let bound = keeper.is_bound(lent.bdf);
            let rests = bound == Some(is_offered) && is_open == is_offered && !lent.unopened;
            let bdf = lent.bdf;
            (!rests)
                .then(|| format!("{bdf}: offered {is_offered}, open {is_open}, bound {bound:?}"))
        });
        functions.find_map(|unrest| unrest)
    }

    /// When all is quiet a keeper dies, or stands still. Every path goes on, and every offer; what is
    /// taken from the pool meanwhile is given back by the next one, and what is offered is refused.
    pub fn check_death_of_keeper(&mut self) {
        let side = self.random.below(2);
        let name = self.hosts[side].name();
        let keeper = self.hosts[side].keeper.as_ref();
        let process = keeper.and_then(|keeper| keeper.process).expect("a keeper");
        let dies = self.random.once_in(2);
        self.trace.tell(13, || {
            let how = if dies { "dies" } else { "stands still" };
            format!("{name}: the keeper {how} when all is quiet")
        });
        let before = self.paths();
        match dies {
            true => self.kill_keeper(side),
            false => self.scheduler.freeze(process, true),
        }
        self.run_for(KNOWN_MS);
        let after = self.paths();
        assert_eq!(
            before, after,
            "INVARIANT keeper: sessions and leases before {name}'s keeper died or stood still (left), and after (right)"
        );
        if dies {
            self.check_pool_without_keeper(side);
        }
    }

    /// `unavailable` ends, and `available` says why not.
    fn check_pool_without_keeper(&mut self, side: usize) {
        let stored = self.stored(side);
        let Some(free) = stored.iter().position(|(_, lease)| lease.is_none()) else {
            return;
        };
        let bdf = self.hosts[side].functions[free].bdf;
        let bound = |world: &Self| world.hosts[side].keeper.as_ref()?.is_bound(bdf);
        let before = bound(self);
        self.unlend(side, free);
        self.run_for(KNOWN_MS);
        self.reap();
        let lent = self.status(side).expect("a port").lent;
        let name = self.hosts[side].name();
        assert!(
            self.verbs.is_empty() && lent.iter().all(|lent| lent.offer.entry.bdf != bdf),
            "INVARIANT keeper: {bdf} of {name} is still offered, or about to be taken back, as its keeper is dead"
        );
        assert_eq!(
            bound(self),
            before,
            "INVARIANT keeper: {bdf} of {name} before (left) and after it was taken back without a keeper (right)"
        );
        self.lend(side, free);
        self.run_for(KNOWN_MS);
        self.reap();
        assert!(
            self.hosts[side].functions[free].unopened,
            "INVARIANT keeper: {bdf} of {name} is offered without a keeper"
        );
    }

    /// All is given back, and so is every function; then there are no keepers any more.
    pub fn end_keepers(&mut self) {
        if !self.kept {
            return;
        }
        for side in 0..2 {
            let host = &self.hosts[side];
            let keeper = host.keeper.as_ref().expect("a keeper");
            for lent in &host.functions {
                assert_eq!(
                    keeper.is_bound(lent.bdf),
                    Some(false),
                    "INVARIANT keeper: whether {} of {} is bound after its port's end",
                    lent.bdf,
                    host.name()
                );
            }
            self.kill_keeper(side);
            self.hosts[side].keeper = None;
        }
        for tree in 1..=self.trees {
            let tree = self.dir.join(format!("tree-{tree}"));
            std::fs::remove_dir_all(tree).expect("a tree to remove");
        }
    }
}
