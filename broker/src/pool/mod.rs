//! The pool: who has which function of this host, decided in one place and written down before it is told.
//!
//! `lease` is the pure machine; `store` is what it writes to; `Pool` joins the two without a
//! thread, and `service` is the thread that ports ask. What a function is called in the store is
//! its `FunctionKey`.

#[cfg(test)]
mod contract;
mod failing;
mod lease;
#[cfg(test)]
mod lease_tests;
mod memory;
mod record;
mod redb;
#[cfg(test)]
mod redb_tests;
mod service;
#[cfg(test)]
mod service_tests;
mod store;

pub use self::redb::RedbStore;
pub use failing::{FailSwitch, FailingStore, When};
pub use lease::{
    Action, Ask, EPOCH_MAX, EXPIRE_AGAIN_MS, Event, FUNCTIONS_MAX, Held, LeaseMachine, LeaseState,
    LeaseStatus, Now, RETRY_MS,
};
pub use memory::MemoryStore;
pub use record::{
    Cause, End, FunctionKey, Holder, JournalEntry, KEY_BYTES_MAX, LeaseRecord, Move, Scrubbed,
    Version,
};
pub use service::{PoolService, PoolStatus, PortPool};
pub use store::{Change, JOURNAL_MAX, LeaseStore, Snapshot, StoreError};

use std::collections::VecDeque;
use vfio_shim::path::grant::ToPort;

/// The machine and its store. Nothing waits but the store itself.
pub struct Pool<S> {
    machine: LeaseMachine,
    store: S,
    last_error: Option<String>,
}

impl<S: LeaseStore> Pool<S> {
    /// With what the store knows. Leases that it still holds wait for their ports.
    pub fn open(mut store: S, ttl_ms: u64) -> Result<Self, StoreError> {
        let machine = LeaseMachine::new(ttl_ms, store.load()?);
        Ok(Self {
            machine,
            store,
            last_error: None,
        })
    }

    /// One event, and all that the store has to do for it; what the ports are told. The clock is
    /// read again after the store, which may be slow: a lease lives from when it is written.
    pub fn handle(&mut self, event: Event, now: impl Fn() -> Now) -> Vec<(String, ToPort)> {
        let mut told = Vec::new();
        let mut todo: VecDeque<Action> = self.machine.handle(event, now()).into();
        while let Some(action) = todo.pop_front() {
            let event = match action {
                Action::Tell(port, message) => {
                    told.push((port, message));
                    continue;
                }
                Action::Write(change) => {
                    let result = self.store.commit(&change);
                    self.note(result.as_ref().err());
                    Event::Stored(change.record.function, result)
                }
                Action::Read(function) => {
                    let result = self.store.read(&function);
                    self.note(result.as_ref().err());
                    Event::Read(function, result)
                }
            };
            todo.extend(self.machine.handle(event, now()));
        }
        told
    }

    fn note(&mut self, error: Option<&StoreError>) {
        if let Some(error) = error {
            tracing::error!(%error, "the store of leases failed");
        }
        self.last_error = error.map(|error| vfio_shim::path::words(error));
    }

    /// When `Event::Tick` is due, in the clock's milliseconds.
    pub fn next_ms(&self) -> Option<u64> {
        self.machine.next_ms()
    }

    /// Every function that was ever lent.
    pub fn status(&self, now: Now) -> Vec<LeaseStatus> {
        self.machine.status(now)
    }

    /// What the store said last, if that was an error.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// The newest moves, oldest first.
    pub fn journal(&mut self, most: usize) -> Result<Vec<JournalEntry>, StoreError> {
        self.store.journal(most)
    }
}
