//! The store of leases in a file: redb, every change synced before it is answered.

use super::record::{FunctionKey, JournalEntry, LeaseRecord};
use super::store::{Change, JOURNAL_MAX, LeaseStore, Snapshot, StoreError, check};
use redb::backends::FileBackend;
use redb::{
    Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    TableDefinition,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// What this program reads and writes.
const SCHEMA: u64 = 2;
/// What it reads too: without what has become of functions in quarantine.
const SCHEMA_BEFORE: u64 = 1;
const META: TableDefinition<&str, u64> = TableDefinition::new("sublet-meta");
const RECORDS: TableDefinition<&str, &[u8]> = TableDefinition::new("sublet-leases");
const JOURNAL: TableDefinition<u64, &[u8]> = TableDefinition::new("sublet-journal");
const META_SCHEMA: &str = "schema";
const META_EPOCH: &str = "epoch_last";
const META_JOURNAL: &str = "journal_next";

type Opener = Box<dyn FnMut() -> Result<Database, StoreError> + Send>;

/// A store of leases in a file that one process at a time has open.
pub struct RedbStore {
    path: PathBuf,
    open: Opener,
    /// `None` after a failure: redb takes nothing more until the file is opened again.
    database: Option<Database>,
}

impl RedbStore {
    /// Makes the folder of a store, if it is not there.
    pub fn make_folder(folder: &Path) -> Result<(), StoreError> {
        if folder.is_dir() {
            return Ok(());
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|source| StoreError::File {
            path: folder.to_owned(),
            act: "made",
            source,
        })
    }

    /// Opens or makes the file `leases.redb` in a folder, which is made if it is not there.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("leases.redb");
        Self::make_folder(folder)?;
        let file = path.clone();
        Self::with(path, Box::new(move || open_file(&file)))
    }

    /// On whatever `open` opens; `path` is for the words of errors.
    pub(super) fn with(path: PathBuf, open: Opener) -> Result<Self, StoreError> {
        let mut store = Self {
            path,
            open,
            database: None,
        };
        store.prepare()?;
        Ok(store)
    }

    /// Opens the file. What is damaged is an error here whatever redb makes of it: where its own
    /// checks find what it never wrote, its debug builds panic.
    fn prepare(&mut self) -> Result<(), StoreError> {
        let (path, open) = (&self.path, &mut self.open);
        let prepared = catch_unwind(AssertUnwindSafe(|| prepare(path, open)));
        let damaged = |_| StoreError::Unsound {
            path: path.clone(),
            cause: "its pages are damaged".into(),
        };
        self.database = Some(prepared.map_err(damaged)??);
        Ok(())
    }

    /// Does one thing with the open database, which is opened again if it failed before.
    fn act<T>(
        &mut self,
        act: &'static str,
        run: impl FnOnce(&Database) -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        if self.database.is_none() {
            self.prepare()?;
        }
        let Some(database) = &self.database else {
            return Err(StoreError::failed(act, "it is not open"));
        };
        let result = run(database);
        result.map_err(|failure| {
            if matches!(failure, Failure::Redb(_)) {
                self.database = None;
            }
            from_failure(&self.path, act, failure)
        })
    }
}

/// Looks whose the file is, whether it is sound, and makes the tables of a new one.
fn prepare(path: &Path, open: &mut Opener) -> Result<Database, StoreError> {
    let mut database = open()?;
    let sound = database.check_integrity();
    if !sound.map_err(|error| from_database(path, error))? {
        return Err(unsound(path, "its pages' checksums are wrong"));
    }
    let made = make_tables(&database);
    made.map_err(|failure| from_failure(path, "read", failure))?;
    Ok(database)
}

fn make_tables(database: &Database) -> Result<(), Failure> {
    let txn = database.begin_write()?;
    {
        let is_new = txn.list_tables()?.count() == 0;
        let mut meta = txn.open_table(META)?;
        let found = meta.get(META_SCHEMA)?.map(|found| found.value());
        match found {
            Some(SCHEMA) => {}
            Some(SCHEMA_BEFORE) => {
                meta.insert(META_SCHEMA, SCHEMA)?;
            }
            Some(found) => return Err(Failure::Schema(found)),
            None if is_new => {
                meta.insert(META_SCHEMA, SCHEMA)?;
            }
            None => return Err(Failure::Value("it is another program's".into())),
        }
        txn.open_table(RECORDS)?;
        txn.open_table(JOURNAL)?;
    }
    txn.commit()?;
    Ok(())
}

fn unsound(path: &Path, cause: impl Into<String>) -> StoreError {
    StoreError::Unsound {
        path: path.to_owned(),
        cause: cause.into(),
    }
}

fn from_failure(path: &Path, act: &'static str, failure: Failure) -> StoreError {
    match failure {
        Failure::Refused(error) => *error,
        Failure::Value(cause) => unsound(path, cause),
        Failure::Schema(found) => StoreError::Schema {
            path: path.to_owned(),
            found,
            known: SCHEMA,
        },
        Failure::Redb(error) => from_redb(path, act, *error),
    }
}

/// Why one act did not go well.
enum Failure {
    Refused(Box<StoreError>),
    Value(String),
    Schema(u64),
    Redb(Box<redb::Error>),
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Redb(Box::new(error.into()))
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    let wrong =
        |error: serde_json::Error| Failure::Value(format!("an entry is malformed: {error}"));
    serde_json::from_slice(bytes).map_err(wrong)
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Failure> {
    let wrong =
        |error: serde_json::Error| Failure::Refused(Box::new(StoreError::failed("written", error)));
    serde_json::to_vec(value).map_err(wrong)
}

impl LeaseStore for RedbStore {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        self.act("read", |database| {
            let txn = database.begin_read()?;
            let mut snapshot = Snapshot::default();
            for row in txn.open_table(RECORDS)?.iter()? {
                snapshot.records.push(decode(row?.1.value())?);
            }
            let epoch_last = txn.open_table(META)?.get(META_EPOCH)?;
            snapshot.epoch_last = epoch_last.map_or(0, |epoch| epoch.value());
            Ok(snapshot)
        })
    }

    fn read(&mut self, function: &FunctionKey) -> Result<Option<LeaseRecord>, StoreError> {
        self.act("read", |database| {
            let txn = database.begin_read()?;
            let records = txn.open_table(RECORDS)?;
            let found = records.get(function.as_ref())?;
            found.map(|bytes| decode(bytes.value())).transpose()
        })
    }

    fn commit(&mut self, change: &Change) -> Result<(), StoreError> {
        self.act("written", |database| {
            let mut txn = database.begin_write()?;
            // A grant is answered when this returns: it has to be on the disk by then.
            txn.set_durability(Durability::Immediate)?;
            write(&txn, change)?;
            txn.commit()?;
            Ok(())
        })
    }

    fn journal(&mut self, most: usize) -> Result<Vec<JournalEntry>, StoreError> {
        self.act("read", |database| {
            let txn = database.begin_read()?;
            let journal = txn.open_table(JOURNAL)?;
            let mut entries = Vec::new();
            for row in journal.iter()?.rev().take(most) {
                entries.push(decode(row?.1.value())?);
            }
            entries.reverse();
            Ok(entries)
        })
    }
}

fn write(txn: &redb::WriteTransaction, change: &Change) -> Result<(), Failure> {
    let Change { record, entry, .. } = change;
    let mut meta = txn.open_table(META)?;
    let mut records = txn.open_table(RECORDS)?;
    let mut journal = txn.open_table(JOURNAL)?;
    let epoch_last = meta.get(META_EPOCH)?.map_or(0, |epoch| epoch.value());
    let found = records.get(record.function.as_ref())?;
    let found: Option<LeaseRecord> = found.map(|bytes| decode(bytes.value())).transpose()?;
    let found = found.as_ref().map(LeaseRecord::version);
    check(change, found, epoch_last).map_err(|error| Failure::Refused(Box::new(error)))?;
    records.insert(record.function.as_ref(), encode(record)?.as_slice())?;
    meta.insert(META_EPOCH, epoch_last.max(record.epoch))?;
    let next = meta.get(META_JOURNAL)?.map_or(0, |next| next.value());
    journal.insert(next, encode(entry)?.as_slice())?;
    meta.insert(META_JOURNAL, next + 1)?;
    while journal.len()? > JOURNAL_MAX as u64 {
        journal.pop_first()?;
    }
    Ok(())
}

/// The file is its owner's alone, whoever made it.
fn open_file(path: &Path) -> Result<Database, StoreError> {
    let failed = |act| {
        move |source: io::Error| StoreError::File {
            path: path.to_owned(),
            act,
            source,
        }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(path)
        .map_err(failed("opened"))?;
    file.set_permissions(Permissions::from_mode(0o600))
        .map_err(failed("kept from others"))?;
    // A new file's name has to outlive a power cut too.
    if let Some(folder) = path.parent() {
        let folder = File::open(folder).and_then(|folder| folder.sync_all());
        folder.map_err(failed("synced"))?;
    }
    let backend = FileBackend::new(file).map_err(|error| from_database(path, error))?;
    let database = Database::builder().create_with_backend(backend);
    database.map_err(|error| from_database(path, error))
}

fn from_database(path: &Path, error: DatabaseError) -> StoreError {
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            StoreError::InUse(path.to_owned())
        }
        DatabaseError::UpgradeRequired(version) => {
            unsound(path, format!("its file format is redb's version {version}"))
        }
        error => from_redb(path, "opened", error.into()),
    }
}

fn from_redb(path: &Path, act: &'static str, error: redb::Error) -> StoreError {
    let cause = match error {
        redb::Error::Corrupted(cause) => cause,
        redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => error.to_string(),
        error @ (redb::Error::TableTypeMismatch { .. }
        | redb::Error::TypeDefinitionChanged { .. }
        | redb::Error::TableIsMultimap(_)
        | redb::Error::TableDoesNotExist(_)) => error.to_string(),
        error => return StoreError::failed(act, error),
    };
    unsound(path, cause)
}
