//! The lease machine: states, legal moves, epochs, times to live and what the journal is told; pure.
//!
//! ```text
//!          ask              written             path opened
//! Free ----------> Granting ----------> Held ------------------> Open
//!  ^ ^                |   | port gone    | end, expiry             | end, port gone
//!  | |   write failed |   +------------> v                         v
//!  | |                |                Ending <--------------------+
//!  | |                v  write failed  |  ^
//!  | +---------- Unsure <--------------+  |   Restored (held in the store at the start):
//!  |  read: free    +-- read: held -------+   its port says Held, Open or nothing (Ending)
//!  +------------------ written ------- Ending
//! ```
//! A write that failed may have reached the disk or not: nobody is told that he has the function,
//! and it is nobody's until the store has been read again. A port hears of a lease only when it
//! is written; a lease's end it tells itself, after the path is undone. A function that is free and
//! in quarantine is not granted; that it was mended is written in `Ending` too.

mod quarantine;

use super::record::{
    Cause, End, FunctionKey, Holder, JournalEntry, LeaseRecord, Move, Scrubbed, Version,
};
use super::store::{Change, Snapshot, StoreError};
use std::collections::BTreeMap;
use vfio_shim::path::grant::{AskId, Grant, ToPort};
use vfio_shim::path::message::Secret;
use vfio_shim::path::{LeaseId, Refusal, RefusalCode};

/// Most functions that one host's pool knows.
pub const FUNCTIONS_MAX: usize = 4096;
/// How soon a store is read again after it failed, milliseconds.
pub const RETRY_MS: u64 = 1_000;
/// How soon a port is told again that a lease has expired, milliseconds.
pub const EXPIRE_AGAIN_MS: u64 = 1_000;
/// Greatest epoch that is believed of a port, unless the store has counted further itself: from
/// there on it does not overflow.
pub const EPOCH_MAX: u64 = 1 << 62;

/// What the clocks say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// A monotonic clock, milliseconds: for times to live.
    pub ms: u64,
    /// Unix time, milliseconds: for the journal and ages.
    pub unix_ms: u64,
}

/// Where the lease of a function stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// Nobody has it.
    Free,
    /// A lease is being written.
    Granting,
    /// Somebody has it, without a path: its time to live runs.
    Held,
    /// Its path is open.
    Open,
    /// Its end is being written.
    Ending,
    /// A write failed: what the store holds is not known.
    Unsure,
    /// Somebody had it when its port was last heard of: before this daemon's time, or before the
    /// way to the port was lost. The port has said nothing since.
    Restored,
}

impl LeaseState {
    /// Every move that there is.
    pub const fn may_become(self, next: Self) -> bool {
        use LeaseState::*;
        matches!(
            (self, next),
            (Free, Granting | Ending)
                | (Granting, Held | Ending | Unsure)
                | (Held, Open | Ending | Restored)
                | (Open, Ending | Restored)
                | (Ending, Free | Unsure)
                | (Unsure, Free | Ending)
                | (Restored, Held | Open | Ending)
        )
    }

    /// The word that logs and `status` use.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Granting => "granting",
            Self::Held => "held",
            Self::Open => "open",
            Self::Ending => "ending",
            Self::Unsure => "unsure",
            Self::Restored => "restored",
        }
    }
}

/// A port wants a lease for a borrower.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Which port of this host.
    pub port: String,
    /// Its name for the ask.
    pub ask: AskId,
    /// Which function.
    pub function: FunctionKey,
    /// The borrower's node.
    pub borrower: Option<u16>,
    /// Fresh randomness.
    pub secret: Secret,
}

/// A lease that a port says it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Of which function.
    pub function: FunctionKey,
    /// Which lease.
    pub epoch: u64,
    /// Whether its path is open.
    pub path_open: bool,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A port is there, and this is all that it holds.
    Connected {
        /// Which.
        port: String,
        /// Its leases.
        holds: Vec<Held>,
    },
    /// All ports that there are have connected.
    Settle,
    /// A lease is wanted.
    Ask(Ask),
    /// A path was opened.
    Opened {
        /// By which port.
        port: String,
        /// Of which function.
        function: FunctionKey,
        /// Of which lease.
        epoch: u64,
    },
    /// A lease is over, and its path undone.
    Ended {
        /// At which port.
        port: String,
        /// Of which function.
        function: FunctionKey,
        /// Which lease.
        epoch: u64,
        /// How.
        end: End,
    },
    /// A function in quarantine may be lent again.
    Mended {
        /// Which function.
        function: FunctionKey,
        /// Its last lease.
        epoch: u64,
        /// What has become of it.
        scrubbed: Scrubbed,
    },
    /// The way to a port is lost; it may go on, and will tell when it is back.
    Away {
        /// Which.
        port: String,
    },
    /// A port is no more, and with it all of its paths.
    Gone {
        /// Which.
        port: String,
    },
    /// What came of a write.
    Stored(FunctionKey, Result<(), StoreError>),
    /// What came of a read.
    Read(FunctionKey, Result<Option<LeaseRecord>, StoreError>),
    /// Time has passed.
    Tick,
}

/// What the driver has to do.
#[derive(Debug)]
pub enum Action {
    /// Write, then `Event::Stored`.
    Write(Box<Change>),
    /// Read, then `Event::Read`.
    Read(FunctionKey),
    /// Tell a port.
    Tell(String, ToPort),
}

/// What `status` tells of one function's lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseStatus {
    /// Which function.
    pub function: FunctionKey,
    /// Where it stands.
    pub state: LeaseState,
    /// The newest lease's.
    pub epoch: u64,
    /// Who has it.
    pub holder: Option<Holder>,
    /// For how long.
    pub age_ms: Option<u64>,
    /// What is left of its time to live, while that runs.
    pub ttl_ms: Option<u64>,
    /// How the last lease ended.
    pub last_end: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    Grant,
    Open,
    End,
}

#[derive(Debug)]
struct Entry {
    function: FunctionKey,
    state: LeaseState,
    /// The newest lease's.
    epoch: u64,
    /// What the store holds, as far as known: what the next write expects.
    stored: Option<Version>,
    holder: Option<Holder>,
    /// Whom to answer when the grant is written; nobody, when the port is gone.
    asked: Option<(AskId, Secret)>,
    /// The end that is to be written.
    end: Option<End>,
    last_end: Option<End>,
    /// What has become of a function in quarantine, until that can be written.
    mend: Option<Scrubbed>,
    writing: Option<Writing>,
    reading: bool,
    /// The ask that is served when this lease's end is written.
    waiting: Option<Ask>,
    /// Held: when it expires. Unsure: when the store is read again.
    due_ms: Option<u64>,
}

/// All leases of a host.
#[derive(Debug)]
pub struct LeaseMachine {
    ttl_ms: u64,
    epoch_last: u64,
    entries: BTreeMap<FunctionKey, Entry>,
}

impl LeaseMachine {
    /// With what the store knows, and the time to live of a lease without a path.
    pub fn new(ttl_ms: u64, snapshot: Snapshot) -> Self {
        let entry = |record: LeaseRecord| (record.function.clone(), Entry::restored(record));
        Self {
            ttl_ms,
            epoch_last: snapshot.epoch_last,
            entries: snapshot.records.into_iter().map(entry).collect(),
        }
    }

    /// One event.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Connected { port, holds } => self.connected(&port, holds, now, &mut out),
            Event::Settle => {
                for entry in self.entries.values_mut() {
                    if entry.state == LeaseState::Restored {
                        entry.finish(End::reclaimed(), now, &mut out);
                    }
                }
            }
            Event::Ask(ask) => self.ask(ask, now, &mut out),
            Event::Opened {
                port,
                function,
                epoch,
            } => {
                if let Some(entry) = self.in_force(&port, &function, epoch) {
                    entry.opened(now, &mut out);
                }
            }
            Event::Ended {
                port,
                function,
                epoch,
                end,
            } => match self.in_force(&port, &function, epoch) {
                Some(entry) => entry.finish(end, now, &mut out),
                None => self.mended(&function, epoch, end.scrubbed, now, &mut out),
            },
            Event::Mended {
                function,
                epoch,
                scrubbed,
            } => self.mended(&function, epoch, scrubbed, now, &mut out),
            Event::Away { port } => self.away(&port),
            Event::Gone { port } => self.gone(&port, now, &mut out),
            Event::Stored(function, result) => {
                if let Some(entry) = self.entries.get_mut(&function) {
                    entry.stored(result, self.ttl_ms, now, &mut out);
                }
                self.serve(&function, now, &mut out);
            }
            Event::Read(function, result) => {
                if let Some(entry) = self.entries.get_mut(&function) {
                    entry.read(result, now, &mut out);
                    self.epoch_last = self.epoch_last.max(entry.epoch);
                }
                self.serve(&function, now, &mut out);
            }
            Event::Tick => {
                for entry in self.entries.values_mut() {
                    entry.tick(now, &mut out);
                }
            }
        }
        out
    }

    /// When the next `Tick` is due.
    pub fn next_ms(&self) -> Option<u64> {
        self.entries.values().filter_map(|entry| entry.due_ms).min()
    }

    /// Every function that was ever lent.
    pub fn status(&self, now: Now) -> Vec<LeaseStatus> {
        self.entries
            .values()
            .map(|entry| entry.status(now))
            .collect()
    }

    /// The lease that a port's message is about: the one in force, and at this port.
    fn in_force(&mut self, port: &str, function: &FunctionKey, epoch: u64) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(function)?;
        let at_port = entry.holder.as_ref().is_some_and(|held| held.port == port);
        let in_force = matches!(entry.state, LeaseState::Held | LeaseState::Open);
        (in_force && at_port && entry.epoch == epoch).then_some(entry)
    }

    fn connected(&mut self, port: &str, holds: Vec<Held>, now: Now, out: &mut Vec<Action>) {
        // It may have come back before anybody saw it go.
        self.away(port);
        // A port that was taken over may have said the greatest: what is granted after that is
        // believed of the others.
        let most = EPOCH_MAX.max(self.epoch_last);
        for held in holds.into_iter().filter(|held| held.epoch <= most) {
            self.epoch_last = self.epoch_last.max(held.epoch);
            let known = self.entries.contains_key(&held.function);
            if !known && self.entries.len() >= FUNCTIONS_MAX {
                continue;
            }
            let entry = self.entries.entry(held.function.clone());
            let entry = entry.or_insert_with(|| Entry::lost_record(&held, port, now));
            let here = entry.holder.as_ref().is_some_and(|one| one.port == port);
            if here && entry.state == LeaseState::Restored && entry.epoch == held.epoch {
                entry.adopt(held.path_open, self.ttl_ms, now);
            }
        }
        for entry in self.entries.values_mut() {
            let here = entry.holder.as_ref().is_some_and(|held| held.port == port);
            if here && entry.state == LeaseState::Restored {
                entry.finish(End::reclaimed(), now, out);
            }
        }
    }

    fn ask(&mut self, ask: Ask, now: Now, out: &mut Vec<Action>) {
        let function = ask.function.clone();
        if !self.entries.contains_key(&function) {
            if self.entries.len() >= FUNCTIONS_MAX {
                let text = format!(
                    "the lender's store knows {FUNCTIONS_MAX} functions, its limit: stop its \
                     daemon, move the store away, and start it again"
                );
                let refusal = Refusal::new(RefusalCode::Limit, FUNCTIONS_MAX as u64, text);
                out.push(refuse(ask, refusal));
                return;
            }
            let entry = Entry::new(function.clone());
            self.entries.insert(function.clone(), entry);
        }
        let Some(entry) = self.entries.get_mut(&function) else {
            return;
        };
        if let Err(refusal) = entry.queue(&ask, out) {
            out.push(refuse(ask, refusal));
            return;
        }
        entry.waiting = Some(ask);
        self.serve(&function, now, out);
    }

    /// Grants what waits, if the function is free.
    fn serve(&mut self, function: &FunctionKey, now: Now, out: &mut Vec<Action>) {
        let Some(entry) = self.entries.get_mut(function) else {
            return;
        };
        if entry.state != LeaseState::Free || !entry.may_be_lent(now, out) {
            return;
        }
        if let Some(ask) = entry.waiting.take() {
            self.epoch_last += 1;
            entry.grant(ask, self.epoch_last, now, out);
        }
    }

    /// Whoever asked there has been refused by the port itself.
    fn away(&mut self, port: &str) {
        for entry in self.entries.values_mut() {
            entry.waiting.take_if(|ask| ask.port == port);
            if entry.holder.as_ref().is_none_or(|held| held.port != port) {
                continue;
            }
            match entry.state {
                LeaseState::Granting => entry.asked = None,
                LeaseState::Held | LeaseState::Open => {
                    entry.become_(LeaseState::Restored);
                    entry.due_ms = None;
                }
                _ => {}
            }
        }
    }

    fn gone(&mut self, port: &str, now: Now, out: &mut Vec<Action>) {
        for entry in self.entries.values_mut() {
            entry.waiting.take_if(|ask| ask.port == port);
            if entry.holder.as_ref().is_none_or(|held| held.port != port) {
                continue;
            }
            match entry.state {
                LeaseState::Granting => entry.asked = None,
                LeaseState::Held | LeaseState::Open | LeaseState::Restored => {
                    entry.finish(End::reclaimed(), now, out);
                }
                LeaseState::Free | LeaseState::Ending | LeaseState::Unsure => {}
            }
        }
    }
}

impl End {
    /// Nobody holds it any more.
    fn reclaimed() -> Self {
        let (cause, scrubbed) = (Cause::Reclaimed, Scrubbed::NoPath);
        Self { cause, scrubbed }
    }
}

fn refuse(ask: Ask, refusal: Refusal) -> Action {
    Action::Tell(ask.port, ToPort::Granted(ask.ask, Err(refusal)))
}

fn store_failed(function: &FunctionKey, error: &StoreError) -> Refusal {
    let text = format!(
        "the lender could not write a lease of {function} down, so nothing was lent: {}; mend the \
         lender's disk, and borrow again",
        vfio_shim::path::words(error)
    );
    Refusal::new(RefusalCode::Kernel, 0, text)
}

impl Entry {
    fn new(function: FunctionKey) -> Self {
        Self {
            function,
            state: LeaseState::Free,
            epoch: 0,
            stored: None,
            holder: None,
            asked: None,
            end: None,
            last_end: None,
            mend: None,
            writing: None,
            reading: false,
            waiting: None,
            due_ms: None,
        }
    }

    fn restored(record: LeaseRecord) -> Self {
        let stored = Some(record.version());
        Self {
            state: match record.holder {
                Some(_) => LeaseState::Restored,
                None => LeaseState::Free,
            },
            epoch: record.epoch,
            stored,
            holder: record.holder,
            last_end: record.last_end,
            ..Self::new(record.function)
        }
    }

    /// A lease that a port holds and the store does not know: the store was lost meanwhile.
    fn lost_record(held: &Held, port: &str, now: Now) -> Self {
        let holder = Holder {
            port: port.to_owned(),
            borrower: None,
            since_unix_ms: now.unix_ms,
        };
        Self {
            state: LeaseState::Restored,
            epoch: held.epoch,
            holder: Some(holder),
            ..Self::new(held.function.clone())
        }
    }

    fn become_(&mut self, next: LeaseState) {
        assert!(
            self.state.may_become(next),
            "{}: {:?} -> {next:?}",
            self.function,
            self.state
        );
        self.state = next;
    }

    fn adopt(&mut self, path_open: bool, ttl_ms: u64, now: Now) {
        if path_open {
            self.become_(LeaseState::Open);
        } else {
            self.become_(LeaseState::Held);
            self.due_ms = Some(now.ms.saturating_add(ttl_ms));
        }
    }

    /// Whether an ask may wait for this function; the words if not.
    fn queue(&mut self, ask: &Ask, out: &mut Vec<Action>) -> Result<(), Refusal> {
        let function = &ask.function;
        let busy = |text: String| Err(Refusal::new(RefusalCode::Busy, 0, text));
        match self.state {
            LeaseState::Free => Ok(()),
            LeaseState::Ending | LeaseState::Unsure if self.waiting.is_some() => busy(format!(
                "somebody waits for {function} already: try again in a moment"
            )),
            LeaseState::Ending => Ok(()),
            LeaseState::Unsure => {
                self.read_again(out);
                Ok(())
            }
            LeaseState::Restored => busy(format!(
                "the lender's daemon does not know yet who has {function}, as the port that lent \
                 it last has not said so: try again in a moment, and look at the lender's `sublet \
                 status`"
            )),
            LeaseState::Granting | LeaseState::Held | LeaseState::Open => {
                let text = format!("{function} is in use: return it where it is borrowed first");
                Err(Refusal::new(RefusalCode::Taken, 0, text))
            }
        }
    }

    fn grant(&mut self, ask: Ask, epoch: u64, now: Now, out: &mut Vec<Action>) {
        self.become_(LeaseState::Granting);
        self.epoch = epoch;
        self.asked = Some((ask.ask, ask.secret));
        let holder = Holder {
            port: ask.port,
            borrower: ask.borrower,
            since_unix_ms: now.unix_ms,
        };
        self.holder = Some(holder.clone());
        self.write(Writing::Grant, Move::Granted(holder), now, out);
    }

    fn opened(&mut self, now: Now, out: &mut Vec<Action>) {
        if self.state == LeaseState::Held {
            self.become_(LeaseState::Open);
            self.due_ms = None;
            self.write(Writing::Open, Move::Opened, now, out);
        }
    }

    /// The lease is over; its end is written as soon as no other write is under way.
    fn finish(&mut self, end: End, now: Now, out: &mut Vec<Action>) {
        self.become_(LeaseState::Ending);
        self.due_ms = None;
        self.end = Some(end);
        if self.writing.is_none() {
            self.write_end(now, out);
        }
    }

    fn write_end(&mut self, now: Now, out: &mut Vec<Action>) {
        let end = self.end.get_or_insert_with(End::reclaimed).clone();
        self.holder = None;
        self.last_end = Some(end.clone());
        self.write(Writing::End, Move::Ended(end), now, out);
    }

    fn write(&mut self, writing: Writing, moved: Move, now: Now, out: &mut Vec<Action>) {
        tracing::info!(function = %self.function, epoch = self.epoch, "lease: {moved:?}");
        self.writing = Some(writing);
        out.push(Action::Write(Box::new(Change {
            expect: self.stored,
            record: LeaseRecord {
                function: self.function.clone(),
                epoch: self.epoch,
                holder: self.holder.clone(),
                last_end: self.last_end.clone(),
            },
            entry: JournalEntry {
                unix_ms: now.unix_ms,
                function: self.function.clone(),
                epoch: self.epoch,
                moved,
            },
        })));
    }

    fn stored(
        &mut self,
        result: Result<(), StoreError>,
        ttl_ms: u64,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let writing = self.writing.take();
        let held = |held| Version {
            epoch: self.epoch,
            held,
        };
        match (writing, result) {
            (None, _) => {}
            (Some(Writing::Grant), Ok(())) => {
                self.stored = Some(held(true));
                self.granted(ttl_ms, now, out);
            }
            (Some(Writing::Grant), Err(error)) => {
                let refusal = store_failed(&self.function, &error);
                self.answer(Err(refusal), out);
                let (cause, scrubbed) = (Cause::NotGranted, Scrubbed::NoPath);
                self.end = Some(End { cause, scrubbed });
                self.unsure(now, out);
            }
            // Only the journal misses it: the record is the same.
            (Some(Writing::Open), _) => {
                if self.state == LeaseState::Ending {
                    self.write_end(now, out);
                }
            }
            (Some(Writing::End), Ok(())) => {
                self.stored = Some(held(false));
                self.end = None;
                self.become_(LeaseState::Free);
            }
            (Some(Writing::End), Err(_)) => self.unsure(now, out),
        }
    }

    fn granted(&mut self, ttl_ms: u64, now: Now, out: &mut Vec<Action>) {
        let Some((_, secret)) = self.asked else {
            return self.finish(End::reclaimed(), now, out);
        };
        self.become_(LeaseState::Held);
        self.due_ms = Some(now.ms.saturating_add(ttl_ms));
        let lease = LeaseId(self.epoch);
        self.answer(Ok(Grant { lease, secret }), out);
    }

    fn answer(&mut self, result: Result<Grant, Refusal>, out: &mut Vec<Action>) {
        if let (Some((ask, _)), Some(holder)) = (self.asked.take(), &self.holder) {
            out.push(Action::Tell(
                holder.port.clone(),
                ToPort::Granted(ask, result),
            ));
        }
    }

    /// A write failed. The store is read at once, and then now and again.
    fn unsure(&mut self, now: Now, out: &mut Vec<Action>) {
        self.become_(LeaseState::Unsure);
        self.due_ms = Some(now.ms.saturating_add(RETRY_MS));
        self.read_again(out);
    }

    fn read_again(&mut self, out: &mut Vec<Action>) {
        if !self.reading {
            self.reading = true;
            out.push(Action::Read(self.function.clone()));
        }
    }

    fn read(
        &mut self,
        result: Result<Option<LeaseRecord>, StoreError>,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        self.reading = false;
        if self.state != LeaseState::Unsure {
            return;
        }
        let record = match result {
            Ok(record) => record,
            Err(error) => {
                self.due_ms = Some(now.ms.saturating_add(RETRY_MS));
                if let Some(ask) = self.waiting.take() {
                    let refusal = store_failed(&self.function, &error);
                    out.push(refuse(ask, refusal));
                }
                return;
            }
        };
        self.due_ms = None;
        self.stored = record.as_ref().map(LeaseRecord::version);
        self.epoch = self.stored.map_or(self.epoch, |version| version.epoch);
        if self.stored.is_some_and(|version| version.held) {
            self.become_(LeaseState::Ending);
            return self.write_end(now, out);
        }
        self.holder = None;
        self.end = None;
        self.last_end = record.and_then(|record| record.last_end);
        self.become_(LeaseState::Free);
    }

    fn tick(&mut self, now: Now, out: &mut Vec<Action>) {
        let Some(due_ms) = self.due_ms else {
            return;
        };
        if now.ms < due_ms {
            return;
        }
        match (self.state, &self.holder) {
            (LeaseState::Held, Some(holder)) => {
                self.due_ms = Some(now.ms.saturating_add(EXPIRE_AGAIN_MS));
                let expired = ToPort::Expired(LeaseId(self.epoch));
                out.push(Action::Tell(holder.port.clone(), expired));
            }
            (LeaseState::Unsure, _) => {
                self.due_ms = Some(now.ms.saturating_add(RETRY_MS));
                self.read_again(out);
            }
            _ => self.due_ms = None,
        }
    }

    fn status(&self, now: Now) -> LeaseStatus {
        let age = |holder: &Holder| now.unix_ms.saturating_sub(holder.since_unix_ms);
        let runs = self.state == LeaseState::Held;
        LeaseStatus {
            function: self.function.clone(),
            state: self.state,
            epoch: self.epoch,
            age_ms: self.holder.as_ref().map(age),
            ttl_ms: self
                .due_ms
                .filter(|_| runs)
                .map(|due_ms| due_ms.saturating_sub(now.ms)),
            holder: self.holder.clone(),
            last_end: self.last_end.clone(),
        }
    }
}
