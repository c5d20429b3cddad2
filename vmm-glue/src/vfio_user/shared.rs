//! What the owner of an endpoint can see of its guest session, from any thread.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// Where an endpoint is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SessionState {
    /// Nobody serves it.
    #[default]
    Closed,
    /// No VMM is connected.
    Waiting,
    /// A VMM is connected.
    Connected {
        /// Its process; 0 if that is in a PID namespace that this process does not see.
        pid: i32,
    },
    /// The VMM has gone, and what it had is being undone.
    Undoing {
        /// Its process.
        pid: i32,
    },
}

/// A count that one thread writes and any may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The count now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(super) fn count(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }
}

/// What was counted since the endpoint was made, over all of its guest sessions.
#[derive(Debug, Default)]
pub struct SessionCounters {
    /// VMMs that connected.
    pub sessions: Counter,
    /// Messages received.
    pub messages: Counter,
    /// Reads of a BAR or the ROM that came as a message.
    pub bar_reads: Counter,
    /// Writes to a BAR that came as a message.
    pub bar_writes: Counter,
    /// Reads of config space.
    pub config_reads: Counter,
    /// Writes to config space.
    pub config_writes: Counter,
    /// DMA_MAP messages that were accepted.
    pub dma_maps: Counter,
    /// DMA_UNMAP messages that were accepted.
    pub dma_unmaps: Counter,
    /// Resets of the function that a VMM asked for and that were done.
    pub resets: Counter,
    /// Requests refused: with an error, all ones, or the end of the session.
    pub refused: Counter,
    /// DMA maps recorded now.
    pub maps_now: Counter,
    /// Bytes of guest memory recorded now.
    pub bytes_now: Counter,
}

#[derive(Debug, Default)]
struct Status {
    state: SessionState,
    last_error: Option<String>,
}

/// One endpoint's counters and state, shared with whoever answers `status`.
#[derive(Debug, Default)]
pub struct SessionShared {
    /// What was counted.
    pub counters: SessionCounters,
    status: Mutex<Status>,
}

impl SessionShared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the endpoint is.
    pub fn state(&self) -> SessionState {
        self.status().state
    }

    /// Why the last guest session that did not end by itself was ended, in words.
    pub fn last_error(&self) -> Option<String> {
        self.status().last_error.clone()
    }

    pub(super) fn enter(&self, state: SessionState) {
        self.status().state = state;
    }

    pub(super) fn fail(&self, words: String) {
        self.status().last_error = Some(words);
    }
}
