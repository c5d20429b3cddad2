//! A store of leases that fails on command: at the n-th write, before or after it reached the disk, or at every read.

use super::record::{FunctionKey, JournalEntry, LeaseRecord};
use super::store::{Change, LeaseStore, Snapshot, StoreError};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// On which side of the disk a write fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Nothing is written.
    Before,
    /// It is written, and only the answer is an error.
    After,
}

#[derive(Debug, Default)]
struct Plan {
    /// So many more writes go well, then one fails.
    write: Option<(u64, When)>,
    reads_fail: bool,
    failures: u64,
}

/// What makes a `FailingStore` fail, from outside.
#[derive(Clone, Debug, Default)]
pub struct FailSwitch {
    plan: Arc<Mutex<Plan>>,
}

impl FailSwitch {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The n-th write from now fails, counted from 0; the ones after it go well.
    pub fn fail_write(&self, nth: u64, when: When) {
        self.plan().write = Some((nth, when));
    }

    /// Reads fail, or no longer.
    pub fn fail_reads(&self, fail: bool) {
        self.plan().reads_fail = fail;
    }

    /// How often it has failed.
    pub fn failures(&self) -> u64 {
        self.plan().failures
    }

    fn at_write(&self) -> Option<When> {
        let mut plan = self.plan();
        let (left, when) = plan.write.take()?;
        if left > 0 {
            plan.write = Some((left - 1, when));
            return None;
        }
        plan.failures += 1;
        Some(when)
    }

    fn at_read(&self) -> Result<(), StoreError> {
        let mut plan = self.plan();
        if plan.reads_fail {
            plan.failures += 1;
            return Err(StoreError::failed("read", io::Error::from_raw_os_error(5)));
        }
        Ok(())
    }
}

/// A store that fails when its switch says so.
#[derive(Debug)]
pub struct FailingStore<S> {
    inner: S,
    switch: FailSwitch,
}

impl<S> FailingStore<S> {
    /// Around a store.
    pub fn new(inner: S, switch: FailSwitch) -> Self {
        Self { inner, switch }
    }
}

impl<S: LeaseStore> LeaseStore for FailingStore<S> {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        self.switch.at_read()?;
        self.inner.load()
    }

    fn read(&mut self, function: &FunctionKey) -> Result<Option<LeaseRecord>, StoreError> {
        self.switch.at_read()?;
        self.inner.read(function)
    }

    fn commit(&mut self, change: &Change) -> Result<(), StoreError> {
        let full = || StoreError::failed("written", io::Error::from_raw_os_error(28));
        match self.switch.at_write() {
            None => self.inner.commit(change),
            Some(When::Before) => Err(full()),
            Some(When::After) => {
                self.inner.commit(change)?;
                Err(full())
            }
        }
    }

    fn journal(&mut self, most: usize) -> Result<Vec<JournalEntry>, StoreError> {
        self.switch.at_read()?;
        self.inner.journal(most)
    }
}
