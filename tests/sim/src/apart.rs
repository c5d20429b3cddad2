//! Port and daemon of a host as two processes: each starts, and dies, without the other, and what must hold then.

use crate::host::{HEARTBEAT_MS, Host, LOST_AFTER_MS, PORT};
use crate::lease::Verb;
use crate::scheduler::Scheduler;
use crate::table::Trouble;
use crate::world::World;
use std::path::Path;
use std::sync::Arc;
use sublet::daemon::router::{LeaseLine, Line, LinePort};
use sublet::daemon::socket::ControlSocket;
use sublet::pool::{FunctionKey, LeaseState};
use sublet::port::PortLeases;
use vfio_shim::model::{Bdf, Runtime};
use vfio_shim::path::{LeaseId, LeasePool};

/// How long a death may take to be known everywhere, and what it ends to be undone.
const KNOWN_MS: u64 = LOST_AFTER_MS + 10 * HEARTBEAT_MS;
/// How many quiet moments there are for one at which somebody dies.
const DEATH_ONCE_IN: usize = 3;

impl Host {
    /// The port's end of the line, which is there before anything of the NTB is.
    pub fn wait_for_daemons(
        &self,
        socket: &Path,
        runtime: &Arc<dyn Runtime>,
    ) -> Arc<dyn LeasePool> {
        let socket = ControlSocket::claim_packets(socket).expect("a socket");
        let leases = PortLeases::start_on(Arc::clone(runtime), (self.node(), PORT), socket);
        leases.expect("a port that waits for a daemon")
    }

    /// Starts a daemon in a process of its own: the pool, and what looks for the port.
    pub fn start_daemon(&mut self, scheduler: &mut Scheduler) {
        let socket = self.line_socket.clone().expect("two processes");
        self.daemon = scheduler.process(self.side);
        self.start_pool(scheduler);
        let pool = self.pool.as_ref().expect("a pool").port(PORT);
        let port = LinePort {
            node: self.node(),
            name: PORT.to_owned(),
            socket,
        };
        let line = LeaseLine::start_on(scheduler.runtime(self.daemon), port, pool);
        self.line = Some(line.expect("a daemon that looks for its port"));
    }

    /// Whether port and daemon are there, and have said to each other what they hold.
    pub fn is_joined(&self) -> bool {
        let there = |line: &LeaseLine| matches!(line.now(), Line::There { .. });
        let joined = self.line_socket.is_none() || self.line.as_ref().is_some_and(there);
        self.engine.is_some() && self.pool.is_some() && joined
    }
}

impl World {
    /// What of a host's software is not there, if anything is not.
    pub fn down(&self, side: usize) -> Option<Trouble> {
        let host = &self.hosts[side];
        match (&host.engine, &host.pool) {
            (Some(_), Some(_)) => None,
            (None, Some(_)) => Some(Trouble::PortDown),
            (Some(_), None) => Some(Trouble::DaemonDown),
            (None, None) => Some(Trouble::HostDown),
        }
    }

    /// A host's port and daemon are killed where they stand.
    pub fn kill(&mut self, side: usize) {
        if self.hosts[side].engine.is_some() {
            self.kill_port(side);
        }
        if self.hosts[side].pool.is_some() {
            self.kill_daemon(side);
        }
    }

    /// A host's port is killed where it stands, with its daemon where they are one process; its
    /// kernel closes what it had.
    pub fn kill_port(&mut self, side: usize) {
        // Its kernel closes without any plan: what has struck until now would be forgotten.
        self.note_struck();
        let host = &mut self.hosts[side];
        self.scheduler.kill(host.process);
        host.engine = None;
        if host.line_socket.is_none() {
            host.pool = None;
        }
        self.verbs.retain(|verb: &Verb| verb.side != side);
        self.drop_held(|held| held.side == side);
        self.downs += 1;
        let workers = self.workers_of(side);
        self.hosts[side].close_all(&mut self.scheduler, &mut self.random, workers);
    }

    /// A host's daemon is killed where it stands, and its port goes on.
    pub fn kill_daemon(&mut self, side: usize) {
        let host = &mut self.hosts[side];
        self.scheduler.kill(host.daemon);
        host.line = None;
        host.pool = None;
    }

    /// A host's daemon stands still, or goes on.
    pub fn freeze_daemon(&mut self, side: usize, frozen: bool) {
        let host = &mut self.hosts[side];
        if host.line.is_some() && self.scheduler.is_stopped(host.daemon) != frozen {
            self.scheduler.freeze(host.daemon, frozen);
            host.daemon_since_ms = self.scheduler.now_ms();
        }
    }

    /// Starts some of what is not there. False where all is, or none can be started yet.
    pub fn start_some(&mut self, side: usize) -> bool {
        let (port, daemon) = match self.down(side) {
            None => return false,
            Some(Trouble::HostDown) if self.apart => {
                let which = self.random.below(3);
                (which != 1, which != 2)
            }
            Some(_) => (true, true),
        };
        self.start_missing(side, port, daemon)
    }

    /// Starts all that is not there and can be.
    pub fn restart(&mut self, side: usize) {
        self.start_missing(side, true, true);
    }

    /// Of a host that has power again if it had none. Whether anything was started: a port only
    /// is when the kernel has closed what the last one had.
    fn start_missing(&mut self, side: usize, port: bool, daemon: bool) -> bool {
        let host = &mut self.hosts[side];
        let daemon = daemon && self.apart && host.pool.is_none();
        let port = port && host.engine.is_none() && !self.is_closing(side);
        let host = &mut self.hosts[side];
        if (daemon || port) && !host.powered {
            host.soft.start();
            host.powered = true;
            if self.kept {
                self.switch_keeper_on(side);
            }
        }
        let host = &mut self.hosts[side];
        if daemon {
            host.start_daemon(&mut self.scheduler);
        }
        if port {
            self.start(side);
        }
        daemon || port
    }

    /// A host's port stops, then its daemon, which writes down what that means for its leases.
    pub fn stop(&mut self, side: usize) {
        let engine = self.hosts[side].engine.take().expect("a port");
        let pool = self.hosts[side].pool.take();
        let process = self.hosts[side].process;
        let daemon = self.hosts[side].daemon;
        self.run_in(process, "stop", move || engine.stop());
        // What the port said last has arrived.
        self.run_for(HEARTBEAT_MS);
        let line = self.hosts[side].line.take();
        self.run_in(daemon, "stop", move || drop((line, pool)));
    }

    /// A pool has for open what is open, and for free what nobody has.
    pub fn check_known(&mut self, side: usize, open: &[Bdf]) {
        let pool = self.hosts[side].pool.take().expect("a pool");
        let daemon = self.hosts[side].daemon;
        let (pool, status) = self.run_in(daemon, "leases", move || {
            let status = pool.status();
            (pool, status)
        });
        self.hosts[side].pool = Some(pool);
        let open: Vec<_> = open.iter().map(|bdf| FunctionKey::from(*bdf)).collect();
        for lease in status.expect("a pool's words").leases {
            let expected = match open.contains(&lease.function) {
                true => LeaseState::Open,
                false => LeaseState::Free,
            };
            assert_eq!(
                lease.state,
                expected,
                "INVARIANT apart: {} in the pool of {} (left), and at its port (right)",
                lease.function,
                self.hosts[side].name()
            );
        }
    }

    /// When all is quiet, a daemon dies or stands still without its port, or a port dies without its
    /// daemon: what that ends, and what it does not.
    pub fn check_deaths(&mut self) {
        let some = self.apart || self.kept;
        if !some || self.is_tainted() || !self.random.once_in(DEATH_ONCE_IN) {
            return;
        }
        if self.kept && (!self.apart || self.random.once_in(2)) {
            self.check_death_of_keeper();
            self.settle();
            return self.check_quiet();
        }
        let side = self.random.below(2);
        match self.random.below(3) {
            0 => self.check_death_of_daemon(side),
            1 => self.check_stand_of_daemon(side),
            _ => self.check_death_of_port(side),
        }
        self.settle();
        self.check_quiet();
    }

    /// Every path goes on, nothing new is lent, and the words for it are right.
    fn check_death_of_daemon(&mut self, side: usize) {
        let name = self.hosts[side].name();
        self.trace
            .tell(8, || format!("{name}: the daemon dies when all is quiet"));
        let before = self.paths();
        let stored = self.stored(side);
        self.kill_daemon(side);
        self.run_for(KNOWN_MS);
        let after = self.paths();
        assert_eq!(
            before, after,
            "INVARIANT apart: sessions and leases before {name}'s daemon died (left), and after (right)"
        );
        if let Some(free) = stored.iter().position(|(_, lease)| lease.is_none()) {
            self.check_refused(side, free);
        }
        if self.random.once_in(2) {
            self.check_returned(side);
        }
        assert_eq!(
            stored,
            self.stored(side),
            "INVARIANT apart: what is written on {name} before its daemon died (left), and after (right)"
        );
    }

    /// Every path goes on, who asks meanwhile is lent nothing, and no session ends by that.
    fn check_stand_of_daemon(&mut self, side: usize) {
        let name = self.hosts[side].name();
        self.trace.tell(10, || {
            format!("{name}: the daemon stands still when all is quiet")
        });
        let before = self.paths();
        let stored = self.stored(side);
        self.freeze_daemon(side, true);
        self.run_for(KNOWN_MS);
        let after = self.paths();
        assert_eq!(
            before, after,
            "INVARIANT apart: sessions and leases before {name}'s daemon stood still (left), and after (right)"
        );
        if let Some(free) = stored.iter().position(|(_, lease)| lease.is_none()) {
            let bdf = self.hosts[side].functions[free].bdf;
            let before = self.sessions();
            let borrowed = self.borrow_now(side, bdf);
            borrowed
                .expect_err("INVARIANT apart: a function is lent while its daemon stands still");
            self.run_for(KNOWN_MS);
            assert_eq!(
                before,
                self.sessions(),
                "INVARIANT apart: sessions before {name} was asked while its daemon stands still (left), and after (right)"
            );
        }
        if self.random.once_in(2) {
            self.check_returned(side);
        }
        self.freeze_daemon(side, false);
    }

    /// A peer of this host borrows one of its functions, and waits for what comes of it.
    fn borrow_now(&mut self, side: usize, bdf: Bdf) -> Result<(), String> {
        let engine = self.hosts[1 - side].engine.clone().expect("a port");
        let process = self.hosts[1 - side].process;
        self.run_in(process, "borrow", move || {
            let borrowed = engine.borrow(bdf, None);
            borrowed.map(|_| ()).map_err(|error| error.to_string())
        })
    }

    /// A lender without a daemon lends nothing, and says why.
    fn check_refused(&mut self, side: usize, function: usize) {
        let lent = &self.hosts[side].functions[function];
        let (bdf, offered) = (lent.bdf, lent.wanted);
        let linked = self.in_one_session() == Some(true);
        let borrowed = self.borrow_now(side, bdf);
        let words = borrowed.expect_err("INVARIANT apart: a function is lent without a daemon");
        assert!(
            !linked || !offered || words.contains("daemon does not run"),
            "INVARIANT apart: without a daemon, a borrower is told: {words}"
        );
    }

    /// A lender without a daemon takes a function back all the same.
    fn check_returned(&mut self, side: usize) {
        let of_this = |at: &usize| self.held[*at].side != side;
        let all: Vec<usize> = (0..self.held.len()).filter(of_this).collect();
        let Some(at) = self.random.pick(&all) else {
            return;
        };
        let (lease, function) = (self.held[at].lease, self.held[at].function);
        self.give_back(at);
        self.run_for(KNOWN_MS);
        self.reap();
        let lent = self.status(side).expect("a port").lent.into_iter();
        let bdf = self.hosts[side].functions[function].bdf;
        let mut lent = lent.filter(|lent| lent.offer.entry.bdf == bdf);
        let left = lent.find_map(|lent| lent.offer.lease);
        let mut others = self.held.iter().filter(|held| held.side != side);
        let held = others.any(|held| held.lease == lease);
        assert!(
            left.is_none() && !held,
            "INVARIANT apart: lease {lease} is given back without a daemon: its lender has {left:?}, and its borrower holds it: {held}"
        );
    }

    /// Every path of the port ends, on both hosts, and its daemon writes that down by itself.
    fn check_death_of_port(&mut self, side: usize) {
        let name = self.hosts[side].name();
        self.trace
            .tell(9, || format!("{name}: the port dies when all is quiet"));
        self.kill_port(side);
        self.run_for(KNOWN_MS);
        self.reap();
        assert!(
            !self.is_closing(side),
            "INVARIANT liveness: the kernel of {name} does not close what its port had"
        );
        for host in 0..2 {
            let held = self
                .stored(host)
                .into_iter()
                .find(|(_, lease)| lease.is_some());
            assert_eq!(
                held,
                None,
                "INVARIANT apart: the port of {name} is dead, and {} has a lease written down",
                self.hosts[host].name()
            );
        }
        let lost = self.find_lost();
        let alive = self.held.iter().zip(&lost).find(|(_, lost)| lost.is_none());
        assert!(
            alive.is_none(),
            "INVARIANT apart: the port of {name} is dead, and its peer holds {:?}",
            alive.map(|(held, _)| held.lease)
        );
        let functions = self.hosts.iter().flat_map(|host| &host.functions);
        let maps: usize = functions.map(|lent| lent.soft.space().maps().len()).sum();
        let port = self.hosts[side].port.space().maps().len();
        assert_eq!(
            (maps, port),
            (0, 0),
            "INVARIANT apart: maps of all functions and of the port of {name}, which is dead"
        );
    }

    /// The leases of a host's functions that are in force by what is written.
    pub(crate) fn stored(&self, side: usize) -> Vec<(Bdf, Option<LeaseId>)> {
        let host = &self.hosts[side];
        let functions = host.functions.iter().map(|lent| lent.bdf);
        functions.map(|bdf| (bdf, host.disk.holder(bdf))).collect()
    }

    /// In which session each port is.
    fn sessions(&mut self) -> [Option<u64>; 2] {
        [0, 1].map(|side| {
            let status = self.status(side).expect("a port");
            status.session.map(|session| session.info.session)
        })
    }

    /// In which session each port is, what it lends and how that stands; and who has lost what.
    pub(crate) fn paths(&mut self) -> Vec<String> {
        let mut paths = Vec::new();
        for side in 0..2 {
            let status = self.status(side).expect("a port");
            let session = status.session.map(|session| session.info.session);
            let lent = status.lent.into_iter();
            let lent = lent.map(|lent| (lent.offer.entry.bdf, lent.offer.lease, lent.offer.state));
            paths.push(format!("{session:?} {:?}", lent.collect::<Vec<_>>()));
        }
        let lost = self.find_lost();
        let held = self.held.iter().map(|held| held.lease);
        paths.extend(held.zip(lost).map(|held| format!("{held:?}")));
        paths
    }
}
