//! What must hold: at every moment, and when all faults are over and all is quiet.

use crate::guest::Life;
use crate::host::{HEARTBEAT_MS, Host, LEASE_TTL_MS, WINDOW_BYTES};
use crate::lease::{Held, Server};
use crate::memory::BLOCK_BYTES;
use crate::pool::Watch;
use crate::rig::MAILBOX_BYTES;
use crate::world::World;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vfio_shim::model::{Bdf, COMMAND, Function, RegionIndex};
use vfio_shim::ntb::soft::{ARC_SCRATCH, SCRATCH};
use vfio_shim::path::{LeaseId, OfferState, PortStatus};

/// How late a lease's expiry may be: as long as an `open` under way may take, and then some.
const EXPIRY_SLACK_MS: u64 = 8_000;
/// How long all may take to be quiet: the longest wait of the product, and then some.
const QUIET_MS: u64 = 40_000;

impl World {
    /// What holds at every moment.
    pub fn check_always(&mut self) {
        if self.random.once_in(4) {
            // Memory of guests that have ended is looked at when all is quiet.
            let guests = self.guests.iter().map(|guest| guest.borrow());
            let live = guests.filter(|guest| guest.life == Life::Running);
            live.for_each(|guest| guest.ram.check());
        }
        if !self.is_forged() {
            self.check_scratch();
        }
        self.check_held_once();
        self.check_free();
        self.check_expiry();
    }

    /// A store into a function's register is of a guest that has the function still.
    pub fn check_scratch(&self) {
        for host in &self.hosts {
            for lent in &host.functions {
                let register = if lent.arc { ARC_SCRATCH } else { SCRATCH };
                let bar = lent.soft.bar(RegionIndex(0)).expect("BAR0");
                let value = bar.read_u64(register);
                if value == 0 || value == u64::MAX {
                    continue;
                }
                let guests = self.guests.iter().map(|guest| guest.borrow());
                let mut owner = guests.filter(|guest| guest.serial == value >> 32);
                let owner = owner.next().expect("only guests store");
                let tag = owner.tags.iter().find(|(tag, _)| *tag == value);
                let resets = tag.map(|(_, resets)| *resets);
                assert!(
                    Arc::ptr_eq(&owner.function, &lent.soft) && resets == Some(lent.soft.resets()),
                    "INVARIANT store: {value:#x} of guest {} stands in {} of {} after {} resets, and was stored after {resets:?}",
                    owner.serial,
                    lent.bdf,
                    host.name(),
                    lent.soft.resets()
                );
            }
        }
    }

    /// A function that nobody has by what is written reaches nothing. A daemon writes down that its
    /// port is gone while the kernel still closes what that had: nobody can open it until then.
    fn check_free(&self) {
        let closing = |side: usize| self.apart && self.is_closing(side);
        let hosts = self.hosts.iter().filter(|host| !host.tainted);
        for host in hosts.filter(|host| !closing(host.side)) {
            for lent in &host.functions {
                let maps = lent.soft.space().maps().len();
                assert!(
                    maps == 0 || host.disk.holder(lent.bdf).is_some(),
                    "INVARIANT reach: {} of {} has {maps} maps, and nobody has it by the store",
                    lent.bdf,
                    host.name()
                );
            }
        }
    }

    /// A lease whose path nobody opens ends in time.
    pub fn check_expiry(&self) {
        let now_ms = self.scheduler.now_ms();
        let stopped = |host: &Host| self.scheduler.is_stopped(host.daemon);
        let up = |host: &&Host| host.engine.is_some() && host.pool.is_some() && !stopped(host);
        for host in self.hosts.iter().filter(up) {
            let unopened = host.watch.as_ref().and_then(Watch::unopened);
            let awake = self.scheduler.awake_since_ms(host.side);
            if let (Some((lease, granted_ms)), Some(awake_ms)) = (unopened, awake) {
                // Its clock stands while no daemon is there, and begins anew with the next; one that
                // stands still does nothing until it goes on.
                let since_ms = granted_ms.max(awake_ms).max(host.daemon_since_ms);
                let end_ms = since_ms + host.lease_ttl_ms + EXPIRY_SLACK_MS;
                assert!(
                    now_ms <= end_ms,
                    "INVARIANT expiry: lease {lease} of {}, granted at {granted_ms} ms, lives at {now_ms} ms without a path",
                    host.name()
                );
            }
        }
    }

    /// However much was forged, this host holds no more than it has functions.
    pub fn check_bounds(&mut self, side: usize) {
        if self.hosts[side].engine.is_none() {
            return;
        }
        // What a forger has borrowed and never opened goes by itself.
        let ttl_ms = self.hosts[side].lease_ttl_ms;
        if ttl_ms < LEASE_TTL_MS {
            self.run_for(ttl_ms + EXPIRY_SLACK_MS);
            self.check_expiry();
        }
        let functions = self.hosts[side].functions.len();
        let Some(status) = self.status(side) else {
            return;
        };
        let held = (status.lent.len(), status.borrowed.len());
        assert!(
            held.0 <= functions && held.1 <= functions,
            "INVARIANT bounds: {} lends and has borrowed {held:?}, and its peer forges",
            self.hosts[side].name()
        );
    }

    /// Of two borrowers' ends of one function, one at least is lost.
    fn check_held_once(&self) {
        for (at, one) in self.held.iter().enumerate() {
            for other in &self.held[at + 1..] {
                let same = (one.side, one.function) == (other.side, other.function);
                assert!(
                    !same,
                    "INVARIANT lease: function {} is held twice: {} and {}",
                    one.function, one.lease, other.lease
                );
            }
        }
    }

    /// Ends all faults and waits until all is quiet.
    pub fn settle(&mut self) {
        self.trace.tell(3, || "all faults end".to_owned());
        self.plan_nothing();
        self.thaw_all();
        self.end_forging();
        let end_ms = self.scheduler.now_ms() + QUIET_MS;
        loop {
            self.revive();
            self.run_for(HEARTBEAT_MS);
            self.reap();
            if self.is_quiet() {
                break;
            }
            assert!(
                self.scheduler.now_ms() < end_ms,
                "INVARIANT liveness: {} are still under way after {QUIET_MS} ms without faults",
                self.unquiet()
            );
        }
        self.leave_quarantine();
        // A lost bell is found at a heartbeat, and an unmap told to the lender by then.
        self.run_for(3 * HEARTBEAT_MS);
        self.reap();
        if let Some(forger) = &mut self.forger {
            forger.at_it = false;
        }
    }

    /// `quarantine retry`, of what a host's store has in quarantine since an earlier daemon.
    fn leave_quarantine(&mut self) {
        for side in 0..2 {
            let lent = self.status(side).map(|status| status.lent);
            let held = lent.unwrap_or_default().into_iter().map(|lent| lent.offer);
            let held = held.filter(|offer| matches!(offer.state, OfferState::Quarantine(_)));
            for bdf in held.map(|offer| offer.entry.bdf) {
                let engine = self.hosts[side].engine.clone().expect("a daemon");
                let process = self.hosts[side].process;
                let state = self.run_in(process, "retry", move || engine.retry(bdf, QUIET_MS));
                self.trace
                    .tell(6, || format!("{bdf} is put back: {state:?}"));
            }
        }
    }

    fn thaw_all(&mut self) {
        (0..2).for_each(|side| self.scheduler.freeze_host(side, false));
        (0..2).for_each(|side| self.freeze_daemon(side, false));
        self.scheduler.thaw_all();
        if self.cut {
            self.cut = false;
            self.link.plug();
        }
        self.scheduler.poke();
    }

    fn revive(&mut self) {
        for side in 0..2 {
            if self.down(side).is_some() && !self.is_closing(side) {
                let name = self.hosts[side].name();
                self.trace
                    .tell(4, || format!("{name}: what is not there is started again"));
                self.restart(side);
            }
            self.start_keeper(side);
        }
        self.lend_unopened();
    }

    fn is_quiet(&mut self) -> bool {
        let guests = self.guests.iter().all(|guest| {
            let guest = guest.borrow();
            guest.life == Life::Running && guest.commands.is_empty() && guest.doing.is_none()
                || guest.life == Life::Ended && guest.undone
        });
        let up = self.hosts.iter().all(Host::is_joined);
        let mut dead = self.held.iter().filter(|held| held.server.ended());
        let buried = dead.all(Held::is_buried);
        let idle = self.verbs.is_empty() && self.orphans.is_empty() && buried;
        idle && guests && up && self.agreed() && self.keepers_rest()
    }

    fn unquiet(&mut self) -> String {
        let verbs: Vec<_> = self.verbs.iter().map(|v| (v.side, v.kind)).collect();
        let guests = self.guests.iter().map(|guest| guest.borrow());
        let guests = guests.filter(|g| g.life != Life::Ended || !g.undone);
        let guests: Vec<_> = guests
            .map(|g| (g.serial, g.life, g.doing, g.undone))
            .collect();
        let orphans = self.orphans.len();
        let links = [0, 1].map(|side| self.status(side).map(|status| status.link));
        let keepers = [0, 1].map(|side| self.unrest(side));
        format!(
            "verbs {verbs:?}, guests {guests:?}, {orphans} orphans, links {links:?}, keepers {keepers:?}"
        )
    }

    /// What `status` tells of a port.
    pub fn status(&mut self, side: usize) -> Option<PortStatus> {
        let engine = self.hosts[side].engine.clone()?;
        let process = self.hosts[side].process;
        self.run_in(process, "status", move || engine.status())
    }

    /// Both ports are in the same link session, or one of them must be started again.
    fn agreed(&mut self) -> bool {
        self.in_one_session().unwrap_or_else(|| self.is_tainted())
    }

    /// Whether both ports are in the same link session; none where one of them is in none.
    pub(crate) fn in_one_session(&mut self) -> Option<bool> {
        let [one, other] = [0, 1].map(|side| self.status(side).and_then(|status| status.session));
        let (one, other) = one.zip(other)?;
        let same = one.info.session == other.info.session;
        Some(same && one.info.peer_node.is_some() && other.info.peer_node.is_some())
    }

    pub(crate) fn is_tainted(&self) -> bool {
        self.hosts.iter().any(|host| host.tainted)
    }

    /// What holds when all is quiet.
    pub fn check_quiet(&mut self) {
        self.trace
            .tell(5, || "all is quiet, and is looked at".to_owned());
        for guest in &self.guests {
            guest.borrow_mut().ram.freeze_all();
        }
        self.check_scratch();
        // Beside a forger all may be quiet without a session: a lender that has none, whose
        // borrower does not know it yet, sends no interrupt.
        let joined = !self.is_tainted() || self.in_one_session() == Some(true);
        let lost = self.find_lost();
        self.collect();
        for (at, lost) in lost.iter().enumerate().filter(|_| joined) {
            if let (None, Some(guest)) = (lost, self.held[at].guest()) {
                guest.borrow_mut().check_nothing_lost();
            }
        }
        if self.is_tainted() {
            return;
        }
        for side in 0..2 {
            self.check_figures(side, &lost);
        }
    }

    /// Why each lease is lost, if it is.
    pub(crate) fn find_lost(&mut self) -> Vec<Option<String>> {
        let mut lost = Vec::new();
        for at in 0..self.held.len() {
            let process = self.hosts[self.held[at].side].process;
            let look: Box<dyn FnOnce() -> Option<String>> = match &self.held[at].server {
                Server::Thread { borrowed, .. } => {
                    let borrowed = Arc::clone(borrowed);
                    Box::new(move || borrowed.lost())
                }
                Server::Worker { server, .. } => {
                    let server = Arc::clone(server);
                    Box::new(move || server.path().lost())
                }
            };
            lost.push(self.run_in(process, "lost", look));
        }
        lost
    }

    /// The lender knows what the borrower knows, and both hosts have mapped just that.
    fn check_figures(&mut self, side: usize, lost: &[Option<String>]) {
        let name = self.hosts[side].name();
        let status = self.status(side).expect("a daemon");
        let live = || {
            self.held
                .iter()
                .zip(lost)
                .filter(|(_, lost)| lost.is_none())
        };
        let mut free = WINDOW_BYTES - MAILBOX_BYTES;
        let (mut maps, mut open) = (1, Vec::new());
        for (function, lent) in self.hosts[side].functions.iter().enumerate() {
            let held = live().map(|(held, _)| held);
            let mut held = held.filter(|held| held.side != side && held.function == function);
            let held = held.next();
            let offer = status.lent.iter().find(|l| l.offer.entry.bdf == lent.bdf);
            let told = offer.map(|l| (l.offer.lease, l.offer.state.clone()));
            let expected = match held {
                Some(held) => Some((Some(held.lease), OfferState::Open)),
                None => told.as_ref().map(|_| (None, OfferState::Available)),
            };
            assert_eq!(
                told, expected,
                "INVARIANT lease: {name} on function {function} (left), and its borrower (right)"
            );
            self.check_stored(side, lent.bdf, held.map(|held| held.lease));
            let of_function = lent.soft.space().maps().len();
            let blocks = held.map_or(0, blocks);
            assert_eq!(
                of_function, blocks,
                "INVARIANT leak: maps of function {function} of {name} (left), and its guest's (right)"
            );
            match held {
                Some(_) => {
                    open.push(lent.bdf);
                    let (bytes, areas) = lent.slices();
                    free -= bytes;
                    maps += areas;
                }
                None => self.check_power_on(side, function),
            }
        }
        let mine = || {
            live()
                .map(|(held, _)| held)
                .filter(|held| held.side == side)
        };
        let pinned: usize = mine().map(blocks).sum();
        maps += pinned;
        let port = self.hosts[side].port.space().maps().len();
        assert_eq!(
            port, maps,
            "INVARIANT leak: maps of the port of {name} (left), and what is to be there (right)"
        );
        // What was set aside may be used or not.
        if mine().all(|held| held.ram.is_none()) {
            let free = free - pinned as u64 * BLOCK_BYTES;
            assert_eq!(
                status.window_free, free,
                "INVARIANT leak: free bytes of the window of {name} (left), and what is to be free (right)"
            );
        }
        let leases: Vec<_> = status.borrowed.iter().map(|lease| lease.lease).collect();
        assert_eq!(
            leases.len(),
            mine().count(),
            "INVARIANT lease: {name} holds {leases:?}"
        );
        self.check_known(side, &open);
    }

    /// The store holds a function's lease just as long as its borrower does.
    fn check_stored(&self, side: usize, bdf: Bdf, held: Option<LeaseId>) {
        let host = &self.hosts[side];
        let stored = host.disk.holder(bdf);
        let name = host.name();
        assert_eq!(
            stored, held,
            "INVARIANT store: the lease of {bdf} in the store of {name} (left), and its borrower's (right)"
        );
    }

    /// A function that nobody has is as it was at power-on.
    fn check_power_on(&self, side: usize, function: usize) {
        let lent = &self.hosts[side].functions[function];
        let name = self.hosts[side].name();
        let mut command = [0; 2];
        let config = RegionIndex::CONFIG;
        let read = lent.soft.region_read(config, COMMAND as u64, &mut command);
        read.expect("config space");
        let bar = lent.soft.bar(RegionIndex(0)).expect("BAR0");
        let registers = [8, 16, 24, 32, 40, 48].map(|at| bar.read_u64(at));
        let dark = registers == [0; 6] || registers == [u64::MAX; 6];
        assert!(
            command[0] & 4 == 0 && lent.soft.triggers() == 0 && dark,
            "INVARIANT undo: function {function} of {name} is not as at power-on: command {command:x?}, {} triggers, registers {registers:x?}",
            lent.soft.triggers()
        );
    }

    /// What must not be relied on any more is started again.
    pub fn clean_up(&mut self) {
        for side in 0..2 {
            if self.hosts[side].tainted {
                self.kill_port(side);
            }
        }
        if self.hosts.iter().any(|host| host.engine.is_none()) {
            self.settle();
        }
    }

    /// All is given back and ended; nothing may be left.
    pub fn end(&mut self) {
        self.trace.tell(6, || "all is given back".to_owned());
        (0..self.held.len()).for_each(|at| self.give_back(at));
        self.settle();
        assert!(
            self.held.is_empty(),
            "INVARIANT leak: leases are held after `return`"
        );
        self.check_quiet();
        self.clean_up();
        for side in 0..2 {
            self.stop(side);
            for lent in &self.hosts[side].functions {
                self.check_stored(side, lent.bdf, None);
            }
        }
        assert_eq!(
            self.maps(),
            0,
            "INVARIANT leak: maps after the end of both daemons"
        );
        self.end_keepers();
        for host in &self.hosts {
            for lent in &host.functions {
                assert_eq!(
                    Arc::strong_count(&lent.soft),
                    1 + self.users(&lent.soft),
                    "INVARIANT leak: a function is held by somebody"
                );
            }
        }
    }

    fn users(&self, soft: &Arc<vfio_shim::ntb::soft::SoftFunction>) -> usize {
        let guests = self.guests.iter().map(|guest| guest.borrow());
        guests
            .filter(|guest| Arc::ptr_eq(&guest.function, soft))
            .count()
    }
}

/// Blocks that the device of a held function has.
fn blocks(held: &crate::lease::Held) -> usize {
    let running = held
        .vmm
        .as_ref()
        .filter(|vmm| !vmm.ended.load(Ordering::Acquire));
    running.map_or(0, |vmm| {
        let guest = vmm.guest.borrow();
        match guest.life == Life::Running && guest.master {
            true => guest.mapped.iter().filter(|m| **m == Some(true)).count(),
            false => 0,
        }
    })
}
