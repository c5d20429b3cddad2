//! The borrower's end of all paths of a port: leases held, guest RAM behind the own window, and the steps of each call; pure.
//!
//! A call of a worker or a verb is a short walk of steps, each ended by a reply of the peer or by
//! the mapper. `map` is: slices -> pin -> tell the lender -> answer. `unmap` is: unpin -> answer
//! (that makes the memory safe) -> tell the lender -> free the slices.

mod calls;
mod check;
mod lease;
mod maps;

pub use calls::{
    Answer, BorrowerAction, Call, CallError, GuestMap, OpenedPath, Pin, Slice, Step, Token,
};

use super::limits::Limits;
use super::message::{
    ENTRIES_MAX, LeaseId, MapRange, OpId, PoolEntry, Refusal, RefusalCode, RemoteFunction, Reply,
    Request, Secret,
};
use super::plan::{Owner, Rows, SlicePool};
use super::refused::{Refused, RefusedAs};
use super::wire::IRQ_WORDS_MAX;
use crate::model::{Bdf, WindowOffset};
use lease::{Lease, Place, Taken};
use std::collections::{BTreeMap, HashSet, VecDeque};

/// How many functions one port borrows at most.
pub const LEASES_MAX: usize = 64;
/// How many calls may be under way at once.
pub const CALLS_MAX: usize = 256;
/// How many guest memory mappings one lease may hold.
pub const MAPS_MAX: usize = 65_535;
/// Config space is fetched in pieces of this many bytes.
const CONFIG_PIECE: u16 = 2048;

enum Op {
    List {
        entries: Vec<PoolEntry>,
    },
    Borrow {
        ram: Option<u64>,
    },
    Open {
        lease: LeaseId,
    },
    Config {
        lease: LeaseId,
        opened: Box<OpenedPath>,
    },
    Return {
        lease: LeaseId,
    },
    MapPin {
        lease: LeaseId,
        places: Vec<Place>,
    },
    MapTell {
        lease: LeaseId,
        places: Vec<Place>,
        rest: VecDeque<Vec<MapRange>>,
    },
    MapUndo {
        lease: LeaseId,
        taken: Vec<Taken>,
        cause: CallError,
    },
    Unpin {
        lease: LeaseId,
        taken: Vec<Taken>,
    },
    UnmapTell {
        lease: LeaseId,
        freed: Vec<Slice>,
    },
    Forward,
    End(End),
}

/// The end of a lease: what it waits for before the lender is told, or a new session begins.
struct End {
    lease: LeaseId,
    slices: Vec<Slice>,
    then: Then,
    /// Its worker can store into the lease's slices no more.
    let_go: bool,
    /// What came of unpinning the guest RAM.
    unpinned: Option<Result<(), CallError>>,
}

/// What comes after that.
enum Then {
    /// The lender is asked to end the lease.
    Return,
    /// The lender's `revoked` is answered.
    Confirm(OpId),
    /// Nothing: the session is over.
    Session,
}

impl End {
    fn new(lease: LeaseId, slices: Vec<Slice>, then: Then) -> Self {
        Self {
            lease,
            slices,
            then,
            let_go: false,
            unpinned: None,
        }
    }

    /// Of an ended session: the mapper is at work.
    fn at_mapper(slices: Vec<Slice>) -> Self {
        Self {
            let_go: true,
            ..Self::new(NO_LEASE, slices, Then::Session)
        }
    }
}

/// Of an ended session's.
const NO_LEASE: LeaseId = LeaseId(0);

/// The borrower's end of all paths of a port.
#[derive(Default)]
pub struct Borrower {
    leases: BTreeMap<LeaseId, Lease>,
    steps: BTreeMap<Step, (Option<Token>, Op)>,
    step_last: u64,
    rows: Rows,
    /// What the mapper could not unpin: it is tried again at the session's end, and nobody gets
    /// these slices before.
    left: BTreeMap<Slice, LeaseId>,
    limits: Limits,
}

/// What `status` tells of one lease.
#[derive(Clone, Debug)]
pub struct LeaseStatus {
    /// The lease.
    pub lease: LeaseId,
    /// The function, on the lender.
    pub bdf: Bdf,
    /// Live mappings of guest RAM.
    pub maps: usize,
    /// Bytes of them.
    pub mapped_bytes: u64,
    /// What the peer said of it, and was not done.
    pub refused: Refused,
}

type Actions = Vec<BorrowerAction>;

fn answer(token: Option<Token>, result: Result<Answer, CallError>) -> Actions {
    token
        .map(|token| BorrowerAction::Answer(token, result))
        .into_iter()
        .collect()
}

/// This side's own limit.
fn limit(most: u64, text: String) -> CallError {
    CallError::Refused(Refusal::new(RefusalCode::Limit, most, text))
}

impl Borrower {
    /// One whose leases are held to these limits.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// What `status` tells.
    pub fn status(&self) -> Vec<LeaseStatus> {
        let of = |(lease, held): (&LeaseId, &Lease)| LeaseStatus {
            lease: *lease,
            bdf: held.bdf,
            maps: held.maps.values().filter(|map| map.live).count(),
            mapped_bytes: held
                .maps
                .values()
                .filter(|map| map.live)
                .map(|map| map.len)
                .sum(),
            refused: held.refused,
        };
        self.leases.iter().map(of).collect()
    }

    /// A message that was not taken names this lease, which may be none.
    pub fn count_refused(&mut self, lease: LeaseId, as_what: RefusedAs) {
        if let Some(held) = self.leases.get_mut(&lease) {
            held.refused.count(as_what);
        }
    }

    /// A call of a worker or a verb, while a link session is open.
    pub fn call(&mut self, token: Token, call: Call, pool: &mut SlicePool) -> Actions {
        // What takes something away is never refused: the caller could only believe it gone.
        let takes_away = matches!(call, Call::Unmap(..) | Call::Return(_));
        if self.steps.len() >= CALLS_MAX && !takes_away {
            let text = format!("{CALLS_MAX} calls are under way: wait for one to end");
            return answer(Some(token), Err(limit(CALLS_MAX as u64, text)));
        }
        let begun = match call {
            Call::List => {
                let op = Op::List {
                    entries: Vec::new(),
                };
                Ok(self.send(Some(token), op, Request::List { cursor: 0 }))
            }
            Call::Borrow(bdf, ram) => self.borrow(token, bdf, ram),
            Call::Open(lease) => self.open(token, lease),
            Call::Return(lease) => self.give_back(token, lease),
            Call::Map(lease, maps) => self.map(token, lease, maps, pool),
            Call::Unmap(lease, span) => self.unmap(token, lease, span),
            Call::Forward(lease, request) => self
                .held(lease)
                .map(|_| ())
                .map(|()| self.send(Some(token), Op::Forward, request)),
        };
        begun.unwrap_or_else(|error| answer(Some(token), Err(error)))
    }

    fn held(&mut self, lease: LeaseId) -> Result<&mut Lease, CallError> {
        let gone = || CallError::Gone(format!("lease {lease} is over: borrow the function again"));
        self.leases
            .get_mut(&lease)
            .filter(|held| !held.closing)
            .ok_or_else(gone)
    }

    fn step(&mut self, token: Option<Token>, op: Op) -> Step {
        self.step_last += 1;
        let step = Step(self.step_last);
        self.steps.insert(step, (token, op));
        step
    }

    fn send(&mut self, token: Option<Token>, op: Op, request: Request) -> Actions {
        let step = self.step(token, op);
        vec![BorrowerAction::Send(step, request)]
    }

    fn borrow(&mut self, token: Token, bdf: Bdf, ram: Option<u64>) -> Result<Actions, CallError> {
        if self.leases.len() >= LEASES_MAX {
            let text = format!("a port borrows at most {LEASES_MAX} functions: return one first");
            return Err(limit(LEASES_MAX as u64, text));
        }
        Ok(self.send(Some(token), Op::Borrow { ram }, Request::Borrow { bdf }))
    }

    fn open(&mut self, token: Token, lease: LeaseId) -> Result<Actions, CallError> {
        let count = self.held(lease)?.irq_count;
        let first = self.rows.allocate(lease, count)?;
        let held = self.held(lease)?;
        let (secret, irq_count) = (held.secret, count);
        let mut actions = vec![BorrowerAction::Scan(lease, first, count)];
        let request = Request::Open {
            lease,
            secret,
            irq_first: first,
            irq_count,
        };
        actions.extend(self.send(Some(token), Op::Open { lease }, request));
        Ok(actions)
    }

    fn give_back(&mut self, token: Token, lease: LeaseId) -> Result<Actions, CallError> {
        let held = self.held(lease)?;
        // From here on the lease takes no call; a map under way finds its entry gone.
        held.closing = true;
        let slices = held.take_all();
        let why = "the lease was given back".to_owned();
        let end = End::new(lease, slices, Then::Return);
        Ok(self.end(Some(token), end, Some(why)))
    }

    /// Begins what ends a lease here: its worker lets go, where it has one (`lost` says why), and
    /// its guest RAM is unpinned.
    fn end(&mut self, token: Option<Token>, end: End, lost: Option<String>) -> Actions {
        let (lease, slices) = (end.lease, end.slices.clone());
        let step = self.step(token, Op::End(end));
        let mut actions = Vec::new();
        match lost {
            Some(why) => actions.push(BorrowerAction::Lost(step, lease, why)),
            None => drop(self.ending(step).map(|end| end.let_go = true)),
        }
        actions.push(BorrowerAction::Unpin(step, lease, slices));
        actions
    }

    fn ending(&mut self, step: Step) -> Option<&mut End> {
        match self.steps.get_mut(&step) {
            Some((_, Op::End(end))) => Some(end),
            _ => None,
        }
    }

    /// Nobody on this host can store into the lease's slices any more.
    pub fn let_go(&mut self, step: Step, pool: &mut SlicePool) -> Actions {
        match self.ending(step) {
            Some(end) => {
                end.let_go = true;
                self.go_on(step, pool)
            }
            None => Vec::new(),
        }
    }

    /// What comes when a lease's worker has let go and its guest RAM is unpinned.
    fn go_on(&mut self, step: Step, pool: &mut SlicePool) -> Actions {
        let unpinned = self.ending(step).filter(|end| end.let_go);
        let Some(unpinned) = unpinned.and_then(|end| end.unpinned.take()) else {
            return Vec::new();
        };
        let Some((token, Op::End(End { lease, then, .. }))) = self.steps.remove(&step) else {
            return Vec::new();
        };
        match then {
            Then::Return => self.send(token, Op::Return { lease }, Request::Return { lease }),
            Then::Confirm(op) => {
                // The lender had unmapped all before it told us.
                self.release(lease, pool);
                let mut actions = vec![BorrowerAction::Confirm(op, unpinned)];
                actions.extend(answer(token, Ok(Answer::Done)));
                actions
            }
            Then::Session => Vec::new(),
        }
    }

    /// The mapper has pinned or unpinned.
    pub fn pinned(
        &mut self,
        step: Step,
        result: Result<(), CallError>,
        pool: &mut SlicePool,
    ) -> Actions {
        let unpinning = self.steps.get(&step).and_then(|(_, op)| op.unpinning());
        if let (Err(_), Some((lease, slices))) = (&result, unpinning) {
            self.left
                .extend(slices.into_iter().map(|slice| (slice, lease)));
        }
        if let Some(end) = self.ending(step) {
            end.unpinned = Some(result);
            return self.go_on(step, pool);
        }
        let Some((token, op)) = self.steps.remove(&step) else {
            return Vec::new();
        };
        match (op, result) {
            (Op::MapPin { lease, places }, Ok(())) => self.tell(token, lease, places),
            (Op::MapPin { lease, places }, Err(error)) => {
                if let Some(held) = self.leases.get_mut(&lease) {
                    held.forget(&places, lease, pool);
                }
                answer(token, Err(error))
            }
            (
                Op::MapUndo {
                    lease,
                    taken,
                    cause,
                },
                _,
            ) => self.unpinned(token, lease, taken, Err(cause)),
            (Op::Unpin { lease, taken }, result) => {
                let bytes = taken.iter().map(|(span, _)| span.len()).sum();
                let result = result.map(|()| Answer::Unmapped(bytes));
                self.unpinned(token, lease, taken, result)
            }
            (_, result) => answer(token, result.map(|()| Answer::Done)),
        }
    }

    /// The answer first: what was unpinned is safe already. Then the lender is told.
    fn unpinned(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        taken: Vec<Taken>,
        result: Result<Answer, CallError>,
    ) -> Actions {
        let mut actions = answer(token, result);
        if let Some(held) = self.leases.get_mut(&lease) {
            held.untold.extend(taken);
        }
        actions.extend(self.tell_next(lease));
        actions
    }

    /// The slices of guest RAM that is mapped, or on its way there or back.
    pub fn slices_in_use(&self) -> HashSet<WindowOffset> {
        let maps = self.leases.values().flat_map(|held| held.maps.values());
        maps.map(|map| map.offset).collect()
    }

    /// Whether the lease is held, and is not being given back.
    pub fn holds(&self, lease: LeaseId) -> bool {
        self.leases.get(&lease).is_some_and(|held| !held.closing)
    }

    /// Interrupt words of leases whose end the lender has not confirmed.
    pub fn words_in_quarantine(&self) -> u32 {
        self.rows.quarantine(|lease| self.holds(lease))
    }

    fn is_left(&self, slice: Slice) -> bool {
        self.left.contains_key(&slice)
    }

    /// Whether guest memory of an ended lease is still pinned, as the mapper failed: then no new
    /// session may open, for its handshake says the opposite.
    pub fn has_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// Nothing of the lease is mapped at the lender any more.
    fn release(&mut self, lease: LeaseId, pool: &mut SlicePool) {
        self.rows.free(lease);
        if !self.left.values().any(|holder| *holder == lease) {
            pool.free_all(Owner::Borrowed(lease));
        }
    }

    /// The peer has answered.
    pub fn reply(
        &mut self,
        step: Step,
        result: Result<Reply, Refusal>,
        pool: &mut SlicePool,
    ) -> Actions {
        let Some((token, op)) = self.steps.remove(&step) else {
            return Vec::new();
        };
        match (op, result) {
            (
                Op::List { entries },
                Ok(Reply::List {
                    next,
                    entries: more,
                }),
            ) => self.listed(token, entries, next, more),
            (
                Op::Borrow { ram },
                Ok(Reply::Borrowed {
                    lease,
                    secret,
                    entry,
                }),
            ) => self.borrowed(token, ram, (lease, secret, entry), pool),
            (Op::Open { lease }, Ok(Reply::Opened(function))) => {
                self.opened(token, lease, function, pool)
            }
            (Op::Open { lease }, Err(refusal)) => {
                self.rows.free(lease);
                let mut actions = vec![BorrowerAction::ScanEnd(lease)];
                actions.extend(answer(token, Err(refusal.into())));
                actions
            }
            (Op::Config { lease, mut opened }, Ok(Reply::Bytes(bytes))) if !bytes.is_empty() => {
                opened.config.extend(bytes);
                opened.config.truncate(opened.function.config_len.into());
                self.fetch(token, lease, opened)
            }
            (Op::Return { lease }, result) => self.returned(token, lease, result, pool),
            (
                Op::MapTell {
                    lease,
                    places,
                    rest,
                },
                result,
            ) => self.map_told(token, lease, (places, rest), result),
            (Op::UnmapTell { lease, freed }, result) => self.unmap_told(lease, freed, result, pool),
            (Op::Forward, Ok(Reply::Bytes(bytes))) => answer(token, Ok(Answer::Bytes(bytes))),
            (Op::Forward, Ok(Reply::Done)) => answer(token, Ok(Answer::Done)),
            (_, Err(refusal)) => answer(token, Err(refusal.into())),
            (_, Ok(_)) => {
                let text = "the lender's answer does not fit the question: both ends must run \
                            versions that belong together";
                answer(token, Err(CallError::Gone(text.into())))
            }
        }
    }

    fn listed(
        &mut self,
        token: Option<Token>,
        mut entries: Vec<PoolEntry>,
        next: u32,
        more: Vec<PoolEntry>,
    ) -> Actions {
        let grew = !more.is_empty();
        entries.extend(more);
        if next == 0 || !grew || entries.len() >= ENTRIES_MAX {
            return answer(token, Ok(Answer::List(entries)));
        }
        self.send(token, Op::List { entries }, Request::List { cursor: next })
    }

    fn borrowed(
        &mut self,
        token: Option<Token>,
        ram: Option<u64>,
        (lease, secret, entry): (LeaseId, Secret, PoolEntry),
        pool: &mut SlicePool,
    ) -> Actions {
        if self.leases.contains_key(&lease) || self.is_named(lease) {
            // It is another tenant's, or was: nothing is done to it, and what the lender has yet to
            // answer about the old one is not taken for the new one's.
            let text = format!("the lender gave lease {lease} out twice: restart its daemon");
            let refusal = Refusal::new(RefusalCode::WrongState, 0, text);
            return answer(token, Err(refusal.into()));
        }
        let held = Lease::new(entry.bdf, secret, entry.irq_count);
        self.leases.insert(lease, held);
        let reserve = |bytes| pool.reserve(Owner::Borrowed(lease), bytes);
        let fits = check::vectors(entry.irq_count, IRQ_WORDS_MAX);
        match fits.and_then(|()| ram.map_or(Ok(()), reserve)) {
            Ok(()) => answer(token, Ok(Answer::Borrowed(lease, entry))),
            Err(refusal) => {
                // Nothing is left behind: the lease goes back before the refusal is told.
                self.leases.remove(&lease);
                let mut actions = self.send(None, Op::Forward, Request::Return { lease });
                actions.extend(answer(token, Err(refusal.into())));
                actions
            }
        }
    }

    fn opened(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        function: RemoteFunction,
        pool: &SlicePool,
    ) -> Actions {
        let irq_count = match self.held(lease) {
            Ok(held) => held.irq_count,
            Err(gone) => return answer(token, Err(gone)),
        };
        let others = self.leases.values().flat_map(|held| &held.bars);
        match check::function(&function, irq_count, pool, others) {
            Ok(bars) => {
                if let Ok(held) = self.held(lease) {
                    held.bars = bars;
                }
                let config = Vec::new();
                self.fetch(token, lease, Box::new(OpenedPath { function, config }))
            }
            // The caller gives the lease back; until then nothing of it is reached.
            Err(refusal) => answer(token, Err(refusal.into())),
        }
    }

    fn fetch(&mut self, token: Option<Token>, lease: LeaseId, opened: Box<OpenedPath>) -> Actions {
        let have = opened.config.len() as u16;
        let want = opened.function.config_len;
        if have >= want {
            return answer(token, Ok(Answer::Opened(opened)));
        }
        let len = (want - have).min(CONFIG_PIECE);
        let request = Request::Config {
            lease,
            offset: have,
            len,
        };
        self.send(token, Op::Config { lease, opened }, request)
    }

    fn returned(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        result: Result<Reply, Refusal>,
        pool: &mut SlicePool,
    ) -> Actions {
        self.leases.remove(&lease);
        // A lender that refuses may still have it all mapped, as while it revokes: slices and
        // words then stay in quarantine until it says `revoked`, or the session is over.
        let over = |refusal: &Refusal| refusal.code == RefusalCode::NoLease;
        if result.as_ref().err().is_none_or(over) {
            self.release(lease, pool);
        }
        let mut actions = vec![BorrowerAction::ScanEnd(lease)];
        let result = result.map(|_| Answer::Done).map_err(CallError::from);
        actions.extend(answer(token, result));
        actions
    }

    /// The lender has revoked a lease. `Confirm` comes when nothing of it is pinned any more.
    pub fn revoked(
        &mut self,
        op: OpId,
        lease: LeaseId,
        why: String,
        pool: &mut SlicePool,
    ) -> Actions {
        let held = self.leases.remove(&lease);
        if let Some(end) = self.ending_of(lease) {
            // Its worker or the mapper is still at it, and the lender waits for no return.
            end.then = Then::Confirm(op);
            return vec![BorrowerAction::ScanEnd(lease)];
        }
        let Some(mut held) = held else {
            // Returned meanwhile, and so unpinned.
            self.release(lease, pool);
            return vec![BorrowerAction::Confirm(op, Ok(()))];
        };
        let end = End::new(lease, held.take_all(), Then::Confirm(op));
        let mut actions = vec![BorrowerAction::ScanEnd(lease)];
        actions.extend(self.end(None, end, Some(why)));
        actions
    }

    /// Whether anything is under way about a lease.
    fn is_named(&self, lease: LeaseId) -> bool {
        let mut steps = self.steps.values();
        steps.any(|(_, op)| op.lease() == Some(lease))
    }

    fn ending_of(&mut self, lease: LeaseId) -> Option<&mut End> {
        let ends = self.steps.values_mut().filter_map(|(_, op)| match op {
            Op::End(end) => Some(end),
            _ => None,
        });
        ends.into_iter().find(|end| end.lease == lease)
    }

    /// The link session is over: calls are answered, leases lost, guest RAM unpinned.
    pub fn session_over(&mut self, why: &str) -> Actions {
        let mut actions = Vec::new();
        let mut under_way = BTreeMap::new();
        for (step, (token, op)) in std::mem::take(&mut self.steps) {
            actions.extend(answer(token, Err(CallError::Gone(why.to_owned()))));
            // The mapper's answer is still to come, or the worker's; nothing is reused before.
            if let Some(end) = op.at_session_over() {
                under_way.insert(step, (None, Op::End(end)));
            }
        }
        self.steps = under_way;
        let leases = std::mem::take(&mut self.leases);
        for (lease, mut held) in leases {
            actions.push(BorrowerAction::ScanEnd(lease));
            let end = End::new(lease, held.take_all(), Then::Session);
            actions.extend(self.end(None, end, Some(why.to_owned())));
        }
        let left: Vec<Slice> = std::mem::take(&mut self.left).into_keys().collect();
        if !left.is_empty() {
            let end = End::new(NO_LEASE, left, Then::Session);
            actions.extend(self.end(None, end, None));
        }
        self.rows = Rows::default();
        actions
    }

    /// Whether nothing of an ended session is under way.
    pub fn is_undone(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether all that is under way is workers that have not let go.
    pub fn waits_for_workers_alone(&self) -> bool {
        let waits = |op: &Op| matches!(op, Op::End(end) if end.unpinned.is_some());
        self.steps.values().all(|(_, op)| waits(op))
    }
}

impl Op {
    /// Whose state its answer changes.
    fn lease(&self) -> Option<LeaseId> {
        match self {
            Self::List { .. } | Self::Borrow { .. } | Self::Forward => None,
            Self::Open { lease }
            | Self::Config { lease, .. }
            | Self::Return { lease }
            | Self::MapPin { lease, .. }
            | Self::MapTell { lease, .. }
            | Self::MapUndo { lease, .. }
            | Self::Unpin { lease, .. }
            | Self::UnmapTell { lease, .. }
            | Self::End(End { lease, .. }) => Some(*lease),
        }
    }

    /// What is left to wait for of it when the session is over.
    fn at_session_over(self) -> Option<End> {
        let slices = self.unpinning().map(|(_, slices)| slices);
        match self {
            Self::End(end) => Some(End {
                lease: NO_LEASE,
                then: Then::Session,
                ..end
            }),
            // Of a map under way the lease's own end unpins what it took.
            Self::MapPin { .. } => Some(End::at_mapper(Vec::new())),
            _ => slices.map(End::at_mapper),
        }
    }

    /// What the mapper is asked to unpin, and of which lease.
    fn unpinning(&self) -> Option<(LeaseId, Vec<Slice>)> {
        match self {
            Self::MapUndo { lease, taken, .. } | Self::Unpin { lease, taken } => {
                Some((*lease, taken.iter().map(|(_, slice)| *slice).collect()))
            }
            Self::End(end) if end.unpinned.is_none() => Some((end.lease, end.slices.clone())),
            _ => None,
        }
    }
}
