//! The worker: the process that faces one VMM. It is handed what it needs, gives up its rights, and only then listens.
//!
//! ```text
//! started --function, start, descriptors--> told --slices mapped, window closed--> confined
//!         --channel's thread--> sealed --ready--> serves one VMM after the other --killed--> gone
//! ```
//! Two threads: this one serves the VMM; the channel's reads what the port says, and writes the
//! VMM's eventfds. It holds the write end of a pipe, its grip, as long as it can reach its slice of
//! the window: closed when the lease is lost, and by its death. It dies with the daemon: by a
//! signal, and by the channel's end.

mod port;
mod role;
mod window;

pub use role::{ALLOCATOR, ROLE};

use crate::{
    ipc::{Channel, ChannelError, Sent, Start, ToPort, ToWorker, Token, Told},
    jail::{JailError, Role, Sandbox, confine},
};
use port::ChannelPort;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::Errno,
    process::{Pid, Signal, getppid, set_parent_process_death_signal},
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    process::exit,
    sync::{Arc, Mutex, PoisonError},
};
use vfio_shim::{
    model::{BAR_COUNT, CONFIG_BYTES_MAX, Function, FunctionIds},
    path::{
        BorrowedFunction, CallError, LeaseId, borrower::OpenedPath, message::RemoteFunction, words,
    },
};
use vmm_glue::vfio_user::{
    BarMode, Endpoint, EndpointError, MemoryCheck, Options, Peers, SessionShared,
};
use window::BarWindow;

/// Why a worker ends before it serves anybody.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// It was started by somebody else, or the daemon has died meanwhile.
    #[error("a worker is started by `sublet port`, which is not its parent (any more)")]
    Orphan,
    /// The channel.
    #[error("the channel to the daemon")]
    Channel(#[from] ChannelError),
    /// The daemon said something else than a start.
    #[error("the daemon did not say what to serve")]
    NotTold,
    /// It cannot give its rights up.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The function, as it was told, cannot be served.
    #[error("the function cannot be served")]
    Function(#[from] CallError),
    /// The kernel refused.
    #[error("cannot {act}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// Serving ended.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
}

fn kernel(act: &'static str) -> impl Fn(io::Error) -> WorkerError {
    move |source| WorkerError::Kernel { act, source }
}

/// What the daemon has told before the worker gives its rights up.
struct Orders {
    ids: FunctionIds,
    function: RemoteFunction,
    config: Vec<u8>,
    start: Start,
    listener: OwnedFd,
    table: OwnedFd,
    grip: OwnedFd,
    window: Option<(OwnedFd, u64)>,
}

fn orders(channel: &Channel) -> Result<Orders, WorkerError> {
    let next = || channel.receive_from_port()?.ok_or(WorkerError::Orphan);
    let ToWorker::Function(ids, function) = next()? else {
        return Err(WorkerError::NotTold);
    };
    let mut config = Vec::new();
    loop {
        match next()? {
            ToWorker::Config(bytes) if config.len() + bytes.len() <= CONFIG_BYTES_MAX => {
                config.extend(bytes);
            }
            ToWorker::Start(start, fds) => {
                let mut fds = fds.into_iter();
                let mut fd = || fds.next().ok_or(WorkerError::NotTold);
                let (listener, table, grip) = (fd()?, fd()?, fd()?);
                let window = start
                    .window
                    .zip(fds.next())
                    .map(|(offset, fd)| (fd, offset));
                return Ok(Orders {
                    ids,
                    function: *function,
                    config,
                    start,
                    listener,
                    table,
                    grip,
                    window,
                });
            }
            _ => return Err(WorkerError::NotTold),
        }
    }
}

/// Makes sure that the worker does not outlive the daemon that started it.
fn die_with(parent: i32) -> Result<(), WorkerError> {
    let signal = set_parent_process_death_signal(Some(Signal::KILL));
    signal.map_err(|errno| kernel("tie its life to the daemon's")(errno.into()))?;
    // A daemon that died before that call has sent no signal.
    match getppid().map(Pid::as_raw_nonzero) {
        Some(now) if now.get() == parent => Ok(()),
        _ => Err(WorkerError::Orphan),
    }
}

/// The channel, which came as stdin. Nothing else reads there.
fn channel() -> io::Result<Channel> {
    Ok(Channel::of(io::stdin().as_fd().try_clone_to_owned()?))
}

/// Everything that the worker's two threads share.
struct Worker {
    channel: Arc<Channel>,
    port: Arc<ChannelPort>,
    function: Arc<BorrowedFunction>,
    shared: SessionShared,
    table: OwnedFd,
    grip: Mutex<Option<OwnedFd>>,
    seen: Mutex<Vec<u64>>,
}

/// Runs a worker for the daemon `parent`, whose channel is stdin, held to `role`.
pub fn run(parent: i32, sandbox: Sandbox, role: &'static Role) -> Result<(), WorkerError> {
    die_with(parent)?;
    let channel = Arc::new(channel().map_err(kernel("take its channel"))?);
    let orders = orders(&channel)?;
    let bars = windows(&orders).map_err(kernel("map its slice of the window"))?;
    // A window that no VMM maps itself is closed here, for good; the slice stays as a mapping.
    let window = orders.window.filter(|_| orders.start.mapped);
    let handed = [
        Some(&orders.listener),
        Some(&orders.table),
        Some(&orders.grip),
    ];
    let handed = handed
        .into_iter()
        .chain([window.as_ref().map(|(fd, _)| fd)]);
    let mut own: Vec<i32> = handed.flatten().map(AsRawFd::as_raw_fd).collect();
    own.extend([0, 1, 2, channel.as_fd().as_raw_fd()]);
    let confined = confine(role, sandbox, &own)?;

    let port = ChannelPort::new(Arc::clone(&channel), bars, window);
    let lease = LeaseId(orders.start.lease);
    let opened = OpenedPath {
        function: orders.function,
        config: orders.config,
    };
    let function = BorrowedFunction::at(port.clone(), lease, (orders.ids, opened))?;
    let function = Arc::new(function);
    let worker = Arc::new(Worker {
        seen: Mutex::new(vec![0; function.signals().len()]),
        channel,
        port,
        function,
        shared: SessionShared::default(),
        table: orders.table,
        grip: Mutex::new(Some(orders.grip)),
    });
    look_up();
    start_listening(&worker)?;
    let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let stop = stop.map_err(|errno| kernel("make an eventfd")(errno.into()))?;
    let options = options(&orders.start, &worker.port);
    let endpoint = Endpoint::adopt(orders.listener, Path::new(&orders.start.path));
    let report = confined.seal()?;
    worker.channel.send_to_port(&ToPort::Ready(report))?;
    let served: Arc<dyn Function> = worker.function.clone();
    let ended = endpoint.serve(&served, &options, stop.as_fd(), &worker.shared);
    if let Err(error) = &ended {
        let _ = worker.channel.send_to_port(&ToPort::Failed(words(error)));
    }
    Ok(ended?)
}

/// Has libraries find out now what they would ask the kernel for at their first use.
pub fn look_up() {
    // Where the kernel's clock is mapped.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
}

/// Returns when the second thread has begun: what the kernel is asked for at the start of a thread
/// is nothing that it may be asked for later.
fn start_listening(worker: &Arc<Worker>) -> Result<(), WorkerError> {
    let listening = Arc::clone(worker);
    let (began, begun) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("channel".into());
    let spawned = thread.spawn(move || {
        let _ = began.send(());
        drop(began);
        listening.listen();
    });
    spawned.map_err(kernel("start its second thread"))?;
    begun.recv().map_err(|_| WorkerError::Orphan)
}

fn options(start: &Start, port: &Arc<ChannelPort>) -> Options {
    Options {
        bars: match start.mapped {
            true => BarMode::Mapped,
            false => BarMode::Trapped,
        },
        memory_check: match start.memory_check {
            true => MemoryCheck::On,
            false => MemoryCheck::Off,
        },
        peers: Peers::Only {
            uids: start.vmm_uids.clone(),
            gids: start.vmm_gids.clone(),
        },
        maps_max: start.maps_max,
        bytes_max: start.bytes_max,
        memory_maps: port.clone(),
        ..Options::default()
    }
}

/// Each BAR's slice, mapped where the window is memory, else reached through the channel.
fn windows(orders: &Orders) -> io::Result<[BarWindow; BAR_COUNT]> {
    let mut bars = Vec::with_capacity(BAR_COUNT);
    for bar in 0..BAR_COUNT {
        let region = &orders.function.regions[bar];
        bars.push(match (&orders.window, region.slice) {
            (_, None) => BarWindow::none(),
            (Some((fd, window)), Some(slice)) => {
                BarWindow::mapped(fd.as_fd(), window + slice.0, &region.info)?
            }
            (None, Some(_)) => BarWindow::far(bar as u8, region.info.size),
        });
    }
    bars.try_into()
        .map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Worker {
    /// Reads what the port says until it says nothing more, and then ends the process.
    fn listen(&self) {
        let ended = self.listen_on();
        if let Err(error) = &ended {
            tracing::error!("a worker ends: {}", words(error));
        }
        // The daemon has gone, or has told what cannot be: nothing of this process may go on.
        exit(i32::from(ended.is_err()));
    }

    fn listen_on(&self) -> Result<(), ChannelError> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.function.wake_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    let source = errno.into();
                    let act = "wait for";
                    return Err(ChannelError::Io { act, source });
                }
            }
            if !fds[0].revents().is_empty() {
                match self.channel.receive_from_port()? {
                    None => return Ok(()),
                    Some(message) => self.hear(message)?,
                }
                // After each message: one that says so may have found no room.
                self.scan();
            }
            self.function.deliver();
        }
    }

    fn hear(&self, message: ToWorker) -> Result<(), ChannelError> {
        match message {
            ToWorker::Answer(token, result) => self.port.answered(token, result),
            ToWorker::Tell(token, first) => drop(self.tell(token, first)?),
            ToWorker::Lost(why) => self.lose(&why),
            ToWorker::Raised => {}
            // Told once, before the sandbox.
            ToWorker::Function(..) | ToWorker::Config(_) | ToWorker::Start(..) => {}
        }
        Ok(())
    }

    /// Raises every vector whose count in the table differs from the one seen.
    fn scan(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; seen.len() * 8];
        let read = rustix::io::pread(&self.table, &mut bytes, 0).unwrap_or(0);
        let counts = bytes[..read].chunks_exact(8);
        for (vector, (count, seen)) in counts.zip(seen.iter_mut()).enumerate() {
            let count = u64::from_ne_bytes(count.try_into().unwrap_or_default());
            if count != *seen {
                *seen = count;
                self.function.raise(vector as u32);
            }
        }
    }

    /// Lets go of the window: what waits for the port goes on with ones, nothing is mapped any more,
    /// no access begins, and then the grip is opened, which tells the port.
    fn lose(&self, why: &str) {
        self.port.let_go();
        self.function.lose(why);
        let mut grip = self.grip.lock().unwrap_or_else(PoisonError::into_inner);
        drop(grip.take());
    }

    fn tell(&self, token: Token, first: u32) -> Result<Sent, ChannelError> {
        let counters = &self.shared.counters;
        let signals = self.function.signals();
        let signals = signals.into_iter().skip(first as usize);
        let told = Told {
            state: self.shared.state(),
            last_error: self.shared.last_error(),
            counters: [
                counters.bar_reads.get(),
                counters.bar_writes.get(),
                counters.config_reads.get(),
                counters.maps_now.get(),
                counters.bytes_now.get(),
                counters.messages.get(),
            ],
            signals: signals.take(crate::ipc::SIGNALS_MAX).collect(),
        };
        self.channel.send_to_port(&ToPort::Told(token, told))
    }
}
