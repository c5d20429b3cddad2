//! The daemon's end of a port's line: a thread that looks for the port, and tells the pool what it holds and says.
//!
//! ```text
//! nobody listens --> leases of the port are reclaimed --+
//!   ^                                                   | again and again
//!   +-- connect <---------------------------------------+
//!          | hello, leases, ready: the pool is told what the port holds
//!          v
//!       connected --end of the line--> whether it goes on is not known: connect
//! ```

use crate::line::{FromDaemon, FromPort, Lease, Packets, Sent, VERSION, connect};
use crate::pool::{End, Event, FunctionKey, Held, PortPool};
use crate::port::ENDED_MAX;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::net::SocketType;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_shim::model::{JoinOnDrop, Runtime};
use vfio_shim::path::grant::{AskId, PortLine, ToPool, ToPort};
use vfio_shim::path::lender::OFFERS_MAX;
use vfio_shim::path::message::Secret;
use vfio_shim::path::{LeaseId, LeasePool, words};

/// How soon a port is looked for again after the end of its line, milliseconds.
const AGAIN_SOON_MS: u64 = 20;
/// The same for one that has not been there for long: each look waits twice as long as the last.
const AGAIN_MAX_MS: u64 = 1_000;
/// How long a port may take to say what it holds, milliseconds.
const HELLO_DEADLINE_MS: u64 = 2_000;
/// The most leases that a port may hold or remember.
const LEASES_MAX: usize = OFFERS_MAX + ENDED_MAX;

/// Whether a port is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Nobody serves it.
    Missing,
    /// Somebody does, and no line is to be had.
    Broken(String),
    /// It is connected.
    There {
        /// Its process.
        pid: Option<i32>,
        /// Of which version its program is.
        build: String,
    },
}

/// Which port a line leads to.
#[derive(Clone, Debug)]
pub struct LinePort {
    /// This host's node.
    pub node: u16,
    /// What the configuration calls it.
    pub name: String,
    /// Where it waits for a daemon.
    pub socket: PathBuf,
}

/// The line of one port's leases. The thread ends on drop.
pub struct LeaseLine {
    line: Arc<Mutex<Line>>,
    stop: OwnedFd,
    _thread: JoinOnDrop,
}

impl LeaseLine {
    /// Looks for the port from now on, and tells this pool.
    pub fn start_on(
        runtime: Arc<dyn Runtime>,
        port: LinePort,
        pool: Arc<PortPool>,
    ) -> io::Result<Self> {
        let line = Arc::new(Mutex::new(Line::Missing));
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let name = format!("port-{}", port.name);
        let seeker = Seeker {
            port,
            pool,
            line: Arc::clone(&line),
            stop: stop.try_clone()?,
            runtime: Arc::clone(&runtime),
            is_gone: false,
        };
        let thread = runtime.spawn(name, Box::new(move || seeker.run()))?;
        Ok(Self {
            line,
            stop,
            _thread: thread.join_on_drop(),
        })
    }

    /// How it stands.
    pub fn now(&self) -> Line {
        lock(&self.line).clone()
    }
}

impl Drop for LeaseLine {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
    )
}

/// The thread that holds a port's line.
struct Seeker {
    port: LinePort,
    pool: Arc<PortPool>,
    line: Arc<Mutex<Line>>,
    stop: OwnedFd,
    runtime: Arc<dyn Runtime>,
    /// Whether the pool knows that the port is no more.
    is_gone: bool,
}

/// Why a line ended.
enum Over {
    /// The daemon stops.
    Stopped,
    /// Everything else.
    Broken(String),
}

impl Seeker {
    fn run(mut self) {
        let mut again_ms = AGAIN_SOON_MS;
        loop {
            let line = match connect(&self.port.socket, SocketType::SEQPACKET) {
                Ok(socket) => match self.hold(Packets::of(socket)) {
                    Over::Stopped => return,
                    Over::Broken(why) => {
                        tracing::warn!(port = self.port.name, "the line is over: {why}");
                        if let Line::There { .. } = *lock(&self.line) {
                            again_ms = AGAIN_SOON_MS;
                        }
                        Line::Broken(why)
                    }
                },
                Err(error) if is_missing(&error) => {
                    self.gone();
                    Line::Missing
                }
                Err(error) => Line::Broken(error.to_string()),
            };
            *lock(&self.line) = line;
            if self.stopped_within(again_ms) {
                return;
            }
            again_ms = (again_ms * 2).min(AGAIN_MAX_MS);
        }
    }

    /// Nobody listens there, so that no port of this name holds anything: it listens before it
    /// opens its NTB, and until its end.
    fn gone(&mut self) {
        if !self.is_gone {
            tracing::warn!(
                port = self.port.name,
                "no process serves it: its leases are over"
            );
            self.pool.tell(ToPool::Gone);
            self.is_gone = true;
        }
    }

    fn stopped_within(&self, time_ms: u64) -> bool {
        let until_ms = self.runtime.now_ms() + time_ms;
        let ready = self.wait(&[self.stop.as_fd()], Some(until_ms));
        ready.is_none_or(|ready| ready[0])
    }

    /// Takes what the port says until the end of the line.
    fn hold(&mut self, packets: Packets) -> Over {
        let packets = Arc::new(packets);
        let over = match self.welcome(&packets) {
            Ok((build, leases)) => {
                self.is_gone = false;
                self.connected(&packets, leases);
                let pid = packets.peer().ok().flatten();
                tracing::info!(port = self.port.name, pid, build, "connected");
                *lock(&self.line) = Line::There { pid, build };
                let over = self.listen(&packets);
                if !self.is_gone {
                    self.pool.away();
                }
                over
            }
            Err(over) => over,
        };
        packets.close();
        over
    }

    /// The port's first words: of which build it is, and which leases it knows.
    fn welcome(&self, packets: &Packets) -> Result<(String, Vec<Lease>), Over> {
        let broken = |why: String| Err(Over::Broken(why));
        if let Err(error) = packets.peer() {
            return broken(error.to_string());
        }
        let until_ms = self.runtime.now_ms() + HELLO_DEADLINE_MS;
        let build = match self.next(packets, Some(until_ms))? {
            FromPort::Hello { version, build, .. } if version != VERSION => {
                return broken(format!(
                    "it is of build {build}, which speaks version {version} of the line, and this \
                     daemon speaks {VERSION}: run both of one build"
                ));
            }
            FromPort::Hello {
                build, node, port, ..
            } if node == self.port.node && port == self.port.name => build,
            FromPort::Hello { node, port, .. } => {
                return broken(format!("it says that it is port `{port}` of node {node:x}"));
            }
            FromPort::Taken { pid } => {
                let pid = pid.map_or_else(|| "another".to_owned(), |pid| pid.to_string());
                return broken(format!("process {pid} is its daemon: stop that one first"));
            }
            _ => return broken("it does not say who it is".to_owned()),
        };
        let mut leases = Vec::new();
        loop {
            match self.next(packets, Some(until_ms))? {
                FromPort::Holds(more) if leases.len() + more.len() <= LEASES_MAX => {
                    leases.extend(more);
                }
                FromPort::Ready => return Ok((build, leases)),
                _ => return broken("it does not say what it holds".to_owned()),
            }
        }
    }

    fn connected(&self, packets: &Arc<Packets>, leases: Vec<Lease>) {
        let held = |lease: &Lease| Held {
            function: FunctionKey::from(lease.function.0),
            epoch: lease.epoch,
            path_open: lease.path_open,
        };
        let holds = leases.iter().map(held).collect();
        let to_port = Arc::clone(packets);
        let line: PortLine = Box::new(move |message| say(&to_port, message));
        self.pool.connect_with(line, holds);
        for lease in leases {
            if let Some(end) = lease.end {
                self.ended(FunctionKey::from(lease.function.0), lease.epoch, end);
            }
        }
    }

    fn ended(&self, function: FunctionKey, epoch: u64, end: End) {
        let port = self.port.name.clone();
        self.pool.send(Event::Ended {
            port,
            function,
            epoch,
            end,
        });
    }

    fn listen(&mut self, packets: &Packets) -> Over {
        loop {
            let message = match self.next(packets, None) {
                Ok(message) => message,
                Err(over) => return over,
            };
            match message {
                FromPort::Ask {
                    ask,
                    function,
                    borrower,
                } => self.pool.tell(ToPool::Grant {
                    ask: AskId(ask),
                    bdf: function.0,
                    borrower,
                    // The port keeps it: it is not written down, and not needed here.
                    secret: Secret([0; 16]),
                }),
                FromPort::Opened { function, epoch } => self.pool.tell(ToPool::Opened {
                    bdf: function.0,
                    lease: LeaseId(epoch),
                }),
                FromPort::Ended {
                    function,
                    epoch,
                    end,
                } => self.ended(function.0.into(), epoch, end),
                FromPort::Gone => self.gone(),
                _ => return Over::Broken("it said hello twice".to_owned()),
            }
            // A port says no more than the disk takes.
            self.pool.flush();
        }
    }

    fn next(&self, packets: &Packets, until_ms: Option<u64>) -> Result<FromPort, Over> {
        loop {
            match packets.receive() {
                Ok(Some(bytes)) => {
                    let message = FromPort::decode(&bytes);
                    return message.map_err(|error| Over::Broken(words(&error)));
                }
                Ok(None) => return Err(Over::Broken("the port ended it".to_owned())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Over::Broken(error.to_string())),
            }
            if until_ms.is_some_and(|until_ms| until_ms <= self.runtime.now_ms()) {
                return Err(Over::Broken("the port says nothing".to_owned()));
            }
            match self.wait(&[self.stop.as_fd(), packets.as_fd()], until_ms) {
                Some(ready) if !ready[0] => {}
                _ => return Err(Over::Stopped),
            }
        }
    }

    /// Which of them are readable, or at their end; `None` = the kernel does not wait any more.
    fn wait(&self, fds: &[BorrowedFd<'_>], until_ms: Option<u64>) -> Option<Vec<bool>> {
        let polled = fds.iter();
        let polled = polled.map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN));
        let mut polled: Vec<_> = polled.collect();
        if let Err(error) = self.runtime.poll_until(&mut polled, until_ms) {
            tracing::error!(%error, "a port's line cannot be waited for");
            return None;
        }
        Some(polled.iter().map(|fd| !fd.revents().is_empty()).collect())
    }
}

/// Tells the port; one that does not read is cut off, and says what it holds when it is back.
fn say(packets: &Packets, message: ToPort) {
    let message = match message {
        ToPort::Granted(ask, Ok(grant)) => FromDaemon::Granted {
            ask: ask.0,
            epoch: grant.lease.0,
        },
        ToPort::Granted(ask, Err(refusal)) => FromDaemon::Refused {
            ask: ask.0,
            code: refusal.code.raw(),
            figure: refusal.figure,
            text: refusal.text,
        },
        ToPort::Expired(lease) => FromDaemon::Expired { epoch: lease.0 },
    };
    let bytes = message.encode().map_err(|error| words(&error));
    let sent = bytes.and_then(|bytes| packets.send(&bytes).map_err(|error| error.to_string()));
    match sent {
        Ok(Sent::Sent) => return,
        Ok(Sent::Closed) => {}
        Ok(Sent::Full) => tracing::warn!("a port does not read: it is cut off"),
        Err(error) => tracing::error!("a port cannot be told: {error}"),
    }
    packets.close();
}
