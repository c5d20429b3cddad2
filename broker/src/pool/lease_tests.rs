//! Lease machine tests: nobody has what another has, whatever the store does and whoever dies.

use super::contract::function;
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use vfio_shim::path::grant::{AskId, Grant};
use vfio_shim::path::message::Secret;
use vfio_shim::path::{LeaseId, Refusal, RefusalCode};

const TTL_MS: u64 = 60_000;

fn returned() -> End {
    End {
        cause: Cause::Returned,
        scrubbed: Scrubbed::Reset,
    }
}

/// A pool over a disk that fails on command.
struct Rig {
    disk: MemoryStore,
    switch: FailSwitch,
    pool: Pool<FailingStore<MemoryStore>>,
    now: Now,
    ask_last: u64,
}

impl Rig {
    fn new() -> Self {
        Self::on(MemoryStore::default())
    }

    /// A daemon that starts on this disk.
    fn on(disk: MemoryStore) -> Self {
        let switch = FailSwitch::default();
        let store = FailingStore::new(disk.clone(), switch.clone());
        Self {
            disk,
            switch,
            pool: Pool::open(store, TTL_MS).unwrap(),
            now: Now {
                ms: 1_000,
                unix_ms: 1_700_000_000_000,
            },
            ask_last: 0,
        }
    }

    fn handle(&mut self, event: Event) -> Vec<(String, ToPort)> {
        let now = self.now;
        self.pool.handle(event, || now)
    }

    fn after(&mut self, ms: u64) -> Vec<(String, ToPort)> {
        self.now.ms += ms;
        self.now.unix_ms += ms;
        self.handle(Event::Tick)
    }

    fn borrow(&mut self, port: &str, name: &str) -> Result<Grant, Refusal> {
        self.ask_last += 1;
        let ask = AskId(self.ask_last);
        let told = self.handle(Event::Ask(Ask {
            port: port.into(),
            ask,
            function: function(name),
            borrower: Some(8),
            secret: Secret([self.ask_last as u8; 16]),
        }));
        match told.into_iter().next() {
            Some((to, ToPort::Granted(answered, result))) => {
                assert_eq!((to.as_str(), answered), (port, ask));
                result
            }
            other => panic!("not answered: {other:?}"),
        }
    }

    fn granted(&mut self, port: &str, name: &str) -> u64 {
        self.borrow(port, name).unwrap().lease.0
    }

    fn end(&mut self, port: &str, name: &str, epoch: u64, end: End) {
        let told = self.handle(Event::Ended {
            port: port.into(),
            function: function(name),
            epoch,
            end,
        });
        assert!(told.is_empty(), "{told:?}");
    }

    fn opened(&mut self, port: &str, name: &str, epoch: u64) {
        self.handle(Event::Opened {
            port: port.into(),
            function: function(name),
            epoch,
        });
    }

    fn connected(&mut self, port: &str, holds: Vec<Held>) {
        let port = port.into();
        self.handle(Event::Connected { port, holds });
    }

    fn lease(&self, name: &str) -> LeaseStatus {
        let status = self.pool.status(self.now);
        let found = status
            .into_iter()
            .find(|one| one.function == function(name));
        found.unwrap()
    }

    fn moves(&mut self) -> Vec<Move> {
        let journal = self.disk.journal(99).unwrap();
        journal.into_iter().map(|entry| entry.moved).collect()
    }

    fn last_cause(&mut self) -> Cause {
        match self.moves().pop() {
            Some(Move::Ended(end)) => end.cause,
            other => panic!("no end: {other:?}"),
        }
    }
}

#[test]
fn lease_lives_from_when_it_is_written_however_slow_the_store_was() {
    let mut rig = Rig::new();
    let started = rig.now;
    let read = std::cell::Cell::new(0);
    // Each look at the clock is a second after the last one.
    let now = || {
        read.set(read.get() + 1);
        let ms = 1_000 * read.get();
        Now { ms, ..started }
    };
    let ask = Ask {
        port: "ntb0".into(),
        ask: AskId(1),
        function: function("a"),
        borrower: Some(8),
        secret: Secret([1; 16]),
    };
    rig.pool.handle(Event::Ask(ask), now);
    assert_eq!(rig.pool.next_ms(), Some(2_000 + TTL_MS));
}

#[test]
fn lease_of_a_port_that_is_away_is_nobody_elses_and_is_what_the_port_says_when_it_is_back() {
    let mut rig = Rig::new();
    let [open, held, over] = ["a", "b", "c"].map(|name| rig.granted("ntb0", name));
    rig.opened("ntb0", "a", open);
    let port = "ntb0".to_owned();
    rig.handle(Event::Away { port });
    for name in ["a", "b", "c"] {
        assert_eq!(rig.lease(name).state, LeaseState::Restored);
        let refusal = rig.borrow("ntb1", name).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::Busy);
    }
    // Its clock stands while nobody knows.
    assert!(rig.after(2 * TTL_MS).is_empty());
    let hold = |name, epoch, path_open| Held {
        function: function(name),
        epoch,
        path_open,
    };
    rig.connected("ntb0", vec![hold("a", open, true), hold("b", held, true)]);
    let states = ["a", "b", "c"].map(|name| rig.lease(name).state);
    assert_eq!(
        states,
        [LeaseState::Open, LeaseState::Open, LeaseState::Free],
        "b was opened meanwhile, c was ended"
    );
    let _ = over;
    // A second connection, whose end nobody saw: what it does not hold any more is over.
    rig.connected("ntb0", vec![hold("a", open, true)]);
    assert_eq!(rig.lease("b").state, LeaseState::Free);
    assert_eq!(rig.lease("a").state, LeaseState::Open);
}

#[test]
fn port_that_claims_what_is_not_its_own_or_cannot_be_gets_nothing() {
    let mut rig = Rig::new();
    let epoch = rig.granted("ntb0", "a");
    let port = "ntb0".to_owned();
    rig.handle(Event::Away { port });
    let hold = |name, epoch| Held {
        function: function(name),
        epoch,
        path_open: true,
    };
    rig.connected("ntb1", vec![hold("a", epoch), hold("z", u64::MAX)]);
    assert_eq!(rig.lease("a").state, LeaseState::Restored);
    assert!(rig.pool.status(rig.now).len() == 1, "z is not believed");
    rig.connected("ntb0", vec![hold("a", epoch), hold("b", EPOCH_MAX)]);
    assert_eq!(rig.lease("a").state, LeaseState::Open);
    let next = rig.granted("ntb0", "c");
    assert_eq!(next, EPOCH_MAX + 1);
    // Nor is what another port has said the end of what this one has.
    rig.connected("ntb1", vec![hold("y", EPOCH_MAX)]);
    let port = "ntb0".to_owned();
    rig.handle(Event::Away { port });
    rig.connected("ntb0", vec![hold("a", epoch), hold("c", next)]);
    assert_eq!(rig.lease("c").state, LeaseState::Open);
}

#[test]
fn function_is_lent_to_one_port_at_a_time() {
    let mut rig = Rig::new();
    let epoch = rig.granted("ntb0", "a");
    for port in ["ntb0", "ntb1"] {
        let refusal = rig.borrow(port, "a").unwrap_err();
        assert_eq!(refusal.code, RefusalCode::Taken);
    }
    rig.end("ntb0", "a", epoch, returned());
    let next = rig.granted("ntb1", "a");
    assert!(next > epoch);
}

#[test]
fn end_of_an_older_lease_or_of_another_port_leaves_the_next_one_in_force() {
    let mut rig = Rig::new();
    let old = rig.granted("ntb0", "a");
    rig.end("ntb0", "a", old, returned());
    let new = rig.granted("ntb0", "a");
    rig.end("ntb0", "a", old, returned());
    rig.end("ntb1", "a", new, returned());
    rig.opened("ntb0", "a", old);
    let lease = rig.lease("a");
    assert_eq!((lease.state, lease.epoch), (LeaseState::Held, new));
    assert_eq!(
        rig.borrow("ntb1", "a").unwrap_err().code,
        RefusalCode::Taken
    );
}

#[test]
fn every_move_is_in_the_journal_with_its_cause_and_the_scrubbing() {
    let mut rig = Rig::new();
    let results = [
        Scrubbed::Reset,
        Scrubbed::Waited,
        Scrubbed::Assumed,
        Scrubbed::Failed("FLR failed".into()),
    ];
    for scrubbed in results.clone() {
        let epoch = rig.granted("ntb0", "a");
        rig.opened("ntb0", "a", epoch);
        let cause = Cause::Revoked("wanted".into());
        rig.end("ntb0", "a", epoch, End { cause, scrubbed });
    }
    let moves = rig.moves();
    assert_eq!(moves.len(), 12);
    for (three, expected) in moves.chunks(3).zip(results) {
        assert!(matches!(three[0], Move::Granted(_)));
        assert_eq!(three[1], Move::Opened);
        let Move::Ended(end) = &three[2] else {
            panic!("{three:?}")
        };
        assert_eq!(end.scrubbed, expected);
    }
}

#[test]
fn store_that_fails_at_a_grant_refuses_it_in_words_and_the_function_stays_available() {
    for when in [When::Before, When::After] {
        let mut rig = Rig::new();
        rig.switch.fail_write(0, when);
        let refusal = rig.borrow("ntb0", "a").unwrap_err();
        assert!(refusal.text.contains("nothing was lent"), "{refusal}");
        assert!(refusal.text.contains("No space left"), "{refusal}");
        assert_eq!(rig.switch.failures(), 1);
        let epoch = rig.granted("ntb1", "a");
        rig.end("ntb1", "a", epoch, returned());
        assert_eq!(rig.lease("a").state, LeaseState::Free);
        let not_granted = rig
            .moves()
            .iter()
            .any(|moved| matches!(moved, Move::Ended(end) if end.cause == Cause::NotGranted));
        assert_eq!(not_granted, when == When::After, "told as it was");
    }
}

#[test]
fn store_that_cannot_be_read_either_loses_the_function_only_as_long_as_that_lasts() {
    let mut rig = Rig::new();
    rig.switch.fail_write(0, When::After);
    rig.switch.fail_reads(true);
    rig.borrow("ntb0", "a").unwrap_err();
    assert_eq!(rig.lease("a").state, LeaseState::Unsure);
    let refusal = rig.borrow("ntb0", "a").unwrap_err();
    assert!(refusal.text.contains("mend the lender's disk"), "{refusal}");
    rig.after(RETRY_MS);
    assert_eq!(rig.lease("a").state, LeaseState::Unsure);
    rig.switch.fail_reads(false);
    assert!(rig.after(RETRY_MS - 1).is_empty());
    assert_eq!(rig.lease("a").state, LeaseState::Unsure, "not yet");
    rig.after(1);
    assert_eq!(rig.lease("a").state, LeaseState::Free);
    rig.granted("ntb0", "a");

    // Or somebody wants it before that.
    let mut rig = Rig::new();
    rig.switch.fail_write(0, When::After);
    rig.switch.fail_reads(true);
    rig.borrow("ntb0", "a").unwrap_err();
    rig.switch.fail_reads(false);
    rig.granted("ntb0", "a");
}

#[test]
fn store_that_fails_at_an_end_keeps_no_function() {
    for when in [When::Before, When::After] {
        let mut rig = Rig::new();
        let epoch = rig.granted("ntb0", "a");
        rig.switch.fail_write(0, when);
        rig.end("ntb0", "a", epoch, returned());
        assert_eq!(rig.lease("a").state, LeaseState::Free);
        assert_eq!(rig.last_cause(), Cause::Returned);
        assert_eq!(rig.moves().len(), 2, "written once");
        assert!(rig.granted("ntb0", "a") > epoch);
    }
}

#[test]
fn lease_expires_only_without_a_path_and_is_told_again_until_it_ends() {
    let mut rig = Rig::new();
    let epoch = rig.granted("ntb0", "a");
    let expired = vec![("ntb0".to_owned(), ToPort::Expired(LeaseId(epoch)))];
    assert_eq!(rig.pool.next_ms(), Some(rig.now.ms + TTL_MS));
    assert!(rig.after(TTL_MS - 1).is_empty());
    assert_eq!(rig.lease("a").ttl_ms, Some(1));
    assert_eq!(rig.after(1), expired);
    assert!(rig.after(EXPIRE_AGAIN_MS - 1).is_empty());
    assert_eq!(rig.after(1), expired);
    // The port was opening a path at that moment: the lease lives on.
    rig.opened("ntb0", "a", epoch);
    assert_eq!(rig.pool.next_ms(), None);
    assert!(rig.after(100 * TTL_MS).is_empty());
    let lease = rig.lease("a");
    assert_eq!((lease.state, lease.ttl_ms), (LeaseState::Open, None));
    assert_eq!(lease.age_ms, Some(101 * TTL_MS + EXPIRE_AGAIN_MS));
}

#[test]
fn port_that_is_gone_gives_back_what_it_has_and_what_it_was_about_to_get() {
    let mut rig = Rig::new();
    let open = rig.granted("ntb0", "a");
    rig.opened("ntb0", "a", open);
    rig.granted("ntb0", "b");
    let other = rig.granted("ntb1", "c");
    let port = "ntb0".to_owned();
    assert!(rig.handle(Event::Gone { port }).is_empty());
    for name in ["a", "b"] {
        assert_eq!(rig.lease(name).state, LeaseState::Free);
        assert_eq!(rig.lease(name).last_end.unwrap().cause, Cause::Reclaimed);
    }
    assert_eq!(rig.lease("c").epoch, other);
    assert_eq!(rig.lease("c").state, LeaseState::Held);
}

#[test]
fn port_that_dies_while_its_grant_is_written_is_answered_nothing_and_keeps_nothing() {
    let mut machine = LeaseMachine::new(TTL_MS, Snapshot::default());
    let now = Now::default();
    let ask = Ask {
        port: "ntb0".into(),
        ask: AskId(1),
        function: function("a"),
        borrower: None,
        secret: Secret([1; 16]),
    };
    let actions = machine.handle(Event::Ask(ask), now);
    assert!(matches!(&actions[..], [Action::Write(_)]));
    let port = "ntb0".to_owned();
    assert!(machine.handle(Event::Gone { port }, now).is_empty());
    let actions = machine.handle(Event::Stored(function("a"), Ok(())), now);
    let [Action::Write(change)] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert!(change.record.holder.is_none());
    machine.handle(Event::Stored(function("a"), Ok(())), now);
    assert_eq!(machine.status(now)[0].state, LeaseState::Free);
}

#[test]
fn daemon_that_starts_again_reclaims_what_no_port_holds() {
    let mut rig = Rig::new();
    let kept = rig.granted("ntb0", "a");
    rig.opened("ntb0", "a", kept);
    rig.granted("ntb0", "b");
    rig.granted("gone", "c");
    let mut rig = Rig::on(rig.disk.clone());
    assert_eq!(rig.lease("a").state, LeaseState::Restored);
    let busy = rig.borrow("ntb0", "a").unwrap_err();
    assert_eq!(busy.code, RefusalCode::Busy);
    let held = Held {
        function: function("a"),
        epoch: kept,
        path_open: true,
    };
    rig.connected("ntb0", vec![held]);
    assert_eq!(rig.lease("a").state, LeaseState::Open);
    assert_eq!(rig.lease("b").state, LeaseState::Free);
    assert_eq!(rig.last_cause(), Cause::Reclaimed);
    assert_eq!(rig.lease("c").state, LeaseState::Restored);
    rig.handle(Event::Settle);
    assert_eq!(rig.lease("c").state, LeaseState::Free);
    assert_eq!(rig.lease("a").state, LeaseState::Open, "its port has it");
    let next = rig.granted("ntb0", "b");
    assert!(next > kept + 2, "epochs grow over a restart");
    rig.end("ntb0", "a", kept, returned());
    assert_eq!(rig.last_cause(), Cause::Returned);
}

#[test]
fn port_whose_lease_the_store_has_lost_keeps_it() {
    let mut rig = Rig::new();
    let held = Held {
        function: function("a"),
        epoch: 7,
        path_open: true,
    };
    rig.connected("ntb0", vec![held]);
    assert_eq!(
        rig.borrow("ntb1", "a").unwrap_err().code,
        RefusalCode::Taken
    );
    assert_eq!(rig.granted("ntb1", "b"), 8, "epochs go on from there");
    rig.end("ntb0", "a", 7, returned());
    assert_eq!(rig.granted("ntb1", "a"), 9);
}

#[test]
fn pool_knows_a_named_maximum_of_functions() {
    let mut rig = Rig::new();
    for at in 0..FUNCTIONS_MAX {
        rig.granted("ntb0", &format!("f{at}"));
    }
    let refusal = rig.borrow("ntb0", "one more").unwrap_err();
    assert_eq!(refusal.code, RefusalCode::Limit);
    let name = "x".repeat(KEY_BYTES_MAX);
    assert!(FunctionKey::try_from(name.clone()).is_ok());
    assert!(FunctionKey::try_from(name + "x").is_err());
}

#[test]
fn secret_is_in_no_record_journal_status_or_debug() {
    let mut rig = Rig::new();
    let secret = Secret([0xa5; 16]);
    let ask = Ask {
        port: "ntb0".into(),
        ask: AskId(1),
        function: function("a"),
        borrower: None,
        secret,
    };
    let mut said = format!("{ask:?}");
    let told = rig.handle(Event::Ask(ask));
    let ToPort::Granted(_, Ok(grant)) = &told[0].1 else {
        panic!("{told:?}")
    };
    assert_eq!(grant.secret, secret, "handed out");
    said += &format!("{told:?} {:?}", rig.pool.status(rig.now));
    said += &serde_json::to_string(&rig.disk.load().unwrap().records).unwrap();
    said += &serde_json::to_string(&rig.disk.journal(9).unwrap()).unwrap();
    for form in ["165, 165", "a5a5", "a5, a5", "A5A5", "0xa5"] {
        assert!(!said.contains(form), "{form} in {said}");
    }
}

fn failed() -> End {
    End {
        cause: Cause::Returned,
        scrubbed: Scrubbed::Failed("reset: I/O error".into()),
    }
}

/// Function `a` after a lease that could not be undone.
fn quarantined() -> (Rig, u64) {
    let mut rig = Rig::new();
    let epoch = rig.granted("ntb0", "a");
    rig.end("ntb0", "a", epoch, failed());
    (rig, epoch)
}

fn mend(rig: &mut Rig, epoch: u64) {
    rig.handle(Event::Mended {
        function: function("a"),
        epoch,
        scrubbed: Scrubbed::Reset,
    });
}

fn refused(rig: &mut Rig) -> Refusal {
    rig.borrow("ntb1", "a").unwrap_err()
}

#[test]
fn nobody_is_granted_a_function_in_quarantine_whichever_port_asks_and_whoever_starts_anew() {
    let (mut rig, epoch) = quarantined();
    for _ in 0..2 {
        let refusal = refused(&mut rig);
        assert_eq!(refusal.code, RefusalCode::Quarantine);
        assert_eq!(refusal.figure, epoch, "what a mend has to name");
        assert_eq!(refusal.text, "reset: I/O error");
        assert_eq!(rig.lease("a").quarantine(), Some("reset: I/O error"));
        rig.granted("ntb0", "b");
        let name = "b";
        let held = rig.lease(name).epoch;
        rig.end("ntb0", name, held, returned());
        rig = Rig::on(rig.disk.clone());
    }
}

#[test]
fn mend_of_that_lease_is_written_once_and_the_function_lent_again() {
    let (mut rig, epoch) = quarantined();
    mend(&mut rig, epoch + 1);
    assert_eq!(refused(&mut rig).code, RefusalCode::Quarantine);
    mend(&mut rig, epoch);
    mend(&mut rig, epoch);
    // Told as the end of that lease, once more: by a port to a daemon that comes anew.
    rig.end("ntb0", "a", epoch, returned());
    let mends = |rig: &mut Rig| {
        let moves = rig.moves().into_iter();
        moves.filter(|one| matches!(one, Move::Mended(_))).count()
    };
    assert_eq!(mends(&mut rig), 1);
    let mut rig = Rig::on(rig.disk.clone());
    assert_eq!(rig.lease("a").quarantine(), None);
    rig.granted("ntb1", "a");
}

#[test]
fn end_that_is_told_anew_mends_and_one_without_a_reset_does_not() {
    let (mut rig, epoch) = quarantined();
    let without = End {
        cause: Cause::Returned,
        scrubbed: Scrubbed::NoPath,
    };
    rig.end("ntb0", "a", epoch, without);
    rig.end("ntb0", "a", epoch, failed());
    assert_eq!(refused(&mut rig).code, RefusalCode::Quarantine);
    rig.end("ntb0", "a", epoch, returned());
    rig.granted("ntb1", "a");
}

#[test]
fn mend_that_is_not_written_leaves_the_function_in_quarantine() {
    let (mut rig, epoch) = quarantined();
    rig.switch.fail_write(0, When::Before);
    mend(&mut rig, epoch);
    assert_eq!(refused(&mut rig).code, RefusalCode::Quarantine);
    mend(&mut rig, epoch);
    rig.granted("ntb0", "a");
}

/// What the ports believe, and a store whose answers come when they like.
struct World {
    disk: MemoryStore,
    switch: FailSwitch,
    store: FailingStore<MemoryStore>,
    machine: LeaseMachine,
    todo: Vec<Action>,
    now: Now,
    ask_last: u64,
    /// Who was told that he has which function.
    told: BTreeMap<FunctionKey, (String, u64)>,
    epochs: BTreeMap<FunctionKey, u64>,
    open: BTreeMap<FunctionKey, u64>,
    asks: BTreeMap<AskId, FunctionKey>,
}

const NAMES: [&str; 2] = ["a", "b"];
const PORTS: [&str; 2] = ["ntb0", "ntb1"];

impl World {
    fn new() -> Self {
        let disk = MemoryStore::default();
        let switch = FailSwitch::default();
        Self {
            store: FailingStore::new(disk.clone(), switch.clone()),
            switch,
            machine: LeaseMachine::new(TTL_MS, disk.clone().load().unwrap()),
            disk,
            todo: Vec::new(),
            now: Now::default(),
            ask_last: 0,
            told: BTreeMap::new(),
            epochs: BTreeMap::new(),
            open: BTreeMap::new(),
            asks: BTreeMap::new(),
        }
    }

    fn handle(&mut self, event: Event) {
        for action in self.machine.handle(event, self.now) {
            match action {
                Action::Tell(port, message) => self.port_hears(port, message),
                work => self.todo.push(work),
            }
        }
    }

    fn port_hears(&mut self, port: String, message: ToPort) {
        match message {
            ToPort::Granted(ask, result) => {
                let function = self.asks.remove(&ask).expect("asked, and answered once");
                let Ok(grant) = result else { return };
                let epoch = grant.lease.0;
                let newest = self.epochs.insert(function.clone(), epoch);
                assert!(newest < Some(epoch), "epoch {epoch} after {newest:?}");
                let written = self.disk.clone().read(&function).unwrap().unwrap();
                assert_eq!(
                    written.version(),
                    Version { epoch, held: true },
                    "not written"
                );
                assert_eq!(written.holder.unwrap().port, port);
                let other = self.told.insert(function, (port, epoch));
                assert_eq!(other, None, "held twice");
            }
            ToPort::Expired(lease) => {
                let found = self.told.iter().find(|(_, held)| held.1 == lease.0);
                let Some(function) = found.map(|(function, _)| function.clone()) else {
                    return;
                };
                if !self.open.contains_key(&function) {
                    self.port_ends(&function);
                }
            }
        }
    }

    fn port_ends(&mut self, function: &FunctionKey) {
        let Some((port, epoch)) = self.told.remove(function) else {
            return;
        };
        self.open.remove(function);
        self.handle(Event::Ended {
            port,
            function: function.clone(),
            epoch,
            end: returned(),
        });
    }

    fn ask(&mut self, port: &str, name: &str) {
        self.ask_last += 1;
        let ask = AskId(self.ask_last);
        self.asks.insert(ask, function(name));
        self.handle(Event::Ask(Ask {
            port: port.into(),
            ask,
            function: function(name),
            borrower: None,
            secret: Secret([3; 16]),
        }));
    }

    /// One thing that the store was asked for is done, in whatever order.
    fn store_works(&mut self, pick: usize) {
        if self.todo.is_empty() {
            return;
        }
        let action = self.todo.remove(pick % self.todo.len());
        let event = match action {
            Action::Write(change) => {
                let result = self.store.commit(&change);
                Event::Stored(change.record.function, result)
            }
            Action::Read(function) => {
                let result = self.store.read(&function);
                Event::Read(function, result)
            }
            Action::Tell(..) => unreachable!("told at once"),
        };
        self.handle(event);
    }

    fn gone(&mut self, port: &str) {
        self.told.retain(|_, held| held.0 != port);
        let told = &self.told;
        self.open.retain(|function, _| told.contains_key(function));
        let port = port.to_owned();
        self.handle(Event::Gone { port });
    }

    /// The daemon dies with whatever it was doing, and the ports live on.
    fn daemon_dies(&mut self) {
        self.todo.clear();
        self.asks.clear();
        self.switch.fail_reads(false);
        self.machine = LeaseMachine::new(TTL_MS, self.disk.clone().load().unwrap());
        for port in PORTS {
            let held = self.told.iter().filter(|(_, held)| held.0 == port);
            let holds = held.map(|(function, (_, epoch))| Held {
                function: function.clone(),
                epoch: *epoch,
                path_open: self.open.contains_key(function),
            });
            let holds = holds.collect();
            let port = port.to_owned();
            self.handle(Event::Connected { port, holds });
        }
        self.handle(Event::Settle);
    }

    fn step(&mut self, what: u8, which: u8) {
        let (name, port) = (
            NAMES[usize::from(which & 1)],
            PORTS[usize::from(which >> 1 & 1)],
        );
        match what {
            0..=2 => self.ask(port, name),
            3 => self.port_ends(&function(name)),
            4 => {
                if let Some((port, epoch)) = self.told.get(&function(name)).cloned() {
                    self.open.insert(function(name), epoch);
                    self.handle(Event::Opened {
                        port,
                        function: function(name),
                        epoch,
                    });
                }
            }
            5 => self.gone(port),
            6 => self.daemon_dies(),
            7 => self.switch.fail_write(u64::from(which >> 2), When::Before),
            8 => self.switch.fail_write(u64::from(which >> 2), When::After),
            9 => self.switch.fail_reads(which & 1 == 1),
            10 => {
                self.now.ms += u64::from(which) * 5_000;
                self.handle(Event::Tick);
            }
            // What a port says of a lease that is not in force.
            11 => self.handle(Event::Ended {
                port: port.into(),
                function: function(name),
                epoch: self
                    .epochs
                    .get(&function(name))
                    .map_or(0, |epoch| epoch - 1),
                end: returned(),
            }),
            _ => self.store_works(usize::from(which)),
        }
    }

    fn heal(&mut self) {
        // A switch that nobody has set.
        self.switch.fail_reads(false);
        self.store = FailingStore::new(self.disk.clone(), FailSwitch::default());
        for _ in 0..50 {
            while !self.todo.is_empty() {
                self.store_works(0);
            }
            self.now.ms += RETRY_MS;
            self.handle(Event::Tick);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn no_lease_is_held_twice_epochs_grow_and_no_function_is_lost(
        steps in proptest::collection::vec((0u8..20, 0u8..8), 1..120),
    ) {
        let mut world = World::new();
        for (what, which) in steps {
            // An illegal move panics in the machine; the rest is asserted where ports hear of it.
            world.step(what, which);
        }
        world.heal();
        for name in NAMES {
            world.port_ends(&function(name));
        }
        world.heal();
        for name in NAMES {
            prop_assert_eq!(world.told.get(&function(name)), None);
            world.ask("ntb0", name);
            while !world.todo.is_empty() {
                world.store_works(0);
            }
            prop_assert!(world.told.contains_key(&function(name)), "{name} is lost");
        }
    }
}
