//! What every store of leases keeps: compare-and-set, epochs that grow, all or nothing, and still there when it is opened again.

use super::failing::{FailSwitch, FailingStore};
use super::memory::MemoryStore;
use super::record::*;
use super::redb_tests::{CutDisk, RedbFolder};
use super::store::*;

/// What a store lies on: every `open` finds what the one before has written.
pub(super) trait Disk: Default {
    type Store: LeaseStore;

    fn open(&self) -> Self::Store;
}

impl Disk for MemoryStore {
    type Store = Self;

    fn open(&self) -> Self {
        self.clone()
    }
}

#[derive(Default)]
struct FailingDisk(MemoryStore);

impl Disk for FailingDisk {
    type Store = FailingStore<MemoryStore>;

    fn open(&self) -> Self::Store {
        FailingStore::new(self.0.clone(), FailSwitch::default())
    }
}

pub(super) fn function(name: &str) -> FunctionKey {
    FunctionKey::try_from(name.to_owned()).unwrap()
}

pub(super) fn version(epoch: u64, held: bool) -> Option<Version> {
    Some(Version { epoch, held })
}

pub(super) fn grant(name: &str, epoch: u64, expect: Option<Version>) -> Change {
    let holder = Holder {
        port: "ntb0".into(),
        borrower: Some(8),
        since_unix_ms: 1_000 + epoch,
    };
    let record = LeaseRecord {
        function: function(name),
        epoch,
        holder: Some(holder.clone()),
        last_end: None,
    };
    change(record, expect, Move::Granted(holder))
}

pub(super) fn end(name: &str, epoch: u64, expect: Option<Version>) -> Change {
    let end = End {
        cause: Cause::Revoked("wanted back".into()),
        scrubbed: Scrubbed::Failed("reset: I/O error".into()),
    };
    let record = LeaseRecord {
        function: function(name),
        epoch,
        holder: None,
        last_end: Some(end.clone()),
    };
    change(record, expect, Move::Ended(end))
}

fn change(record: LeaseRecord, expect: Option<Version>, moved: Move) -> Change {
    let entry = JournalEntry {
        unix_ms: 1_000 + record.epoch,
        function: record.function.clone(),
        epoch: record.epoch,
        moved,
    };
    Change {
        expect,
        record,
        entry,
    }
}

fn change_is_there_when_the_store_is_opened_again<D: Disk>() {
    let disk = D::default();
    assert_eq!(disk.open().load().unwrap(), Snapshot::default());
    let (one, two) = (grant("a", 1, None), grant("b", 2, None));
    let three = end("a", 1, version(1, true));
    for change in [&one, &two, &three] {
        disk.open().commit(change).unwrap();
        let found = disk.open().read(&change.record.function).unwrap();
        assert_eq!(found.as_ref(), Some(&change.record));
    }
    let mut store = disk.open();
    let snapshot = store.load().unwrap();
    assert_eq!(snapshot.epoch_last, 2);
    assert_eq!(snapshot.records, [three.record.clone(), two.record.clone()]);
    let entries = [one.entry, two.entry, three.entry];
    assert_eq!(store.journal(9).unwrap(), entries);
    assert_eq!(store.journal(2).unwrap(), entries[1..]);
    assert_eq!(store.read(&function("c")).unwrap(), None);
}

/// Refused, and as if it had never been asked.
fn refused<S: LeaseStore>(store: &mut S, change: &Change) -> StoreError {
    let before = (store.load().unwrap(), store.journal(99).unwrap());
    let error = store.commit(change).unwrap_err();
    let after = (store.load().unwrap(), store.journal(99).unwrap());
    assert_eq!(before, after, "something of a refused change was written");
    error
}

fn function_is_granted_once_until_its_lease_has_ended<D: Disk>() {
    let mut store = D::default().open();
    store.commit(&grant("a", 1, None)).unwrap();
    for expect in [None, version(1, false), version(2, true)] {
        let error = refused(&mut store, &grant("a", 2, expect));
        assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    }
    let error = refused(&mut store, &end("a", 1, version(1, false)));
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    store.commit(&end("a", 1, version(1, true))).unwrap();
    let error = refused(&mut store, &end("a", 1, version(1, true)));
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    store.commit(&grant("a", 2, version(1, false))).unwrap();
}

fn epoch_that_was_given_out_is_not_granted_again<D: Disk>() {
    let mut store = D::default().open();
    store.commit(&grant("a", 5, None)).unwrap();
    for epoch in [0, 4, 5] {
        let error = refused(&mut store, &grant("b", epoch, None));
        assert!(
            matches!(error, StoreError::NotNew { last: 5, .. }),
            "{error}"
        );
    }
    store.commit(&end("a", 5, version(5, true))).unwrap();
    let error = refused(&mut store, &grant("a", 5, version(5, false)));
    assert!(matches!(error, StoreError::NotNew { .. }), "{error}");
    // The same lease once more is no grant: its path was opened.
    store.commit(&grant("a", 6, version(5, false))).unwrap();
    store.commit(&grant("a", 6, version(6, true))).unwrap();
    // A port's lease that the store had lost ends without having been granted here.
    store.commit(&end("c", 3, None)).unwrap();
    assert_eq!(store.load().unwrap().epoch_last, 6);
}

fn journal_keeps_its_maximum_and_drops_the_oldest<D: Disk>() {
    let disk = D::default();
    let mut store = disk.open();
    store.commit(&grant("a", 1, None)).unwrap();
    for _ in 1..JOURNAL_MAX {
        store.commit(&grant("a", 1, version(1, true))).unwrap();
    }
    assert_eq!(store.journal(usize::MAX).unwrap().len(), JOURNAL_MAX);
    store.commit(&end("a", 1, version(1, true))).unwrap();
    drop(store);
    let journal = disk.open().journal(usize::MAX).unwrap();
    assert_eq!(journal.len(), JOURNAL_MAX);
    assert!(matches!(journal[JOURNAL_MAX - 1].moved, Move::Ended(_)));
}

macro_rules! keeps_the_contract {
    ($name:ident, $disk:ty, $($test:ident),+) => {
        mod $name {
            use super::*;

            $(#[test]
            fn $test() {
                super::$test::<$disk>();
            })+
        }
    };
}

keeps_the_contract!(
    memory,
    MemoryStore,
    change_is_there_when_the_store_is_opened_again,
    function_is_granted_once_until_its_lease_has_ended,
    epoch_that_was_given_out_is_not_granted_again,
    journal_keeps_its_maximum_and_drops_the_oldest
);
keeps_the_contract!(
    failing,
    FailingDisk,
    change_is_there_when_the_store_is_opened_again,
    function_is_granted_once_until_its_lease_has_ended,
    epoch_that_was_given_out_is_not_granted_again,
    journal_keeps_its_maximum_and_drops_the_oldest
);
keeps_the_contract!(
    redb_file,
    RedbFolder,
    change_is_there_when_the_store_is_opened_again,
    function_is_granted_once_until_its_lease_has_ended,
    epoch_that_was_given_out_is_not_granted_again
);
// The journal's maximum has a test of its own there: thousands of syncs take too long.
keeps_the_contract!(
    redb_disk_in_memory,
    CutDisk,
    change_is_there_when_the_store_is_opened_again,
    function_is_granted_once_until_its_lease_has_ended,
    epoch_that_was_given_out_is_not_granted_again
);
