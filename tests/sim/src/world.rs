//! Two hosts, the cable between them, their operators, VMMs and guests; and how time passes for all of them.

use crate::forger::Forger;
use crate::guest::{Guest, Life, Tally};
use crate::host::{Host, WINDOW_BYTES};
use crate::keeper::{KeeperHost, open_by};
use crate::lease::{Held, Kind, Outcome, Verb, Vmm, Wish};
use crate::random::Random;
use crate::schedule::Shape;
use crate::scheduler::{Process, Scheduler};
use crate::steps::Step;
use crate::table::Table;
use crate::trace::Trace;
use crate::vmm;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vfio_shim::model::Function;
use vfio_shim::ntb::soft::{FaultPlan, SoftHost, SoftLink, SoftPortConfig};
use vfio_shim::path::{Engine, Keep, PortStatus};

/// All of a simulation.
pub struct World {
    /// Who runs next.
    pub scheduler: Scheduler,
    /// What happened.
    pub trace: Trace,
    /// What the schedule chooses by.
    pub random: Random,
    /// The cable.
    pub link: SoftLink,
    /// Both ends.
    pub hosts: [Host; 2],
    /// What is borrowed.
    pub held: Vec<Held>,
    /// Verbs under way.
    pub verbs: Vec<Verb>,
    /// All guests that ever were, whose memory must stay as it is.
    pub guests: Vec<Rc<RefCell<Guest>>>,
    /// VMMs whose function is gone.
    pub orphans: Vec<Vmm>,
    /// How often a port was killed, and its end of the link with it.
    pub downs: u64,
    link_downs: u64,
    /// A borrow was refused: there is something to wait for.
    pub refused: bool,
    /// Whether the cable is out.
    pub cut: bool,
    /// Operations and the faults they met.
    pub table: Table,
    /// One of both hosts forges, if there is one that does.
    pub forger: Option<Forger>,
    /// Whether functions are served by processes of their own, most of them.
    pub workers: bool,
    /// Whether ports and daemons are processes of their own.
    pub apart: bool,
    /// Whether keepers open the functions for the ports.
    pub kept: bool,
    /// How many trees there were for keepers.
    pub(crate) trees: u64,
    /// Those processes, but for some that have ended.
    pub worker_processes: Vec<Process>,
    pub(crate) dir: PathBuf,
    pub(crate) sockets: u64,
    guests_last: u64,
}

impl World {
    /// Both daemons run, all functions are offered.
    pub fn new(mut random: Random, shape: Shape, trace: Trace, dir: &Path) -> Self {
        let mut scheduler = Scheduler::new(random.fork());
        let hosts = [0, 1].map(|_| {
            let core = Arc::clone(scheduler.core());
            SoftHost::paced(move || core.pace())
        });
        let config = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link =
            SoftLink::between(hosts.clone(), [config; 2], shape.fabric.plan()).expect("a link");
        link.arm(FaultPlan::default()).expect("no faults");
        let mut side = 0;
        let hosts = hosts.map(|soft| {
            let process = scheduler.process(side);
            side += 1;
            Host::new(side - 1, soft, link.port(side - 1), process)
        });
        let mut world = Self {
            scheduler,
            trace,
            random,
            link,
            hosts,
            held: Vec::new(),
            verbs: Vec::new(),
            guests: Vec::new(),
            orphans: Vec::new(),
            downs: 0,
            link_downs: 0,
            refused: false,
            cut: false,
            table: Table::default(),
            forger: None,
            workers: shape.workers,
            apart: shape.apart,
            kept: shape.kept,
            trees: 0,
            worker_processes: Vec::new(),
            dir: dir.to_owned(),
            sockets: 0,
            guests_last: 0,
        };
        if shape.forger {
            let side = world.random.below(2);
            world.forger = Some(Forger::new(side, &world.hosts));
        }
        if shape.kept {
            world.start_keepers();
        }
        for side in 0..2 {
            if shape.short_leases {
                world.hosts[side].lease_ttl_ms = 20 + world.random.below(1500) as u64;
            }
            if shape.apart {
                world.hosts[side].line_socket = Some(dir.join(format!("leases-{side}.sock")));
                world.hosts[side].start_daemon(&mut world.scheduler);
            }
            world.start(side);
        }
        world
    }

    /// Starts a host's port, which offers what was offered before; with its daemon, where both are
    /// one process.
    pub fn start(&mut self, side: usize) {
        self.hosts[side].start(&mut self.scheduler);
        for function in 0..self.hosts[side].functions.len() {
            if self.hosts[side].functions[function].wanted {
                self.lend(side, function);
            }
        }
    }

    /// One thread runs until it pauses; signals that it gave are looked at before anybody else runs.
    fn step(&mut self) -> bool {
        let Some(signaller) = self.scheduler.step(&mut self.trace) else {
            return false;
        };
        // Before anybody looks at what a device has made of half a command.
        let downs = self.link.downs();
        if std::mem::replace(&mut self.link_downs, downs) != downs {
            self.tell_downs();
        }
        if signaller {
            self.collect();
        }
        if let Some((process, step)) = self.scheduler.core().reached() {
            self.kill_at(process, step);
        }
        true
    }

    /// A process is killed at a step that has a name.
    fn kill_at(&mut self, process: Process, step: Step) {
        let host = &self.hosts[process.side];
        let (name, port, daemon) = (host.name(), host.process, host.daemon);
        let keeper = host.keeper.as_ref().and_then(|keeper| keeper.process);
        self.trace.tell(step.number(), || {
            let who = match process {
                _ if process == port => "the port",
                _ if process == daemon => "the daemon",
                _ if Some(process) == keeper => "the keeper",
                _ => "a worker",
            };
            format!("{name}: {who} is killed at {step}")
        });
        self.table.killed(step);
        match process {
            _ if process == port => self.kill_port(process.side),
            _ if process == daemon => self.kill_daemon(process.side),
            _ if Some(process) == keeper => self.kill_keeper(process.side),
            _ => self.scheduler.kill(process),
        }
    }

    /// Takes all signals.
    pub fn collect(&mut self) {
        self.tell_downs();
        for guest in &self.guests {
            let mut guest = guest.borrow_mut();
            if guest.life == Life::Running {
                guest.collect();
            }
        }
    }

    /// Tells guests how often the link has gone down.
    pub fn tell_downs(&mut self) {
        let downs = self.downs + self.link.downs();
        for guest in &self.guests {
            guest.borrow_mut().downs_are(downs);
        }
    }

    /// Threads run until all wait, at most so many steps.
    pub fn run_steps(&mut self, steps: u64) {
        let end = self.scheduler.steps() + steps;
        while self.scheduler.steps() < end && self.step() {}
    }

    /// This much time passes.
    pub fn run_for(&mut self, ms: u64) {
        let end_ms = self.scheduler.now_ms() + ms;
        loop {
            while self.step() {}
            if !self.scheduler.pass(end_ms) {
                return;
            }
            self.trace.at(self.scheduler.now_ms());
        }
    }

    /// Runs something that waits as a thread of a host's daemon, until it has ended.
    pub fn run_in<T: 'static>(
        &mut self,
        process: Process,
        what: &str,
        run: impl FnOnce() -> T + 'static,
    ) -> T {
        let slot = Rc::new(RefCell::new(None));
        let theirs = Rc::clone(&slot);
        let run = move || {
            let value = run();
            *theirs.borrow_mut() = Some(value);
        };
        let ended = self.scheduler.start(process, what, Box::new(run));
        let end_ms = self.scheduler.now_ms() + 60_000;
        while !ended.load(Ordering::Acquire) {
            let on = self.step() || self.scheduler.pass(end_ms);
            assert!(on, "INVARIANT liveness: {what} does not end in a minute");
            self.trace.at(self.scheduler.now_ms());
        }
        slot.take().expect("its value")
    }

    pub(crate) fn verb(
        &mut self,
        (side, kind, function): (usize, Kind, usize),
        wish: Option<Wish>,
        run: impl FnOnce(Arc<Engine>) -> Outcome + 'static,
    ) {
        let Some(engine) = self.hosts[side].engine.clone() else {
            return;
        };
        let outcome = Rc::new(RefCell::new(None));
        let theirs = Rc::clone(&outcome);
        let run = move || {
            let value = run(engine);
            *theirs.borrow_mut() = Some(value);
        };
        let process = self.hosts[side].process;
        let ended = self.scheduler.start(process, "verb", Box::new(run));
        self.verbs.push(Verb {
            side,
            kind,
            function,
            wish,
            outcome,
            ended,
        });
    }

    /// `available`.
    pub fn lend(&mut self, side: usize, function: usize) {
        let lent = &mut self.hosts[side].functions[function];
        (lent.wanted, lent.unopened) = (true, false);
        let (entry, soft) = (lent.entry(), Arc::clone(&lent.soft));
        let (bdf, device) = (lent.bdf, Arc::clone(&lent.device));
        let host = &self.hosts[side];
        let keeper = host.keeper.as_ref().map(KeeperHost::folder);
        let runtime = self.scheduler.runtime(host.process);
        self.verb((side, Kind::Lend, function), None, move |engine| {
            let function: Arc<dyn Function> = soft;
            let offers = |status: PortStatus| status.lent.iter().any(|l| l.offer.entry.bdf == bdf);
            let offered = engine.status().is_some_and(offers);
            let keep = match keeper.filter(|_| !offered) {
                None => Keep::default(),
                Some(folder) => match open_by(&folder, bdf, &device, runtime) {
                    Ok(keep) => keep,
                    Err(refusal) => return Outcome::NotOpened(refusal),
                },
            };
            Outcome::Lent(engine.offer_with(entry, function, keep))
        });
    }

    /// `unavailable`.
    pub fn unlend(&mut self, side: usize, function: usize) {
        let bdf = self.hosts[side].functions[function].bdf;
        self.verb((side, Kind::Unlend, function), None, move |engine| {
            Outcome::Lent(engine.withdraw(bdf))
        });
    }

    /// Takes the answers of verbs.
    pub fn reap(&mut self) {
        let (ended, verbs) = std::mem::take(&mut self.verbs)
            .into_iter()
            .partition(|verb| verb.ended.load(Ordering::Acquire));
        self.verbs = verbs;
        let ended: Vec<Verb> = ended;
        for verb in ended {
            let Some(outcome) = verb.outcome.take() else {
                continue;
            };
            let host = self.hosts[verb.side].name();
            let kind = verb.kind;
            match outcome {
                Outcome::Borrowed(result) => {
                    let wish = verb.wish.expect("what was wished for");
                    self.borrowed((verb.side, verb.function), wish, result);
                }
                Outcome::Returned(result) => {
                    self.trace.tell(u64::from(result.is_ok()), || {
                        format!("{host}: {kind:?} is answered: {result:?}")
                    });
                    self.drop_held(|held| matches!(kind, Kind::Return(lease) if held.side == verb.side && held.lease == lease && held.function == verb.function));
                }
                Outcome::NotOpened(refusal) => {
                    self.trace.tell(2, || {
                        format!(
                            "{host}: function {} is not opened: {refusal}",
                            verb.function
                        )
                    });
                    self.hosts[verb.side].functions[verb.function].unopened = true;
                }
                Outcome::Lent(result) => {
                    self.trace.tell(u64::from(result.is_ok()), || {
                        format!(
                            "{host}: {kind:?} of function {} is answered: {result:?}",
                            verb.function
                        )
                    });
                    if verb.kind == Kind::Unlend && result.is_ok() {
                        self.hosts[verb.side].functions[verb.function].wanted = false;
                    }
                }
            }
        }
        self.undo_guests();
    }

    /// Forgets borrowed functions; their VMMs live on without.
    pub fn drop_held(&mut self, which: impl Fn(&Held) -> bool) {
        let (gone, held) = std::mem::take(&mut self.held).into_iter().partition(which);
        self.held = held;
        let gone: Vec<Held> = gone;
        for held in gone {
            self.orphans.extend(held.vmm);
        }
    }

    /// A VMM starts and connects.
    pub fn connect(&mut self, at: usize) {
        let held = &self.held[at];
        let (side, function, socket) = (held.side, held.function, held.socket.clone());
        let lent = &self.hosts[1 - side].functions[function];
        self.guests_last += 1;
        let guest = Guest::new(
            self.guests_last,
            Arc::clone(&lent.soft),
            lent.arc,
            lent.vectors,
        );
        let guest = Guest {
            forged: self.is_forged(),
            downs: self.downs + self.link.downs(),
            ..guest
        };
        let guest = Rc::new(RefCell::new(guest));
        let theirs = Rc::clone(&guest);
        let process = self.scheduler.process(side);
        let run = move || vmm::run(&theirs, &socket);
        let ended = self.scheduler.start(process, "vmm", Box::new(run));
        self.guests.push(Rc::clone(&guest));
        let new = Vmm {
            process,
            guest,
            ended,
        };
        let old = self.held[at].vmm.replace(new);
        self.orphans.extend(old);
    }

    /// Where all of a guest's session is undone, nothing arrives in its memory any more.
    pub fn undo_guests(&mut self) {
        for held in &self.held {
            if let Some(vmm) = &held.vmm
                && vmm.ended.load(Ordering::Acquire)
                && held.is_undone()
            {
                vmm.guest.borrow_mut().undo();
            }
        }
        // Without its worker, a guest's session is undone when its host's kernel has closed all.
        let closing = [0, 1].map(|side| {
            let closing = &self.hosts[side].closing;
            closing.as_ref().is_some_and(|c| !c.load(Ordering::Acquire))
        });
        self.orphans.retain(|vmm| {
            let over = vmm.ended.load(Ordering::Acquire) && !closing[vmm.process.side];
            if over {
                vmm.guest.borrow_mut().undo();
            }
            !over
        });
    }

    /// What was counted by all guests.
    pub fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        for guest in &self.guests {
            let tally = guest.borrow().tally;
            sum.raises += tally.raises;
            sum.signals += tally.signals;
            sum.looked += tally.looked;
            sum.turns += tally.turns;
        }
        sum
    }

    /// Whether anything is mapped by anybody.
    pub fn maps(&self) -> usize {
        let functions = self.hosts.iter().flat_map(|host| &host.functions);
        let of_functions: usize = functions.map(|f| f.soft.space().maps().len()).sum();
        let ports = self.hosts.iter().map(|host| host.port.space().maps().len());
        ports.sum::<usize>() + of_functions
    }

    /// A host loses power, with all that runs on it.
    pub fn power_off(&mut self, side: usize) {
        self.hosts[side].soft.stop();
        self.hosts[side].powered = false;
        let mine = |vmm: &&Vmm| vmm.process.side == side;
        let vmms = self.held.iter().filter_map(|held| held.vmm.as_ref());
        let vmms = vmms.chain(&self.orphans).filter(mine);
        let dead: Vec<_> = vmms
            .map(|vmm| (vmm.process, Rc::clone(&vmm.guest)))
            .collect();
        for (process, guest) in dead {
            self.scheduler.kill(process);
            guest.borrow_mut().end();
        }
        for worker in self.workers_of(side) {
            self.scheduler.kill(worker);
        }
        self.kill_keeper(side);
        self.kill(side);
    }

    /// What both kernels still have to do is done.
    pub fn is_closing(&self, side: usize) -> bool {
        let closing = &self.hosts[side].closing;
        closing
            .as_ref()
            .is_some_and(|closed| !closed.load(Ordering::Acquire))
    }
}
