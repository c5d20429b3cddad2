//! How the lender's end asks the pool for a lease, takes its answer, and ends leases by itself.

use super::{Lender, LenderAction, OfferState, Pending, no_lease, refuse, unknown};
use crate::model::Bdf;
use crate::path::grant::{AskId, EndCause, Grant, LeaseEnd, ToPool, ToPort, Undone};
use crate::path::lender::entry_now;
use crate::path::message::{LeaseId, OpId, Refusal, RefusalCode, Reply, Secret};
use crate::path::refused::Refused;
use crate::path::work::FunctionWork;

/// A lease that the pool has been asked for.
#[derive(Debug)]
pub(super) struct Asked {
    bdf: Bdf,
    /// Whom to answer; nobody, when the session of the request is over.
    answer: Option<(OpId, u16)>,
    /// Why it is not wanted any more.
    given_up: Option<EndCause>,
}

impl Asked {
    pub(super) fn is_of(&self, bdf: Bdf) -> bool {
        self.bdf == bdf
    }

    pub(super) fn give_up(&mut self, cause: EndCause) {
        // An operation's id means nothing in the next session.
        if cause == EndCause::Reclaimed {
            self.answer = None;
        }
        self.given_up.get_or_insert(cause);
    }
}

/// Refused: somebody has it.
pub(in crate::path) fn taken(bdf: Bdf) -> Refusal {
    let text = format!("{bdf} is in use: return it where it is borrowed first");
    refuse(RefusalCode::Taken, 0, text)
}

pub(super) fn granting(bdf: Bdf) -> Refusal {
    let text = format!(
        "a lease of {bdf} is being written to the lender's store: try again in a moment; if that \
         lasts, look at the lender's disk and log"
    );
    refuse(RefusalCode::Busy, 0, text)
}

fn in_quarantine(bdf: Bdf, why: &str) -> Refusal {
    let text = format!("{bdf} is in quarantine: {why}");
    refuse(RefusalCode::Quarantine, 0, text)
}

/// Whether the peer has to be told of an end, and what.
pub(super) fn tell_peer(lease: LeaseId, cause: &EndCause) -> Option<LenderAction> {
    match cause {
        EndCause::Revoked(_) | EndCause::Expired => {
            Some(LenderAction::Revoked(lease, cause.to_string()))
        }
        EndCause::Returned | EndCause::Reclaimed => None,
    }
}

impl Lender {
    pub(super) fn borrow(
        &mut self,
        answer: (OpId, u16),
        bdf: Bdf,
        borrower: Option<u16>,
        secret: Secret,
    ) -> Result<Vec<LenderAction>, Refusal> {
        let offer = self.offers.get_mut(&bdf).ok_or_else(|| unknown(bdf))?;
        match &offer.state {
            OfferState::Available => {}
            OfferState::Granting => return Err(granting(bdf)),
            OfferState::Quarantine(why) => return Err(in_quarantine(bdf, why)),
            OfferState::Gone(_) => return Err(unknown(bdf)),
            _ => return Err(taken(bdf)),
        }
        offer.state = OfferState::Granting;
        self.ask_last += 1;
        let ask = AskId(self.ask_last);
        let asked = Asked {
            bdf,
            answer: Some(answer),
            given_up: None,
        };
        self.asks.insert(ask, asked);
        Ok(vec![LenderAction::Pool(ToPool::Grant {
            ask,
            bdf,
            borrower,
            secret,
        })])
    }

    /// The pool's answers and wishes.
    pub fn pool_says(&mut self, message: ToPort) -> Vec<LenderAction> {
        match message {
            ToPort::Granted(ask, result) => self.granted(ask, result),
            ToPort::Expired(lease) => match self.leased(lease) {
                // A path that is open, or being opened, keeps its lease alive.
                Ok((bdf, offer)) if offer.state == OfferState::Leased => {
                    self.end(bdf, EndCause::Expired)
                }
                _ => Vec::new(),
            },
        }
    }

    fn granted(&mut self, ask: AskId, result: Result<Grant, Refusal>) -> Vec<LenderAction> {
        let Some(asked) = self.asks.remove(&ask) else {
            return Vec::new();
        };
        let bdf = asked.bdf;
        let Some(offer) = self.offers.get_mut(&bdf) else {
            return Vec::new();
        };
        offer.state = OfferState::Available;
        let back = |lease, cause| {
            let undone = Undone::NoPath;
            let end = LeaseEnd { cause, undone };
            LenderAction::Pool(ToPool::Ended { bdf, lease, end })
        };
        let mut actions = Vec::new();
        let result = match (result, asked.given_up) {
            // The store knows better: a port was started anew since, or the function offered anew.
            (Err(refusal), _) if refusal.code == RefusalCode::Quarantine => {
                let told = in_quarantine(bdf, &refusal.text);
                offer.hold_back(LeaseId(refusal.figure), refusal.text, self.now_ms);
                Err(told)
            }
            (Err(refusal), _) => Err(refusal),
            // Nobody waits for it any more.
            (Ok(grant), Some(cause)) => {
                offer.last_end = Some(cause.to_string());
                offer.epoch = offer.epoch.max(grant.lease);
                actions.push(back(grant.lease, cause));
                Err(no_lease())
            }
            // A store that was set back: a message of the older lease of this number would be
            // taken for one of the new.
            (Ok(grant), None) if grant.lease <= offer.epoch => {
                let text = format!(
                    "the lender's store is older than lease {} of {bdf}: restart the lender's \
                     daemon",
                    offer.epoch
                );
                actions.push(back(grant.lease, EndCause::Revoked(text.clone())));
                Err(refuse(RefusalCode::WrongState, 0, text))
            }
            (Ok(Grant { lease, secret }), None) => {
                offer.state = OfferState::Leased;
                offer.lease = Some((lease, secret));
                offer.epoch = lease;
                offer.refused = Refused::default();
                Ok(Reply::Borrowed {
                    lease,
                    secret,
                    entry: entry_now(offer),
                })
            }
        };
        if let Some((op, code)) = asked.answer {
            actions.push(LenderAction::Reply(op, code, Box::new(result)));
        }
        actions
    }

    /// Ends the lease of a function, if it has one and is not about to lose it.
    pub(super) fn end(&mut self, bdf: Bdf, cause: EndCause) -> Vec<LenderAction> {
        let Some(offer) = self.offers.get_mut(&bdf) else {
            return Vec::new();
        };
        let lease = offer.lease.map(|(lease, _)| lease);
        match (&offer.state, lease) {
            (OfferState::Open | OfferState::Opening, _) => {
                offer.state = OfferState::Closing;
                let pending = Pending::Close {
                    answer: None,
                    cause,
                };
                self.give(bdf, FunctionWork::Close, pending)
            }
            (OfferState::Leased, Some(lease)) => {
                let told = tell_peer(lease, &cause);
                let ended = offer.end_lease(cause, Undone::NoPath);
                ended.into_iter().chain(told).collect()
            }
            _ => Vec::new(),
        }
    }
}
