//! Workers that do not end when they are killed: what that costs, and whom.

use super::*;
use crate::ipc::ToPort;
use std::{
    sync::{Condvar, atomic::AtomicU32},
    thread,
    time::{Duration, Instant},
};
use vfio_shim::{
    model::{Function, FunctionIds, PortIova, RegionIndex},
    ntb::soft::{IDENT, IDENT_VALUE, SoftFunction, SoftLink, SoftPortConfig},
    path::{BorrowedFunction, EngineConfig, OfferState, PoolEntry, PoolState},
};

const WINDOW_BYTES: u64 = 64 << 20;
const FUNCTIONS: [&str; 2] = ["0000:4a:00.1", "0000:4a:00.2"];
/// A port that waits for a worker without end has lost its peer by then.
const LOST_AFTER_MS: u64 = 5_000;
/// More than all waits of one `end`, and less than any for ever.
const BOUND: Duration = Duration::from_secs(20);
const PID: u32 = 4711;

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + BOUND;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what} did not come true");
        thread::sleep(Duration::from_millis(1));
    }
}

/// How a worker behaves.
#[derive(Clone, Copy)]
struct Manners {
    /// Its channel's thread lets go when it is told to.
    obeys: bool,
    /// Its memory goes when it is killed, though it stands on in the kernel.
    leaves_memory: bool,
}

/// A process that stands in the kernel, killed or not, until that lets it go.
struct Stuck {
    manners: Manners,
    killed: AtomicBool,
    let_go: AtomicBool,
    gone: (Mutex<bool>, Condvar),
    buried: AtomicU32,
}

impl Stuck {
    fn new(manners: Manners) -> Arc<Self> {
        Arc::new(Self {
            manners,
            killed: AtomicBool::new(false),
            let_go: AtomicBool::new(false),
            gone: Default::default(),
            buried: AtomicU32::new(0),
        })
    }

    /// The server of the file system answers.
    fn free(&self) {
        *self.gone.0.lock().unwrap() = true;
        self.gone.1.notify_all();
    }
}

impl Process for Stuck {
    fn id(&self) -> u32 {
        PID
    }

    fn kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
    }

    fn gone(&self, wait_ms: Option<u64>) -> bool {
        let gone = self.gone.0.lock().unwrap();
        let wait = Duration::from_millis(wait_ms.unwrap_or(u64::MAX));
        let stands = |gone: &mut bool| !*gone;
        *self
            .gone
            .1
            .wait_timeout_while(gone, wait, stands)
            .unwrap()
            .0
    }

    fn maps_a_device(&self) -> bool {
        let left = self.manners.leaves_memory && self.killed.load(Ordering::SeqCst);
        !self.gone(Some(0)) && !left && !self.let_go.load(Ordering::SeqCst)
    }

    fn status(&self) -> String {
        assert!(self.gone(Some(0)), "it has no status yet");
        self.buried.fetch_add(1, Ordering::SeqCst);
        "gone".into()
    }
}

/// The channel's thread of that process, which ends when it is killed.
struct Launcher(Arc<Stuck>);

impl Launch for Launcher {
    fn launch(&self, theirs: Channel) -> Result<Arc<dyn Process>, StartError> {
        let stuck = Arc::clone(&self.0);
        thread::spawn(move || {
            let mut grip = None;
            while let Ok(Some(message)) = theirs.receive_from_port() {
                match message {
                    ToWorker::Start(_, fds) => {
                        grip = Some(fds);
                        theirs
                            .send_to_port(&ToPort::Ready(Report::default()))
                            .unwrap();
                    }
                    ToWorker::Lost(_) if stuck.manners.obeys => {
                        stuck.let_go.store(true, Ordering::SeqCst);
                        grip = None;
                    }
                    _ => {}
                }
            }
            // The other thread has all that is open, too: nothing is closed.
            std::mem::forget(grip);
        });
        Ok(self.0.clone())
    }
}

/// Node 1 lends two functions to node 2: one to a worker that gets stuck, one to a witness.
struct Rig {
    worker: Arc<WorkerServer>,
    stuck: Arc<Stuck>,
    witness: Arc<BorrowedFunction>,
    engines: [Arc<Engine>; 2],
    session: u64,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new(manners: Manners) -> Self {
        let config = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link = SoftLink::new([config; 2]).unwrap();
        let engines = [0, 1].map(|side: usize| {
            let config = EngineConfig {
                name: format!("soft{side}"),
                node: side as u16 + 1,
                window_base: PortIova(1 << 32),
                window_bytes: WINDOW_BYTES,
                heartbeat_ms: 10,
                lost_after_ms: LOST_AFTER_MS,
                limits: Default::default(),
            };
            Engine::start(link.port(side), config).unwrap()
        });
        FUNCTIONS.iter().for_each(|bdf| offer(&engines[0], bdf));
        until("the pool", || {
            (engines[1].list().ok()?.len() == FUNCTIONS.len()).then_some(())
        });
        let [first, second] = FUNCTIONS.map(|bdf| bdf.parse().unwrap());
        let (_, _, witness) = engines[1].borrow(second, None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let stuck = Stuck::new(manners);
        let worker = serve(&engines[1], first, &stuck, dir.path());
        let session = session(&engines[1]).expect("a session");
        Self {
            worker,
            stuck,
            witness,
            engines,
            session,
            _dir: dir,
        }
    }

    /// Where the worker's function stands, and how many slices of the lender are in quarantine.
    fn lent(&self) -> (OfferState, usize) {
        let status = self.engines[0].status().unwrap();
        (status.lent[0].offer.state.clone(), status.quarantine.slices)
    }

    /// The other tenant has noticed nothing.
    fn check_witness(&self) {
        let mut ident = [0; 4];
        let read = self.witness.region_read(RegionIndex(0), IDENT, &mut ident);
        read.unwrap();
        assert_eq!(u32::from_le_bytes(ident), IDENT_VALUE);
        let sessions = [0, 1].map(|at| session(&self.engines[at]));
        assert_eq!(sessions, [Some(self.session); 2]);
    }

    fn check_buried(&self) {
        let buried = || self.stuck.buried.load(Ordering::SeqCst);
        until("a burial", || (buried() == 1).then_some(()));
    }
}

fn session(engine: &Engine) -> Option<u64> {
    Some(engine.status()?.session?.info.session)
}

fn offer(engine: &Engine, bdf: &str) {
    let ids = FunctionIds {
        vendor: 0x5b1e,
        device: 1,
        ..FunctionIds::default()
    };
    let function = Arc::new(SoftFunction::new(ids, 2));
    let bars = &function.info().regions[..6];
    let entry = PoolEntry {
        bdf: bdf.parse().unwrap(),
        ids,
        state: PoolState::Available,
        irq_count: 2,
        bar_bytes: bars.iter().map(|bar| bar.size).sum(),
        serial: 0,
    };
    engine.offer(entry, function).unwrap();
}

fn serve(
    engine: &Arc<Engine>,
    bdf: Bdf,
    stuck: &Arc<Stuck>,
    dir: &std::path::Path,
) -> Arc<WorkerServer> {
    let socket = dir.join("vmm.sock");
    let settings = Settings {
        messages_per_second: 1000,
        memory_maps: Arc::new(std::path::PathBuf::from("/proc")),
        holders: Default::default(),
    };
    let begin = Start {
        lease: 0,
        path: socket.display().to_string(),
        mapped: false,
        memory_check: false,
        vmm_uids: Vec::new(),
        vmm_gids: Vec::new(),
        maps_max: 16,
        bytes_max: 1 << 20,
        window: None,
    };
    let endpoint = Endpoint::bind(&socket).unwrap();
    let launcher = Box::new(Launcher(Arc::clone(stuck)));
    start(engine, (bdf, None), endpoint, begin, (launcher, &settings)).unwrap()
}

/// Done, and not for ever.
fn bounded<T>(act: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = act();
    assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
    done
}

#[test]
fn worker_that_stands_in_the_kernel_lets_go_by_its_other_thread_and_is_returned() {
    let rig = Rig::new(Manners {
        obeys: true,
        leaves_memory: false,
    });
    let ended = bounded(|| rig.worker.end());
    assert!(ended.is_none(), "{ended:?}");
    assert!(rig.worker.held().is_none() && rig.stuck.killed.load(Ordering::SeqCst));
    assert_eq!(rig.lent(), (OfferState::Available, 0));
    rig.check_witness();
    rig.stuck.free();
    rig.check_buried();
}

#[test]
fn worker_whose_memory_is_gone_is_waited_for_no_more() {
    let rig = Rig::new(Manners {
        obeys: false,
        leaves_memory: true,
    });
    let ended = bounded(|| rig.worker.end());
    assert!(ended.is_none(), "{ended:?}");
    assert_eq!(rig.lent(), (OfferState::Available, 0));
    rig.check_witness();
    rig.stuck.free();
    rig.check_buried();
}

#[test]
fn worker_that_holds_on_keeps_its_own_slices_from_all_and_nobody_waiting() {
    let rig = Rig::new(Manners {
        obeys: false,
        leaves_memory: false,
    });
    let ended = bounded(|| rig.worker.end());
    assert!(matches!(ended, Some(CallError::Held)), "{ended:?}");
    let held = rig.worker.held().unwrap();
    assert!(held.starts_with("process 4711: "), "{held}");
    assert!(held.contains("/sys/fs/fuse/connections"), "{held}");
    rig.check_witness();
    // The lender has its function at once, but not the slices that were behind it.
    let bdf = FUNCTIONS[0].parse().unwrap();
    rig.engines[0]
        .revoke_and_wait(bdf, "wanted back", 20_000)
        .unwrap();
    assert_eq!(rig.lent(), (OfferState::Available, 1));
    assert!(matches!(rig.worker.end(), Some(CallError::Held)));
    rig.check_witness();
    rig.stuck.free();
    until("the end of the quarantine", || {
        (rig.lent().1 == 0).then_some(())
    });
    let after = (rig.worker.held(), rig.worker.end().map(|e| e.to_string()));
    assert_eq!(after, (None, None));
    rig.check_buried();
    rig.check_witness();
}

#[test]
fn port_ends_without_a_worker_that_holds_on() {
    let rig = Rig::new(Manners {
        obeys: false,
        leaves_memory: false,
    });
    bounded(|| rig.engines[1].stop());
    let ended = bounded(|| rig.worker.end());
    assert!(matches!(ended, Some(CallError::Held)), "{ended:?}");
    assert!(!rig.stuck.gone(Some(0)));
    rig.stuck.free();
    rig.check_buried();
}
