//! The control thread: feeds `PortCore`, beats, and carries its actions out; nothing here waits for an ioctl.

use super::executor::{Executor, ExecutorShared};
use super::irq::{IrqCommand, IrqHandle, IrqThread, VectorCounters, word_offset};
use super::keep::{Keep, Orphaned};
use super::mapper::{Mapper, MapperJob};
use super::requests::Wish;
use super::taking::{Take, TakeReply};
use super::{
    CallReply, EngineConfig, EngineError, LET_GO_WAIT_MS, LeaseShared, Shared, Signals, lock,
};
use crate::model::{
    Access, Aperture, Bdf, DmaMap, Function, Memory, Runtime, Span, Task, WindowOffset,
};
use crate::ntb::NtbPort;
use crate::path::borrower::{Answer, Call, CallError, LeaseStatus, Step, Token};
use crate::path::core::{Action, CoreConfig, Event, Inbox, PortCore, SessionInfo};
use crate::path::grant::{LeasePool, ToPool};
use crate::path::lender::{JobId, OfferState, OfferStatus};
use crate::path::mailbox::MailboxCounters;
use crate::path::message::{LeaseId, PoolEntry, Refusal};
use crate::path::plan::Quarantine;
use crate::path::wire::{
    BELL_IRQ, BELL_MAILBOX, COMMIT_OFFSET, MAILBOX_BYTES, PAYLOAD_OFFSET, SLOT_BYTES, SLOT_OFFSET,
    STATUS_BYTES, STATUS_OFFSET, ScratchpadSet,
};
use crate::path::work::FunctionWork;
use crate::vfio::MappedAperture;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

/// A refusal to take a function, and the function: whoever offered it closes it.
pub(crate) type NotTaken = Box<(Refusal, (Arc<dyn Function>, Keep))>;

/// What reaches the control thread.
pub(crate) enum Input {
    Beat,
    Bell,
    LinkChange,
    Event(Event),
    /// Of whoever holds the lease that it is about.
    Call(Token, Call, Option<Arc<LeaseShared>>),
    Offer(
        Box<PoolEntry>,
        (Arc<dyn Function>, Keep),
        mpsc::Sender<Result<(), NotTaken>>,
    ),
    Withdraw(Bdf, mpsc::Sender<Result<Option<Task>, Refusal>>),
    Take(Bdf, Take, TakeReply),
    Clear(Bdf, String, mpsc::Sender<Result<(), Refusal>>),
    Wish(Bdf, Wish),
    Status(mpsc::Sender<PortStatus>),
    Stop,
}

/// The open session, as `status` tells it.
#[derive(Clone, Debug)]
pub struct SessionStatus {
    /// The session.
    pub info: SessionInfo,
    /// Its age in milliseconds.
    pub age_ms: u64,
}

/// One vector of a lent function, as `status` tells it.
#[derive(Clone, Copy, Debug, Default)]
pub struct VectorStatus {
    /// The sum of its eventfd's values in the current or last path.
    pub raised: u64,
    /// Fences read.
    pub fences: u64,
    /// Bells rung.
    pub bells: u64,
    /// Whether it is masked.
    pub masked: bool,
    /// Whether a fence of it did not read the session's nonce: it is silent until the next reset.
    pub suspect: bool,
    /// Whether it is masked for its rate now: what it raises comes when the rate allows.
    pub rate_limited: bool,
    /// How often it was.
    pub rate_limits: u64,
}

/// A lent function, as `status` tells it.
#[derive(Clone, Debug)]
pub struct LentStatus {
    /// What the lender's end knows.
    pub offer: OfferStatus,
    /// Its vectors.
    pub vectors: Vec<VectorStatus>,
    /// Guest RAM behind it: maps and bytes.
    pub maps: (u32, u64),
}

/// A port's doorbells, as `status` tells them.
#[derive(Clone, Copy, Debug, Default)]
pub struct BellStatus {
    /// Rung for interrupts at the peer.
    pub rung: u64,
    /// Taken.
    pub taken: u64,
}

/// Everything that `status` tells of a port.
#[derive(Clone, Debug)]
pub struct PortStatus {
    /// When this was told, by the clock of `OfferStatus::quarantined_ms`.
    pub now_ms: u64,
    /// Whether the link is up.
    pub link_up: bool,
    /// The link session's state in words.
    pub link: String,
    /// The open session.
    pub session: Option<SessionStatus>,
    /// What the mailboxes of all sessions have seen and done.
    pub mailbox: MailboxCounters,
    /// The own lowest and highest protocol version.
    pub own_versions: (u16, u16),
    /// The peer's, as long as it is there to tell them.
    pub peer_versions: Option<(u16, u16)>,
    /// Whether no session can ever open with this peer.
    pub version_mismatch: bool,
    /// Why the last session ended.
    pub over_reason: Option<String>,
    /// The usable window in bytes; 0 until the peer said hello.
    pub window_usable: u64,
    /// Free bytes of it.
    pub window_free: u64,
    /// What waits for the peer's confirmation.
    pub quarantine: Quarantine,
    /// How long ago the peer's heartbeat changed, while a session is open.
    pub heartbeat_age_ms: Option<u64>,
    /// Lent functions.
    pub lent: Vec<LentStatus>,
    /// Borrowed leases.
    pub borrowed: Vec<LeaseStatus>,
    /// Doorbells.
    pub bells: BellStatus,
}

pub(super) struct Worker {
    pub(super) jobs: mpsc::Sender<(JobId, FunctionWork)>,
    pub(super) hurry: mpsc::Sender<()>,
    pub(super) handle: Task,
    shared: Arc<ExecutorShared>,
}

pub(super) struct Control {
    port: Arc<dyn NtbPort>,
    pub(super) config: EngineConfig,
    pub(super) shared: Arc<Shared>,
    inbox: mpsc::Sender<Input>,
    pub(super) core: PortCore,
    mailbox: Arc<dyn Aperture>,
    mailbox_span: Span,
    window: Arc<dyn Aperture>,
    irq: IrqHandle,
    irq_thread: Option<IrqThread>,
    irq_join: Option<Task>,
    /// What the irq thread scans: each lease's first word, and what was read there.
    scanned: BTreeMap<LeaseId, (u32, Arc<Signals>)>,
    mapper: Option<mpsc::Sender<MapperJob>>,
    mapper_join: Option<Task>,
    pub(super) workers: BTreeMap<Bdf, Worker>,
    /// Who looks whether a function's maker is still there.
    pub(super) makers: BTreeMap<Bdf, Orphaned>,
    /// Executors that end by themselves.
    pub(super) leaving: BTreeMap<Bdf, Task>,
    /// Who waits for a function to be at rest.
    pub(super) takes: Vec<(Bdf, TakeReply)>,
    pool: Arc<dyn LeasePool>,
    /// Since when.
    stopping: Option<u64>,
}

fn spawn(
    runtime: &dyn Runtime,
    name: String,
    what: &'static str,
    run: impl FnOnce() + Send + 'static,
) -> Result<Task, EngineError> {
    let spawned = runtime.spawn(name, Box::new(run));
    spawned.map_err(|source| EngineError::Thread { what, source })
}

/// The mailbox's memory: a memfd of its own, in no tenant's reach.
pub(super) fn mailbox_memory() -> Result<(OwnedFd, Arc<dyn Aperture>), EngineError> {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let failed = |act| move |source| EngineError::Mailbox { act, source };
    let fd = memfd_create("sublet-mailbox", MemfdFlags::CLOEXEC)
        .map_err(|error| failed("made")(error.into()))?;
    ftruncate(&fd, MAILBOX_BYTES).map_err(|error| failed("made")(error.into()))?;
    let mapped = MappedAperture::memory(fd.as_fd(), 0, MAILBOX_BYTES).map_err(failed("mapped"))?;
    Ok((fd, Arc::new(mapped)))
}

impl Control {
    pub(super) fn new(
        port: Arc<dyn NtbPort>,
        config: EngineConfig,
        shared: Arc<Shared>,
        inbox: mpsc::Sender<Input>,
        pool: Arc<dyn LeasePool>,
    ) -> Result<Self, EngineError> {
        let (memory, mailbox) = mailbox_memory()?;
        let mailbox_span = Span::new(config.window_base.0, MAILBOX_BYTES)
            .ok_or(crate::model::MapError::TooMany(0))?;
        port.window_close(0);
        port.address_space().map(&[DmaMap {
            span: mailbox_span,
            access: Access::READ_WRITE,
            memory: Memory::Fd(memory.as_fd(), 0),
        }])?;
        port.doorbell_unmask_only(BELL_MAILBOX | BELL_IRQ);
        let (thread, irq) = IrqThread::new(
            Arc::clone(&port),
            Arc::clone(&mailbox),
            config.limits.interrupts_per_second,
            (inbox.clone(), Arc::clone(&shared.runtime)),
        )?;
        let entropy = Arc::clone(&shared.runtime);
        let core = PortCore::new(
            CoreConfig {
                node: config.node,
                window_bytes: config.window_bytes,
                heartbeat_ms: config.heartbeat_ms,
                lost_after_ms: config.lost_after_ms,
                limits: config.limits,
            },
            Box::new(move || entropy.entropy()),
        );
        Ok(Self {
            window: port.window(0),
            port,
            config,
            shared,
            inbox,
            core,
            mailbox,
            mailbox_span,
            irq,
            irq_thread: Some(thread),
            irq_join: None,
            scanned: BTreeMap::new(),
            mapper: None,
            mapper_join: None,
            workers: BTreeMap::new(),
            makers: BTreeMap::new(),
            leaving: BTreeMap::new(),
            takes: Vec::new(),
            pool,
            stopping: None,
        })
    }

    /// Starts irq thread, mapper, and this thread.
    pub(super) fn spawn(mut self, events: mpsc::Receiver<Input>) -> Result<Task, EngineError> {
        let name = self.config.name.clone();
        let runtime = Arc::clone(&self.shared.runtime);
        if let Some(thread) = self.irq_thread.take() {
            let run = move || thread.run();
            self.irq_join = Some(spawn(&*runtime, format!("{name}-irq"), "irq thread", run)?);
        }
        let (jobs, work) = mpsc::channel();
        let mapper = Mapper {
            port: Arc::clone(&self.port),
            base: self.config.window_base,
            inbox: self.inbox.clone(),
            runtime: Arc::clone(&runtime),
        };
        self.mapper = Some(jobs);
        let run = move || mapper.run(&work);
        self.mapper_join = Some(spawn(
            &*runtime,
            format!("{name}-map"),
            "mapper thread",
            run,
        )?);
        // Here and not in the thread: whoever started the port knows that the pool has heard of it.
        let inbox = self.inbox.clone();
        self.pool.connect(Box::new(move |message| {
            // A port that has stopped said so by `ToPool::Gone`.
            let _ = inbox.send(Input::Event(Event::Pool(message)));
        }));
        let run = move || self.run(&events);
        spawn(&*runtime, format!("{name}-ctl"), "control thread", run)
    }

    fn run(mut self, events: &mpsc::Receiver<Input>) {
        let runtime = Arc::clone(&self.shared.runtime);
        let every_ms = self.config.heartbeat_ms.max(1);
        let mut beat_ms = runtime.now_ms() + every_ms;
        loop {
            let late_ms = runtime.now_ms().checked_sub(beat_ms);
            // In its turn beside others who never leave the channel empty.
            let input = match late_ms {
                Some(_) => Ok(Input::Beat),
                None => runtime.receive(events, Some(beat_ms)),
            };
            if let Some(late_ms) = late_ms {
                beat_ms += late_ms / every_ms * every_ms + every_ms;
            }
            match input {
                Ok(input) => self.input(input),
                Err(mpsc::RecvTimeoutError::Timeout) => continue,
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            self.tell_takers();
            if self.is_stopped() {
                break;
            }
        }
        self.end();
    }

    /// Whether nothing more is to come. A worker that does not let go is left to whoever opens the
    /// NTB next: the kernel keeps that from all as long as one has it mapped.
    fn is_stopped(&self) -> bool {
        let Some(since_ms) = self.stopping else {
            return false;
        };
        let late = || self.shared.now_ms() >= since_ms + LET_GO_WAIT_MS;
        let left = || late() && self.core.waits_for_workers_alone();
        if self.core.is_idle() {
            return true;
        }
        if left() {
            let why = CallError::Held;
            tracing::error!(
                port = self.config.name,
                "the port ends without a worker: {why}"
            );
            return true;
        }
        false
    }

    fn input(&mut self, input: Input) {
        let now = self.shared.now_ms();
        let told = &self.irq.told;
        let looked = match &input {
            Input::Beat => Some(&told.beat),
            Input::Bell => Some(&told.bell),
            Input::LinkChange => Some(&told.link_change),
            _ => None,
        };
        if let Some(told) = looked {
            // A swap, as the looks below must not overtake it.
            told.swap(false, Ordering::SeqCst);
        }
        let event = match input {
            Input::Beat => {
                self.look_for_raises();
                self.look_for_orphans();
                if self.stopping.is_some() {
                    return;
                }
                Event::Beat {
                    link_up: self.port.link_is_up(),
                    spads: std::array::from_fn(|index| self.port.spad_read(index as u32)),
                    inbox: self.read_inbox(),
                }
            }
            Input::Bell => Event::Bell(self.read_inbox()),
            Input::LinkChange if self.stopping.is_some() => return,
            Input::LinkChange => Event::LinkChange(self.port.link_is_up()),
            Input::Event(event) => event,
            Input::Call(token, call, Some(of)) if !self.is_held(&call, &of) => {
                return self.call_of_ended(token, &call);
            }
            Input::Call(token, call, _) => Event::Call(token, call),
            Input::Offer(entry, (function, keep), reply) => {
                let _ = reply.send(self.offer(*entry, function, keep));
                return;
            }
            Input::Withdraw(bdf, reply) => {
                let _ = reply.send(self.withdraw(bdf));
                return;
            }
            Input::Take(bdf, take, reply) => return self.take(bdf, take, reply),
            Input::Clear(bdf, by, reply) => return self.clear(bdf, &by, &reply),
            Input::Wish(bdf, wish) => return self.wish(bdf, wish),
            Input::Status(reply) => {
                let _ = reply.send(self.status(now));
                return;
            }
            Input::Stop => {
                self.stopping.get_or_insert(now);
                self.port.link_enable(false);
                let actions = self.core.shut_down(now);
                return self.perform(actions);
            }
        };
        let actions = self.core.handle(event, now);
        self.perform(actions);
    }

    /// A lost bell is late, never lost: the irq thread is woken for words that it has not read.
    fn look_for_raises(&self) {
        let unseen = |&(first, ref signals): &(u32, Arc<Signals>)| {
            signals.has_unseen(|vector| self.mailbox.read_u64(word_offset(first, vector)))
        };
        if self.core.session().is_some() && self.scanned.values().any(unseen) {
            self.irq.send(IrqCommand::Look);
        }
    }

    fn read_inbox(&self) -> Inbox {
        let mut status = [0; STATUS_BYTES];
        self.mailbox.read(STATUS_OFFSET, &mut status);
        let mut slot = Box::new([0; SLOT_BYTES]);
        let commit = self.mailbox.read_u64(SLOT_OFFSET + COMMIT_OFFSET as u64);
        std::sync::atomic::fence(Ordering::Acquire);
        if commit != 0 {
            self.mailbox.read(SLOT_OFFSET, &mut slot[..COMMIT_OFFSET]);
            slot[COMMIT_OFFSET..].copy_from_slice(&commit.to_le_bytes());
        }
        Inbox { status, slot }
    }

    pub(super) fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::CloseWindow => self.port.window_close(0),
            Action::PrepareMailbox(nonce) => self.prepare_mailbox(nonce),
            Action::OpenWindow => self.open_window(MAILBOX_BYTES),
            Action::Post(set) => self.post(&set),
            Action::WriteSlot(slot) => self.write_slot(&slot),
            Action::WriteStatus(status) => self.window.write(STATUS_OFFSET, &status),
            Action::RingMailbox => self.port.peer_doorbell_ring(BELL_MAILBOX),
            Action::SessionOpened {
                session,
                peer_nonce,
            } => {
                self.open_window(self.config.window_bytes);
                tracing::info!(
                    port = self.config.name,
                    "link session {session:#018x} is open"
                );
                self.irq.send(IrqCommand::SessionOpened {
                    session,
                    peer_nonce,
                });
            }
            Action::SessionOver => {
                let why = self.core.over_reason().unwrap_or("unknown");
                tracing::warn!(port = self.config.name, "the link session is over: {why}");
                self.irq.send(IrqCommand::SessionOver);
            }
            Action::Work(bdf, job, work) => self.work(bdf, job, work),
            Action::Pin(step, lease, pins) => self.map(MapperJob::Pin(step, lease, pins)),
            Action::Unpin(step, lease, spans) => {
                let base = self.config.window_base.0;
                let span = |(offset, len): (WindowOffset, u64)| Span::new(base + offset.0, len);
                let spans = spans.into_iter().filter_map(span).collect();
                self.map(MapperJob::Unpin(step, lease, spans));
            }
            Action::Scan(lease, first, count) => {
                if let Some(state) = self.borrowed(lease) {
                    self.clear_words(first, count);
                    let signals = Arc::clone(&state.signals);
                    self.scanned.insert(lease, (first, Arc::clone(&signals)));
                    self.irq.send(IrqCommand::Scan {
                        lease,
                        first,
                        count,
                        signals,
                    });
                }
            }
            Action::ScanEnd(lease) => {
                self.scanned.remove(&lease);
                self.irq.send(IrqCommand::ScanEnd(lease));
            }
            Action::Pool(message) => self.pool.tell(message),
            Action::Answer(token, result) => self.answer(token, result),
            Action::Lost(step, lease, why) => self.lose(step, lease, why),
            Action::Gone(bdf) => self.gone(bdf),
        }
    }

    /// The thread that its worker lets go by may stand for as long as that worker can: here nothing
    /// waits for it.
    fn lose(&self, step: Step, lease: LeaseId, why: String) {
        let inbox = self.inbox.clone();
        let has_let_go = Box::new(move || {
            // A port that has stopped has nothing more to give out.
            let _ = inbox.send(Input::Event(Event::LetGo(step)));
        });
        let state = lock(&self.shared.borrowed).remove(&lease);
        match state {
            Some(state) => {
                state.lose(why);
                state.when_let_go(has_let_go);
            }
            None => has_let_go(),
        }
    }

    /// Of what a lease that is over had mapped some may still wait for the mapper.
    fn call_of_ended(&self, token: Token, call: &Call) {
        if let Call::Unmap(lease, _) = call {
            let shared = Arc::clone(&self.shared);
            let unpinned = move || {
                // Nobody waits any more after the time.
                let waits = lock(&shared.calls).remove(&token);
                let _ = waits.map(|waits| waits.send(Ok(Answer::Unmapped(0))));
            };
            return self.map(MapperJob::Tell(*lease, Box::new(unpinned)));
        }
        let over = "the lease is over: borrow the function again";
        self.answer(token, Err(CallError::Gone(over.to_owned())));
    }

    /// A lease that comes when nobody waits for it any more goes back.
    fn answer(&self, token: Token, result: CallReply) {
        let unwanted = match lock(&self.shared.calls).remove(&token) {
            Some(reply) => reply.send(result).err().map(|unsent| unsent.0),
            None => Some(result),
        };
        if let Some(Ok(Answer::Borrowed(lease, _))) = unwanted {
            let token = self.shared.token();
            let _ = self
                .inbox
                .send(Input::Call(token, Call::Return(lease), None));
        }
    }

    fn is_held(&self, call: &Call, of: &Arc<LeaseShared>) -> bool {
        let held = call.lease().and_then(|lease| self.borrowed(lease));
        held.is_some_and(|held| Arc::ptr_eq(&held, of))
    }

    fn borrowed(&self, lease: LeaseId) -> Option<Arc<LeaseShared>> {
        lock(&self.shared.borrowed).get(&lease).cloned()
    }

    fn work(&mut self, bdf: Bdf, job: JobId, work: FunctionWork) {
        let sent = self
            .workers
            .get(&bdf)
            .is_some_and(|worker| worker.jobs.send((job, work)).is_ok());
        if !sent {
            let refusal = Refusal::stopped();
            let _ = self
                .inbox
                .send(Input::Event(Event::Worked(job, Err(refusal))));
        }
    }

    fn map(&self, job: MapperJob) {
        // The mapper lives as long as control does.
        if let Some(mapper) = &self.mapper {
            let _ = mapper.send(job);
        }
    }

    fn prepare_mailbox(&self, nonce: u64) {
        const ZEROS: [u8; 4096] = [0; 4096];
        for offset in (0..MAILBOX_BYTES).step_by(ZEROS.len()) {
            self.mailbox.write(offset, &ZEROS);
        }
        self.mailbox.write_u64(0, nonce);
    }

    fn clear_words(&self, first: u32, count: u32) {
        for word in first..first + count {
            self.mailbox.write_u64(word_offset(0, word), 0);
        }
    }

    /// The mailbox alone until a session is open: with that the peer has stopped what still ran into
    /// the slices of the last one. Before, it would be a fault of this IOMMU for each access.
    fn open_window(&self, bytes: u64) {
        let base = self.config.window_base;
        if let Err(error) = self.port.window_open(0, base, bytes) {
            tracing::error!(port = self.config.name, %error, "the inbound window stays closed");
        }
    }

    fn post(&self, set: &ScratchpadSet) {
        for (index, word) in set.stores() {
            self.port.peer_spad_write(index, word);
        }
    }

    /// Only what the message fills, then the commit: a store across the NTB is dear.
    fn write_slot(&self, slot: &[u8; SLOT_BYTES]) {
        let payload = u32::from_le_bytes([slot[28], slot[29], slot[30], slot[31]]) as usize;
        let used = (PAYLOAD_OFFSET + payload)
            .next_multiple_of(8)
            .min(COMMIT_OFFSET);
        self.window.write(SLOT_OFFSET, &slot[..used]);
        std::sync::atomic::fence(Ordering::Release);
        self.window
            .write(SLOT_OFFSET + COMMIT_OFFSET as u64, &slot[COMMIT_OFFSET..]);
    }

    fn offer(
        &mut self,
        entry: PoolEntry,
        function: Arc<dyn Function>,
        mut keep: Keep,
    ) -> Result<(), NotTaken> {
        let bdf = entry.bdf;
        if let Err(refusal) = self.core.lender.offer(entry, function.info().clone()) {
            return Err(Box::new((refusal, (function, keep))));
        }
        if keep.stop.is_some() {
            self.core.lender.stops(bdf);
        }
        if let Some(held) = keep.quarantine.take() {
            self.core.lender.hold_back(bdf, held);
        }
        let orphaned = keep.orphaned.take();
        let (jobs, work) = mpsc::channel();
        let (hurry, hurried) = mpsc::channel();
        let back = Arc::clone(&function);
        let shared = Arc::new(ExecutorShared::default());
        let executor = Executor {
            function,
            bdf,
            keep,
            hurry: hurried,
            hurried: false,
            clean: false,
            port: Arc::clone(&self.port),
            base: self.config.window_base,
            irq: self.irq.clone(),
            inbox: self.inbox.clone(),
            runtime: Arc::clone(&self.shared.runtime),
            shared: Arc::clone(&shared),
            path: None,
        };
        let name = format!("{}-{bdf}", self.config.name);
        let run = move || executor.run(&work);
        match spawn(&*self.shared.runtime, name, "executor thread", run) {
            Ok(handle) => {
                self.makers.extend(orphaned.map(|orphaned| (bdf, orphaned)));
                self.workers.insert(
                    bdf,
                    Worker {
                        jobs,
                        hurry,
                        handle,
                        shared,
                    },
                );
                Ok(())
            }
            Err(error) => {
                let _ = self.core.lender.withdraw(bdf);
                // Its guard went with the thread that could not be.
                Err(Box::new((Refusal::kernel(&error), (back, Keep::default()))))
            }
        }
    }

    fn status(&self, now_ms: u64) -> PortStatus {
        let session = self.core.session().map(|info| SessionStatus {
            info: info.clone(),
            age_ms: now_ms - info.since_ms,
        });
        let lent = self
            .core
            .lender
            .status()
            .into_iter()
            .map(|offer| self.lent(offer))
            .collect();
        PortStatus {
            now_ms,
            link_up: self.port.link_is_up(),
            link: self.core.link().state().to_string(),
            session,
            mailbox: self.core.mailbox_counters(),
            own_versions: self.core.link().own_versions(),
            peer_versions: self.core.link().peer_versions(),
            version_mismatch: self.core.link().state().is_mismatch(),
            over_reason: self.core.over_reason().map(str::to_owned),
            window_usable: self.core.pool().usable_bytes(),
            window_free: self.core.pool().free_bytes(),
            quarantine: self.core.quarantine(),
            heartbeat_age_ms: self.core.link().heartbeat_age_ms(now_ms),
            lent,
            borrowed: self.core.borrower.status(),
            bells: BellStatus {
                rung: self.irq.bells.rung.load(Ordering::Relaxed),
                taken: self.irq.bells.taken.load(Ordering::Relaxed),
            },
        }
    }

    fn lent(&self, offer: OfferStatus) -> LentStatus {
        let Some(worker) = self.workers.get(&offer.entry.bdf) else {
            return LentStatus {
                offer,
                vectors: Vec::new(),
                maps: (0, 0),
            };
        };
        let counters = Arc::clone(&lock(&worker.shared.counters));
        let vector = |counters: &VectorCounters| VectorStatus {
            raised: counters.raised.load(Ordering::Relaxed),
            fences: counters.fences.load(Ordering::Relaxed),
            bells: counters.bells.load(Ordering::Relaxed),
            masked: counters.masked.load(Ordering::Relaxed),
            suspect: counters.suspect.load(Ordering::Relaxed),
            rate_limited: counters.rate_limited.load(Ordering::Relaxed),
            rate_limits: counters.rate_limits.load(Ordering::Relaxed),
        };
        let maps = worker.shared.maps.load(Ordering::Relaxed) as u32;
        let bytes = worker.shared.mapped_bytes.load(Ordering::Relaxed);
        LentStatus {
            offer,
            vectors: counters.iter().map(vector).collect(),
            maps: (maps, bytes),
        }
    }

    /// Executors, mapper, irq thread; then the window is closed and the mailbox unmapped.
    fn end(&mut self) {
        for worker in std::mem::take(&mut self.workers).into_values() {
            drop((worker.jobs, worker.hurry));
            worker.handle.join();
        }
        for handle in std::mem::take(&mut self.leaving).into_values() {
            handle.join();
        }
        self.mapper = None;
        self.irq.send(IrqCommand::Stop);
        for handle in [self.mapper_join.take(), self.irq_join.take()]
            .into_iter()
            .flatten()
        {
            handle.join();
        }
        self.port.window_close(0);
        if let Err(error) = self.port.address_space().unmap(self.mailbox_span) {
            tracing::error!(%error, "the mailbox stays mapped");
        }
        self.pool.tell(ToPool::Gone);
        // Whoever asked too late need not wait.
        lock(&self.shared.calls).clear();
    }
}

impl OfferState {
    /// Whether somebody has the function.
    pub fn is_in_use(&self) -> bool {
        matches!(
            self,
            Self::Granting | Self::Leased | Self::Opening | Self::Open | Self::Closing
        )
    }
}
