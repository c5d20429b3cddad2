//! Which thread runs next and what time it is: the simulation's own scheduler, clock and randomness.

use crate::coroutine::{Pause, Thread, is_dying, is_inside, pause};
use crate::random::Random;
use crate::steps::Step;
use crate::trace::Trace;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_shim::model::{Idle, Runtime, Task, UndoStep, Wait};

/// A thread pauses before a port's or function's operation once in so many of them.
const PREEMPT_ONCE_IN: usize = 12;
/// Threads that wait for fds look once in so many steps, as long as others can run.
const LOOK_AT_FDS_ONCE_IN: usize = 12;
/// A signal that ends a process has arrived before a step once in so many of them.
const KILL_ARRIVES_ONCE_IN: usize = 4;
/// How the threads are called that write VMMs' eventfds.
pub const SIGNALLER: &str = "irq-lease-";
/// More steps without any time passing than threads that make progress can need.
const STEPS_MAX: u64 = 400_000;

/// Whose threads live and die together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// The host it runs on.
    pub side: usize,
    /// Which one.
    pub number: u64,
}

struct Born {
    process: Process,
    name: String,
    run: Box<dyn FnOnce() + Send>,
    ended: Arc<AtomicBool>,
}

struct State {
    now_ms: u64,
    random: Random,
    entropy: Random,
    born: Vec<Born>,
    dead: Vec<Process>,
    /// Signals to end a process that have not arrived yet.
    killed: Vec<Process>,
    /// Processes that are to stand still at their next access of their own to a window.
    stops: Vec<Process>,
    /// Those that have come there.
    stopped: Vec<Process>,
    /// At which step the next process is killed that comes there.
    kill_at: Option<Step>,
    /// A process that has come there.
    reached: Option<(Process, Step)>,
}

/// What the threads see of the scheduler.
pub struct Core {
    state: Mutex<State>,
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A host's software is about to do something with a port or a function.
    pub fn pace(&self) {
        if is_inside() && !is_dying() && self.lock().random.once_in(PREEMPT_ONCE_IN) {
            pause(Pause::Ready);
        }
    }

    /// The clock.
    pub fn now_ms(&self) -> u64 {
        self.lock().now_ms
    }

    /// Ends a process, whichever thread asks: some steps may go by until it is gone.
    pub fn kill(&self, process: Process) {
        self.lock().killed.push(process);
    }

    /// Freezes a process where it next loads or stores something by itself, just before that.
    pub fn stop_at_access(&self, process: Process) {
        self.lock().stops.push(process);
    }

    /// A process is about to load or store something by itself.
    pub fn access(&self, process: Process) {
        {
            let mut state = self.lock();
            if !state.stops.contains(&process) {
                return;
            }
            state.stops.retain(|other| *other != process);
            state.stopped.push(process);
        }
        pause(Pause::Ready);
    }

    /// The next process that comes to this step is to be killed there.
    pub fn kill_at(&self, step: Option<Step>) {
        self.lock().kill_at = step;
    }

    /// Who has come there just now.
    pub fn reached(&self) -> Option<(Process, Step)> {
        self.lock().reached.take()
    }

    /// A process comes to a step, and may be killed there.
    pub fn reach(&self, process: Process, step: Step) {
        if !is_inside() || is_dying() {
            return;
        }
        {
            let mut state = self.lock();
            if state.kill_at != Some(step) {
                return;
            }
            state.kill_at = None;
            state.reached = Some((process, step));
        }
        // It is killed before anybody else runs.
        pause(Pause::Ready);
    }

    /// Whether it is gone.
    pub fn is_dead(&self, process: Process) -> bool {
        self.lock().dead.contains(&process)
    }

    /// What a process's threads stand on.
    pub fn runtime(self: &Arc<Self>, process: Process) -> Arc<dyn Runtime> {
        Arc::new(ProcessRuntime {
            core: Arc::clone(self),
            process,
        })
    }
}

/// What the threads of one process stand on.
pub struct ProcessRuntime {
    core: Arc<Core>,
    process: Process,
}

impl Runtime for ProcessRuntime {
    fn now_ms(&self) -> u64 {
        self.core.now_ms()
    }

    fn entropy(&self) -> u64 {
        self.core.lock().entropy.draw()
    }

    fn spawn(&self, name: String, run: Box<dyn FnOnce() + Send>) -> io::Result<Task> {
        let ended = Arc::new(AtomicBool::new(false));
        let process = self.process;
        let mut state = self.core.lock();
        if state.dead.contains(&process) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.born.push(Born {
            process,
            name,
            run,
            ended: Arc::clone(&ended),
        });
        Ok(Task::new(move || {
            wait_for(|| ended.load(Ordering::Acquire))
        }))
    }

    fn reach(&self, step: UndoStep) {
        self.core.reach(self.process, Step::Undo(step));
    }

    fn is_killed(&self) -> bool {
        self.core.is_dead(self.process)
    }

    fn idle(&self, wait: Wait) -> Idle {
        pause(Pause::Idle(wait));
        Idle::Look
    }
}

/// Lets others run until it is so. A thread that is killed does not wait.
pub fn wait_for(mut so: impl FnMut() -> bool) {
    let mut again = false;
    while !so() && is_inside() && !is_dying() {
        pause(Pause::Idle(Wait {
            again,
            ..Wait::default()
        }));
        again = true;
    }
}

struct Running {
    process: Process,
    name: String,
    thread: Thread,
    ended: Arc<AtomicBool>,
    /// The epoch in which it last looked and found nothing.
    looked: u64,
    until_ms: Option<u64>,
    /// It waits for fds, and looks less often: each look is a system call.
    fds: bool,
    serial: u64,
}

/// All threads, and the clock.
pub struct Scheduler {
    core: Arc<Core>,
    threads: Vec<Running>,
    /// Room for the choice of each step: threads that can run, and those that wait for fds.
    ready: [Vec<usize>; 2],
    frozen: Vec<Process>,
    frozen_sides: [bool; 2],
    /// When they were last frozen or thawed.
    thawed_ms: [u64; 2],
    /// Goes on whenever something may have changed for a thread that found nothing.
    epoch: u64,
    serial_last: u64,
    process_last: u64,
    steps: u64,
    idle_steps: u64,
}

impl Scheduler {
    /// No threads yet; all that is random follows from `random`.
    pub fn new(mut random: Random) -> Self {
        let state = State {
            now_ms: 0,
            entropy: random.fork(),
            random,
            born: Vec::new(),
            dead: Vec::new(),
            killed: Vec::new(),
            stops: Vec::new(),
            stopped: Vec::new(),
            kill_at: None,
            reached: None,
        };
        Self {
            core: Arc::new(Core {
                state: Mutex::new(state),
            }),
            threads: Vec::new(),
            ready: [Vec::new(), Vec::new()],
            frozen: Vec::new(),
            frozen_sides: [false; 2],
            thawed_ms: [0; 2],
            epoch: 1,
            serial_last: 0,
            process_last: 0,
            steps: 0,
            idle_steps: 0,
        }
    }

    /// What threads see of it.
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// A new process on a host.
    pub fn process(&mut self, side: usize) -> Process {
        self.process_last += 1;
        let number = self.process_last;
        Process { side, number }
    }

    /// What its threads stand on.
    pub fn runtime(&self, process: Process) -> Arc<dyn Runtime> {
        self.core.runtime(process)
    }

    /// Starts a thread; the flag tells that it has ended, one way or the other.
    pub fn start(
        &mut self,
        process: Process,
        name: &str,
        run: Box<dyn FnOnce()>,
    ) -> Arc<AtomicBool> {
        let ended = Arc::new(AtomicBool::new(false));
        self.begin(process, name.to_owned(), run, Arc::clone(&ended));
        ended
    }

    fn begin(
        &mut self,
        process: Process,
        name: String,
        run: Box<dyn FnOnce()>,
        ended: Arc<AtomicBool>,
    ) {
        self.serial_last += 1;
        self.threads.push(Running {
            process,
            name,
            thread: Thread::new(run),
            ended,
            looked: 0,
            until_ms: None,
            fds: false,
            serial: self.serial_last,
        });
    }

    fn adopt(&mut self) {
        let mut state = self.core.lock();
        if state.born.is_empty() {
            return;
        }
        let born = std::mem::take(&mut state.born);
        drop(state);
        for born in born {
            self.begin(born.process, born.name, born.run, born.ended);
        }
    }

    fn is_frozen(&self, process: Process) -> bool {
        self.frozen_sides[process.side] || self.frozen.contains(&process)
    }

    /// All of a host's software stands still, or goes on.
    pub fn freeze_host(&mut self, side: usize, frozen: bool) {
        if std::mem::replace(&mut self.frozen_sides[side], frozen) != frozen {
            self.thawed_ms[side] = self.now_ms();
        }
        self.epoch += 1;
    }

    /// A process stands still, or goes on.
    pub fn freeze(&mut self, process: Process, frozen: bool) {
        self.frozen.retain(|other| *other != process);
        if frozen {
            self.frozen.push(process);
        }
        self.epoch += 1;
    }

    /// Whether a host stands still.
    pub fn is_frozen_host(&self, side: usize) -> bool {
        self.frozen_sides[side]
    }

    /// Since when a host runs, if it does.
    pub fn awake_since_ms(&self, side: usize) -> Option<u64> {
        (!self.frozen_sides[side]).then_some(self.thawed_ms[side])
    }

    /// Whether any host does.
    pub fn frozen_hosts(&self) -> bool {
        self.frozen_sides != [false; 2]
    }

    /// Whether a process itself stands still.
    pub fn is_stopped(&self, process: Process) -> bool {
        self.frozen.contains(&process)
    }

    /// All processes go on.
    pub fn thaw_all(&mut self) {
        self.frozen.clear();
        let mut core = self.core.lock();
        core.stops.clear();
        // Also who stopped itself in the step before this, and is not counted as frozen yet.
        core.stopped.clear();
        drop(core);
        self.epoch += 1;
    }

    /// How many processes do.
    pub fn stopped(&self) -> usize {
        self.frozen.len()
    }

    /// Whether something stands still.
    pub fn any_frozen(&self) -> bool {
        self.frozen_sides != [false; 2] || !self.frozen.is_empty()
    }

    /// A process is gone, wherever its threads were.
    pub fn kill(&mut self, process: Process) {
        self.adopt();
        {
            let mut state = self.core.lock();
            if state.dead.contains(&process) {
                return;
            }
            state.dead.push(process);
        }
        self.frozen.retain(|other| *other != process);
        let (dead, alive) = std::mem::take(&mut self.threads)
            .into_iter()
            .partition(|running| running.process == process);
        self.threads = alive;
        let dead: Vec<Running> = dead;
        dead.iter()
            .for_each(|running| running.ended.store(true, Ordering::Release));
        drop(dead);
        self.epoch += 1;
    }

    /// Processes are gone that threads have killed, each by chance. Whether one is.
    fn deliver_kills(&mut self, once_in: usize) -> bool {
        let mut arrived = Vec::new();
        {
            let State { killed, random, .. } = &mut *self.core.lock();
            killed.retain(|process| {
                let arrives = random.once_in(once_in);
                arrived.extend(arrives.then_some(*process));
                !arrives
            });
        }
        arrived.iter().for_each(|process| self.kill(*process));
        !arrived.is_empty()
    }

    /// The clock.
    pub fn now_ms(&self) -> u64 {
        self.core.now_ms()
    }

    /// How many steps threads have made, looks that found nothing not counted.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Something changed from outside.
    pub fn poke(&mut self) {
        self.epoch += 1;
    }

    /// The thread that runs next, by chance; `None` when all wait for time to pass.
    fn choose(&mut self) -> Option<usize> {
        self.ready.iter_mut().for_each(Vec::clear);
        for (at, running) in self.threads.iter().enumerate() {
            if running.looked != self.epoch && !self.is_frozen(running.process) {
                self.ready[usize::from(running.fds)].push(at);
            }
        }
        let [others, waiting_for_fds] = &self.ready;
        if others.is_empty() && waiting_for_fds.is_empty() {
            return None;
        }
        let mut state = self.core.lock();
        let fds = others.is_empty()
            || !waiting_for_fds.is_empty() && state.random.once_in(LOOK_AT_FDS_ONCE_IN);
        let ready = if fds { waiting_for_fds } else { others };
        Some(ready[state.random.below(ready.len())])
    }

    /// One thread runs until it pauses: whether it was one that signals guests. `None` when all
    /// wait for time to pass.
    pub fn step(&mut self, trace: &mut Trace) -> Option<bool> {
        self.adopt();
        let stopped = std::mem::take(&mut self.core.lock().stopped);
        stopped
            .iter()
            .for_each(|process| self.freeze(*process, true));
        self.deliver_kills(KILL_ARRIVES_ONCE_IN);
        let at = match self.choose() {
            Some(at) => at,
            // No time passes while a signal is on its way.
            None if self.deliver_kills(1) => self.choose()?,
            None => return None,
        };
        let running = &mut self.threads[at];
        let signals = running.name.starts_with(SIGNALLER);
        let pause = running.thread.resume();
        trace.mix(running.serial << 2 | u64::from(pause.is_none()));
        let found_nothing = matches!(pause, Some(Pause::Idle(Wait { again: true, .. })));
        match pause {
            None => {
                running.ended.store(true, Ordering::Release);
                let ended = self.threads.remove(at);
                drop(ended);
            }
            Some(Pause::Ready) => running.fds = false,
            Some(Pause::Idle(wait)) => {
                (running.until_ms, running.fds) = (wait.until_ms, wait.fds);
                if found_nothing {
                    running.looked = self.epoch;
                }
            }
        }
        if !found_nothing {
            self.epoch += 1;
            self.steps += 1;
            self.idle_steps += 1;
            let names = || self.names();
            assert!(
                self.idle_steps < STEPS_MAX,
                "INVARIANT liveness: {} spin",
                names()
            );
        }
        Some(signals && !found_nothing)
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.threads.iter().map(|r| r.name.as_str()).collect();
        names.join(", ")
    }

    /// Time passes until the next deadline, or `end_ms`. False when it was there already.
    pub fn pass(&mut self, end_ms: u64) -> bool {
        let now_ms = self.now_ms();
        if now_ms >= end_ms {
            return false;
        }
        self.idle_steps = 0;
        let due = |running: &&Running| !self.is_frozen(running.process);
        let waits = self.threads.iter().filter(due);
        let deadlines = waits.filter_map(|running| running.until_ms);
        let deadline_ms = deadlines.filter(|at| *at > now_ms).min();
        let mut state = self.core.lock();
        state.now_ms = deadline_ms.map_or(end_ms, |at| at.min(end_ms));
        drop(state);
        self.epoch += 1;
        true
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        for running in &self.threads {
            running.ended.store(true, Ordering::Release);
        }
    }
}
