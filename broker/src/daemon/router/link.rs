//! The daemon's way to one port: its line of leases, held by a thread, and its verbs.
//!
//! ```text
//! nobody listens --> leases of the port are reclaimed --+
//!   ^                                                   | again and again
//!   +-- connect <---------------------------------------+
//!          | hello, leases, ready: the pool is told what the port holds
//!          v
//!       connected --end of the line--> whether it goes on is not known: connect
//! ```

use crate::config::Config;
use crate::daemon::ask::ask;
use crate::daemon::vocabulary::{ErrorCode, Outcome, Verb, VerbError};
use crate::line::{FromDaemon, FromPort, Lease, Packets, Sent, VERSION, connect};
use crate::pool::{End, Event, FunctionKey, Held, PortPool};
use crate::port::{ENDED_MAX, leases_socket, verbs_socket};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::SocketType;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vfio_shim::model::Fdid;
use vfio_shim::path::grant::{AskId, PortLine, ToPool, ToPort};
use vfio_shim::path::lender::OFFERS_MAX;
use vfio_shim::path::message::Secret;
use vfio_shim::path::{LeaseId, LeasePool, words};

/// How soon a port is looked for again after the end of its line.
const AGAIN_SOON: Duration = Duration::from_millis(20);
/// The same for one that has not been there for long: each look waits twice as long as the last.
const AGAIN_MAX: Duration = Duration::from_secs(1);
/// How long a port may take to say what it holds.
const HELLO_DEADLINE: Duration = Duration::from_secs(2);
/// The most leases that a port may hold or remember.
const LEASES_MAX: usize = OFFERS_MAX + ENDED_MAX;

/// Whether a port is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Line {
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

/// One port, as the daemon reaches it. The thread ends on drop.
pub(super) struct PortLink {
    pub(super) name: String,
    verbs: PathBuf,
    /// What starts it, for people.
    start: String,
    line: Arc<Mutex<Line>>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl PortLink {
    /// Looks for the port from now on.
    pub(super) fn start(
        config: &Config,
        start: String,
        name: &str,
        pool: Arc<PortPool>,
    ) -> io::Result<Self> {
        let line = Arc::new(Mutex::new(Line::Missing));
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let seeker = Seeker {
            node: config.node_id,
            name: name.to_owned(),
            socket: leases_socket(config, name),
            pool,
            line: Arc::clone(&line),
            stop: stop.try_clone()?,
            is_gone: false,
        };
        let builder = std::thread::Builder::new().name(format!("port-{name}"));
        Ok(Self {
            name: name.to_owned(),
            verbs: verbs_socket(config, name),
            start,
            line,
            stop,
            thread: Some(builder.spawn(move || seeker.run())?),
        })
    }

    pub(super) fn line(&self) -> Line {
        lock(&self.line).clone()
    }

    /// Has the port do one verb.
    pub(super) fn ask(&self, verb: &Verb, deadline: Duration) -> Result<Outcome, VerbError> {
        let stream = connect(&self.verbs, SocketType::STREAM).and_then(|socket| {
            let stream = UnixStream::from(socket);
            stream.set_nonblocking(false)?;
            Ok(stream)
        });
        let stream = stream.map_err(|error| self.away(&error))?;
        ask(&stream, verb, deadline).map_err(|error| self.silent(&error))?
    }

    /// Whether the host at its far end offers a function through it.
    pub(super) fn offers(&self, fdid: Fdid, deadline: Duration) -> bool {
        match self.ask(&Verb::List, deadline) {
            Ok(Outcome::List(entries)) => entries.iter().any(|entry| entry.fdid.0 == fdid),
            _ => false,
        }
    }

    /// Whether anybody listens there. If not, no port of this name holds anything.
    pub(super) fn is_there(&self) -> bool {
        !connect(&self.verbs, SocketType::STREAM).is_err_and(|error| is_missing(&error))
    }

    /// Nobody is there.
    fn away(&self, error: &io::Error) -> VerbError {
        if error.kind() == io::ErrorKind::WouldBlock {
            return self.silent(error);
        }
        let (name, start) = (&self.name, &self.start);
        let text = match is_missing(error) {
            true => format!("no process serves port `{name}`: start `{start}`"),
            false => format!(
                "port `{name}` cannot be reached ({error}): run the daemon as the port's user, \
                 or start `{start}` anew"
            ),
        };
        VerbError::new(ErrorCode::PortAway, text)
    }

    /// Somebody is there and says nothing.
    fn silent(&self, error: &io::Error) -> VerbError {
        let (name, start) = (&self.name, &self.start);
        let who = match self.line() {
            Line::There { pid: Some(pid), .. } => format!("process {pid}"),
            _ => "its process".to_owned(),
        };
        let what = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                "no reply came in time".to_owned()
            }
            _ => error.to_string(),
        };
        let text = format!(
            "port `{name}` ({who}) does not answer ({what}): look at its log; if it hangs, end it \
             and start `{start}`, which ends the paths of its guests"
        );
        VerbError::new(ErrorCode::PortAway, text)
    }
}

impl Drop for PortLink {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
    )
}

/// The thread that holds a port's line.
struct Seeker {
    node: u16,
    name: String,
    socket: PathBuf,
    pool: Arc<PortPool>,
    line: Arc<Mutex<Line>>,
    stop: OwnedFd,
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
        let mut again = AGAIN_SOON;
        loop {
            let line = match connect(&self.socket, SocketType::SEQPACKET) {
                Ok(socket) => match self.hold(Packets::of(socket)) {
                    Over::Stopped => return,
                    Over::Broken(why) => {
                        tracing::warn!(port = self.name, "the line is over: {why}");
                        if let Line::There { .. } = *lock(&self.line) {
                            again = AGAIN_SOON;
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
            if self.stopped_within(again) {
                return;
            }
            again = (again * 2).min(AGAIN_MAX);
        }
    }

    /// Nobody listens there, so that no port of this name holds anything: it listens before it
    /// opens its NTB, and until its end.
    fn gone(&mut self) {
        if !self.is_gone {
            tracing::warn!(
                port = self.name,
                "no process serves it: its leases are over"
            );
            self.pool.tell(ToPool::Gone);
            self.is_gone = true;
        }
    }

    fn stopped_within(&self, time: Duration) -> bool {
        wait(&[self.stop.as_fd()], Some(time)).is_none_or(|ready| ready[0])
    }

    /// Takes what the port says until the end of the line.
    fn hold(&mut self, packets: Packets) -> Over {
        let packets = Arc::new(packets);
        let over = match self.welcome(&packets) {
            Ok((build, leases)) => {
                self.is_gone = false;
                self.connected(&packets, leases);
                let pid = packets.peer().ok().flatten();
                tracing::info!(port = self.name, pid, build, "connected");
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
        let deadline = Instant::now() + HELLO_DEADLINE;
        let build = match self.next(packets, Some(deadline))? {
            FromPort::Hello { version, build, .. } if version != VERSION => {
                return broken(format!(
                    "it is of build {build}, which speaks version {version} of the line, and this \
                     daemon speaks {VERSION}: run both of one build"
                ));
            }
            FromPort::Hello {
                build, node, port, ..
            } if node == self.node && port == self.name => build,
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
            match self.next(packets, Some(deadline))? {
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
        let port = self.name.clone();
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

    fn next(&self, packets: &Packets, deadline: Option<Instant>) -> Result<FromPort, Over> {
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
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Over::Broken("the port says nothing".to_owned()));
            }
            match wait(&[self.stop.as_fd(), packets.as_fd()], left) {
                Some(ready) if !ready[0] => {}
                _ => return Err(Over::Stopped),
            }
        }
    }
}

/// Which of them are readable, or at their end; `None` = the kernel does not wait any more.
fn wait(fds: &[std::os::fd::BorrowedFd<'_>], longest: Option<Duration>) -> Option<Vec<bool>> {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let longest = longest.map(|time| Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    match poll(&mut polled, longest.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => {
            tracing::error!(%error, "a port's line cannot be waited for");
            return None;
        }
    }
    Some(polled.iter().map(|fd| !fd.revents().is_empty()).collect())
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
