//! The threads around one port's state: control with the heartbeat, interrupts, mapper, and one executor for each lent function.
//!
//! | thread | does | never |
//! |---|---|---|
//! | control | owns `PortCore`; mailbox, handshake, heartbeat, answers | waits for an ioctl |
//! | irq | doorbells, relay, scan | an ioctl that can wait |
//! | mapper | pins guest RAM into the port's container | |
//! | executor, one per lent function | resets, interrupts, maps of that function | |
//!
//! Drop order: verbs and workers first, then the executors (each closes its path), the mapper, the
//! irq thread, control, which tells the pool that the port is gone; the port itself, and with it window and link, goes last.

mod borrowed;
mod control;
mod executor;
#[cfg(test)]
mod forged_tests;
mod guest_maps;
mod hold;
mod irq;
mod keep;
#[cfg(test)]
mod late_tests;
mod mapper;
#[cfg(test)]
mod order_tests;
mod path_port;
mod requests;
mod scrub;
mod signals;
#[cfg(test)]
mod soft_fault_tests;
#[cfg(test)]
mod soft_tests;
#[cfg(test)]
mod storm_tests;
mod taking;
#[cfg(test)]
mod taking_tests;
#[cfg(test)]
mod undo_tests;

pub use borrowed::BorrowedFunction;
pub use control::{BellStatus, LentStatus, PortStatus, SessionStatus, VectorStatus};
pub use hold::{HasLetGo, LetGo};
pub use keep::{Keep, Orphaned, ResetWord, ScrubPlan, StopFunction};
pub use path_port::{BorrowedPath, PathPort, Tell};
pub use signals::Signals;

use super::borrower::{Answer, Call, CallError, OpenedPath, Token};
use super::grant::{LeasePool, VolatilePool};
use super::lender::OfferState;
use super::limits::Limits;
use super::message::{LeaseId, PoolEntry, Refusal, Request};
use crate::model::{Bdf, Function, MapError, OsRuntime, PortIova, Runtime, Task, UndoStep};
use crate::ntb::NtbPort;
use control::{Control, Input};
use hold::Hold;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

/// How long a map, or the reply to the first bus-master enable, may take, milliseconds.
pub const MAP_WAIT_MS: u64 = 4_000;
/// How long taking guest memory away may take: as a pin of another tenant's that has begun, and
/// that may be of all its memory, milliseconds.
pub const UNMAP_WAIT_MS: u64 = 300_000;
/// How long a lender's reset may take: xe's can take 5 s per GT, milliseconds.
pub const RESET_WAIT_MS: u64 = 15_000;
/// How long whoever ends a lease, or a port, waits for a worker to let go of what it had. What it
/// did not let go of by then stays in quarantine, milliseconds.
pub const LET_GO_WAIT_MS: u64 = 3_000;

/// What a port's engine is told.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The port's name, for thread names and logs.
    pub name: String,
    /// This host's node id.
    pub node: u16,
    /// The inbound window's first address in the port's container.
    pub window_base: PortIova,
    /// The inbound window's size in bytes.
    pub window_bytes: u64,
    /// Heartbeat, milliseconds.
    pub heartbeat_ms: u64,
    /// The peer is lost when its heartbeat stands still for so long, milliseconds.
    pub lost_after_ms: u64,
    /// What each tenant may take of the port.
    pub limits: Limits,
}

/// Why an engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The mailbox's memory.
    #[error("the mailbox's memory could not be {act}")]
    Mailbox {
        /// `made` or `mapped`.
        act: &'static str,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// The mailbox could not be mapped into the port's container.
    #[error("the mailbox could not be mapped into the NTB's container")]
    Map(#[from] MapError),
    /// A thread, a timer or an eventfd.
    #[error("the port's {what} could not be made")]
    Thread {
        /// Which.
        what: &'static str,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
}

type CallReply = Result<Answer, CallError>;

/// What the engine's threads share; each lock is held for a look-up only.
pub(crate) struct Shared {
    calls: Mutex<HashMap<Token, mpsc::Sender<CallReply>>>,
    borrowed: Mutex<HashMap<LeaseId, Arc<LeaseShared>>>,
    token_last: AtomicU64,
    pub(crate) runtime: Arc<dyn Runtime>,
}

/// What control, irq thread and worker share of one borrowed lease.
pub(crate) struct LeaseShared {
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) signals: Arc<Signals>,
    pub(crate) lost: Mutex<Option<String>>,
    /// For whoever must not wait for an access under way, as its answer may be theirs to bring.
    pub(crate) is_lost: AtomicBool,
    /// Who can reach the lease's slices besides this process.
    pub(crate) hold: Mutex<Hold>,
}

impl LeaseShared {
    pub(crate) fn new(runtime: Arc<dyn Runtime>, signals: Signals) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            signals: Arc::new(signals),
            lost: Mutex::new(None),
            is_lost: AtomicBool::new(false),
            hold: Mutex::default(),
        })
    }

    /// When it returns, no load or store of the lease by this process is under way and none begins,
    /// and a worker in another process is letting go.
    pub(crate) fn lose(self: &Arc<Self>, why: String) {
        self.runtime.reach(UndoStep::Lost);
        let why = self.runtime.lock(&self.lost).get_or_insert(why).clone();
        self.is_lost.store(true, Ordering::SeqCst);
        self.signals.end();
        self.ask_to_let_go(&why);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means that another thread of ours panicked; the data is still whole, since
    // no critical section leaves it half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn token(&self) -> Token {
        Token(self.token_last.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.runtime.now_ms()
    }
}

/// One port at work.
pub struct Engine {
    inbox: mpsc::Sender<Input>,
    shared: Arc<Shared>,
    port: Arc<dyn NtbPort>,
    control: Mutex<Option<Task>>,
}

impl Engine {
    /// Starts the threads and the link's training. Its leases are forgotten with the process.
    pub fn start(port: Arc<dyn NtbPort>, config: EngineConfig) -> Result<Arc<Self>, EngineError> {
        Self::start_with_pool(port, config, Arc::new(VolatilePool::default()))
    }

    /// The same, with leases granted by this pool.
    pub fn start_with_pool(
        port: Arc<dyn NtbPort>,
        config: EngineConfig,
        pool: Arc<dyn LeasePool>,
    ) -> Result<Arc<Self>, EngineError> {
        Self::start_on(Arc::new(OsRuntime), port, config, pool)
    }

    /// The same on another runtime than the operating system's.
    pub fn start_on(
        runtime: Arc<dyn Runtime>,
        port: Arc<dyn NtbPort>,
        config: EngineConfig,
        pool: Arc<dyn LeasePool>,
    ) -> Result<Arc<Self>, EngineError> {
        let shared = Arc::new(Shared {
            calls: Mutex::default(),
            borrowed: Mutex::default(),
            token_last: AtomicU64::new(0),
            runtime,
        });
        let (inbox, events) = mpsc::channel();
        let control = Control::new(
            Arc::clone(&port),
            config,
            Arc::clone(&shared),
            inbox.clone(),
            pool,
        )?;
        let handle = control.spawn(events)?;
        port.link_enable(true);
        Ok(Arc::new(Self {
            inbox,
            shared,
            port,
            control: Mutex::new(Some(handle)),
        }))
    }

    /// Puts a function into the pool. Its executor starts here and ends at `withdraw`.
    pub fn offer(&self, entry: PoolEntry, function: Arc<dyn Function>) -> Result<(), Refusal> {
        self.offer_with(entry, function, Keep::default())
    }

    /// The same, with what comes with the function. Whoever holds the function besides this keeps
    /// it open when the kernel wants it back.
    pub fn offer_with(
        &self,
        entry: PoolEntry,
        function: Arc<dyn Function>,
        keep: Keep,
    ) -> Result<(), Refusal> {
        let offered = |reply| Input::Offer(Box::new(entry), (function, keep), reply);
        let taken = self.wait_for(offered)?;
        // What was not taken is closed here, and not by the control thread.
        taken.map_err(|not_taken| not_taken.0)
    }

    /// Takes a function out of the pool; refused while somebody has it. It is closed when this
    /// returns, and what was kept for it is dropped.
    pub fn withdraw(&self, bdf: Bdf) -> Result<(), Refusal> {
        let executor = self.ask(|reply| Input::Withdraw(bdf, reply))?;
        if let Some(executor) = executor {
            executor.join();
        }
        Ok(())
    }

    /// Ends the lease of a lent function from this side. Nobody waits for it.
    pub fn revoke(&self, bdf: Bdf, why: &str) {
        let _ = self.inbox.send(Input::revoke(bdf, why).0);
    }

    /// The same, and waits until its path is undone; tells where the function stands then. Past
    /// the wait the undoing goes on by itself.
    pub fn revoke_and_wait(
        &self,
        bdf: Bdf,
        why: &str,
        wait_ms: u64,
    ) -> Result<OfferState, CallError> {
        let (input, answer) = Input::revoke(bdf, why);
        self.take(input, &answer, wait_ms)
    }

    /// Tries again to put a function in quarantine back to power-on state, and tells where it
    /// stands then.
    pub fn retry(&self, bdf: Bdf, wait_ms: u64) -> Result<OfferState, CallError> {
        let (input, answer) = Input::retry(bdf);
        self.take(input, &answer, wait_ms)
    }

    /// Gives a function out of quarantine as it is, at the word of this operator.
    pub fn clear(&self, bdf: Bdf, by: &str) -> Result<(), Refusal> {
        self.ask(|reply| Input::Clear(bdf, by.to_owned(), reply))
    }

    fn take(
        &self,
        input: Input,
        answer: &mpsc::Receiver<Result<OfferState, CallError>>,
        wait_ms: u64,
    ) -> Result<OfferState, CallError> {
        let stopped = || CallError::Gone("the port has stopped".into());
        self.inbox.send(input).map_err(|_| stopped())?;
        let runtime = &self.shared.runtime;
        let until_ms = runtime.now_ms().saturating_add(wait_ms);
        match runtime.receive(answer, Some(until_ms)) {
            Ok(answer) => answer,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(CallError::Timeout(wait_ms)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(stopped()),
        }
    }

    fn ask<T>(
        &self,
        input: impl FnOnce(mpsc::Sender<Result<T, Refusal>>) -> Input,
    ) -> Result<T, Refusal> {
        self.wait_for(input)?
    }

    fn wait_for<R>(&self, input: impl FnOnce(mpsc::Sender<R>) -> Input) -> Result<R, Refusal> {
        let (reply, answer) = mpsc::channel();
        let sent = self.inbox.send(input(reply));
        sent.map_err(|_| Refusal::stopped())?;
        let answered = self.shared.runtime.receive(&answer, None);
        answered.map_err(|_| Refusal::stopped())
    }

    /// Everything that `status` tells of the port.
    pub fn status(&self) -> Option<PortStatus> {
        let (reply, answer) = mpsc::channel();
        self.inbox.send(Input::Status(reply)).ok()?;
        self.shared.runtime.receive(&answer, None).ok()
    }

    /// The peer's pool.
    pub fn list(&self) -> Result<Vec<PoolEntry>, CallError> {
        match self.call(Call::List, MAP_WAIT_MS)? {
            Answer::List(entries) => Ok(entries),
            other => Err(unexpected(&other)),
        }
    }

    /// Borrows a function and opens the path to it. Nothing is left behind on failure.
    pub fn borrow(
        self: &Arc<Self>,
        bdf: Bdf,
        ram: Option<u64>,
    ) -> Result<(LeaseId, PoolEntry, Arc<BorrowedFunction>), CallError> {
        let (lease, entry) = self.lease(bdf, ram)?;
        let opened = self.open(lease, &entry, Signals::new);
        let function = opened.and_then(|(opened, state)| {
            let ids = entry.ids;
            BorrowedFunction::start(Arc::clone(self), lease, (ids, opened), state)
        });
        match function {
            Ok(function) => Ok((lease, entry, function)),
            Err(error) => {
                let _ = self.give_back(lease);
                Err(error)
            }
        }
    }

    fn lease(&self, bdf: Bdf, ram: Option<u64>) -> Result<(LeaseId, PoolEntry), CallError> {
        match self.call(Call::Borrow(bdf, ram), MAP_WAIT_MS)? {
            Answer::Borrowed(lease, entry) => Ok((lease, entry)),
            other => Err(unexpected(&other)),
        }
    }

    fn open(
        &self,
        lease: LeaseId,
        entry: &PoolEntry,
        signals: impl FnOnce(u32) -> std::io::Result<Signals>,
    ) -> Result<(OpenedPath, Arc<LeaseShared>), CallError> {
        let signals = signals(entry.irq_count).map_err(|e| CallError::Gone(e.to_string()))?;
        let state = LeaseShared::new(Arc::clone(&self.shared.runtime), signals);
        lock(&self.shared.borrowed).insert(lease, Arc::clone(&state));
        match self.call(Call::Open(lease), RESET_WAIT_MS)? {
            Answer::Opened(path) => Ok((*path, state)),
            other => Err(unexpected(&other)),
        }
    }

    /// Ends the lease that has this id now. The guest session must have ended.
    pub fn give_back(&self, lease: LeaseId) -> Result<(), CallError> {
        let state = lock(&self.shared.borrowed).get(&lease).cloned();
        self.end(lease, state.as_ref())
    }

    /// The same of a function of this process, whichever lease has its id now.
    pub fn give_back_function(&self, function: &BorrowedFunction) -> Result<(), CallError> {
        self.end(function.lease(), Some(function.state()))
    }

    pub(crate) fn end(
        &self,
        lease: LeaseId,
        state: Option<&Arc<LeaseShared>>,
    ) -> Result<(), CallError> {
        self.stop_function(lease, state);
        // Whoever still has its BARs reads ones before the lender gives the slices to another.
        if let Some(state) = state {
            state.lose("the lease was given back".into());
        }
        let held = state.is_some_and(|state| !state.waits_until_let_go(LET_GO_WAIT_MS));
        self.shared.runtime.reach(UndoStep::Return);
        if held {
            // It goes on when that worker has let go, and nobody waits for it. What is known of the
            // lease stays here until control, which may come to it later, has begun its end.
            let _ = self.call_of(state, Call::Return(lease), 0);
            return Err(CallError::Held);
        }
        let ended = self.call_of(state, Call::Return(lease), RESET_WAIT_MS);
        let mut borrowed = lock(&self.shared.borrowed);
        let held = borrowed.get(&lease);
        if held
            .zip(state)
            .is_some_and(|(held, own)| Arc::ptr_eq(held, own))
        {
            borrowed.remove(&lease);
        }
        ended.map(|_| ())
    }

    /// Stops the function's DMA before its guest's memory is unpinned, and before anybody is told
    /// that it is: else its work goes on into nothing, and each access is a fault of the IOMMU. A
    /// lender that does not answer in time stops it as the lease ends.
    fn stop_function(&self, lease: LeaseId, state: Option<&Arc<LeaseShared>>) {
        let request = Request::BusMaster {
            lease,
            enable: false,
        };
        let _ = self.call_of(state, Call::Forward(lease, request), MAP_WAIT_MS);
    }

    /// What its threads stand on.
    pub fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.shared.runtime
    }

    /// The port that the engine drives.
    pub(crate) fn port(&self) -> &Arc<dyn NtbPort> {
        &self.port
    }

    pub(crate) fn call(&self, call: Call, wait_ms: u64) -> CallReply {
        self.call_of(None, call, wait_ms)
    }

    /// A call of whoever holds this lease. A lender may give the id of a lost lease to another: by
    /// the id alone the call would reach that one.
    pub(crate) fn call_of(
        &self,
        of: Option<&Arc<LeaseShared>>,
        call: Call,
        wait_ms: u64,
    ) -> CallReply {
        let token = self.shared.token();
        let (reply, answer) = mpsc::channel();
        lock(&self.shared.calls).insert(token, reply);
        let sent = self
            .inbox
            .send(Input::Call(token, call, of.cloned()))
            .is_ok();
        let runtime = &self.shared.runtime;
        let until_ms = runtime.now_ms().saturating_add(wait_ms);
        let answered = match sent {
            true => runtime.receive(&answer, Some(until_ms)),
            false => Err(mpsc::RecvTimeoutError::Disconnected),
        };
        lock(&self.shared.calls).remove(&token);
        match answered {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                // Control answers under that lock: what came just too late is there now, or never.
                let late = answer.try_recv();
                late.unwrap_or(Err(CallError::Timeout(wait_ms)))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(CallError::Gone("the port has stopped".into()))
            }
        }
    }

    /// Undoes every path, tells the peer by taking the link down, and ends the threads.
    pub fn stop(&self) {
        let _ = self.inbox.send(Input::Stop);
        let control = lock(&self.control).take();
        if let Some(control) = control {
            control.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn unexpected(answer: &Answer) -> CallError {
    CallError::Gone(format!("an answer of the wrong kind: {answer:?}"))
}

impl OfferState {
    /// The word that `status` and `list` use.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::Granting | Self::Leased | Self::Opening | Self::Open => "in use",
            Self::Closing => "closing",
            Self::Quarantine(_) => "quarantine",
            Self::Gone(_) => "gone",
        }
    }
}
