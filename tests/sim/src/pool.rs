//! The lease pool of a simulated host: its disk, and what must hold for every lease that it grants.

use crate::coroutine::{Pause, pause};
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
}

impl Disk {
    /// The store, as the next daemon opens it.
    pub fn open(&self) -> PacedStore<FailingStore<MemoryStore>> {
        PacedStore(FailingStore::new(self.store.clone(), self.switch.clone()))
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
pub struct PacedStore<S>(S);

impl<S: LeaseStore> LeaseStore for PacedStore<S> {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        self.0.load()
    }

    fn read(&mut self, function: &FunctionKey) -> Result<Option<LeaseRecord>, StoreError> {
        pause(Pause::Ready);
        self.0.read(function)
    }

    fn commit(&mut self, change: &Change) -> Result<(), StoreError> {
        pause(Pause::Ready);
        let result = self.0.commit(change);
        pause(Pause::Ready);
        result
    }

    fn journal(&mut self, most: usize) -> Result<Vec<JournalEntry>, StoreError> {
        self.0.journal(most)
    }
}

#[derive(Default)]
struct Ledger {
    asks: BTreeMap<AskId, Bdf>,
    held: BTreeMap<Bdf, LeaseId>,
    /// Leases without a path, and when they were granted.
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
    runtime: Arc<dyn Runtime>,
    ttl_ms: u64,
    ledger: Arc<Mutex<Ledger>>,
}

impl Watched {
    /// Around a daemon's pool, whose leases are on this disk.
    pub fn new(
        pool: Arc<dyn LeasePool>,
        disk: &Disk,
        (runtime, ttl_ms): (Arc<dyn Runtime>, u64),
    ) -> Self {
        Self {
            pool,
            store: disk.store.clone(),
            epoch_told: Arc::clone(&disk.epoch_told),
            expired: Arc::clone(&disk.expired),
            runtime,
            ttl_ms,
            ledger: Arc::default(),
        }
    }

    /// What it has granted.
    pub fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.ledger))
    }
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.not_open(lease);
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
        self.pool.connect(Box::new(move |message| {
            if let ToPort::Expired(lease) = &message {
                lock(&ledger).expires(*lease, runtime.now_ms(), ttl_ms);
            }
            if let ToPort::Granted(ask, result) = &message {
                let mut ledger = lock(&ledger);
                let bdf = ledger.asks.remove(ask).expect("an ask, answered once");
                if let Ok(grant) = result {
                    let last = told.swap(grant.lease.0, Ordering::Relaxed);
                    ledger.granted(bdf, grant.lease, written(&store, bdf), last);
                    ledger.unopened.insert(grant.lease, runtime.now_ms());
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
