//! What an operator or the kernel asks of the lender's end: a lease back, a function out of quarantine, a function away.

use super::{Lender, LenderAction, Offer, OfferState, Pending, refuse, unknown};
use crate::model::Bdf;
use crate::path::grant::{EndCause, Scrub, ToPool, Undone};
use crate::path::message::{LeaseId, Refusal, RefusalCode};
use crate::path::plan::{Owner, SlicePool};
use crate::path::work::{FunctionWork, WorkOutcome};

/// Why a function that was offered to be put back is not there for borrowers.
const PUT_BACK: &str = "offered to be put back alone, and that is done";

/// The slices of a lease whose undoing failed: they are behind this host's function still.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    lease: LeaseId,
    /// Whether nothing of them is mapped at the borrower any more.
    confirmed: bool,
}

impl Left {
    pub(super) fn new(lease: LeaseId, confirmed: bool) -> Self {
        Self { lease, confirmed }
    }
}

fn not_in_quarantine(bdf: Bdf) -> Refusal {
    let text = format!("{bdf} is not in quarantine: see `sublet quarantine list`");
    refuse(RefusalCode::WrongState, 0, text)
}

impl Lender {
    /// What time it is, for what `status` tells.
    pub fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
    }

    /// Where an offered function stands.
    pub fn state(&self, bdf: Bdf) -> Option<&OfferState> {
        self.offers.get(&bdf).map(|offer| &offer.state)
    }

    /// Refused where there is no lease to end.
    pub fn check_revoke(&self, bdf: Bdf) -> Result<(), Refusal> {
        let state = self.state(bdf).ok_or_else(|| unknown(bdf))?;
        let (code, text) = match state {
            OfferState::Granting | OfferState::Leased | OfferState::Opening | OfferState::Open => {
                return Ok(());
            }
            OfferState::Closing => (
                RefusalCode::Busy,
                format!("a lease of {bdf} is ending already: see `sublet status`"),
            ),
            OfferState::Available => (
                RefusalCode::NoLease,
                format!("nobody has {bdf}: there is no lease to revoke"),
            ),
            OfferState::Quarantine(why) => (
                RefusalCode::NoLease,
                format!(
                    "nobody has {bdf}, it is in quarantine ({why}): see `sublet quarantine list`"
                ),
            ),
            OfferState::Gone(why) => (
                RefusalCode::NoLease,
                format!("nobody has {bdf}, it was taken away ({why})"),
            ),
        };
        Err(refuse(code, 0, text))
    }

    /// Tries again what failed when its last lease was undone.
    pub fn retry(&mut self, bdf: Bdf) -> Result<Vec<LenderAction>, Refusal> {
        let offer = self.offers.get_mut(&bdf).ok_or_else(|| unknown(bdf))?;
        if !matches!(offer.state, OfferState::Quarantine(_)) {
            return Err(not_in_quarantine(bdf));
        }
        offer.state = OfferState::Closing;
        Ok(self.give(bdf, FunctionWork::PutBack, Pending::Retry))
    }

    /// Gives a function out of quarantine as it is, at the word of this operator.
    pub fn clear(&mut self, bdf: Bdf, by: &str) -> Result<Vec<LenderAction>, Refusal> {
        let offer = self.offers.get_mut(&bdf).ok_or_else(|| unknown(bdf))?;
        let OfferState::Quarantine(why) = &offer.state else {
            return Err(not_in_quarantine(bdf));
        };
        offer.last_end = Some(format!(
            "cleared from quarantine by the operator, not put back ({why})"
        ));
        // Its slices stay held back: they may be mapped still.
        Ok(vec![offer.mended(Undone::Cleared(by.to_owned()))])
    }

    /// It was in quarantine when it was offered, since this lease and so why: it is put back, and
    /// nobody borrows it by this offer.
    pub fn hold_back(&mut self, bdf: Bdf, (lease, why): (LeaseId, String)) {
        if let Some(offer) = self.offers.get_mut(&bdf) {
            offer.mends_only = true;
            offer.hold_back(lease, why, self.now_ms);
        }
    }

    pub(super) fn retried(
        &mut self,
        bdf: Bdf,
        result: Result<WorkOutcome, Refusal>,
        pool: &mut SlicePool,
    ) -> Vec<LenderAction> {
        let Some(offer) = self.offers.get_mut(&bdf) else {
            return Vec::new();
        };
        match undone(&result) {
            Undone::Failed(why) => {
                offer.state = OfferState::Quarantine(why);
                Vec::new()
            }
            undone => {
                if let Some(left) = offer.left.take_if(|left| left.confirmed) {
                    pool.free_all(Owner::Lent(left.lease));
                }
                // What the borrower has not confirmed yet is freed when it does.
                offer.left = None;
                vec![offer.mended(undone)]
            }
        }
    }

    /// The borrower has confirmed that nothing of a revoked lease is mapped.
    pub fn revoke_confirmed(&mut self, lease: LeaseId, pool: &mut SlicePool) {
        let mut left = self.offers.values_mut().filter_map(|o| o.left.as_mut());
        match left.find(|left| left.lease == lease) {
            // Behind the own function still.
            Some(left) => left.confirmed = true,
            None => pool.free_all(Owner::Lent(lease)),
        }
    }

    /// The kernel takes the function away: its lease ends, and it leaves the pool.
    pub fn taken_away(&mut self, bdf: Bdf, why: &str) -> Vec<LenderAction> {
        let Some(offer) = self.offers.get_mut(&bdf) else {
            return Vec::new();
        };
        if offer.wanted.is_none() && !matches!(offer.state, OfferState::Gone(_)) {
            offer.wanted = Some(why.to_owned());
            self.wanted += 1;
        }
        self.revoke(bdf, why)
    }

    /// Functions that are to leave and that nothing is done to any more.
    pub fn leaving(&mut self) -> Vec<LenderAction> {
        if self.wanted == 0 {
            return Vec::new();
        }
        let idle = |offer: &&mut Offer| {
            let state = &offer.state;
            offer.wanted.is_some()
                && matches!(state, OfferState::Available | OfferState::Quarantine(_))
        };
        let mut gone = Vec::new();
        for offer in self.offers.values_mut().filter(idle) {
            let why = offer.wanted.take().unwrap_or_default();
            offer.state = OfferState::Gone(why);
            offer.quarantined_ms = None;
            gone.push(LenderAction::Gone(offer.entry.bdf));
        }
        self.wanted -= gone.len();
        gone
    }

    /// Ends a lease from the lender's side: nobody may wait for the borrower's leave.
    pub fn revoke(&mut self, bdf: Bdf, why: &str) -> Vec<LenderAction> {
        let cause = EndCause::Revoked(why.to_owned());
        for asked in self.asks.values_mut().filter(|asked| asked.is_of(bdf)) {
            asked.give_up(cause.clone());
        }
        let open = |offer: &Offer| matches!(offer.state, OfferState::Open | OfferState::Opening);
        let stops = |offer: &Offer| offer.stops && open(offer);
        let mut actions = Vec::new();
        if self.offers.get(&bdf).is_some_and(stops) {
            actions = self.give(bdf, FunctionWork::Stop, Pending::Stop);
        }
        actions.extend(self.end(bdf, cause));
        actions
    }

    /// What the function does can be stopped by other means than its own registers.
    pub fn stops(&mut self, bdf: Bdf) {
        if let Some(offer) = self.offers.get_mut(&bdf) {
            offer.stops = true;
        }
    }
}

impl Offer {
    pub(super) fn hold_back(&mut self, lease: LeaseId, why: String, now_ms: u64) {
        self.epoch = self.epoch.max(lease);
        self.state = OfferState::Quarantine(why);
        self.quarantined_ms = Some(now_ms);
    }

    /// Out of quarantine; what the pool is told of it.
    fn mended(&mut self, undone: Undone) -> LenderAction {
        self.state = match self.mends_only {
            // At once: its withdrawal is a step of its own.
            true => OfferState::Gone(PUT_BACK.to_owned()),
            false => OfferState::Available,
        };
        self.quarantined_ms = None;
        LenderAction::Pool(ToPool::Mended {
            bdf: self.entry.bdf,
            lease: self.epoch,
            undone,
        })
    }
}

/// What has become of a function that was to be put back.
pub(super) fn undone(result: &Result<WorkOutcome, Refusal>) -> Undone {
    match result {
        Ok(WorkOutcome::Closed(scrub)) => Undone::Reset(*scrub),
        Ok(_) => Undone::Reset(Scrub::No),
        Err(refusal) => Undone::Failed(refusal.text.clone()),
    }
}
