//! A host of the simulation: its port's engine, the functions it lends, and what its kernel does when they die.

use crate::coroutine::{Pause, pause};
use crate::keeper::{Device, KeeperHost};
use crate::pool::{Disk, Watch, Watched};
use crate::random::Random;
use crate::scheduler::{Process, Scheduler, wait_for};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use sublet::daemon::router::LeaseLine;
use sublet::pool::PoolService;
use vfio_shim::model::{AddressSpace, Bdf, Function, FunctionIds, IrqIndex, PortIova, Span};
use vfio_shim::ntb::NtbPort;
use vfio_shim::ntb::soft::{FaultPlan, SoftFunction, SoftHost, SoftPort, SoftSpace};
use vfio_shim::path::{Engine, EngineConfig, LeasePool, PoolEntry, PoolState};

/// Each host's window.
pub const WINDOW_BYTES: u64 = 64 << 20;
/// Where it lies in the NTB's container.
pub const WINDOW_BASE: PortIova = PortIova(1 << 32);
/// The product's defaults.
pub const HEARTBEAT_MS: u64 = 250;
pub const LOST_AFTER_MS: u64 = 1500;
/// The product's default.
pub const LEASE_TTL_MS: u64 = 60_000;
/// What configurations call the port.
pub const PORT: &str = "ntb0";
/// Vectors of the engine function.
const VECTORS: u16 = 3;
const VRAM_BYTES: u64 = 1 << 20;

/// A function of a host.
pub struct Lent {
    /// Its address.
    pub bdf: Bdf,
    /// The function.
    pub soft: Arc<SoftFunction>,
    /// Whether it is of an Arc's shape.
    pub arc: bool,
    /// How many vectors it has.
    pub vectors: usize,
    /// Whether the operator wants it offered.
    pub wanted: bool,
    /// No keeper has opened it when it was to be offered.
    pub unopened: bool,
    /// Its device, while a port has it from a keeper.
    pub device: Device,
}

impl Lent {
    fn new(host: &Arc<SoftHost>, number: u8, arc: bool) -> Self {
        let soft = match arc {
            true => SoftFunction::arc_pro(VRAM_BYTES).expect("an Arc's memory"),
            false => SoftFunction::new(ids(), VECTORS),
        };
        let soft = soft.in_host(Arc::clone(host));
        let irqs = soft.info().irqs.iter();
        let vectors = irqs.map(|irq| irq.count).max().unwrap_or(0) as usize;
        Self {
            bdf: format!("4a:00.{number}").parse().expect("an address"),
            soft: Arc::new(soft),
            arc,
            vectors,
            wanted: true,
            unopened: false,
            device: Device::default(),
        }
    }

    /// As it stands in the pool.
    pub fn entry(&self) -> PoolEntry {
        let info = self.soft.info();
        PoolEntry {
            bdf: self.bdf,
            ids: info.ids,
            state: PoolState::Available,
            irq_count: self.vectors as u32,
            bar_bytes: info.regions[..6].iter().map(|region| region.size).sum(),
            serial: 0,
        }
    }

    /// BAR slices' bytes, and how many of the port's maps they are.
    pub fn slices(&self) -> (u64, usize) {
        let bars = &self.soft.info().regions[..6];
        let areas = bars.iter().map(|bar| bar.areas.len()).sum();
        (bars.iter().map(|bar| bar.size).sum(), areas)
    }
}

fn ids() -> FunctionIds {
    FunctionIds {
        vendor: 0x5b1e,
        device: 1,
        ..FunctionIds::default()
    }
}

/// A host.
pub struct Host {
    /// Which one.
    pub side: usize,
    /// Its power switch.
    pub soft: Arc<SoftHost>,
    /// Its end of the cable.
    pub port: Arc<SoftPort>,
    /// What it can lend.
    pub functions: Vec<Lent>,
    /// Its port's process.
    pub process: Process,
    /// Its port, while that lives.
    pub engine: Option<Arc<Engine>>,
    /// Its daemon's process: the port's, where they are one.
    pub daemon: Process,
    /// Its daemon's pool, while that lives.
    pub pool: Option<PoolService>,
    /// The daemon's line to the port, while the daemon lives and where they are two.
    pub line: Option<LeaseLine>,
    /// Where the port waits for a daemon, where they are two.
    pub line_socket: Option<PathBuf>,
    /// When the daemon was started, or went on last.
    pub daemon_since_ms: u64,
    /// What the port was granted.
    pub watch: Option<Watch>,
    /// How long a lease lives without a path.
    pub lease_ttl_ms: u64,
    /// Where that writes leases down: it stays when the daemon ends.
    pub disk: Disk,
    /// Who opens its functions, where the port does not itself.
    pub keeper: Option<KeeperHost>,
    /// Whether it has power.
    pub powered: bool,
    /// Its kernel is still closing what the daemon had.
    pub closing: Option<Arc<AtomicBool>>,
    /// A map could not be taken away: until the daemon is started again, all figures are off.
    pub tainted: bool,
}

impl Host {
    /// With power, without a daemon.
    pub fn new(side: usize, soft: Arc<SoftHost>, port: Arc<SoftPort>, process: Process) -> Self {
        let functions = [(1, false), (2, true)];
        let functions = functions.map(|(number, arc)| Lent::new(&soft, number, arc));
        Self {
            side,
            soft,
            port,
            functions: functions.into(),
            process,
            engine: None,
            daemon: process,
            pool: None,
            line: None,
            line_socket: None,
            daemon_since_ms: 0,
            watch: None,
            lease_ttl_ms: LEASE_TTL_MS,
            disk: Disk::default(),
            keeper: None,
            powered: true,
            closing: None,
            tainted: false,
        }
    }

    /// What people call it.
    pub fn name(&self) -> &'static str {
        ["host 4", "host 8"][self.side]
    }

    /// Starts a port's engine in a new process; with the daemon's pool, where they are one.
    pub fn start(&mut self, scheduler: &mut Scheduler) {
        self.process = scheduler.process(self.side);
        let config = EngineConfig {
            name: format!("h{}", self.side),
            node: self.node(),
            window_base: WINDOW_BASE,
            window_bytes: WINDOW_BYTES,
            heartbeat_ms: HEARTBEAT_MS,
            lost_after_ms: LOST_AFTER_MS,
            limits: Default::default(),
        };
        self.port.reset();
        let runtime = scheduler.runtime(self.process);
        let port: Arc<dyn NtbPort> = self.port.clone();
        let pool: Arc<dyn LeasePool> = match &self.line_socket {
            Some(socket) => self.wait_for_daemons(socket, &runtime),
            None => {
                self.daemon = self.process;
                self.start_pool(scheduler);
                self.pool.as_ref().expect("a pool").port(PORT)
            }
        };
        let clock = (Arc::clone(&runtime), self.lease_ttl_ms);
        let watched = Watched::new(pool, &self.disk, clock, self.line_socket.is_some());
        self.watch = Some(watched.watch());
        let pool: Arc<dyn LeasePool> = Arc::new(watched);
        self.engine = Some(Engine::start_on(runtime, port, config, pool).expect("an engine"));
        if let (None, Some(pool)) = (&self.line_socket, &self.pool) {
            pool.settle();
        }
        self.tainted = false;
    }

    /// What the fabric calls it.
    pub fn node(&self) -> u16 {
        [4, 8][self.side]
    }

    /// Starts the daemon's pool in the daemon's process.
    pub fn start_pool(&mut self, scheduler: &Scheduler) {
        let runtime = scheduler.runtime(self.daemon);
        let store = self.disk.open(scheduler.core(), self.daemon);
        let service = PoolService::start_on(runtime, store, self.lease_ttl_ms);
        self.pool = Some(service.expect("a pool"));
        self.daemon_since_ms = scheduler.now_ms();
    }

    /// What the kernel does with the fds of a daemon that is gone: in the order of their numbers, so
    /// that the NTB, which was opened first, is closed before the functions.
    /// It ends the daemon's workers first, whose mappings keep the NTB open.
    pub fn close_all(
        &mut self,
        scheduler: &mut Scheduler,
        random: &mut Random,
        workers: Vec<Process>,
    ) {
        let mut parts: Vec<Part> = vec![Part::Port(Arc::clone(&self.port))];
        for lent in &self.functions {
            lent.soft.arm(FaultPlan::default());
            lent.soft.space().arm(FaultPlan::default());
            let device = Arc::clone(&lent.device);
            parts.push(Part::Function(Arc::clone(&lent.soft), device));
        }
        self.port.space().arm(FaultPlan::default());
        for at in (2..parts.len()).rev() {
            parts.swap(at, 1 + random.below(at));
        }
        let kernel = scheduler.process(self.side);
        let core = Arc::clone(scheduler.core());
        let close = move || {
            for worker in workers {
                pause(Pause::Ready);
                core.kill(worker);
                wait_for(|| core.is_dead(worker));
            }
            parts.iter().for_each(Part::close);
        };
        self.closing = Some(scheduler.start(kernel, "kernel", Box::new(close)));
    }
}

enum Part {
    Port(Arc<SoftPort>),
    Function(Arc<SoftFunction>, Device),
}

impl Part {
    /// VFIO, when the last fd is closed: interrupts and bus mastering off and a reset, then the
    /// container's maps.
    fn close(&self) {
        pause(Pause::Ready);
        match self {
            Self::Port(port) => {
                port.reset();
                pause(Pause::Ready);
                clear(port.space());
            }
            Self::Function(function, device) => {
                for index in IrqIndex::ALL {
                    let _ = function.disable_irqs(index);
                }
                pause(Pause::Ready);
                function.reset().expect("a kernel's reset");
                pause(Pause::Ready);
                clear(function.space());
                // Only now it is free for others.
                if let Ok(mut device) = device.lock() {
                    device.take();
                }
            }
        }
    }
}

fn clear(space: &SoftSpace) {
    let all = Span::new(0, u64::MAX).expect("a span");
    space.unmap(all).expect("all maps go with their container");
}
