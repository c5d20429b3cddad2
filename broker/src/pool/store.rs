//! The store of leases as a trait: a change is a compare-and-set, and durable when it returns.

use super::record::{FunctionKey, JournalEntry, LeaseRecord, Version};
use std::path::PathBuf;

/// Most entries of the journal: the oldest go first.
pub const JOURNAL_MAX: usize = 4096;

/// Everything that the machine needs at its start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// One for each function.
    pub records: Vec<LeaseRecord>,
    /// The greatest epoch that was ever written, of whichever function.
    pub epoch_last: u64,
}

/// One change: all of it is written, or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What the store must hold for the function; `None` = nothing.
    pub expect: Option<Version>,
    /// What it holds afterwards.
    pub record: LeaseRecord,
    /// What the journal tells of it.
    pub entry: JournalEntry,
}

/// Why a store refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store holds something else; nothing was written.
    #[error(
        "the lease of {function} was changed meanwhile (expected {expected:?}, found {found:?})"
    )]
    Conflict {
        /// Of which function.
        function: FunctionKey,
        /// What was expected.
        expected: Option<Version>,
        /// What is there.
        found: Option<Version>,
    },
    /// A lease whose epoch is not new; nothing was written.
    #[error("a lease of epoch {epoch} cannot be granted: epoch {last} was given out already")]
    NotNew {
        /// The wanted one.
        epoch: u64,
        /// The greatest that was given out.
        last: u64,
    },
    /// Somebody else has the file.
    #[error(
        "{0} is in use by another process: stop the other daemon, or give this one another `state` folder"
    )]
    InUse(PathBuf),
    /// The file is none of ours, or damaged.
    #[error(
        "{path} is not a sound store of leases ({cause}): move it away (`mv {path} {path}.bad`) and start again; no lease outlives the daemon, so nothing in force is lost"
    )]
    Unsound {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// The file is of another version of Sublet.
    #[error(
        "{path} is of schema {found}, this program knows {known}: run the version that wrote it, or move it away (`mv {path} {path}.old`) and start again"
    )]
    Schema {
        /// Which file.
        path: PathBuf,
        /// Its schema.
        found: u64,
        /// What this program knows.
        known: u64,
    },
    /// The folder or file cannot be had.
    #[error(
        "the store's {path} cannot be {act}: mend the folder, or set `state` in the configuration's [daemon] to another"
    )]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        act: &'static str,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// It failed under way: whether the change is written is not known.
    #[error("the store of leases cannot be {act}")]
    Failed {
        /// What was tried.
        act: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl StoreError {
    /// A failure under way.
    pub fn failed(
        act: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let source = source.into();
        Self::Failed { act, source }
    }
}

/// Where leases are written down. One process at a time has it.
pub trait LeaseStore: Send {
    /// Everything that is written.
    fn load(&mut self) -> Result<Snapshot, StoreError>;

    /// What is written of one function.
    fn read(&mut self, function: &FunctionKey) -> Result<Option<LeaseRecord>, StoreError>;

    /// Writes a change, if the store holds what it expects and a new lease's epoch is new. Durable
    /// when it returns `Ok`; not known to be written or not when it returns `Failed`.
    fn commit(&mut self, change: &Change) -> Result<(), StoreError>;

    /// The newest entries of the journal, oldest first.
    fn journal(&mut self, most: usize) -> Result<Vec<JournalEntry>, StoreError>;
}

/// What every store checks before it writes.
pub(super) fn check(
    change: &Change,
    found: Option<Version>,
    epoch_last: u64,
) -> Result<(), StoreError> {
    if change.expect != found {
        return Err(StoreError::Conflict {
            function: change.record.function.clone(),
            expected: change.expect,
            found,
        });
    }
    let next = change.record.version();
    let is_grant =
        next.held && found.is_none_or(|version| !version.held || version.epoch != next.epoch);
    if is_grant && next.epoch <= epoch_last {
        return Err(StoreError::NotNew {
            epoch: next.epoch,
            last: epoch_last,
        });
    }
    Ok(())
}
