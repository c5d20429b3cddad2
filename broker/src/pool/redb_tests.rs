//! The store in a file: power cuts, processes killed at any moment, files of others, and whose the file is.

use super::contract::{Disk, end, function, grant};
use super::record::{Move, Version};
use super::redb::RedbStore;
use super::store::{JOURNAL_MAX, LeaseStore, Snapshot, StoreError};
use proptest::prelude::*;
use redb::{Database, StorageBackend};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// A folder of its own for each disk.
pub(super) struct RedbFolder(tempfile::TempDir);

impl Default for RedbFolder {
    fn default() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
}

impl Disk for RedbFolder {
    type Store = RedbStore;

    fn open(&self) -> RedbStore {
        RedbStore::open(self.0.path()).unwrap()
    }
}

impl RedbFolder {
    fn file(&self) -> PathBuf {
        self.0.path().join("leases.redb")
    }

    fn refusal(&self) -> StoreError {
        RedbStore::open(self.0.path()).err().expect("refused")
    }
}

#[derive(Clone, Debug)]
enum Write_ {
    Bytes(u64, Vec<u8>),
    Len(u64),
}

#[derive(Clone, Debug, Default)]
struct Image {
    /// What the kernel's cache shows.
    now: Vec<u8>,
    /// What a power cut leaves for sure.
    synced: Vec<u8>,
    /// What it may leave or not, each for itself.
    since: Vec<Write_>,
    writes: u64,
    /// After so many writes the power is cut: what is left of the ones since the last sync.
    cut: Option<(u64, u64)>,
    left: Option<Vec<u8>>,
}

fn apply(bytes: &mut Vec<u8>, write: &Write_) {
    match write {
        Write_::Len(len) => bytes.resize(*len as usize, 0),
        Write_::Bytes(offset, data) => {
            let end = *offset as usize + data.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[*offset as usize..end].copy_from_slice(data);
        }
    }
}

impl Image {
    fn write(&mut self, write: Write_) {
        apply(&mut self.now, &write);
        self.since.push(write);
        self.writes += 1;
        if let Some((at, lost)) = self.cut
            && at == self.writes
        {
            self.left = Some(self.after_a_cut(lost));
        }
    }

    /// The bits of `lost` say which of the writes since the last sync are lost.
    fn after_a_cut(&self, lost: u64) -> Vec<u8> {
        let mut bytes = self.synced.clone();
        let kept = self.since.iter().zip(0..);
        for (write, _) in kept.filter(|(_, at)| lost >> (at % 64) & 1 == 0) {
            apply(&mut bytes, write);
        }
        bytes
    }
}

/// A disk whose power can be cut. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(super) struct CutDisk(Arc<Mutex<Image>>);

impl CutDisk {
    fn image(&self) -> MutexGuard<'_, Image> {
        self.0.lock().unwrap()
    }

    fn of(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Image {
            synced: bytes.clone(),
            now: bytes,
            ..Image::default()
        })))
    }

    fn try_open(&self) -> Result<RedbStore, StoreError> {
        let disk = self.clone();
        let open = move || {
            let database = Database::builder().create_with_backend(disk.clone());
            database.map_err(|error| StoreError::failed("opened", error))
        };
        RedbStore::with("disk".into(), Box::new(open))
    }
}

impl StorageBackend for CutDisk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.image().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let start = offset as usize;
        out.copy_from_slice(&self.image().now[start..start + out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.image().write(Write_::Len(len));
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let image = &mut *self.image();
        for write in image.since.drain(..) {
            apply(&mut image.synced, &write);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.image().write(Write_::Bytes(offset, data.to_vec()));
        Ok(())
    }
}

impl Disk for CutDisk {
    type Store = RedbStore;

    fn open(&self) -> RedbStore {
        self.try_open().unwrap()
    }
}

#[test]
fn grant_that_was_answered_outlives_a_power_cut() {
    let disk = CutDisk::default();
    let mut store = disk.open();
    for epoch in 1..=5 {
        let name = format!("f{epoch}");
        store.commit(&grant(&name, epoch, None)).unwrap();
        // Everything that was not synced is lost.
        let left = CutDisk::of(disk.image().after_a_cut(u64::MAX));
        let snapshot = left.open().load().unwrap();
        assert_eq!(snapshot.epoch_last, epoch, "the answered grant is lost");
        assert_eq!(snapshot.records.len() as u64, epoch);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn power_cut_at_any_write_leaves_all_of_a_change_or_nothing(
        at in 1u64..120, lost in any::<u64>(),
    ) {
        let disk = CutDisk::default();
        let mut store = disk.open();
        let opened = disk.image().writes;
        disk.image().cut = Some((opened + at, lost));
        let seen = |store: &mut RedbStore| {
            (store.load().unwrap(), store.journal(99).unwrap())
        };
        let mut states = vec![(opened, seen(&mut store))];
        for epoch in 1..=8u64 {
            let name = format!("f{}", epoch % 2);
            let stored = store.read(&function(&name)).unwrap().map(|record| record.version());
            let change = match stored {
                Some(version) if version.held => end(&name, version.epoch, stored),
                _ => grant(&name, epoch, stored),
            };
            store.commit(&change).unwrap();
            let writes = disk.image().writes;
            states.push((writes, seen(&mut store)));
        }
        let Some(left) = disk.image().left.clone() else {
            return Ok(());
        };
        let found = seen(&mut CutDisk::of(left).open());
        let answered = states.iter().rposition(|(writes, _)| *writes < opened + at);
        let answered = answered.unwrap_or(0);
        let may_be = &states[answered..states.len().min(answered + 2)];
        prop_assert!(may_be.iter().any(|(_, state)| *state == found), "{found:?}");
    }
}

const KILL_FOLDER: &str = "SUBLET_TEST_KILL_FOLDER";

/// The process that is killed: grants and ends for ever, and says before and after each.
fn grant_until_killed(folder: &Path) {
    let mut store = RedbStore::open(folder).unwrap();
    let mut epoch = store.load().unwrap().epoch_last;
    let mut out = std::io::stdout();
    loop {
        epoch += 1;
        let name = format!("f{}", epoch % 3);
        let version = |store: &mut RedbStore| {
            let found = store.read(&function(&name)).unwrap();
            found.map(|record| record.version())
        };
        let stored = version(&mut store);
        if let Some(held) = stored.filter(|version| version.held) {
            store.commit(&end(&name, held.epoch, stored)).unwrap();
        }
        writeln!(out, "\ntry {epoch}").unwrap();
        let stored = version(&mut store);
        store.commit(&grant(&name, epoch, stored)).unwrap();
        writeln!(out, "\nok {epoch}").unwrap();
    }
}

/// Runs the child until it has answered so many grants, kills it a moment later, and returns the
/// last epochs that it tried and answered.
fn killed_after(folder: &Path, answers: u32, moment: Duration) -> (u64, u64) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("pool::redb_tests::{KILL_TEST}")])
        .arg("--nocapture")
        .env(KILL_FOLDER, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut tried, mut answered) = (0, 0);
    let mut take = |line: String| {
        let number = |word: &str| line.strip_prefix(word)?.parse::<u64>().ok();
        tried = number("try ").unwrap_or(tried);
        let ok = number("ok ");
        answered = ok.unwrap_or(answered);
        ok.is_some()
    };
    let mut seen = 0;
    while seen < answers {
        let line = lines.next().expect("the child ended by itself").unwrap();
        seen += u32::from(take(line));
    }
    std::thread::sleep(moment);
    child.kill().unwrap();
    child.wait().unwrap();
    for line in lines.map_while(Result::ok) {
        take(line);
    }
    (tried, answered)
}

const KILL_TEST: &str =
    "process_killed_at_any_moment_has_every_answered_grant_written_and_no_half_of_another";

#[test]
fn process_killed_at_any_moment_has_every_answered_grant_written_and_no_half_of_another() {
    if let Some(folder) = std::env::var_os(KILL_FOLDER) {
        return grant_until_killed(Path::new(&folder));
    }
    let disk = RedbFolder::default();
    for round in 0..12u32 {
        // Spread over the milliseconds that one grant takes; where it hits is for the machine.
        let moment = Duration::from_micros(u64::from(round) * 397);
        let (tried, answered) = killed_after(disk.0.path(), 1 + round % 4, moment);
        let mut store = disk.open();
        let snapshot = store.load().unwrap();
        let last = snapshot.epoch_last;
        assert!(
            (answered..=tried).contains(&last),
            "epoch {last} after {answered} was answered and {tried} tried"
        );
        whole(&snapshot, &mut store);
    }
}

/// Records and journal tell the same story: the newest entry of each function is its record.
fn whole(snapshot: &Snapshot, store: &mut RedbStore) {
    let journal = store.journal(usize::MAX).unwrap();
    let newest: BTreeMap<_, _> = journal
        .iter()
        .map(|entry| (&entry.function, entry))
        .collect();
    assert_eq!(newest.len(), snapshot.records.len());
    for record in &snapshot.records {
        let entry = newest[&record.function];
        assert_eq!(entry.epoch, record.epoch);
        let held = matches!(entry.moved, Move::Granted(_));
        assert_eq!(held, record.holder.is_some(), "{entry:?} {record:?}");
    }
    let granted = |entry: &&super::JournalEntry| matches!(entry.moved, Move::Granted(_));
    let epochs: Vec<u64> = journal
        .iter()
        .filter(granted)
        .map(|entry| entry.epoch)
        .collect();
    assert_eq!(epochs, (1..=snapshot.epoch_last).collect::<Vec<_>>());
}

#[test]
fn journal_in_a_file_keeps_its_maximum_and_drops_the_oldest() {
    const META: redb::TableDefinition<&str, u64> = redb::TableDefinition::new("sublet-meta");
    const JOURNAL: redb::TableDefinition<u64, &[u8]> = redb::TableDefinition::new("sublet-journal");
    let disk = RedbFolder::default();
    let mut store = disk.open();
    store.commit(&grant("a", 1, None)).unwrap();
    let oldest = serde_json::to_vec(&store.journal(1).unwrap()[0]).unwrap();
    drop(store);
    let full = JOURNAL_MAX as u64 - 1;
    let database = Database::create(disk.file()).unwrap();
    let txn = database.begin_write().unwrap();
    for at in 1..full {
        let mut journal = txn.open_table(JOURNAL).unwrap();
        journal.insert(at, oldest.as_slice()).unwrap();
    }
    let mut meta = txn.open_table(META).unwrap();
    meta.insert("journal_next", full).unwrap();
    drop(meta);
    txn.commit().unwrap();
    drop(database);
    let mut store = disk.open();
    let moved = |epoch| end("a", epoch, Some(Version { epoch, held: true }));
    store.commit(&moved(1)).unwrap();
    assert_eq!(store.journal(usize::MAX).unwrap().len(), JOURNAL_MAX);
    let expect = Some(Version {
        epoch: 1,
        held: false,
    });
    store.commit(&grant("a", 2, expect)).unwrap();
    store.commit(&moved(2)).unwrap();
    let journal = store.journal(usize::MAX).unwrap();
    assert_eq!(journal.len(), JOURNAL_MAX);
    let ended = |entry: &&super::JournalEntry| matches!(entry.moved, Move::Ended(_));
    assert_eq!(
        journal.iter().filter(ended).count(),
        2,
        "the newest are there"
    );
}

#[test]
fn file_and_folder_are_their_owners_alone() {
    let top = tempfile::tempdir().unwrap();
    let folder = top.path().join("var/lib/sublet");
    drop(RedbStore::open(&folder).unwrap());
    let file = folder.join("leases.redb");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    drop(RedbStore::open(&folder).unwrap());
    assert_eq!(mode(&file), 0o600, "tightened");
}

#[test]
fn second_process_is_refused_while_the_first_has_the_file() {
    let disk = RedbFolder::default();
    let _store = disk.open();
    let refusal = disk.refusal();
    assert!(matches!(refusal, StoreError::InUse(_)), "{refusal}");
    assert!(refusal.to_string().contains("stop the other daemon"));
}

#[test]
fn foreign_file_is_refused_with_the_mend_and_left_as_it_is() {
    let foreign: [&[u8]; 3] = [b"#!/bin/sh\n", &[0; 4096], &[0xff; 70_000]];
    for bytes in foreign {
        let disk = RedbFolder::default();
        fs::write(disk.file(), bytes).unwrap();
        let refusal = disk.refusal();
        assert!(matches!(refusal, StoreError::Unsound { .. }), "{refusal}");
        assert!(refusal.to_string().contains("move it away"), "{refusal}");
        assert_eq!(fs::read(disk.file()).unwrap(), bytes, "changed");
    }
}

#[test]
fn database_of_another_program_or_schema_is_refused() {
    const META: redb::TableDefinition<&str, u64> = redb::TableDefinition::new("sublet-meta");
    const OTHER: redb::TableDefinition<u64, u64> = redb::TableDefinition::new("other");
    let disk = RedbFolder::default();
    let database = Database::create(disk.file()).unwrap();
    let txn = database.begin_write().unwrap();
    txn.open_table(OTHER).unwrap().insert(1, 1).unwrap();
    txn.commit().unwrap();
    drop(database);
    let refusal = disk.refusal().to_string();
    assert!(refusal.contains("another program's"), "{refusal}");

    let disk = RedbFolder::default();
    drop(disk.open());
    let database = Database::create(disk.file()).unwrap();
    let txn = database.begin_write().unwrap();
    txn.open_table(META).unwrap().insert("schema", 3).unwrap();
    txn.commit().unwrap();
    drop(database);
    let refusal = disk.refusal();
    assert!(
        matches!(
            refusal,
            StoreError::Schema {
                found: 3,
                known: 2,
                ..
            }
        ),
        "{refusal}"
    );
}

#[test]
fn store_of_the_schema_before_is_read_and_taken_over() {
    const META: redb::TableDefinition<&str, u64> = redb::TableDefinition::new("sublet-meta");
    let disk = RedbFolder::default();
    let mut store = disk.open();
    store.commit(&grant("f1", 1, None)).unwrap();
    let truth = store.load().unwrap();
    drop(store);
    let database = Database::create(disk.file()).unwrap();
    let txn = database.begin_write().unwrap();
    txn.open_table(META).unwrap().insert("schema", 1).unwrap();
    txn.commit().unwrap();
    drop(database);
    let mut store = disk.open();
    assert_eq!(store.load().unwrap(), truth);
    drop(store);
    let database = Database::create(disk.file()).unwrap();
    let txn = redb::ReadableDatabase::begin_read(&database).unwrap();
    let meta = txn.open_table(META).unwrap();
    assert_eq!(meta.get("schema").unwrap().unwrap().value(), 2);
}

#[test]
fn damaged_file_is_refused_in_words_or_tells_the_truth() {
    let disk = RedbFolder::default();
    let mut store = disk.open();
    for epoch in 1..=20 {
        let name = format!("f{epoch}");
        store.commit(&grant(&name, epoch, None)).unwrap();
    }
    let truth = store.load().unwrap();
    drop(store);
    let good = fs::read(disk.file()).unwrap();
    let mut refused = 0;
    for at in (0..good.len()).step_by(good.len() / 31) {
        let mut bad = good.clone();
        let end = bad.len().min(at + 512);
        bad[at..end].iter_mut().for_each(|byte| *byte ^= 0x5a);
        fs::write(disk.file(), &bad).unwrap();
        match RedbStore::open(disk.0.path()) {
            Ok(mut store) => assert_eq!(store.load().unwrap(), truth, "damaged at {at}"),
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("move it away"), "{at}: {error}");
            }
        }
    }
    assert!(refused > 0);
}
