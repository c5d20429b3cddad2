//! A worker in a process of its own: started, served, told, and ended, by the port's side.
//!
//! One thread for each worker starts it, answers its requests, and outlives it: the kernel ties a
//! worker's life to the thread that started it. What a worker must let go of, it holds by its
//! grip: a pipe whose end it closes when it has let go, and that its death closes.

use crate::{
    ipc::{
        Answered, Channel, ChannelError, FILES_MAX, MapPart, SIGNALS_MAX, Sent, Start, ToPort,
        ToWorker, Token, Told,
    },
    jail::{Report, Sandbox, keep_from_children},
    worker::ALLOCATOR,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};
use vfio_shim::{
    model::{Aperture, OsRuntime, Runtime, Span},
    path::{
        BorrowedPath, CallError, Engine, LeaseId,
        borrower::{Answer, GuestMap},
        limits::Bucket,
        message::CONFIG_BYTES_MAX,
        words,
    },
    vfio::MappedAperture,
};
use vmm_glue::vfio_user::{
    Endpoint,
    memory_check::{Inode, MemoryMaps},
};

/// How long a worker may take from its start to listening.
const READY_WAIT: Duration = Duration::from_secs(20);
/// How long `status` waits for a worker's word.
const TELL_WAIT: Duration = Duration::from_millis(500);
/// How long a worker may take to let go of its slices before it is ended.
const LET_GO_MS: i64 = 500;
/// How the kernel names a mapping of a VFIO device in `/proc/PID/maps`.
const VFIO_MAPPING: &str = "[vfio-device]";

/// What workers are started with.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// The `sublet` program.
    pub(super) program: PathBuf,
    pub(super) sandbox: Sandbox,
    /// More of a worker's messages than this in a second wait.
    pub(super) messages_per_second: u32,
    /// Who looks whether a VMM's memory is shared.
    pub(super) memory_maps: Arc<dyn MemoryMaps>,
}

/// Why there is no worker.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("the lease could not be had")]
    Call(#[source] CallError),
    #[error("the channel to a worker")]
    Channel(#[from] ChannelError),
    #[error("cannot {act} for a worker")]
    Kernel {
        act: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the worker did not begin to serve: {0}")]
    NotReady(String),
}

fn kernel<E: Into<io::Error>>(act: &'static str) -> impl Fn(E) -> StartError {
    move |error| StartError::Kernel {
        act,
        source: error.into(),
    }
}

/// What the daemon's threads share of one worker.
pub(super) struct WorkerProcess {
    channel: Arc<Channel>,
    path: BorrowedPath,
    process: Mutex<Option<Arc<OwnedFd>>>,
    pid: AtomicU64,
    /// The read end of its grip.
    grip: OwnedFd,
    mapped: bool,
    tells: Mutex<HashMap<Token, mpsc::Sender<Told>>>,
    last_token: AtomicU64,
    report: Mutex<Report>,
    /// Messages taken from it, and how often it had to wait for its rate.
    taken: AtomicU64,
    slowed: AtomicU64,
    ending: AtomicBool,
    ended: Mutex<Option<String>>,
    thread: Mutex<Option<JoinHandle<()>>>,
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
pub(super) fn start(
    engine: &Arc<Engine>,
    (bdf, ram): (vfio_shim::model::Bdf, Option<u64>),
    endpoint: Endpoint,
    mut start: Start,
    settings: &Settings,
) -> Result<Arc<WorkerProcess>, StartError> {
    let (ours, theirs) = Channel::pair()?;
    let ours = Arc::new(ours);
    let (grip, held) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(kernel("make a pipe"))?;
    let mut interrupts = None;
    let told = Arc::clone(&ours);
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
    let lease = path.lease();
    let give_back = |error| {
        let _ = engine.give_back(lease);
        error
    };
    let Some(interrupts) = interrupts else {
        return Err(give_back(StartError::NotReady(
            "it has no interrupts".into(),
        )));
    };
    start.lease = lease.0;
    let orders = orders(&path, start, &endpoint, (interrupts, held)).map_err(give_back)?;
    let worker = Arc::new(WorkerProcess {
        mapped: matches!(&orders.last(), Some(ToWorker::Start(start, _)) if start.mapped),
        channel: ours,
        path,
        process: Mutex::default(),
        pid: AtomicU64::new(0),
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
    let thread = Thread {
        worker: Arc::clone(&worker),
        endpoint,
        memory_maps: Arc::clone(&settings.memory_maps),
        ready: Some(ready),
        map: None,
        rate: Bucket::new(settings.messages_per_second, OsRuntime.now_ms()),
    };
    let settings = settings.clone();
    let builder = std::thread::Builder::new().name(format!("worker-{lease}"));
    let spawned = builder.spawn(move || thread.run(&settings, theirs, orders));
    *lock(&worker.thread) = Some(
        spawned
            .map_err(kernel("start a thread"))
            .map_err(give_back)?,
    );
    match readiness.recv_timeout(READY_WAIT) {
        Ok(Ok(())) => Ok(worker),
        Ok(Err(why)) => Err(fail(&worker, why)),
        Err(_) => Err(fail(&worker, "it does not answer".into())),
    }
}

fn fail(worker: &WorkerProcess, why: String) -> StartError {
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

/// The thread that starts and serves one worker.
struct Thread {
    worker: Arc<WorkerProcess>,
    endpoint: Endpoint,
    memory_maps: Arc<dyn MemoryMaps>,
    ready: Option<mpsc::Sender<Result<(), String>>>,
    /// A map call whose last part has not come yet.
    map: Option<MapCall>,
    /// What its messages are held to.
    rate: Bucket,
}

struct MapCall {
    token: Token,
    files: Vec<Arc<OwnedFd>>,
    maps: Vec<GuestMap>,
}

/// Why a worker is ended by the port's side.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("it asked for what no worker asks for: {0}")]
    Impossible(&'static str),
    #[error("it cannot go on: {0}")]
    Failed(String),
    #[error("it has ended")]
    Gone,
}

impl Thread {
    fn run(mut self, settings: &Settings, theirs: Channel, orders: Vec<ToWorker>) {
        let child = match self.worker.spawn(settings, theirs, orders) {
            Ok(child) => child,
            Err(error) => {
                self.worker.set_ended(words(&error));
                self.tell_ready(Err(words(&error)));
                return;
            }
        };
        let fault = self.serve();
        self.finish(child, &fault);
    }

    fn tell_ready(&mut self, result: Result<(), String>) {
        if let Some(ready) = self.ready.take() {
            // Nobody waits any more after its time.
            let _ = ready.send(result);
        }
    }

    /// Answers the worker until it is gone, or must go.
    fn serve(&mut self) -> Fault {
        loop {
            let message = match self.worker.channel.receive_from_worker() {
                Ok(Some(message)) => message,
                Ok(None) => return Fault::Gone,
                Err(error) => return error.into(),
            };
            self.keep_to_rate();
            if let Err(fault) = self.hear(message) {
                return fault;
            }
        }
    }

    /// Waits while the worker is over its rate; its channel fills, and then it waits as well. Ends
    /// early when the worker does.
    fn keep_to_rate(&mut self) {
        self.worker.taken.fetch_add(1, Ordering::Relaxed);
        while let Err(until_ms) = self.rate.take(|| OsRuntime.now_ms()) {
            self.worker.slowed.fetch_add(1, Ordering::Relaxed);
            let process = lock(&self.worker.process).clone();
            let left_ms = until_ms.saturating_sub(OsRuntime.now_ms()) as i64;
            if process.is_none_or(|process| closed(&process, Some(left_ms))) {
                return;
            }
        }
    }

    /// The worker ends, whatever it is doing, and its lease with it, unless the owner ends that.
    fn finish(&mut self, mut child: Child, fault: &Fault) {
        self.worker.kill();
        let status = child.wait();
        let pid = child.id();
        let status = status.map_or_else(|e| e.to_string(), |status| status.to_string());
        let owner = self.worker.ending.load(Ordering::SeqCst);
        let why = match fault {
            Fault::Gone => format!("its worker (process {pid}) has ended: {status}"),
            fault => format!("its worker (process {pid}) was ended: {fault}"),
        };
        if !owner {
            tracing::error!("a lease is lost: {why}");
        }
        self.worker.set_ended(why.clone());
        self.tell_ready(Err(why));
        if !owner && self.worker.path.lost().is_none() {
            // The path is closed and the function reset: what the worker cannot do any more.
            if let Err(error) = self.worker.path.give_back() {
                tracing::error!(%error, "the lease of a dead worker was not given back");
            }
        }
        lock(&self.worker.tells).clear();
    }

    fn hear(&mut self, message: ToPort) -> Result<(), Fault> {
        let path = &self.worker.path;
        let (token, result) = match message {
            ToPort::Ready(report) => {
                *lock(&self.worker.report) = report;
                self.tell_ready(Ok(()));
                return Ok(());
            }
            ToPort::Store(bar, offset, data) => {
                let bar = path.bar(bar.into());
                bar.ok_or(Fault::Impossible("a BAR"))?.write(offset, &data);
                return Ok(());
            }
            ToPort::Told(token, told) => {
                if let Some(asked) = lock(&self.worker.tells).remove(&token) {
                    let _ = asked.send(told);
                }
                return Ok(());
            }
            ToPort::Failed(why) => return Err(Fault::Failed(why)),
            ToPort::Map(token, part) => match self.map(token, part)? {
                Some(maps) => (token, self.worker.path.map(maps)),
                None => return Ok(()),
            },
            ToPort::Forward(token, request) => (token, path.forward(request)),
            ToPort::Unmap(token, span) => (token, path.unmap(span)),
            ToPort::Load(token, bar, offset, len) => {
                let bar = path.bar(bar.into()).ok_or(Fault::Impossible("a BAR"))?;
                let mut data = vec![0xff; len.into()];
                bar.read(offset, &mut data);
                (token, Ok(Answer::Bytes(data)))
            }
            ToPort::Check(token, check) => {
                let file =
                    |(device, number, range): (u64, u64, Span)| (Inode { device, number }, range);
                let ranges: Vec<_> = check.ranges.into_iter().map(file).collect();
                let shared = self.memory_maps.check_shared(check.pid, &ranges);
                let shared = shared.map(|()| Answer::Done);
                (
                    token,
                    shared.map_err(|error| CallError::Gone(words(&error))),
                )
            }
        };
        self.answer(token, result)
    }

    fn answer(&self, token: Token, result: Result<Answer, CallError>) -> Result<(), Fault> {
        let result = result.and_then(|answer| match answer {
            Answer::Done => Ok(Answered::Done),
            Answer::Bytes(bytes) => Ok(Answered::Bytes(bytes)),
            Answer::Unmapped(bytes) => Ok(Answered::Unmapped(bytes)),
            other => Err(CallError::Gone(format!(
                "an answer of the wrong kind: {other:?}"
            ))),
        });
        let answer = ToWorker::Answer(token, result);
        match self.worker.channel.send_to_worker(&answer, true)? {
            Sent::Sent => Ok(()),
            Sent::Full | Sent::Closed => Err(Fault::Gone),
        }
    }

    /// Takes one part of a map call; with the last one, the whole of it.
    fn map(&mut self, token: Token, part: MapPart) -> Result<Option<Vec<GuestMap>>, Fault> {
        let call = self.map.get_or_insert_with(|| MapCall {
            token,
            files: Vec::new(),
            maps: Vec::new(),
        });
        if call.token != token {
            return Err(Fault::Impossible("two map calls at once"));
        }
        call.files.extend(part.files.into_iter().map(Arc::new));
        if call.files.len() > FILES_MAX {
            return Err(Fault::Impossible("too many memory files"));
        }
        if call.maps.len() + part.pieces.len() > vfio_shim::path::borrower::MAPS_MAX {
            return Err(Fault::Impossible("too many maps"));
        }
        for piece in part.pieces {
            let fd = call.files.get(usize::from(piece.file));
            call.maps.push(GuestMap {
                span: piece.span,
                access: piece.access,
                fd: Arc::clone(fd.ok_or(Fault::Impossible("a memory file"))?),
                fd_offset: piece.offset,
            });
        }
        match part.last {
            true => Ok(self.map.take().map(|call| call.maps)),
            false => Ok(None),
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // The socket's file goes with `endpoint`: nobody listens there any more.
        tracing::debug!(path = %self.endpoint.path().display(), "a worker's socket is removed");
    }
}

impl WorkerProcess {
    fn spawn(
        &self,
        settings: &Settings,
        theirs: Channel,
        orders: Vec<ToWorker>,
    ) -> Result<Child, StartError> {
        // Before the fork: what any library has opened for children by mistake is none of theirs.
        keep_from_children();
        let mut command = Command::new(&settings.program);
        command
            .arg("worker")
            .arg(format!("--parent={}", std::process::id()))
            .arg(format!("--sandbox={}", settings.sandbox.word()))
            .env_clear()
            .env(ALLOCATOR.0, ALLOCATOR.1)
            .stdin(Stdio::from(theirs.into_fd()))
            .stdout(Stdio::null());
        if let Some(filter) = std::env::var_os("SUBLET_LOG") {
            command.env("SUBLET_LOG", filter);
        }
        let mut child = command.spawn().map_err(kernel("start a process"))?;
        // The command holds a copy of the worker's end of the channel: with it, no end would come.
        drop(command);
        let told = self.take_in(&child).and_then(|()| {
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
        });
        if let Err(error) = told {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        Ok(child)
    }

    fn take_in(&self, child: &Child) -> Result<(), StartError> {
        let pid = Pid::from_child(child);
        let process = pidfd_open(pid, PidfdFlags::empty());
        let process = process.map_err(kernel("watch a process"))?;
        *lock(&self.process) = Some(Arc::new(process));
        self.pid.store(child.id().into(), Ordering::Relaxed);
        Ok(())
    }

    /// The lease.
    pub(super) fn lease(&self) -> LeaseId {
        self.path.lease()
    }

    /// The lease's path.
    pub(super) fn path(&self) -> &BorrowedPath {
        &self.path
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed) as u32
    }

    /// What it has been left with.
    pub(super) fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    /// How many messages were taken from it, and how often it had to wait for its rate.
    pub(super) fn messages(&self) -> (u64, u64) {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (of(&self.taken), of(&self.slowed))
    }

    /// Why it has ended, if it has.
    pub(super) fn ended(&self) -> Option<String> {
        lock(&self.ended).clone()
    }

    fn set_ended(&self, why: String) {
        lock(&self.ended).get_or_insert(why);
    }

    fn kill(&self) {
        let process = lock(&self.process).clone();
        if let Some(process) = process {
            // Fails where it has ended by itself.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
        self.channel.close();
    }

    /// Makes the worker let go of the lease's slices: when this returns, no store of it can reach
    /// them any more. Called by the thread that ends the lease; short, but for a worker that does
    /// not do as it is told, which is killed.
    fn let_go(&self, why: &str) {
        let lost = ToWorker::Lost(why.to_owned());
        let told = matches!(self.channel.send_to_worker(&lost, false), Ok(Sent::Sent));
        if told && closed(&self.grip, Some(LET_GO_MS)) && !self.maps_a_device() {
            return;
        }
        self.kill();
        let process = lock(&self.process).clone();
        if let Some(process) = process {
            // For ever, if need be: what is not gone can still store into a slice that would be
            // another tenant's. The peer then sees the heartbeat stop, which ends the session.
            closed(&process, None);
        }
    }

    /// Whether the kernel still shows a device mapped by the worker, whatever it says itself. A
    /// worker whose VMM maps the window is as trusted as that.
    fn maps_a_device(&self) -> bool {
        if self.mapped {
            return false;
        }
        let maps = Path::new("/proc").join(self.pid().to_string()).join("maps");
        match std::fs::read_to_string(maps) {
            Ok(maps) => maps.contains(VFIO_MAPPING),
            // Gone, and with it all that it had mapped.
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    /// How the guest session stands; `None` if the worker does not say in time.
    pub(super) fn tell(&self) -> Option<Told> {
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
            Ok(Sent::Sent) => answer.recv_timeout(TELL_WAIT).ok(),
            _ => None,
        };
        lock(&self.tells).remove(&token);
        told.filter(|told| told.signals.len() <= SIGNALS_MAX)
    }

    /// Ends the worker, and then the lease, where that has not ended already.
    pub(super) fn end(&self) -> Option<CallError> {
        self.ending.store(true, Ordering::SeqCst);
        let over = self.ended().is_some() && self.path.lost().is_some();
        self.kill();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        if over || self.path.lost().is_some() {
            return None;
        }
        self.path.give_back().err()
    }
}

/// Waits until the other end of a pipe is closed, or a process has ended; false if not in time.
fn closed(fd: &OwnedFd, wait_ms: Option<i64>) -> bool {
    let timeout = wait_ms.map(|ms| Timespec {
        tv_sec: ms / 1000,
        tv_nsec: ms % 1000 * 1_000_000,
    });
    loop {
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot wait for a worker");
                return false;
            }
        }
    }
}
