//! The lease pool of a simulated host: its disk, and what must hold for every lease that it grants.

use crate::coroutine::{Pause, pause};
use crate::scheduler::{Core, Process};
use crate::steps::{Step, StoreStep};
use crate::table::Trouble;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use sublet::pool::{
    Change, FailSwitch, FailingStore, FunctionKey, JournalEntry, LeaseRecord, LeaseStore,
    MemoryStore, Snapshot, StoreError, When,
};
use vfio_shim::model::{Bdf, Runtime};
use vfio_shim::path::LeaseId;
use vfio_shim::path::LeasePool;
use vfio_shim::path::grant::{AskId, EndCause, PortLine, ToPool, ToPort};

/// A host's disk: it stays when the daemon is killed or the host loses power.
#[derive(Default)]
pub struct Disk {
    store: MemoryStore,
    switch: FailSwitch,
    /// On which side of the disk the planned write fails.
    when: Option<When>,
    /// Failures that were counted already.
    seen: u64,
    /// The greatest epoch that any port of this host was ever told.
    epoch_told: Arc<AtomicU64>,
    /// Leases that ended as nobody opened their path.
    expired: Arc<AtomicU64>,
    expired_seen: u64,
    written: Arc<Mutex<Written>>,
}

/// When each lease was written down first.
type Written = BTreeMap<LeaseId, u64>;

impl Disk {
    /// The store, as the next daemon opens it.
    pub fn open(&self, core: &Arc<Core>, process: Process) -> PacedStore {
        PacedStore {
            store: FailingStore::new(self.store.clone(), self.switch.clone()),
            written: Arc::clone(&self.written),
            core: Arc::clone(core),
            process,
        }
    }

    /// The n-th write from now fails, counted from 0.
    pub fn plan(&mut self, nth: u64, when: When) {
        self.when = Some(when);
        self.switch.fail_write(nth, when);
    }

    /// No write fails any more.
    pub fn plan_nothing(&mut self) {
        self.plan(u64::MAX, When::Before);
        self.when = None;
    }

    /// What has failed since the last look.
    pub fn struck(&mut self) -> Option<(Trouble, u64)> {
        let failures = self.switch.failures();
        let new = failures - std::mem::replace(&mut self.seen, failures);
        let trouble = match self.when? {
            When::Before => Trouble::StoreFails,
            When::After => Trouble::StoreUnsure,
        };
        (new != 0).then_some((trouble, new))
    }

    /// How many leases have expired since the last look.
    pub fn expired(&mut self) -> u64 {
        let expired = self.expired.load(Ordering::Relaxed);
        expired - std::mem::replace(&mut self.expired_seen, expired)
    }

    /// The lease of a function that is in force by what is written.
    pub fn holder(&self, bdf: Bdf) -> Option<LeaseId> {
        written(&self.store, bdf)
            .filter(|record| record.holder.is_some())
            .map(|record| LeaseId(record.epoch))
    }
}

fn written(store: &MemoryStore, bdf: Bdf) -> Option<LeaseRecord> {
    let read = store.clone().read(&FunctionKey::from(bdf));
    read.expect("memory can be read")
}

/// A store where others run, and the daemon can be killed, on either side of each write.
pub struct PacedStore {
    store: FailingStore<MemoryStore>,
    written: Arc<Mutex<Written>>,
    core: Arc<Core>,
    /// The daemon's.
    process: Process,
}

impl PacedStore {
    fn reach(&self, step: Option<StoreStep>) {
        pause(Pause::Ready);
        if let Some(step) = step {
            self.core.reach(self.process, Step::Store(step));
        }
    }
}

impl LeaseStore for PacedStore {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        self.store.load()
    }

    fn read(&mut self, function: &FunctionKey) -> Result<Option<LeaseRecord>, StoreError> {
        pause(Pause::Ready);
        self.store.read(function)
    }

    fn commit(&mut self, change: &Change) -> Result<(), StoreError> {
        let [before, after] =
            StoreStep::around(&change.entry.moved).map_or([None; 2], |both| both.map(Some));
        self.reach(before);
        let result = self.store.commit(change);
        if result.is_ok() {
            let lease = LeaseId(change.record.epoch);
            let now_ms = self.core.now_ms();
            lock(&self.written).entry(lease).or_insert(now_ms);
        }
        self.reach(after.filter(|_| result.is_ok()));
        result
    }

    fn journal(&mut self, most: usize) -> Result<Vec<JournalEntry>, StoreError> {
        self.store.journal(most)
    }
}

#[derive(Default)]
struct Ledger {
    asks: BTreeMap<AskId, Bdf>,
    held: BTreeMap<Bdf, LeaseId>,
    /// Leases without a path, and when their time to live began.
    unopened: BTreeMap<LeaseId, u64>,
    opened: BTreeSet<LeaseId>,
}

/// What a daemon's pool has granted.
pub struct Watch(Arc<Mutex<Ledger>>);

impl Watch {
    /// The oldest lease whose path nobody has opened, and when it was granted.
    pub fn unopened(&self) -> Option<(LeaseId, u64)> {
        let ledger = lock(&self.0);
        let unopened = ledger.unopened.iter().min_by_key(|(_, granted)| **granted);
        unopened.map(|(lease, granted)| (*lease, *granted))
    }
}

/// The product's pool as a port sees it, with a ledger of its own beside it.
pub struct Watched {
    pool: Arc<dyn LeasePool>,
    store: MemoryStore,
    epoch_told: Arc<AtomicU64>,
    expired: Arc<AtomicU64>,
    written: Arc<Mutex<Written>>,
    runtime: Arc<dyn Runtime>,
    ttl_ms: u64,
    /// Whether the pool is another process's, so that what both say may cross.
    apart: bool,
    ledger: Arc<Mutex<Ledger>>,
}

impl Watched {
    /// Around a daemon's pool, whose leases are on this disk.
    pub fn new(
        pool: Arc<dyn LeasePool>,
        disk: &Disk,
        (runtime, ttl_ms): (Arc<dyn Runtime>, u64),
        apart: bool,
    ) -> Self {
        Self {
            pool,
            store: disk.store.clone(),
            epoch_told: Arc::clone(&disk.epoch_told),
            expired: Arc::clone(&disk.expired),
            written: Arc::clone(&disk.written),
            runtime,
            ttl_ms,
            apart,
            ledger: Arc::default(),
        }
    }

    /// What it has granted.
    pub fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.ledger))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    fn granted(&mut self, bdf: Bdf, lease: LeaseId, stored: Option<LeaseRecord>, last: u64) {
        assert!(
            lease.0 > last,
            "INVARIANT epoch: lease {lease} of {bdf} is granted after epoch {last}"
        );
        let durable = stored.is_some_and(|r| r.epoch == lease.0 && r.holder.is_some());
        assert!(
            durable,
            "INVARIANT store: lease {lease} of {bdf} is told, and is not what is written"
        );
        let held = self.held.insert(bdf, lease);
        assert_eq!(held, None, "INVARIANT lease: {bdf} is granted twice");
    }

    fn not_open(&self, lease: LeaseId) {
        assert!(
            !self.opened.contains(&lease),
            "INVARIANT expiry: lease {lease} expires, and its path was opened"
        );
    }

    /// The pool says that a lease has expired.
    fn expires(&self, lease: LeaseId, now_ms: u64, ttl_ms: u64) {
        let granted_ms = self.unopened.get(&lease).copied();
        let early = granted_ms.is_some_and(|granted| now_ms < granted + ttl_ms);
        assert!(
            !early,
            "INVARIANT expiry: lease {lease} of {granted_ms:?} ms expires at {now_ms} ms, before its {ttl_ms} ms"
        );
    }

    /// Says whether it has expired.
    fn ended(&mut self, bdf: Bdf, lease: LeaseId, cause: &EndCause) -> bool {
        let expired = *cause == EndCause::Expired;
        if expired {
            self.not_open(lease);
        }
        if self.held.get(&bdf) == Some(&lease) {
            self.held.remove(&bdf);
        }
        self.unopened.remove(&lease);
        expired
    }
}

impl LeasePool for Watched {
    fn connect(&self, port: PortLine) {
        let ledger = Arc::clone(&self.ledger);
        let (store, told) = (self.store.clone(), Arc::clone(&self.epoch_told));
        let (runtime, ttl_ms) = (Arc::clone(&self.runtime), self.ttl_ms);
        let (apart, times) = (self.apart, Arc::clone(&self.written));
        self.pool.connect(Box::new(move |message| {
            if let ToPort::Expired(lease) = &message {
                let ledger = lock(&ledger);
                ledger.expires(*lease, runtime.now_ms(), ttl_ms);
                if !apart {
                    ledger.not_open(*lease);
                }
            }
            if let ToPort::Granted(ask, result) = &message {
                let mut ledger = lock(&ledger);
                let bdf = ledger.asks.remove(ask).expect("an ask, answered once");
                if let Ok(grant) = result {
                    let last = told.swap(grant.lease.0, Ordering::Relaxed);
                    ledger.granted(bdf, grant.lease, written(&store, bdf), last);
                    // A daemon apart counts from when it has written it down, and the port may
                    // hear of it much later.
                    let written_ms = lock(&times).get(&grant.lease).copied();
                    let written_ms = written_ms.filter(|_| apart);
                    let granted_ms = written_ms.unwrap_or_else(|| runtime.now_ms());
                    ledger.unopened.insert(grant.lease, granted_ms);
                }
            }
            port(message);
        }));
    }

    fn tell(&self, message: ToPool) {
        {
            let mut ledger = lock(&self.ledger);
            match &message {
                ToPool::Grant { ask, bdf, .. } => {
                    ledger.asks.insert(*ask, *bdf);
                }
                ToPool::Ended { bdf, lease, end } => {
                    if ledger.ended(*bdf, *lease, &end.cause) {
                        self.expired.fetch_add(1, Ordering::Relaxed);
                    }
                }
                ToPool::Opened { lease, .. } => {
                    ledger.unopened.remove(lease);
                    ledger.opened.insert(*lease);
                }
                ToPool::Mended { .. } => {}
                ToPool::Gone => {
                    ledger.held.clear();
                    ledger.unopened.clear();
                }
            }
        }
        self.pool.tell(message);
    }
}
