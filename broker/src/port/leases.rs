//! The port's end of the line: the pool for its engine, which is a daemon that may come and go.
//!
//! One thread waits for daemons and for what they say. The engine's own thread sends, and never
//! waits: a daemon that does not read is cut off, and is told everything when it connects again.

use super::ledger::Ledger;
use crate::daemon::socket::ControlSocket;
use crate::line::{
    FromDaemon, FromPort, LEASES_PER_MESSAGE_MAX, MessageError, Packets, Sent, VERSION,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_shim::model::{JoinOnDrop, OsRuntime, Runtime};
use vfio_shim::path::LeasePool;
use vfio_shim::path::grant::{PortLine, ToPool, ToPort};
use vfio_shim::path::words;

/// How long nobody is accepted after that failed, milliseconds.
const PAUSE_MS: u64 = 100;

/// The leases of one port, asked for at whichever daemon is connected. The thread ends on drop.
pub struct PortLeases {
    shared: Arc<Shared>,
    stop: OwnedFd,
    _thread: JoinOnDrop,
}

struct Shared {
    node: u16,
    name: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ledger: Ledger,
    engine: Option<Arc<PortLine>>,
    daemon: Option<Arc<Packets>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that a daemon has to know, and from now on all that happens.
    fn welcome(&self, daemon: Packets) {
        let mut state = self.state();
        let hello = FromPort::Hello {
            version: VERSION,
            build: crate::BUILD.to_owned(),
            node: self.node,
            port: self.name.clone(),
        };
        let leases = state.ledger.leases();
        let holds = leases.chunks(LEASES_PER_MESSAGE_MAX);
        let holds = holds.map(|leases| FromPort::Holds(leases.to_vec()));
        let told = [hello].into_iter().chain(holds).chain([FromPort::Ready]);
        for message in told {
            if !send(&daemon, &message) {
                return;
            }
        }
        tracing::info!(leases = leases.len(), "a daemon is connected");
        state.daemon = Some(Arc::new(daemon));
    }

    /// Whatever this daemon was asked, it will not answer.
    fn lost(&self) {
        let (engine, refusals) = {
            let mut state = self.state();
            state.daemon = None;
            (state.engine.clone(), state.ledger.lost())
        };
        tracing::warn!("the daemon is gone: paths go on, and nothing new is lent without one");
        tell(engine.as_deref(), refusals);
    }

    fn said(&self, message: FromDaemon) {
        let (engine, told) = {
            let mut state = self.state();
            (state.engine.clone(), state.ledger.said(message))
        };
        tell(engine.as_deref(), told);
    }
}

fn tell(engine: Option<&PortLine>, messages: impl IntoIterator<Item = ToPort>) {
    for message in messages {
        if let Some(engine) = engine {
            engine(message);
        }
    }
}

/// Whether it is on its way; if not, the line is closed.
fn send(daemon: &Packets, message: &FromPort) -> bool {
    let sent = message.encode().map_err(|error| words(&error));
    let sent = sent.and_then(|bytes| daemon.send(&bytes).map_err(|error| error.to_string()));
    match sent {
        Ok(Sent::Sent) => return true,
        Ok(Sent::Closed) => {}
        Ok(Sent::Full) => tracing::warn!("the daemon does not read: it is cut off"),
        Err(error) => tracing::error!("the daemon cannot be told: {error}"),
    }
    daemon.close();
    false
}

impl LeasePool for PortLeases {
    fn connect(&self, port: PortLine) {
        self.shared.state().engine = Some(Arc::new(port));
    }

    fn tell(&self, message: ToPool) {
        let mut state = self.shared.state();
        let told = state.ledger.told(message);
        match &state.daemon {
            // Cut off: the thread sees the end, and refuses what was asked.
            Some(daemon) => drop(send(daemon, &told)),
            None if matches!(told, FromPort::Ask { .. }) => {
                let (engine, refusals) = (state.engine.clone(), state.ledger.lost());
                drop(state);
                tell(engine.as_deref(), refusals);
            }
            None => {}
        }
    }
}

impl PortLeases {
    /// Starts to wait for daemons.
    pub fn start(node: u16, name: &str, socket: ControlSocket) -> io::Result<Arc<Self>> {
        Self::start_on(Arc::new(OsRuntime), (node, name), socket)
    }

    /// The same on another runtime than the operating system's.
    pub fn start_on(
        runtime: Arc<dyn Runtime>,
        (node, name): (u16, &str),
        socket: ControlSocket,
    ) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            node,
            name: name.to_owned(),
            state: Mutex::default(),
        });
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = eventfd(0, flags)?;
        let waiting = Waiting {
            shared: Arc::clone(&shared),
            socket,
            stop: stop.try_clone()?,
            runtime: Arc::clone(&runtime),
        };
        let thread = runtime.spawn("leases".into(), Box::new(move || waiting.run()))?;
        Ok(Arc::new(Self {
            shared,
            stop,
            _thread: thread.join_on_drop(),
        }))
    }
}

impl Drop for PortLeases {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

/// The thread that waits for daemons.
struct Waiting {
    shared: Arc<Shared>,
    socket: ControlSocket,
    stop: OwnedFd,
    runtime: Arc<dyn Runtime>,
}

impl Waiting {
    fn run(self) {
        loop {
            let daemon = self.shared.state().daemon.clone();
            let listener = self.socket.listener();
            let mut fds = vec![
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            ];
            if let Some(daemon) = &daemon {
                fds.push(PollFd::from_borrowed_fd(daemon.as_fd(), PollFlags::IN));
            }
            if let Err(error) = self.runtime.poll(&mut fds) {
                return tracing::error!(%error, "no daemon is heard any more");
            }
            let [stopped, called, said] =
                [0, 1, 2].map(|at| fds.get(at).is_some_and(|fd| !fd.revents().is_empty()));
            drop(fds);
            if stopped {
                return;
            }
            // The end of one daemon before the beginning of the next.
            if let Some(daemon) = daemon.filter(|_| said) {
                self.hear(&daemon);
            }
            if called {
                self.accept();
            }
        }
    }

    fn hear(&self, daemon: &Packets) {
        match received(daemon) {
            Ok(Some(message)) => self.shared.said(message),
            Ok(None) => self.shared.lost(),
            Err(Heard::Nothing) => {}
            Err(Heard::Nonsense(error)) => {
                tracing::error!("the daemon is cut off: {error}");
                daemon.close();
                self.shared.lost();
            }
        }
    }

    fn accept(&self) {
        let socket = match self.socket.listener().accept() {
            Ok((socket, _)) => OwnedFd::from(socket),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!(%error, "a daemon could not be accepted");
                // Out of fds or memory: the listener stays readable, so wait on `stop` alone.
                let mut fds = [PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN)];
                let until_ms = self.runtime.now_ms() + PAUSE_MS;
                let _ = self.runtime.poll_until(&mut fds, Some(until_ms));
                return;
            }
        };
        let daemon = Packets::of(socket);
        if let Err(error) = daemon.peer() {
            return tracing::warn!(%error, "who is no daemon of this port's user is refused");
        }
        let held = self.shared.state().daemon.clone();
        match held {
            None => self.shared.welcome(daemon),
            Some(held) => {
                let pid = held.peer().ok().flatten();
                tracing::warn!(pid, "a second daemon is refused: this one is connected");
                send(&daemon, &FromPort::Taken { pid });
            }
        }
    }
}

enum Heard {
    Nothing,
    Nonsense(String),
}

fn received(daemon: &Packets) -> Result<Option<FromDaemon>, Heard> {
    let bytes = match daemon.receive() {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Heard::Nothing),
        Err(error) => return Err(Heard::Nonsense(error.to_string())),
    };
    let message = FromDaemon::decode(&bytes);
    message
        .map(Some)
        .map_err(|error: MessageError| Heard::Nonsense(words(&error)))
}
