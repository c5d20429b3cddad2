//! The pool's thread behind engines on the soft fabric: stores that fail or stand still, and leases that outlive nobody.

use super::contract::function;
use super::*;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};
use vfio_shim::model::{Bdf, Function, FunctionIds, PortIova, RegionIndex};
use vfio_shim::ntb::soft::{IDENT, IDENT_VALUE, SoftFunction, SoftLink, SoftPortConfig};
use vfio_shim::path::grant::{AskId, ToPool};
use vfio_shim::path::message::Secret;
use vfio_shim::path::{Engine, EngineConfig, LeasePool, OfferState, PoolEntry, PoolState};

const WINDOW_BYTES: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const TTL_MS: u64 = 60_000;
const FUNCTIONS: [&str; 2] = ["0000:4a:00.1", "0000:4a:00.2"];

fn bdf(at: usize) -> Bdf {
    FUNCTIONS[at].parse().unwrap()
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A disk that stands still as long as the gate is shut.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn shut(&self, shut: bool) {
        *self.0.0.lock().unwrap() = shut;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let shut = self.0.0.lock().unwrap();
        let _open = self.0.1.wait_while(shut, |shut| *shut).unwrap();
    }
}

struct SlowStore<S>(S, Gate);

impl<S: LeaseStore> LeaseStore for SlowStore<S> {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        self.0.load()
    }

    fn read(&mut self, function: &FunctionKey) -> Result<Option<LeaseRecord>, StoreError> {
        self.0.read(function)
    }

    fn commit(&mut self, change: &Change) -> Result<(), StoreError> {
        self.1.pass();
        self.0.commit(change)
    }

    fn journal(&mut self, most: usize) -> Result<Vec<JournalEntry>, StoreError> {
        self.0.journal(most)
    }
}

/// Node 1 lends both functions to node 2. Fields drop in order: engines, then the pool.
struct Rig {
    engines: [Arc<Engine>; 2],
    pool: PoolService,
    switch: FailSwitch,
    gate: Gate,
}

impl Rig {
    fn on(disk: &MemoryStore) -> Self {
        let (switch, gate) = (FailSwitch::default(), Gate::default());
        let store = FailingStore::new(disk.clone(), switch.clone());
        let pool = PoolService::start(SlowStore(store, gate.clone()), TTL_MS).unwrap();
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
                lost_after_ms: 10_000,
                limits: Default::default(),
            };
            let name = format!("ntb{side}");
            Engine::start_with_pool(link.port(side), config, pool.port(&name)).unwrap()
        });
        pool.settle();
        let rig = Self {
            engines,
            pool,
            switch,
            gate,
        };
        for at in 0..2 {
            rig.offer(at);
        }
        until("the pool shows in the borrower's list", || {
            (rig.engines[1].list().ok()?.len() == 2).then_some(())
        });
        rig
    }

    fn offer(&self, at: usize) {
        let ids = FunctionIds {
            vendor: 0x5b1e,
            device: 1,
            ..FunctionIds::default()
        };
        let function = Arc::new(SoftFunction::new(ids, 2));
        let info = function.info();
        let entry = PoolEntry {
            bdf: bdf(at),
            ids,
            state: PoolState::Available,
            irq_count: 2,
            bar_bytes: info.regions[..6].iter().map(|region| region.size).sum(),
            serial: 0,
        };
        self.engines[0].offer(entry, function).unwrap();
    }

    fn state(&self, at: usize) -> OfferState {
        let status = self.engines[0].status().unwrap();
        let lent = status.lent.into_iter();
        let mut found = lent.filter(|lent| lent.offer.entry.bdf == bdf(at));
        found.next().unwrap().offer.state
    }

    fn lease(&self, at: usize) -> Option<LeaseStatus> {
        let leases = self.pool.status().unwrap().leases;
        let name = function(FUNCTIONS[at]);
        leases.into_iter().find(|lease| lease.function == name)
    }

    fn wait_free(&self, at: usize) -> LeaseStatus {
        until("the function is free again", || {
            let lease = self.lease(at)?;
            let free = lease.state == LeaseState::Free && self.state(at) == OfferState::Available;
            free.then_some(lease)
        })
    }
}

#[test]
fn disk_that_stands_still_stops_no_other_tenant() {
    let rig = Rig::on(&MemoryStore::default());
    let (_, _, first) = rig.engines[1].borrow(bdf(0), None).unwrap();
    until("the path is written down", || {
        (rig.lease(0)?.state == LeaseState::Open).then_some(())
    });
    rig.gate.shut(true);
    let second = Arc::clone(&rig.engines[1]);
    let second = std::thread::spawn(move || second.borrow(bdf(1), None));
    until("the grant is under way", || {
        (rig.state(1) == OfferState::Granting).then_some(())
    });
    let beats = || rig.engines[0].status().unwrap().mailbox.received;
    let before = beats();
    let mut ident = [0; 4];
    first
        .region_read(RegionIndex(0), IDENT, &mut ident)
        .unwrap();
    assert_eq!(u32::from_le_bytes(ident), IDENT_VALUE);
    // By way of the lender's control thread.
    rig.engines[1].list().unwrap();
    assert!(beats() > before, "the lender's control thread goes on");
    assert_eq!(rig.state(1), OfferState::Granting);
    rig.gate.shut(false);
    let (lease, ..) = second.join().unwrap().unwrap();
    assert_eq!(rig.lease(1).unwrap().epoch, lease.0);
}

#[test]
fn borrower_that_has_given_up_waiting_leaves_no_lease() {
    let rig = Rig::on(&MemoryStore::default());
    rig.gate.shut(true);
    let gave_up = rig.engines[1].borrow(bdf(0), None).err().unwrap();
    assert!(gave_up.to_string().contains("4000"), "{gave_up}");
    rig.gate.shut(false);
    let lease = rig.wait_free(0);
    assert_eq!(lease.last_end.unwrap().cause, Cause::Returned);
    rig.engines[1].borrow(bdf(0), None).unwrap();
}

#[test]
fn store_that_fails_makes_borrow_refuse_in_words_and_the_next_one_works() {
    for when in [When::Before, When::After] {
        let rig = Rig::on(&MemoryStore::default());
        rig.switch.fail_write(0, when);
        let refusal = rig.engines[1].borrow(bdf(0), None).err().unwrap();
        let words = refusal.to_string();
        assert!(words.contains("nothing was lent"), "{words}");
        assert!(words.contains("No space left on device"), "{words}");
        assert_eq!(rig.state(0), OfferState::Available);
        rig.engines[1].borrow(bdf(0), None).unwrap();
    }
}

#[test]
fn stopped_port_has_its_leases_written_off_and_a_new_start_goes_on_from_their_epochs() {
    let mut disk = MemoryStore::default();
    let rig = Rig::on(&disk);
    let (first, ..) = rig.engines[1].borrow(bdf(0), None).unwrap();
    rig.engines[0].stop();
    drop(rig);
    let moves: Vec<Move> = disk
        .journal(9)
        .unwrap()
        .into_iter()
        .map(|e| e.moved)
        .collect();
    let Some(Move::Ended(end)) = moves.last() else {
        panic!("{moves:?}")
    };
    assert_eq!(end.cause, Cause::Reclaimed);
    let rig = Rig::on(&disk);
    let (second, ..) = rig.engines[1].borrow(bdf(0), None).unwrap();
    assert!(second > first);
}

#[test]
fn lease_that_a_killed_daemon_left_in_the_store_is_reclaimed_at_the_next_start() {
    let mut disk = MemoryStore::default();
    let name = FUNCTIONS[0];
    disk.commit(&super::contract::grant(name, 41, None))
        .unwrap();
    let rig = Rig::on(&disk);
    let lease = rig.lease(0).unwrap();
    assert_eq!((lease.state, lease.epoch), (LeaseState::Free, 41));
    let entry = disk.journal(1).unwrap().remove(0);
    assert!(matches!(entry.moved, Move::Ended(end) if end.cause == Cause::Reclaimed));
    let (lease, ..) = rig.engines[1].borrow(bdf(0), None).unwrap();
    assert_eq!(lease.0, 42);
}

/// A port without an engine: it hears what the pool tells it.
fn port(pool: &PoolService) -> (Arc<dyn LeasePool>, mpsc::Receiver<ToPort>) {
    let (line, hears) = mpsc::channel();
    let port = pool.port("ntb0");
    port.connect(Box::new(move |message| {
        let _ = line.send(message);
    }));
    (port, hears)
}

fn ask(port: &Arc<dyn LeasePool>) {
    port.tell(ToPool::Grant {
        ask: AskId(1),
        bdf: bdf(0),
        borrower: None,
        secret: Secret([1; 16]),
    });
}

#[test]
fn lease_without_a_path_expires_by_the_clock() {
    let pool = PoolService::start(MemoryStore::default(), 50).unwrap();
    let (port, hears) = port(&pool);
    let start = Instant::now();
    ask(&port);
    let granted = hears.recv_timeout(PATIENCE).unwrap();
    let ToPort::Granted(_, Ok(grant)) = granted else {
        panic!("{granted:?}")
    };
    let expired = hears.recv_timeout(PATIENCE).unwrap();
    assert_eq!(expired, ToPort::Expired(grant.lease));
    // The clock counts whole milliseconds.
    assert!(start.elapsed() >= Duration::from_millis(49));
}

/// The daemon kept a socket of each port that had ended, until another came in its place.
#[test]
fn port_that_is_gone_leaves_no_line_behind() {
    let pool = PoolService::start(MemoryStore::default(), TTL_MS).unwrap();
    let port = pool.port("ntb0");
    let line = Arc::new(());
    let held = Arc::clone(&line);
    port.connect(Box::new(move |_| drop(Arc::clone(&held))));
    assert_eq!(Arc::strong_count(&line), 2);
    port.tell(ToPool::Gone);
    port.flush();
    assert_eq!(Arc::strong_count(&line), 1);
}

#[test]
fn pool_that_is_gone_keeps_nobody_waiting() {
    let pool = PoolService::start(MemoryStore::default(), TTL_MS).unwrap();
    let (port, hears) = port(&pool);
    drop(pool);
    ask(&port);
    let told = hears.recv_timeout(PATIENCE).unwrap();
    let ToPort::Granted(AskId(1), Err(refusal)) = told else {
        panic!("{told:?}")
    };
    assert!(refusal.text.contains("start it again"), "{refusal}");
}
