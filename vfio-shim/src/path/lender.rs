//! The lender's end of all paths of a port: which function is offered, leased and open, and what the peer's requests do to it; pure.
//!
//! ```text
//!            borrow            granted          open              (done)
//! Available --------> Granting --------> Leased --------> Opening --------> Open
//!     ^   refused, session  |               |                | failed         |
//!     +---- over, revoke ---+    return,    v                v                | return, revoke,
//!     +---------------------- expired ----- . <----------- Leased             v session over
//!     +------------------------------------------------------------------- Closing
//!     a step of undoing failed: Quarantine <---------------------------------+
//!     ^                             |  retry: Closing; or clear
//!     +-----------------------------+
//! ```
//! When the kernel wants a function back, its lease is revoked, and from `Available` or
//! `Quarantine` it goes to `Gone`, which is left by `withdraw` only.
//!
//! Leases are granted by the pool (`path::grant`). While it has not answered, the function is
//! nobody's, and is not offered to another; a lease that comes too late goes back at once.

mod grants;
mod held;
mod refused;
#[cfg(test)]
#[path = "lender_tests.rs"]
mod tests;

pub(super) use grants::taken;
use refused::Named;

use super::grant::{AskId, EndCause, LeaseEnd, ToPool, Undone};
use super::message::{
    LeaseId, OpId, PoolEntry, PoolState, Refusal, RefusalCode, RemoteFunction, Reply, Request,
    Secret,
};
use super::plan::{Owner, SlicePool};
use super::refused::Refused;
use super::work::{FunctionWork, OpenPlan, WorkOutcome};
use crate::model::{BAR_COUNT, Bdf, FunctionInfo, WindowOffset};
use std::collections::{BTreeMap, HashMap};

/// How many functions one port lends at most.
pub const OFFERS_MAX: usize = 64;
/// How many operations of one lease may be under way at once.
pub const OPS_MAX: usize = 32;

/// Names one piece of work given to a function's executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// What the driver has to do.
#[derive(Debug)]
pub enum LenderAction {
    /// Give the function's executor this work; it answers by `done` with the same id.
    Work(Bdf, JobId, FunctionWork),
    /// Answer the peer's request.
    Reply(OpId, u16, Box<Result<Reply, Refusal>>),
    /// Tell the peer that the lease is over.
    Revoked(LeaseId, String),
    /// Tell the pool.
    Pool(ToPool),
    /// The function is to be closed: the kernel waits for it.
    Gone(Bdf),
}

/// Where an offered function stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OfferState {
    /// Nobody has it.
    Available,
    /// The pool has been asked for a lease.
    Granting,
    /// Borrowed, no path.
    Leased,
    /// The path is being opened.
    Opening,
    /// The path is open.
    Open,
    /// The path is being undone.
    Closing,
    /// It could not be put back to power-on state; nobody gets it.
    Quarantine(String),
    /// The kernel has taken it away.
    Gone(String),
}

struct Offer {
    entry: PoolEntry,
    info: FunctionInfo,
    state: OfferState,
    lease: Option<(LeaseId, Secret)>,
    /// The newest lease's.
    epoch: LeaseId,
    slices: [Option<WindowOffset>; BAR_COUNT],
    ops: usize,
    last_end: Option<String>,
    /// Since when it is in quarantine.
    quarantined_ms: Option<u64>,
    left: Option<held::Left>,
    /// Why the kernel wants it back.
    wanted: Option<String>,
    /// What the peer said of the lease in force, or of the function, and was not done.
    refused: Refused,
    /// Whether its driver can stop what it does.
    stops: bool,
    /// Offered to be put back, and for nobody to borrow.
    mends_only: bool,
}

enum Pending {
    Reply {
        op: OpId,
        code: u16,
    },
    Open {
        op: OpId,
        code: u16,
    },
    Close {
        answer: Option<(OpId, u16)>,
        cause: EndCause,
    },
    Stop,
    Retry,
}

/// What `status` tells of one offered function.
#[derive(Clone, Debug)]
pub struct OfferStatus {
    /// Its entry in the pool.
    pub entry: PoolEntry,
    /// Where it stands.
    pub state: OfferState,
    /// The lease, while there is one.
    pub lease: Option<LeaseId>,
    /// How the last lease ended: `returned`, `reclaimed` (the session was over), or why it was
    /// revoked.
    pub last_end: Option<String>,
    /// Since when it is in quarantine, in the driver's milliseconds.
    pub quarantined_ms: Option<u64>,
    /// What the peer said of its last lease, and was not done.
    pub refused: Refused,
}

/// The lender's end of all paths of a port.
#[derive(Default)]
pub struct Lender {
    offers: BTreeMap<Bdf, Offer>,
    pending: HashMap<JobId, (Bdf, Pending)>,
    asks: HashMap<AskId, grants::Asked>,
    job_last: u64,
    ask_last: u64,
    now_ms: u64,
    /// How many functions the kernel wants back.
    wanted: usize,
    /// Requests refused that named nothing here.
    refused: u64,
}

fn refuse(code: RefusalCode, figure: u64, text: impl Into<String>) -> Refusal {
    Refusal {
        code,
        figure,
        text: text.into(),
    }
}

fn no_lease() -> Refusal {
    refuse(
        RefusalCode::NoLease,
        0,
        "no such lease, or it is over: borrow the function again",
    )
}

fn wrong_state() -> Refusal {
    refuse(
        RefusalCode::WrongState,
        0,
        "the path is not open: borrow the function again",
    )
}

impl Lender {
    /// Puts a function into the pool.
    pub fn offer(&mut self, entry: PoolEntry, info: FunctionInfo) -> Result<(), Refusal> {
        if !info.resettable {
            let text = "the function has no reset method, so it cannot be lent: its state would \
                        leak to the next tenant";
            return Err(refuse(RefusalCode::NoReset, 0, text));
        }
        if self.offers.contains_key(&entry.bdf) {
            return Err(refuse(
                RefusalCode::Taken,
                0,
                "the function is in the pool already",
            ));
        }
        if self.offers.len() >= OFFERS_MAX {
            let text = format!("a port lends at most {OFFERS_MAX} functions: withdraw one first");
            return Err(refuse(RefusalCode::Limit, OFFERS_MAX as u64, text));
        }
        let offer = Offer {
            entry,
            info,
            state: OfferState::Available,
            lease: None,
            epoch: LeaseId(0),
            slices: [None; BAR_COUNT],
            ops: 0,
            last_end: None,
            quarantined_ms: None,
            left: None,
            wanted: None,
            refused: Refused::default(),
            stops: false,
            mends_only: false,
        };
        self.offers.insert(offer.entry.bdf, offer);
        Ok(())
    }

    /// Takes a function out of the pool; refused while somebody has it.
    pub fn withdraw(&mut self, bdf: Bdf) -> Result<(), Refusal> {
        let Some(offer) = self.offers.get(&bdf) else {
            return Err(unknown(bdf));
        };
        match offer.state {
            OfferState::Available | OfferState::Quarantine(_) | OfferState::Gone(_) => {
                self.wanted -= usize::from(offer.wanted.is_some());
                self.offers.remove(&bdf);
                Ok(())
            }
            OfferState::Granting => Err(grants::granting(bdf)),
            _ => {
                let text = format!("{bdf} is borrowed: return it on the borrower first");
                Err(refuse(RefusalCode::Busy, 0, text))
            }
        }
    }

    /// Whether the lease is there; one that is over has left it.
    pub fn holds(&self, lease: LeaseId) -> bool {
        let mut offers = self.offers.values();
        offers.any(|offer| offer.lease.is_some_and(|(held, _)| held == lease))
    }

    /// What `status` tells.
    pub fn status(&self) -> Vec<OfferStatus> {
        let of = |offer: &Offer| OfferStatus {
            entry: entry_now(offer),
            state: offer.state.clone(),
            lease: offer.lease.as_ref().map(|(lease, _)| *lease),
            last_end: offer.last_end.clone(),
            quarantined_ms: offer.quarantined_ms,
            refused: offer.refused,
        };
        self.offers.values().map(of).collect()
    }

    /// The request of the peer, of this node. `fresh` is randomness for a secret.
    pub fn request(
        &mut self,
        (op, code): (OpId, u16),
        request: Request,
        slices: &mut SlicePool,
        peer: Option<u16>,
        fresh: Secret,
    ) -> Vec<LenderAction> {
        let named = Named::by(&request);
        let result = match request {
            Request::List { cursor } => Ok(vec![self.list(op, code, cursor)]),
            Request::Borrow { bdf } => self.borrow((op, code), bdf, peer, fresh),
            Request::Return { lease } => self.give_back(op, code, lease),
            Request::Open {
                lease,
                secret,
                irq_first,
                irq_count,
            } => self.open(op, code, (lease, secret), (irq_first, irq_count), slices),
            other => self.work(op, code, other, slices),
        };
        result.unwrap_or_else(|refusal| {
            self.count_request(named);
            vec![LenderAction::Reply(op, code, Box::new(Err(refusal)))]
        })
    }

    fn list(&self, op: OpId, code: u16, cursor: u32) -> LenderAction {
        const PAGE: usize = super::message::LIST_MAX;
        let there = |offer: &&Offer| !matches!(offer.state, OfferState::Gone(_));
        let there: Vec<_> = self.offers.values().filter(there).collect();
        let start = (cursor as usize).min(there.len());
        let page = there.iter().skip(start).take(PAGE);
        let entries: Vec<_> = page.map(|offer| entry_now(offer)).collect();
        let end = start + entries.len();
        let next = if end < there.len() { end as u32 } else { 0 };
        LenderAction::Reply(op, code, Box::new(Ok(Reply::List { next, entries })))
    }

    /// The function of the lease that a message names: of this lease, not of one before it.
    fn leased(&mut self, lease: LeaseId) -> Result<(Bdf, &mut Offer), Refusal> {
        let mut offers = self.offers.iter_mut();
        let found = offers.find(|(_, offer)| offer.lease.is_some_and(|(held, _)| held == lease));
        let (bdf, offer) = found.ok_or_else(no_lease)?;
        Ok((*bdf, offer))
    }

    fn open(
        &mut self,
        op: OpId,
        code: u16,
        (lease, secret): (LeaseId, Secret),
        (irq_first, irq_count): (u32, u32),
        pool: &mut SlicePool,
    ) -> Result<Vec<LenderAction>, Refusal> {
        let (bdf, offer) = self.leased(lease)?;
        if offer.lease.as_ref().is_none_or(|(_, held)| *held != secret) {
            return Err(no_lease());
        }
        if offer.state != OfferState::Leased {
            return Err(wrong_state());
        }
        check_rows(irq_first, irq_count)?;
        let sizes = std::array::from_fn(|bar| offer.info.regions[bar].size);
        let slices = pool.allocate_bars(Owner::Lent(lease), &sizes)?;
        offer.slices = slices;
        offer.state = OfferState::Opening;
        let plan = OpenPlan {
            lease,
            slices,
            irq_first,
            irq_count,
        };
        Ok(self.give(bdf, FunctionWork::Open(plan), Pending::Open { op, code }))
    }

    fn give_back(
        &mut self,
        op: OpId,
        code: u16,
        lease: LeaseId,
    ) -> Result<Vec<LenderAction>, Refusal> {
        let (bdf, offer) = self.leased(lease)?;
        match offer.state {
            OfferState::Leased => {
                let ended = offer.end_lease(EndCause::Returned, Undone::NoPath);
                let reply = LenderAction::Reply(op, code, Box::new(Ok(Reply::Done)));
                Ok(ended.into_iter().chain([reply]).collect())
            }
            OfferState::Open | OfferState::Opening => {
                offer.state = OfferState::Closing;
                let pending = Pending::Close {
                    answer: Some((op, code)),
                    cause: EndCause::Returned,
                };
                Ok(self.give(bdf, FunctionWork::Close, pending))
            }
            _ => Err(wrong_state()),
        }
    }

    fn work(
        &mut self,
        op: OpId,
        code: u16,
        request: Request,
        pool: &SlicePool,
    ) -> Result<Vec<LenderAction>, Refusal> {
        let (lease, work) = FunctionWork::from_request(request).ok_or_else(wrong_state)?;
        let (bdf, offer) = self.leased(lease)?;
        if offer.state != OfferState::Open {
            return Err(wrong_state());
        }
        if offer.ops >= OPS_MAX {
            let text = format!("{OPS_MAX} operations of this lease are under way: wait for one");
            return Err(refuse(RefusalCode::Limit, OPS_MAX as u64, text));
        }
        if let FunctionWork::Map(ranges) = &work {
            for range in ranges {
                pool.check_peer_range(range.offset, range.span.len())?;
            }
        }
        Ok(self.give(bdf, work, Pending::Reply { op, code }))
    }

    fn give(&mut self, bdf: Bdf, work: FunctionWork, pending: Pending) -> Vec<LenderAction> {
        self.job_last += 1;
        let job = JobId(self.job_last);
        if let Some(offer) = self.offers.get_mut(&bdf) {
            offer.ops += 1;
        }
        self.pending.insert(job, (bdf, pending));
        vec![LenderAction::Work(bdf, job, work)]
    }

    /// An executor has done its work. `Close` that fails has still stopped DMA and unmapped all;
    /// the function could not be reset.
    pub fn done(
        &mut self,
        job: JobId,
        result: Result<WorkOutcome, Refusal>,
        pool: &mut SlicePool,
    ) -> Vec<LenderAction> {
        let Some((bdf, pending)) = self.pending.remove(&job) else {
            return Vec::new();
        };
        let Some(offer) = self.offers.get_mut(&bdf) else {
            return Vec::new();
        };
        offer.ops -= 1;
        match pending {
            Pending::Reply { op, code } => {
                vec![LenderAction::Reply(op, code, Box::new(to_reply(result)))]
            }
            Pending::Open { op, code } => {
                let reply = match result {
                    Ok(outcome) => Ok(Reply::Opened(remote_function(offer, &outcome))),
                    Err(refusal) => Err(refusal),
                };
                let mut actions = Vec::new();
                if let (OfferState::Opening, Some((lease, _))) = (&offer.state, offer.lease) {
                    if reply.is_ok() {
                        offer.state = OfferState::Open;
                        actions.push(LenderAction::Pool(ToPool::Opened { bdf, lease }));
                    } else {
                        offer.state = OfferState::Leased;
                        pool.free_all(Owner::Lent(lease));
                    }
                }
                actions.push(LenderAction::Reply(op, code, Box::new(reply)));
                actions
            }
            Pending::Close { answer, cause } => self.closed(bdf, result, pool, (answer, cause)),
            Pending::Stop => {
                // The undoing goes on without: bus mastering off and the reset stop it too.
                if let Err(refusal) = result {
                    tracing::warn!(%bdf, %refusal, "its engines were not stopped");
                }
                Vec::new()
            }
            Pending::Retry => self.retried(bdf, result, pool),
        }
    }

    fn closed(
        &mut self,
        bdf: Bdf,
        result: Result<WorkOutcome, Refusal>,
        pool: &mut SlicePool,
        (answer, cause): (Option<(OpId, u16)>, EndCause),
    ) -> Vec<LenderAction> {
        let now_ms = self.now_ms;
        let Some(offer) = self.offers.get_mut(&bdf) else {
            return Vec::new();
        };
        let lease = offer.lease.map(|(lease, _)| lease);
        let undone = held::undone(&result);
        let mut actions: Vec<_> = offer.end_lease(cause.clone(), undone).into_iter().collect();
        if let Some(lease) = lease {
            // Asked for by the borrower, nothing of it maps the slices any more; ended by us, or
            // where a step of undoing failed, they stay in quarantine until it has said so, or a
            // new session began.
            if answer.is_some() && result.is_ok() {
                pool.free_all(Owner::Lent(lease));
            }
            if result.is_err() {
                offer.quarantined_ms = Some(now_ms);
                offer.left = Some(held::Left::new(lease, answer.is_some()));
            }
            actions.extend(grants::tell_peer(lease, &cause));
        }
        if let Some((op, code)) = answer {
            actions.push(LenderAction::Reply(op, code, Box::new(to_reply(result))));
        }
        actions
    }

    /// The link session is over: every path is undone. `is_undone` tells when that is done. A
    /// lease that the pool is still asked for is not waited for.
    pub fn session_over(&mut self) -> Vec<LenderAction> {
        for asked in self.asks.values_mut() {
            asked.give_up(EndCause::Reclaimed);
        }
        for offer in self.offers.values_mut() {
            // A new session's window has no slices of an old one.
            offer.left = None;
        }
        let bdfs: Vec<Bdf> = self.offers.keys().copied().collect();
        let end = |bdf| self.end(bdf, EndCause::Reclaimed);
        bdfs.into_iter().flat_map(end).collect()
    }

    /// Whether nothing of an ended session is under way.
    pub fn is_undone(&self) -> bool {
        self.pending.is_empty()
    }
}

impl Offer {
    /// The lease is over; what the pool is told of it.
    fn end_lease(&mut self, cause: EndCause, undone: Undone) -> Option<LenderAction> {
        self.state = match &undone {
            Undone::Failed(why) => OfferState::Quarantine(why.clone()),
            Undone::NoPath | Undone::Reset(_) | Undone::Cleared(_) => OfferState::Available,
        };
        self.slices = [None; BAR_COUNT];
        self.last_end = Some(cause.to_string());
        let (lease, _) = self.lease.take()?;
        let bdf = self.entry.bdf;
        let end = LeaseEnd { cause, undone };
        Some(LenderAction::Pool(ToPool::Ended { bdf, lease, end }))
    }
}

fn unknown(bdf: Bdf) -> Refusal {
    let text = format!("{bdf} is not in this lender's pool: see `sublet list`");
    refuse(RefusalCode::UnknownFunction, 0, text)
}

fn check_rows(first: u32, count: u32) -> Result<(), Refusal> {
    let max = super::wire::IRQ_WORDS_MAX;
    match first.checked_add(count) {
        Some(end) if end <= max => Ok(()),
        _ => {
            let text = format!("interrupt words {first}+{count} are outside the table of {max}");
            Err(refuse(RefusalCode::OutOfRange, u64::from(max), text))
        }
    }
}

fn entry_now(offer: &Offer) -> PoolEntry {
    let state = match offer.state {
        OfferState::Available => PoolState::Available,
        OfferState::Quarantine(_) | OfferState::Gone(_) => PoolState::Quarantine,
        _ => PoolState::InUse,
    };
    PoolEntry {
        state,
        ..offer.entry
    }
}

fn to_reply(result: Result<WorkOutcome, Refusal>) -> Result<Reply, Refusal> {
    result.map(|outcome| match outcome {
        WorkOutcome::Bytes(bytes) => Reply::Bytes(bytes),
        WorkOutcome::Done | WorkOutcome::Closed(_) | WorkOutcome::Opened { .. } => Reply::Done,
    })
}

fn remote_function(offer: &Offer, outcome: &WorkOutcome) -> RemoteFunction {
    let config_len = match outcome {
        WorkOutcome::Opened { config_len } => *config_len,
        _ => 0,
    };
    RemoteFunction::new(&offer.info, &offer.slices, config_len)
}
