//! The port's side of a worker: starts it, answers its requests, makes it let go, and outlives it.
//!
//! One thread for each worker starts it and answers its requests, and another waits for as long as
//! it takes until it has let go of what it had (`hold`). What a process is, is the owner's to say:
//! [`Launch`] and [`Process`].

mod hear;
mod hold;
mod looks;
#[cfg(test)]
mod tests;

use super::holders::Holders;
use crate::{
    ipc::{Channel, ChannelError, SIGNALS_MAX, Sent, Start, ToWorker, Token, Told},
    jail::Report,
};
use hear::Hearing;
use hold::Hold;
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    pipe::{PipeFlags, pipe_with},
};
use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
};
use vfio_shim::{
    model::{Aperture, Bdf, Runtime, Task},
    path::{
        BorrowedPath, CallError, Engine, LeaseId, limits::Bucket, message::CONFIG_BYTES_MAX, words,
    },
    vfio::MappedAperture,
};
use vmm_glue::vfio_user::{Endpoint, Vmm, memory_check::MemoryMaps};

/// How long a worker may take from its start to listening.
const READY_WAIT_MS: u64 = 20_000;
/// How long `status` waits for a worker's word.
const TELL_WAIT_MS: u64 = 500;
/// How long a worker that was killed is waited for by whoever ends it.
const END_WAIT_MS: u64 = 2_000;

/// Starts a worker's process.
pub trait Launch: Send {
    /// Called by the thread that outlives it. `theirs` is the worker's end of its channel, and of
    /// it nothing stays here.
    fn launch(&self, theirs: Channel) -> Result<Arc<dyn Process>, StartError>;
}

/// A worker's process.
pub trait Process: Send + Sync {
    /// Its number, for `status` and logs.
    fn id(&self) -> u32;
    /// Ends it, wherever it stands; nothing where it has ended.
    fn kill(&self);
    /// Whether it is gone; waits for that, at most so long. Of one that is gone no store arrives.
    fn gone(&self, wait_ms: Option<u64>) -> bool;
    /// Whether it has a device mapped, whatever it says itself.
    fn maps_a_device(&self) -> bool;
    /// How it has ended, in words. Called once, when it is gone.
    fn status(&self) -> String;
}

/// What workers are held to, and who helps them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// More of a worker's messages than this in a second wait.
    pub messages_per_second: u32,
    /// Who looks whether a VMM's memory is shared.
    pub memory_maps: Arc<dyn MemoryMaps>,
    /// Which VMMs have the window.
    pub holders: Arc<Holders>,
}

/// Why there is no worker.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is no lease.
    #[error("the lease could not be had")]
    Call(#[source] CallError),
    /// The channel.
    #[error("the channel to a worker")]
    Channel(#[from] ChannelError),
    /// The kernel refused.
    #[error("cannot {act} for a worker")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// It said so, or nothing at all.
    #[error("the worker did not begin to serve: {0}")]
    NotReady(String),
}

/// Of something that the kernel was asked for a worker.
pub fn kernel<E: Into<io::Error>>(act: &'static str) -> impl Fn(E) -> StartError {
    move |error| StartError::Kernel {
        act,
        source: error.into(),
    }
}

/// What the port's threads share of one worker.
pub struct WorkerServer {
    runtime: Arc<dyn Runtime>,
    channel: Arc<Channel>,
    path: BorrowedPath,
    hold: Arc<Hold>,
    tells: Mutex<HashMap<Token, mpsc::Sender<Told>>>,
    last_token: AtomicU64,
    report: Mutex<Report>,
    /// Messages taken from it, and how often it had to wait for its rate.
    taken: AtomicU64,
    slowed: AtomicU64,
    ending: AtomicBool,
    /// Of those who give the lease back, one does, and the other waits for it.
    returning: Mutex<()>,
    ended: Mutex<Option<String>>,
    thread: Mutex<Option<Task>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The table of interrupts: written here, read by the worker, which cannot cut it off or write it.
fn table(vectors: u32) -> io::Result<(OwnedFd, MappedAperture)> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("sublet-interrupts", flags)?;
    let bytes = (u64::from(vectors) * 8).next_multiple_of(4096).max(4096);
    ftruncate(&fd, bytes)?;
    let mapped = MappedAperture::memory(fd.as_fd(), 0, bytes)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
    fcntl_add_seals(&fd, seals)?;
    Ok((fd, mapped))
}

/// Borrows a function through `engine` and serves it on `endpoint` by a worker, which listens when
/// this returns. Nothing is left behind on failure.
pub fn start(
    engine: &Arc<Engine>,
    (bdf, ram): (Bdf, Option<u64>),
    endpoint: Endpoint,
    mut start: Start,
    (launch, settings): (Box<dyn Launch>, &Settings),
) -> Result<Arc<WorkerServer>, StartError> {
    let runtime = Arc::clone(engine.runtime());
    let (ours, theirs) = Channel::pair()?;
    let ours = Arc::new(ours.on(Arc::clone(&runtime)));
    let (grip, held) = pipe_with(PipeFlags::CLOEXEC).map_err(kernel("make a pipe"))?;
    let (path, interrupts) = borrow(engine, (bdf, ram), &ours)?;
    let lease = path.lease();
    let give_back = |error| {
        let _ = engine.give_back(lease);
        error
    };
    start.lease = lease.0;
    let mapped = start.mapped;
    let hold = Hold::new((&runtime, lease), (grip, mapped), &ours, settings);
    let let_go = hold.let_go_by_a_thread().map_err(give_back)?;
    let orders = orders(&path, start, &endpoint, (interrupts, held)).map_err(give_back)?;
    let worker = Arc::new(WorkerServer {
        runtime: Arc::clone(&runtime),
        channel: ours,
        path,
        hold,
        tells: Mutex::default(),
        last_token: AtomicU64::new(0),
        report: Mutex::default(),
        taken: AtomicU64::new(0),
        slowed: AtomicU64::new(0),
        ending: AtomicBool::new(false),
        returning: Mutex::default(),
        ended: Mutex::default(),
        thread: Mutex::default(),
    });
    worker.path.on_lost(let_go);
    let (ready, readiness) = mpsc::channel();
    let rate = Bucket::new(settings.messages_per_second, runtime.now_ms());
    let memory_maps = Arc::clone(&settings.memory_maps);
    let hearing = Hearing::new(Arc::clone(&worker), endpoint, (memory_maps, rate), ready);
    let run = move || hearing.run(&*launch, theirs, orders);
    let spawned = runtime.spawn(format!("worker-{lease}"), Box::new(run));
    *lock(&worker.thread) = Some(
        spawned
            .map_err(kernel("start a thread"))
            .map_err(give_back)?,
    );
    let until_ms = runtime.now_ms() + READY_WAIT_MS;
    match runtime.receive(&readiness, Some(until_ms)) {
        Ok(Ok(())) => Ok(worker),
        Ok(Err(why)) => Err(fail(&worker, why)),
        Err(_) => Err(fail(&worker, "it does not answer".into())),
    }
}

/// The lease with its open path, and the table of its interrupts for the worker.
fn borrow(
    engine: &Arc<Engine>,
    (bdf, ram): (Bdf, Option<u64>),
    channel: &Arc<Channel>,
) -> Result<(BorrowedPath, OwnedFd), StartError> {
    let mut interrupts = None;
    let told = Arc::clone(channel);
    let tell = |vectors| {
        let (fd, table) = table(vectors)?;
        interrupts = Some(fd);
        let tell = move |vector: u32, count| {
            table.write_u64(u64::from(vector) * 8, count);
            // Without waiting. With no room the worker has messages to read, and it looks at the
            // table after each; one that has gone needs no interrupt.
            let _ = told.send_to_worker(&ToWorker::Raised, false);
        };
        Ok(Box::new(tell) as vfio_shim::path::engine::Tell)
    };
    let path = engine.borrow_path(bdf, ram, tell);
    let path = path.map_err(StartError::Call)?;
    match interrupts {
        Some(interrupts) => Ok((path, interrupts)),
        None => {
            let _ = engine.give_back(path.lease());
            Err(StartError::NotReady("it has no interrupts".into()))
        }
    }
}

fn fail(worker: &WorkerServer, why: String) -> StartError {
    if let Some(error) = worker.end() {
        tracing::error!(%error, "a lease whose worker did not begin could not be given back");
    }
    StartError::NotReady(why)
}

/// Everything that a worker is told before it gives up its rights.
fn orders(
    path: &BorrowedPath,
    mut start: Start,
    endpoint: &Endpoint,
    (interrupts, held): (OwnedFd, OwnedFd),
) -> Result<Vec<ToWorker>, StartError> {
    let opened = path.opened();
    let mut orders = vec![ToWorker::Function(
        path.entry().ids,
        Box::new(opened.function.clone()),
    )];
    let pieces = opened.config.chunks(CONFIG_BYTES_MAX);
    orders.extend(pieces.map(|piece| ToWorker::Config(piece.to_vec())));
    let listener = endpoint.listener().try_clone_to_owned();
    let listener = listener.map_err(kernel("hand the socket over"))?;
    let mut fds = vec![listener, interrupts, held];
    start.window = None;
    if let Some((fd, offset)) = path.window_fd() {
        start.window = Some(offset);
        fds.push(
            fd.try_clone_to_owned()
                .map_err(kernel("hand the window over"))?,
        );
    }
    orders.push(ToWorker::Start(start, fds));
    Ok(orders)
}

impl WorkerServer {
    fn launch(
        &self,
        launch: &dyn Launch,
        theirs: Channel,
        orders: Vec<ToWorker>,
    ) -> Result<Arc<dyn Process>, StartError> {
        let process = launch.launch(theirs)?;
        self.hold.begins(&process);
        match self.order(orders) {
            Ok(()) => Ok(process),
            Err(error) => {
                self.hold.kill();
                self.bury(process);
                Err(error)
            }
        }
    }

    fn order(&self, orders: Vec<ToWorker>) -> Result<(), StartError> {
        // From here on whoever ends the lease finds the process; before, it found none.
        if let Some(why) = self.path.lost() {
            return Err(StartError::NotReady(why));
        }
        for order in &orders {
            if self.channel.send_to_worker(order, true)? != Sent::Sent {
                return Err(StartError::NotReady("it has ended at once".into()));
            }
        }
        Ok(())
    }

    /// The lease.
    pub fn lease(&self) -> LeaseId {
        self.path.lease()
    }

    /// The lease's path.
    pub fn path(&self) -> &BorrowedPath {
        &self.path
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.hold.process().map_or(0, |process| process.id())
    }

    /// What it has been left with.
    pub fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    /// How many messages were taken from it, and how often it had to wait for its rate.
    pub fn messages(&self) -> (u64, u64) {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (of(&self.taken), of(&self.slowed))
    }

    /// Why it has ended, if it has.
    pub fn ended(&self) -> Option<String> {
        lock(&self.ended).clone()
    }

    fn set_ended(&self, why: String) {
        lock(&self.ended).get_or_insert(why);
    }

    /// A VMM is about to have the window; not one whose lease is over.
    fn holder(&self, vmm: Vmm) -> Result<(), CallError> {
        if !self.hold.mapped {
            let why = "no VMM of this lease has the window";
            return Err(CallError::Gone(why.into()));
        }
        let began = self.hold.holders.begins(self.lease(), vmm);
        began.map_err(|error| CallError::Gone(words(&error)))?;
        // Behind the account: who ends the lease sees it, or it is seen here.
        match self.path.lost() {
            Some(why) => Err(CallError::Gone(why)),
            None => Ok(()),
        }
    }

    /// How the guest session stands; `None` if the worker does not say in time.
    pub fn tell(&self) -> Option<Told> {
        let vectors = self.path.scanned().len();
        let mut told = self.tell_from(0)?;
        while told.signals.len() < vectors {
            let more = self.tell_from(told.signals.len() as u32)?.signals;
            if more.is_empty() {
                break;
            }
            told.signals.extend(more);
        }
        Some(told)
    }

    fn tell_from(&self, first: u32) -> Option<Told> {
        if self.ended().is_some() {
            return None;
        }
        let token = Token(self.last_token.fetch_add(1, Ordering::Relaxed) + 1);
        let (reply, answer) = mpsc::channel();
        lock(&self.tells).insert(token, reply);
        let sent = self
            .channel
            .send_to_worker(&ToWorker::Tell(token, first), false);
        let told = match sent {
            Ok(Sent::Sent) => {
                let until_ms = self.runtime.now_ms() + TELL_WAIT_MS;
                self.runtime.receive(&answer, Some(until_ms)).ok()
            }
            _ => None,
        };
        lock(&self.tells).remove(&token);
        told.filter(|told| told.signals.len() <= SIGNALS_MAX)
    }

    /// Why what the lease had stays in quarantine, if it does: the lease is over, and its worker has
    /// not let go.
    pub fn held(&self) -> Option<String> {
        let pid = self.pid();
        let held = self.hold.is_stuck();
        held.then(|| format!("process {pid}: {}", CallError::Held))
    }

    /// How a process that was killed has ended. One that no signal ends is left to a thread that
    /// takes its end whenever that comes.
    fn bury(&self, process: Arc<dyn Process>) -> String {
        if process.gone(Some(END_WAIT_MS)) {
            return process.status();
        }
        let pid = process.id();
        tracing::error!(pid, "{}", CallError::Held);
        let bury = move || {
            process.gone(None);
            let status = process.status();
            tracing::info!(pid, "a worker has ended at last: {status}");
        };
        let spawned = self.runtime.spawn(format!("bury-{pid}"), Box::new(bury));
        if let Err(error) = spawned {
            tracing::error!(pid, %error, "its end will be taken when the port ends");
        }
        CallError::Held.to_string()
    }

    /// Ends the lease, where that has not ended already.
    fn give_back(&self) -> Option<CallError> {
        let _one = self.runtime.lock(&self.returning);
        match self.path.lost() {
            None => self.path.give_back().err(),
            Some(_) => self.path.wait_let_go().err(),
        }
    }

    /// Ends the lease, where that has not ended already, and then the worker. In this order: one
    /// that stands in the kernel lets go as long as its other thread lives.
    pub fn end(&self) -> Option<CallError> {
        self.ending.store(true, Ordering::SeqCst);
        let error = self.give_back();
        self.hold.kill();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            thread.join();
        }
        error
    }
}
