//! What a worker does once it is told what to serve: a loop for its VMM and one for its port, on any runtime.

use super::{
    WorkerError, kernel,
    port::ChannelPort,
    window::{BarWindow, Bars},
};
use crate::{
    ipc::{Channel, ChannelError, Sent, Start, ToPort, ToWorker, Token, Told},
    jail::Report,
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd},
    io::Errno,
};
use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};
use vfio_shim::{
    model::{CONFIG_BYTES_MAX, Function, FunctionIds, Runtime},
    path::{BorrowedFunction, LeaseId, borrower::OpenedPath, message::RemoteFunction, words},
};
use vmm_glue::vfio_user::{BarMode, Endpoint, MemoryCheck, Options, Peers, SessionShared};

/// What the port has told before the worker gives its rights up.
pub struct Orders {
    ids: FunctionIds,
    function: RemoteFunction,
    config: Vec<u8>,
    start: Start,
    listener: OwnedFd,
    table: OwnedFd,
    grip: OwnedFd,
    /// The window's descriptor, and where in it the window begins.
    pub(super) window: Option<(OwnedFd, u64)>,
}

impl Orders {
    /// Waits for them.
    pub fn receive(channel: &Channel) -> Result<Self, WorkerError> {
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
                    let window = start.window.zip(fds.next());
                    return Ok(Self {
                        ids,
                        function: *function,
                        config,
                        listener,
                        table,
                        grip,
                        window: window.map(|(offset, fd)| (fd, offset)),
                        start,
                    });
                }
                _ => return Err(WorkerError::NotTold),
            }
        }
    }

    /// The function that is to be served.
    pub fn function(&self) -> &RemoteFunction {
        &self.function
    }

    /// Whether the VMM maps the BARs itself.
    pub(super) fn mapped(&self) -> bool {
        self.start.mapped
    }

    /// What came along, but for the window.
    pub(super) fn descriptors(&self) -> [RawFd; 3] {
        [&self.listener, &self.table, &self.grip].map(AsRawFd::as_raw_fd)
    }

    fn options(&self, runtime: &Arc<dyn Runtime>, port: &Arc<ChannelPort>) -> Options {
        let start = &self.start;
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
            holders: Some(port.clone()),
            runtime: Arc::clone(runtime),
            ..Options::default()
        }
    }
}

/// Everything that the worker's two threads share.
pub struct Serving {
    runtime: Arc<dyn Runtime>,
    channel: Arc<Channel>,
    port: Arc<ChannelPort>,
    function: Arc<BorrowedFunction>,
    shared: Arc<SessionShared>,
    endpoint: Endpoint,
    options: Options,
    /// Nothing ends the endpoint but the process's own end.
    stop: OwnedFd,
    table: OwnedFd,
    grip: Mutex<Option<OwnedFd>>,
    seen: Mutex<Vec<u64>>,
}

impl Serving {
    /// All of it, ready for both loops; `bars` are the function's as this process reaches them.
    pub fn new(
        runtime: Arc<dyn Runtime>,
        channel: Arc<Channel>,
        mut orders: Orders,
        bars: Bars,
        shared: Arc<SessionShared>,
    ) -> Result<Arc<Self>, WorkerError> {
        let window = orders.window.take();
        let port = ChannelPort::new(Arc::clone(&runtime), Arc::clone(&channel), bars, window);
        let options = orders.options(&runtime, &port);
        let lease = LeaseId(orders.start.lease);
        let opened = OpenedPath {
            function: orders.function,
            config: orders.config,
        };
        let told = (orders.ids, opened);
        let function = BorrowedFunction::at(Arc::clone(&runtime), port.clone(), lease, told)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Arc::new(Self {
            seen: Mutex::new(vec![0; function.signals().len()]),
            runtime,
            channel,
            port,
            function: Arc::new(function),
            shared,
            endpoint: Endpoint::adopt(orders.listener, Path::new(&orders.start.path)),
            options,
            stop: stop.map_err(|errno| kernel("make an eventfd")(errno.into()))?,
            table: orders.table,
            grip: Mutex::new(Some(orders.grip)),
        }))
    }

    /// Tells the port that it listens, and serves one VMM after the other.
    pub fn serve(&self, report: Report) -> Result<(), WorkerError> {
        self.channel.send_to_port(&ToPort::Ready(report))?;
        let served: Arc<dyn Function> = self.function.clone();
        let stop = self.stop.as_fd();
        let ended = self
            .endpoint
            .serve(&served, &self.options, stop, &self.shared);
        if let Err(error) = &ended {
            let _ = self.channel.send_to_port(&ToPort::Failed(words(error)));
        }
        Ok(ended?)
    }

    /// Reads what the port says until it says nothing more, and writes the VMM's eventfds. After
    /// it, nothing of the process may go on.
    pub fn listen(&self) -> Result<(), ChannelError> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.function.wake_fd(), PollFlags::IN),
            ];
            let failed = |errno: Errno| ChannelError::Io {
                act: "wait for",
                source: errno.into(),
            };
            self.runtime.poll(&mut fds).map_err(failed)?;
            if !fds[0].revents().is_empty() {
                match self.channel.receive_from_port()? {
                    None => return Ok(()),
                    Some(message) => {
                        // At each message: one that says so may have found no room. Before the
                        // message: what was raised before a reset is there before its answer.
                        self.scan();
                        self.hear(message)?;
                    }
                }
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

/// Each BAR's slice by what `near` makes of its offset in the window, else through the channel.
pub fn bars<E>(
    function: &RemoteFunction,
    mut near: impl FnMut(u64, &vfio_shim::model::RegionInfo) -> Result<Option<BarWindow>, E>,
) -> Result<Bars, E> {
    let mut bars = Bars::default();
    for (bar, window) in bars.iter_mut().enumerate() {
        let region = &function.regions[bar];
        let Some(slice) = region.slice else { continue };
        let far = BarWindow::Far {
            bar: bar as u8,
            bytes: region.info.size,
        };
        *window = near(slice.0, &region.info)?.unwrap_or(far);
    }
    Ok(bars)
}
