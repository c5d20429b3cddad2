//! A store of leases in memory: it outlives the pool that uses it, and ends with the process.

use super::record::{FunctionKey, JournalEntry, LeaseRecord};
use super::store::{Change, JOURNAL_MAX, LeaseStore, Snapshot, StoreError, check};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A store in memory. Clones are the same store, as a file is the same for every process.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    records: BTreeMap<FunctionKey, LeaseRecord>,
    epoch_last: u64,
    journal: VecDeque<JournalEntry>,
}

impl MemoryStore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LeaseStore for MemoryStore {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        let state = self.state();
        Ok(Snapshot {
            records: state.records.values().cloned().collect(),
            epoch_last: state.epoch_last,
        })
    }

    fn read(&mut self, function: &FunctionKey) -> Result<Option<LeaseRecord>, StoreError> {
        Ok(self.state().records.get(function).cloned())
    }

    fn commit(&mut self, change: &Change) -> Result<(), StoreError> {
        let mut state = self.state();
        let Change { record, entry, .. } = change;
        let found = state.records.get(&record.function);
        check(change, found.map(LeaseRecord::version), state.epoch_last)?;
        state.epoch_last = state.epoch_last.max(record.epoch);
        let function = record.function.clone();
        state.records.insert(function, record.clone());
        state.journal.push_back(entry.clone());
        if state.journal.len() > JOURNAL_MAX {
            state.journal.pop_front();
        }
        Ok(())
    }

    fn journal(&mut self, most: usize) -> Result<Vec<JournalEntry>, StoreError> {
        let state = self.state();
        let skip = state.journal.len().saturating_sub(most);
        Ok(state.journal.iter().skip(skip).cloned().collect())
    }
}
