//! Two hosts in one process: host 0 lends a software function over a soft NTB, host 1 serves it to a VMM.
//!
//! ```text
//! vfio_user::Client -> socket -> Endpoint -> BorrowedFunction -> Engine == SoftLink == Engine -> SoftFunction
//! ```

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vfio_shim::model::{Bdf, Function, FunctionIds, PortIova};
use vfio_shim::ntb::soft::{SoftFunction, SoftLink, SoftPortConfig};
use vfio_shim::path::{BorrowedFunction, Engine, EngineConfig, LeaseId, PoolEntry, PoolState};
use vfio_shim::vfio::MappedAperture;
use vfio_user::Client;
use vmm_glue::vfio_user::{Endpoint, EndpointError, Options, SessionShared, SessionState};

/// Each host's window.
pub const WINDOW_BYTES: u64 = 64 << 20;
/// What the mailbox takes of it.
pub const MAILBOX_BYTES: u64 = 64 << 10;
/// Longer than anything here takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);
const WINDOW_BASE: PortIova = PortIova(1 << 32);
const VECTORS: u16 = 4;

/// One at a time in a process: what is left of one would be found in the other's fds.
static ALONE: Mutex<()> = Mutex::new(());

/// Looks until there is something to see.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What must be as before when a guest session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// Maps of both ports' containers and of the function's.
    pub maps: [usize; 3],
    /// Bytes of both windows that nobody has.
    pub free: [u64; 2],
    /// Interrupts of the function that are armed.
    pub triggers: usize,
    /// File descriptors of this process.
    pub fds: usize,
}

/// Both hosts, a lease, and the socket where a VMM finds its function.
pub struct Sim {
    /// The lender's engine, then the borrower's.
    pub engines: [Arc<Engine>; 2],
    /// The cable.
    pub link: SoftLink,
    /// What is lent.
    pub function: Arc<SoftFunction>,
    /// What `status` tells of the guest session.
    pub shared: Arc<SessionShared>,
    /// Where the VMM connects.
    pub socket: PathBuf,
    lease: LeaseId,
    borrowed: Arc<BorrowedFunction>,
    stop: Arc<OwnedFd>,
    server: Option<JoinHandle<Result<(), EndpointError>>>,
    _dir: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

fn bdf() -> Bdf {
    "4a:00.1".parse().unwrap()
}

fn engine(link: &SoftLink, side: u8) -> Arc<Engine> {
    let config = EngineConfig {
        name: format!("sim{side}"),
        node: u16::from(side) + 1,
        window_base: WINDOW_BASE,
        window_bytes: WINDOW_BYTES,
        heartbeat_ms: 10,
        lost_after_ms: 10_000,
        limits: Default::default(),
    };
    Engine::start(link.port(usize::from(side)), config).unwrap()
}

impl Sim {
    /// As far as a lease, with the endpoint waiting for a VMM.
    pub fn new() -> Self {
        // Poisoned = another test failed, which is its own matter.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let port = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link = SoftLink::new([port; 2]).unwrap();
        let engines = [0, 1].map(|side| engine(&link, side));
        let ids = FunctionIds {
            vendor: 0x5b1e,
            device: 1,
            ..FunctionIds::default()
        };
        let function = Arc::new(SoftFunction::new(ids, VECTORS));
        let entry = PoolEntry {
            bdf: bdf(),
            ids,
            state: PoolState::Available,
            irq_count: u32::from(VECTORS),
            bar_bytes: 8192,
            serial: 0,
        };
        let offered: Arc<dyn Function> = function.clone();
        engines[0].offer(entry, offered).unwrap();
        let (lease, _, borrowed) = until("the function can be borrowed", || {
            engines[1].borrow(bdf(), None).ok()
        });
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vf.sock");
        let endpoint = Endpoint::bind(&socket).unwrap();
        let shared = Arc::new(SessionShared::default());
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let served: Arc<dyn Function> = borrowed.clone();
        let server = std::thread::spawn({
            let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop));
            move || endpoint.serve(&served, &Options::default(), stop.as_fd(), &shared)
        });
        let sim = Self {
            engines,
            link,
            function,
            shared,
            socket,
            lease,
            borrowed,
            stop,
            server: Some(server),
            _dir: dir,
            _alone: alone,
        };
        sim.wait_idle();
        sim
    }

    /// A VMM.
    pub fn vmm(&self) -> Client {
        Client::new(&self.socket).unwrap()
    }

    /// Waits until nobody is connected and all of the last one is undone.
    pub fn wait_idle(&self) {
        until("an idle endpoint", || {
            (self.shared.state() == SessionState::Waiting).then_some(())
        });
    }

    /// Everything that a guest session must give back.
    pub fn left(&self) -> Left {
        let free = |side: usize| self.engines[side].status().unwrap().window_free;
        Left {
            maps: [
                self.link.port(0).space().maps().len(),
                self.link.port(1).space().maps().len(),
                self.function.space().maps().len(),
            ],
            free: [free(0), free(1)],
            triggers: self.function.triggers(),
            fds: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        }
    }

    /// Waits until all is as it was; the lender is told lazily.
    pub fn wait_left(&self, before: Left) {
        let deadline = Instant::now() + PATIENCE;
        while self.left() != before {
            assert!(
                Instant::now() < deadline,
                "{:?} is left, and was {before:?}",
                self.left()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Gives the function back, ends both hosts, and looks at what they leave.
    pub fn end(mut self) {
        rustix::io::write(&*self.stop, &1u64.to_ne_bytes()).unwrap();
        self.server.take().unwrap().join().unwrap().unwrap();
        assert_eq!(self.borrowed.lost(), None);
        self.engines[1].give_back(self.lease).unwrap();
        assert!(!self.socket.exists(), "the socket stayed behind");
        self.engines.iter().for_each(|engine| engine.stop());
        let spaces = [self.link.port(0), self.link.port(1)];
        assert!(spaces.iter().all(|port| port.space().maps().is_empty()));
        assert!(self.function.space().maps().is_empty());
    }
}

impl Default for Sim {
    fn default() -> Self {
        Self::new()
    }
}

/// A memory file of so many bytes.
pub fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

/// Guest memory: a memfd, mapped shared as a VMM has it.
pub struct Ram {
    fd: OwnedFd,
    mapped: Option<MappedAperture>,
}

impl Ram {
    /// Mapped shared.
    pub fn shared(bytes: u64) -> Self {
        let ram = Self::unmapped(bytes);
        let mapped = MappedAperture::memory(ram.fd.as_fd(), 0, bytes).unwrap();
        Self {
            mapped: Some(mapped),
            ..ram
        }
    }

    /// In nobody's address space.
    pub fn unmapped(bytes: u64) -> Self {
        let fd = memfd(bytes);
        Self { fd, mapped: None }
    }

    /// Takes it out of this process's address space; the memfd stays.
    pub fn unmap(&mut self) {
        self.mapped = None;
    }

    /// For the client.
    pub fn raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}
