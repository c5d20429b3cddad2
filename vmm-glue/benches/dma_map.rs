//! Guest memory mapped and unmapped through the vfio-user server and both hosts, with few maps and with many; and a guest of 1 TiB.
//!
//! `cargo bench -p vmm-glue --bench dma_map -- [--short] [--check]`
//!
//! ```text
//! VMM -> socket -> Endpoint -> BorrowedFunction -> Engine == SoftLink == Engine -> SoftFunction
//! ```

mod vmm;

use bench_report::{Report, Rounds, Switches, paired, percentile, time_ns};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};
use vfio_shim::model::{Bdf, Function, FunctionIds, PortIova};
use vfio_shim::ntb::soft::{SoftFunction, SoftLink, SoftPortConfig};
use vfio_shim::path::{BorrowedFunction, Engine, EngineConfig, PoolEntry, PoolState};
use vfio_shim::vfio::MappedAperture;
use vmm::{DECODE, Vmm, message};
use vmm_glue::vfio_user::wire::{Command, DmaMap, DmaUnmap};
use vmm_glue::vfio_user::{Endpoint, EndpointError, Options, SessionShared};
use zerocopy::IntoBytes;

/// Bus mastering, in COMMAND.
const BUS_MASTER: u16 = 4;
const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const WINDOW_BYTES: u64 = 2 * TIB;
/// How many maps live beside the one that is measured.
const LIVE: [u64; 2] = [100, 10_000];
/// As many as a container holds, but for those of the measurement itself.
const LIVE_MOST: u64 = 65_000;
/// Longer than a session takes to open.
const PATIENCE: Duration = Duration::from_secs(20);

/// Both hosts, and the guest's VMM on the borrower.
struct Rig {
    vmm: Vmm,
    memory: OwnedFd,
    _mapped: MappedAperture,
    stop: Arc<OwnedFd>,
    server: Option<JoinHandle<Result<(), EndpointError>>>,
    borrowed: Arc<BorrowedFunction>,
    function: Arc<SoftFunction>,
    engines: [Arc<Engine>; 2],
    _link: SoftLink,
    _dir: tempfile::TempDir,
}

fn bdf() -> Bdf {
    "4a:00.1".parse().expect("a PCI address")
}

fn engine(link: &SoftLink, side: u8) -> Arc<Engine> {
    let config = EngineConfig {
        name: format!("bench{side}"),
        node: u16::from(side) + 1,
        window_base: PortIova(1 << 42),
        window_bytes: WINDOW_BYTES,
        heartbeat_ms: 250,
        lost_after_ms: 10_000,
        limits: Default::default(),
    };
    Engine::start(link.port(usize::from(side)), config).expect("an engine")
}

fn borrow(engines: &[Arc<Engine>; 2], function: &Arc<SoftFunction>) -> Arc<BorrowedFunction> {
    let entry = PoolEntry {
        bdf: bdf(),
        ids: function.info().ids,
        state: PoolState::Available,
        irq_count: 4,
        bar_bytes: 8192,
        serial: 0,
    };
    let offered: Arc<dyn Function> = function.clone();
    engines[0]
        .offer(entry, offered)
        .expect("the function is offered");
    let deadline = Instant::now() + PATIENCE;
    loop {
        match engines[1].borrow(bdf(), None) {
            Ok((_, _, borrowed)) => return borrowed,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        sleep(Duration::from_millis(1));
    }
}

impl Rig {
    /// A guest with so many bytes in one file, none of them mapped for DMA.
    fn new(bytes: u64) -> Self {
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
        let function = Arc::new(SoftFunction::new(ids, 4));
        let borrowed = borrow(&engines, &function);
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("vf");
        let endpoint = Endpoint::bind(&socket).expect("a socket");
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"));
        let server = spawn({
            let (stop, served) = (Arc::clone(&stop), Arc::clone(&borrowed));
            move || {
                let served: Arc<dyn Function> = served;
                let shared = SessionShared::default();
                endpoint.serve(&served, &Options::default(), stop.as_fd(), &shared)
            }
        });
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&memory, bytes).expect("a sparse file");
        let mapped = MappedAperture::memory(memory.as_fd(), 0, bytes).expect("as a VMM maps it");
        Self {
            vmm: Vmm::agreed(&socket),
            memory,
            _mapped: mapped,
            stop,
            server: Some(server),
            borrowed,
            function,
            engines,
            _link: link,
            _dir: dir,
        }
    }

    fn map(&mut self, iova: u64, len: u64, offset: u64) {
        let map = DmaMap {
            argsz: (size_of::<DmaMap>() as u32).into(),
            flags: 3.into(),
            offset: offset.into(),
            iova: iova.into(),
            len: len.into(),
        };
        let request = message(Command::DmaMap, map.as_bytes());
        self.vmm.ask(&request, Some(self.memory.as_fd()));
    }

    fn unmap(&mut self, iova: u64, len: u64) {
        let unmap = DmaUnmap {
            argsz: (size_of::<DmaUnmap>() as u32).into(),
            flags: 0.into(),
            iova: iova.into(),
            len: len.into(),
        };
        self.vmm
            .ask(&message(Command::DmaUnmap, unmap.as_bytes()), None);
    }

    /// So many pages apart from each other, all programmed, and room for one more.
    fn live(count: u64) -> Self {
        let mut rig = Self::new((count + 1) * PAGE);
        for at in 0..count {
            rig.map(2 * at * PAGE, PAGE, at * PAGE);
        }
        rig.vmm.command(DECODE | BUS_MASTER);
        assert_eq!(rig.function.space().maps().len() as u64, count);
        rig
    }

    /// One more and one less.
    fn turns(&mut self, live: u64, turns: usize) -> Vec<u64> {
        let (iova, offset) = (2 * live * PAGE, live * PAGE);
        let turn = |rig: &mut Self| {
            rig.map(iova, PAGE, offset);
            rig.unmap(iova, PAGE);
        };
        (0..turns).map(|_| time_ns(|| turn(self))).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        rustix::io::write(&*self.stop, &1u64.to_ne_bytes()).expect("an eventfd is written");
        if let Some(server) = self.server.take() {
            let ended = server.join().expect("the server's thread");
            ended.expect("the session is undone");
        }
        let back = self.engines[1].give_back(self.borrowed.lease());
        back.expect("the function goes back");
        assert!(self.function.space().maps().is_empty(), "a map is left");
    }
}

fn beside_others(switches: &Switches, report: &mut Report) {
    let rounds = Rounds {
        rounds: 9,
        samples: switches.pick(200, 60),
    };
    let mut one = Rig::live(1);
    for live in LIVE.into_iter().chain([LIVE_MOST]) {
        let mut many = Rig::live(live);
        let figure = |turns| many.turns(live, turns);
        let pair = paired(rounds, figure, |turns| one.turns(1, turns));
        let what = format!("DMA map and unmap, {live} live maps");
        report.pair(&what, "1 live map", &pair, None);
    }
}

/// A guest's memory as a VMM lays it out: below and above the hole under 4 GiB, in blocks of 1 GiB.
fn one_tib(report: &mut Report) {
    let mut rig = Rig::new(TIB);
    let low = [(0, 0xa_0000), (0x10_0000, 3 * GIB - 0x10_0000)];
    let high = (0..TIB / GIB - 3).map(|at| (4 * GIB + at * GIB, GIB));
    let (mut offset, mut replies) = (0, Vec::new());
    let start = Instant::now();
    for (iova, len) in low.into_iter().chain(high) {
        replies.push(time_ns(|| rig.map(iova, len, offset)));
        offset += len;
    }
    let enable = time_ns(|| rig.vmm.command(DECODE | BUS_MASTER));
    let all = start.elapsed().as_nanos() as u64;
    let maps = rig.function.space().maps().len();
    report.number("1 TiB guest: maps used", maps as f64, "maps", None);
    report.time("1 TiB guest: from the first map to DMA", all);
    report.time("1 TiB guest: reply to the bus-master enable", enable);
    let longest = percentile(&mut replies, 100);
    report.time("1 TiB guest: longest reply to a map", longest);
}

fn main() -> ExitCode {
    let switches = match Switches::from_args(std::env::args().skip(1)) {
        Ok(switches) => switches,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::FAILURE;
        }
    };
    let mut report = Report::default();
    one_tib(&mut report);
    beside_others(&switches, &mut report);
    report.end(&switches)
}
