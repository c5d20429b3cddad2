//! Two hosts of this process over a soft NTB: one lends a software function, the other has it open.

use bench_report::on_core;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfio_shim::model::{Bdf, Function, FunctionIds, IrqIndex, PortIova, RegionIndex};
use vfio_shim::ntb::soft::{SoftFunction, SoftLink, SoftPortConfig};
use vfio_shim::path::{BorrowedFunction, Engine, EngineConfig, PoolEntry, PoolState};

const WINDOW_BYTES: u64 = 4 << 30;
/// The core that each host has.
pub const LENDER: usize = 0;
/// Likewise.
pub const BORROWER: usize = 1;
const VECTOR: u32 = 1;
const VECTORS: u16 = 4;
/// Longer than a session takes to open.
const PATIENCE: Duration = Duration::from_secs(20);

/// Both hosts. Fields are dropped in this order: what is borrowed before the engines.
pub struct Rig {
    _borrowed: Arc<BorrowedFunction>,
    /// As the lender has it.
    pub function: Arc<SoftFunction>,
    /// What a guest's interrupt is: a blocking eventfd.
    pub guest: OwnedFd,
    /// The lender's engine, then the borrower's.
    pub engines: [Arc<Engine>; 2],
    _link: SoftLink,
}

fn bdf() -> Bdf {
    "4a:00.1".parse().expect("a PCI address")
}

fn engine(link: &SoftLink, side: u8) -> Arc<Engine> {
    // Its threads stand where this one does.
    on_core([LENDER, BORROWER][usize::from(side)]);
    let config = EngineConfig {
        name: format!("bench{side}"),
        node: u16::from(side) + 1,
        window_base: PortIova(1 << 32),
        window_bytes: WINDOW_BYTES,
        heartbeat_ms: 250,
        lost_after_ms: 10_000,
        limits: Default::default(),
    };
    Engine::start(link.port(usize::from(side)), config).expect("an engine")
}

impl Rig {
    /// With one vector of the function armed. The caller is the device, on the lender's core.
    pub fn new() -> Self {
        let config = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link = SoftLink::new([config; 2]).expect("a soft NTB");
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
            irq_count: VECTORS.into(),
            bar_bytes: 8192,
            serial: 0,
        };
        let offered: Arc<dyn Function> = function.clone();
        engines[0]
            .offer(entry, offered)
            .expect("the function is offered");
        let deadline = Instant::now() + PATIENCE;
        let borrowed = loop {
            match engines[1].borrow(bdf(), None) {
                Ok((_, _, borrowed)) => break borrowed,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let guest = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        borrowed
            .region_write(RegionIndex::CONFIG, 4, &6u16.to_le_bytes())
            .expect("bus mastering is on");
        let trigger = Some(guest.try_clone().expect("an eventfd"));
        borrowed
            .set_irqs(IrqIndex::Msix, VECTOR, vec![trigger])
            .expect("a vector is armed");
        on_core(LENDER);
        Self {
            _borrowed: borrowed,
            function,
            guest,
            engines,
            _link: link,
        }
    }

    /// The function's trigger, and what comes of it at the guest.
    pub fn interrupt(&self) {
        self.function
            .raise_irqs(IrqIndex::Msix, VECTOR, 1)
            .expect("the function has the vector");
        let mut count = [0; 8];
        rustix::io::read(&self.guest, &mut count).expect("an eventfd is read");
    }
}
