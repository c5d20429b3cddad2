//! The pool's thread: it alone waits for the disk, and ports are answered over their lines.

use super::Pool;
use super::lease::{Ask, Event, Held, LeaseStatus, Now};
use super::record::{FunctionKey, JournalEntry, Scrubbed};
use super::store::{LeaseStore, StoreError};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{SystemTime, UNIX_EPOCH};
use vfio_shim::model::{Bdf, JoinOnDrop, OsRuntime, Runtime};
use vfio_shim::path::grant::{PortLine, ToPool, ToPort};
use vfio_shim::path::{LeasePool, Refusal, RefusalCode};

/// What `status` tells of the pool.
#[derive(Clone, Debug, Default)]
pub struct PoolStatus {
    /// Every function that was ever lent.
    pub leases: Vec<LeaseStatus>,
    /// What the store said last, if that was an error.
    pub store_error: Option<String>,
}

enum Input {
    Connect(String, Arc<PortLine>, Vec<Held>),
    Away(String),
    Flush(mpsc::Sender<()>),
    Event(Event),
    Status(mpsc::Sender<PoolStatus>),
    Journal(usize, mpsc::Sender<Result<Vec<JournalEntry>, StoreError>>),
    Stop,
}

/// The pool at work, in a thread of its own. Dropped after the ports: it writes down their ends.
pub struct PoolService {
    inbox: mpsc::Sender<Input>,
    _thread: JoinOnDrop,
    runtime: Arc<dyn Runtime>,
}

struct Thread<S> {
    pool: Pool<S>,
    lines: HashMap<String, Arc<PortLine>>,
    runtime: Arc<dyn Runtime>,
}

impl PoolService {
    /// Reads the store and starts the thread.
    pub fn start<S: LeaseStore + 'static>(store: S, ttl_ms: u64) -> Result<Self, StoreError> {
        Self::start_on(Arc::new(OsRuntime), store, ttl_ms)
    }

    /// The same on another runtime than the operating system's.
    pub fn start_on<S: LeaseStore + 'static>(
        runtime: Arc<dyn Runtime>,
        store: S,
        ttl_ms: u64,
    ) -> Result<Self, StoreError> {
        let thread = Thread {
            pool: Pool::open(store, ttl_ms)?,
            lines: HashMap::new(),
            runtime: Arc::clone(&runtime),
        };
        let (inbox, inputs) = mpsc::channel();
        let spawned = runtime.spawn("pool".into(), Box::new(move || thread.run(&inputs)));
        let thread = spawned.map_err(|source| StoreError::failed("served", source))?;
        Ok(Self {
            inbox,
            _thread: thread.join_on_drop(),
            runtime,
        })
    }

    /// What a port's engine is given. Ports have names of their own.
    pub fn port(&self, name: &str) -> Arc<PortPool> {
        Arc::new(PortPool {
            name: name.to_owned(),
            inbox: self.inbox.clone(),
            line: Mutex::default(),
            runtime: Arc::clone(&self.runtime),
        })
    }

    /// All ports have been started: what nobody holds by now is reclaimed.
    pub fn settle(&self) {
        let _ = self.inbox.send(Input::Event(Event::Settle));
    }

    /// A function in quarantine may be lent again.
    pub fn mend(&self, function: FunctionKey, epoch: u64, scrubbed: Scrubbed) {
        let _ = self.inbox.send(Input::Event(Event::Mended {
            function,
            epoch,
            scrubbed,
        }));
    }

    /// What `status` tells; `None` when the thread is gone.
    pub fn status(&self) -> Option<PoolStatus> {
        let (reply, answer) = mpsc::channel();
        self.inbox.send(Input::Status(reply)).ok()?;
        self.runtime.receive(&answer, None).ok()
    }

    /// The newest moves, oldest first.
    pub fn journal(&self, most: usize) -> Result<Vec<JournalEntry>, StoreError> {
        let stopped = |_| StoreError::failed("read", "the pool has stopped");
        let (reply, answer) = mpsc::channel();
        let sent = self.inbox.send(Input::Journal(most, reply));
        sent.map_err(|_| StoreError::failed("read", "the pool has stopped"))?;
        let answered = self.runtime.receive(&answer, None);
        answered.map_err(stopped)?
    }
}

impl Drop for PoolService {
    fn drop(&mut self) {
        let _ = self.inbox.send(Input::Stop);
    }
}

impl<S: LeaseStore> Thread<S> {
    fn run(mut self, inputs: &mpsc::Receiver<Input>) {
        loop {
            match self.wait(inputs) {
                Ok(Input::Connect(port, line, holds)) => {
                    self.lines.insert(port.clone(), line);
                    self.handle(Event::Connected { port, holds });
                }
                Ok(Input::Away(port)) => {
                    self.lines.remove(&port);
                    self.handle(Event::Away { port });
                }
                Ok(Input::Flush(reply)) => drop(reply.send(())),
                Ok(Input::Event(event)) => {
                    if let Event::Gone { port } = &event {
                        self.lines.remove(port);
                    }
                    self.handle(event);
                }
                Ok(Input::Status(reply)) => {
                    let status = PoolStatus {
                        leases: self.pool.status(now(&*self.runtime)),
                        store_error: self.pool.last_error().map(str::to_owned),
                    };
                    let _ = reply.send(status);
                }
                Ok(Input::Journal(most, reply)) => {
                    let _ = reply.send(self.pool.journal(most));
                }
                Err(mpsc::RecvTimeoutError::Timeout) => self.handle(Event::Tick),
                Ok(Input::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Sleeps for ever while nothing is due.
    fn wait(&self, inputs: &mpsc::Receiver<Input>) -> Result<Input, mpsc::RecvTimeoutError> {
        self.runtime.receive(inputs, self.pool.next_ms())
    }

    fn handle(&mut self, event: Event) {
        let runtime = &*self.runtime;
        for (port, message) in self.pool.handle(event, || now(runtime)) {
            if let Some(line) = self.lines.get(&port) {
                line(message);
            }
        }
    }
}

fn now(runtime: &dyn Runtime) -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH);
    Now {
        ms: runtime.now_ms(),
        unix_ms: unix.map_or(0, |unix| unix.as_millis() as u64),
    }
}

/// The pool as one port sees it.
pub struct PortPool {
    name: String,
    inbox: mpsc::Sender<Input>,
    line: Mutex<Option<Arc<PortLine>>>,
    runtime: Arc<dyn Runtime>,
}

impl PortPool {
    /// The port is there, it holds these leases, and this is the way to it. Once more whenever it
    /// is there again.
    pub fn connect_with(&self, port: PortLine, holds: Vec<Held>) {
        let line = Arc::new(port);
        let mut own = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        *own = Some(Arc::clone(&line));
        let _ = self
            .inbox
            .send(Input::Connect(self.name.clone(), line, holds));
    }

    /// The way to the port is lost, and it may go on.
    pub fn away(&self) {
        self.forget_line();
        let _ = self.inbox.send(Input::Away(self.name.clone()));
    }

    fn forget_line(&self) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.take();
    }

    /// Something has happened at the port.
    pub fn send(&self, event: Event) {
        let _ = self.inbox.send(Input::Event(event));
    }

    /// Returns when all is written down that was said before.
    pub fn flush(&self) {
        let (reply, answer) = mpsc::channel();
        if self.inbox.send(Input::Flush(reply)).is_ok() {
            let _ = self.runtime.receive(&answer, None);
        }
    }

    fn event(&self, message: ToPool) -> Event {
        let port = self.name.clone();
        // An address today; a PF's identity and a VF's index once what is lent outlives a reboot.
        let function = |bdf: Bdf| FunctionKey::from(bdf);
        match message {
            ToPool::Grant {
                ask,
                bdf,
                borrower,
                secret,
            } => Event::Ask(Ask {
                port,
                ask,
                function: function(bdf),
                borrower,
                secret,
            }),
            ToPool::Opened { bdf, lease } => Event::Opened {
                port,
                function: function(bdf),
                epoch: lease.0,
            },
            ToPool::Ended { bdf, lease, end } => Event::Ended {
                port,
                function: function(bdf),
                epoch: lease.0,
                end: end.into(),
            },
            ToPool::Mended { bdf, lease, undone } => Event::Mended {
                function: function(bdf),
                epoch: lease.0,
                scrubbed: undone.into(),
            },
            ToPool::Gone => Event::Gone { port },
        }
    }
}

impl LeasePool for PortPool {
    fn connect(&self, port: PortLine) {
        self.connect_with(port, Vec::new());
    }

    fn tell(&self, message: ToPool) {
        let ask = match &message {
            ToPool::Grant { ask, .. } => Some(*ask),
            _ => None,
        };
        if matches!(message, ToPool::Gone) {
            self.forget_line();
        }
        let event = self.event(message);
        // A pool that is gone grants nothing, and whoever asks is not kept waiting.
        if let (Err(_), Some(ask)) = (self.inbox.send(Input::Event(event)), ask) {
            let text = "the lender's pool has stopped: see its daemon's log, and start it again";
            let refusal = Refusal::new(RefusalCode::WrongState, 0, text);
            let line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(line) = &*line {
                line(ToPort::Granted(ask, Err(refusal)));
            }
        }
    }
}
