//! The port's side of a worker: starts it, answers its requests, makes it let go, and outlives it.
//!
//! One thread for each worker starts it, answers its requests, and outlives it: the kernel ties a
//! worker's life to the thread that started it. What a worker must let go of, it holds by its
//! grip: a pipe whose end it closes when it has let go, and that its death closes. What a process
//! is, is the owner's to say: [`Launch`] and [`Process`].

mod hear;

use super::holders::Holders;
use crate::{
    ipc::{Channel, ChannelError, SIGNALS_MAX, Sent, Start, ToWorker, Token, Told},
    jail::Report,
};
use hear::Hearing;
use rustix::{
    event::{PollFd, PollFlags},
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
/// How long a worker may take to let go of its slices before it is ended.
const LET_GO_MS: u64 = 500;

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
    /// How it has ended, in words. Called once it is killed, by the thread that started it.
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
    process: Mutex<Option<Arc<dyn Process>>>,
    /// The read end of its grip.
    grip: OwnedFd,
    mapped: bool,
    holders: Arc<Holders>,
    tells: Mutex<HashMap<Token, mpsc::Sender<Told>>>,
    last_token: AtomicU64,
    report: Mutex<Report>,
    /// Messages taken from it, and how often it had to wait for its rate.
    taken: AtomicU64,
    slowed: AtomicU64,
    ending: AtomicBool,
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
    let orders = orders(&path, start, &endpoint, (interrupts, held)).map_err(give_back)?;
    let worker = Arc::new(WorkerServer {
        runtime: Arc::clone(&runtime),
        mapped,
        holders: Arc::clone(&settings.holders),
        channel: ours,
        path,
        process: Mutex::default(),
        grip,
        tells: Mutex::default(),
        last_token: AtomicU64::new(0),
        report: Mutex::default(),
        taken: AtomicU64::new(0),
        slowed: AtomicU64::new(0),
        ending: AtomicBool::new(false),
        ended: Mutex::default(),
        thread: Mutex::default(),
    });
    let letting_go = Arc::downgrade(&worker);
    worker.path.on_lost(Box::new(move |why| {
        if let Some(worker) = letting_go.upgrade() {
            worker.let_go(why);
        }
    }));
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
        *lock(&self.process) = Some(Arc::clone(&process));
        match self.order(orders) {
            Ok(()) => Ok(process),
            Err(error) => {
                process.kill();
                process.status();
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

    fn process(&self) -> Option<Arc<dyn Process>> {
        lock(&self.process).clone()
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
        self.process().map_or(0, |process| process.id())
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

    fn kill(&self) {
        if let Some(process) = self.process() {
            process.kill();
        }
        self.channel.close();
    }

    /// Makes the worker let go of the lease's slices: when this returns, no store of it can reach
    /// them any more. Called by the thread that ends the lease; short, but for a worker that does
    /// not do as it is told, which is killed.
    fn let_go(&self, why: &str) {
        let lost = ToWorker::Lost(why.to_owned());
        let told = matches!(self.channel.send_to_worker(&lost, false), Ok(Sent::Sent));
        let let_go = told && self.has_let_go() && !self.maps_a_device();
        if !let_go {
            self.kill();
            if let Some(process) = self.process() {
                // For ever, if need be: what is not gone can still store into a slice that would be
                // another tenant's. The peer then sees the heartbeat stop, which ends the session.
                process.gone(None);
            }
        }
        // It hands the window over no more: who has it, is known.
        self.holders.end(self.lease());
    }

    /// A VMM is about to have the window; not one whose lease is over.
    fn holder(&self, vmm: Vmm) -> Result<(), CallError> {
        if !self.mapped {
            let why = "no VMM of this lease has the window";
            return Err(CallError::Gone(why.into()));
        }
        let began = self.holders.begins(self.lease(), vmm);
        began.map_err(|error| CallError::Gone(words(&error)))?;
        // Behind the account: who ends the lease sees it, or it is seen here.
        match self.path.lost() {
            Some(why) => Err(CallError::Gone(why)),
            None => Ok(()),
        }
    }

    /// Waits until the other end of the grip is closed; false if not in time.
    fn has_let_go(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.grip.as_fd(), PollFlags::IN)];
        let until_ms = self.runtime.now_ms() + LET_GO_MS;
        match self.runtime.poll_until(&mut fds, Some(until_ms)) {
            Ok(closed) => closed,
            Err(error) => {
                tracing::error!(%error, "cannot wait for a worker");
                false
            }
        }
    }

    /// Whether a device is mapped by the worker, whatever it says itself. A worker whose VMM maps
    /// the window is as trusted as that.
    fn maps_a_device(&self) -> bool {
        let process = self.process().filter(|_| !self.mapped);
        process.is_some_and(|process| process.maps_a_device())
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

    /// Ends the worker, and then the lease, where that has not ended already.
    pub fn end(&self) -> Option<CallError> {
        self.ending.store(true, Ordering::SeqCst);
        let over = self.ended().is_some() && self.path.lost().is_some();
        self.kill();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            thread.join();
        }
        if over || self.path.lost().is_some() {
            return None;
        }
        self.path.give_back().err()
    }
}
