//! The lender's verbs that take: a lease from its borrower, a function out of quarantine.

use super::borrow::from_call;
use super::claim::Named;
use super::lend::{from_refusal, not_in_pool};
use super::report::availability;
use super::{LocalHost, OpenPort, refuse};
use crate::daemon::quarantine;
use crate::daemon::vocabulary::{
    Availability, ErrorCode, FdidText, HeldBack, Outcome, QuarantineList, QuarantinedPort,
    UndoneFunction, VerbError,
};
use vfio_shim::model::{Bdf, Fdid};
use vfio_shim::path::{CallError, OfferState, clean_text};

/// Why a lease ends by `revoke`.
const REVOKED: &str = "revoked by the lender's operator";
/// How long an undoing may take where nobody says: a reset of 5 s, and a memory that is cleared.
const UNDO_WAIT_S: u32 = 30;

impl LocalHost {
    /// The port that a function is offered through.
    fn offered_port(&self, bdf: Bdf) -> Result<&OpenPort, VerbError> {
        match self.offered_at(bdf)? {
            Some(port) => Ok(&self.ports[port]),
            None => {
                let text = format!("{bdf} is not offered, so nobody has it: see `sublet list`");
                Err(refuse(ErrorCode::WrongState, text))
            }
        }
    }

    pub(super) fn revoke(&self, bdf: Bdf, deadline_s: Option<u32>) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        let port = self.offered_port(bdf)?;
        let wait_ms = u64::from(deadline_s.unwrap_or(UNDO_WAIT_S)) * 1000;
        tracing::warn!(%bdf, "its lease is {REVOKED}");
        let ended = port.engine.revoke_and_wait(bdf, REVOKED, wait_ms);
        ended
            .map(|state| self.undone(bdf, &state))
            .map_err(|error| still_undoing(bdf, &error))
    }

    pub(super) fn quarantined(&self) -> Result<Outcome, VerbError> {
        let report = self.report();
        let ports = report.ports.into_iter().map(|port| QuarantinedPort {
            port: port.name,
            held: port.quarantine,
        });
        Ok(Outcome::Quarantine(QuarantineList {
            functions: report.quarantine.functions,
            ports: ports.collect(),
        }))
    }

    /// Refused where the store knows that nobody gets the function. A port's own process has no
    /// store: there the daemon has looked.
    pub(super) fn check_quarantine(&self, bdf: Bdf) -> Result<(), VerbError> {
        let pool = self.pool.as_ref();
        pool.map_or(Ok(()), |pool| quarantine::check(pool, bdf))
    }

    /// What is known of a function that is in quarantine and not offered: by the store, or by whom
    /// a port's own process is told.
    fn unoffered(&self, bdf: Bdf, told: Option<HeldBack>) -> Option<HeldBack> {
        if let Ok(Some(_)) = self.offered_at(bdf) {
            return None;
        }
        let pool = self.pool.as_ref();
        told.or_else(|| pool.and_then(|pool| quarantine::held_back(pool, bdf)))
    }

    pub(super) fn retry(&self, bdf: Bdf, told: Option<HeldBack>) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        self.forget_gone_of_the_pool(bdf)?;
        match self.unoffered(bdf, told) {
            Some(held) => self.put_back_unoffered(bdf, held),
            None => self.put_back(bdf, self.offered_port(bdf)?),
        }
    }

    /// Nobody can borrow it by this offer, which is withdrawn at once. Past the wait it stays, as
    /// the undoing goes on, and is as one that the kernel took away when that is done.
    fn put_back_unoffered(&self, bdf: Bdf, held: HeldBack) -> Result<Outcome, VerbError> {
        let port = self.ports.first();
        let port = port.ok_or_else(|| refuse(ErrorCode::Config, "no port can open it"))?;
        let _offering = self.room(bdf, 0)?;
        let offer = self.offer(bdf, 0, Some(held))?;
        let was_in_pool = self.state().lent.contains_key(&bdf);
        self.state().lent.entry(bdf).or_default().offer = Some(offer);
        let done = self.put_back(bdf, port);
        if port.engine.withdraw(bdf).is_ok() {
            let mut state = self.state();
            match was_in_pool {
                true => state.lent.entry(bdf).or_default().offer = None,
                false => drop(state.lent.remove(&bdf)),
            }
        }
        done.map(|_| self.undone_as(bdf, Availability::Unavailable, None))
    }

    fn put_back(&self, bdf: Bdf, port: &OpenPort) -> Result<Outcome, VerbError> {
        let state = port.engine.retry(bdf, u64::from(UNDO_WAIT_S) * 1000);
        match state.map_err(|error| still_undoing(bdf, &error))? {
            OfferState::Quarantine(why) => {
                let text = format!(
                    "{bdf} stays in quarantine: {why}. Look at this host's kernel log; a function \
                     that is not reset by this needs its host to be restarted"
                );
                Err(refuse(ErrorCode::Quarantine, text))
            }
            state => {
                tracing::info!(%bdf, "out of quarantine: put back to power-on state");
                Ok(self.undone(bdf, &state))
            }
        }
    }

    pub(super) fn clear(&self, bdf: Bdf, i_know: bool, by: &str) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        self.forget_gone_of_the_pool(bdf)?;
        if let (Some(pool), Some(held)) = (&self.pool, self.unoffered(bdf, None)) {
            quarantine::check_i_know(bdf, i_know)?;
            return quarantine::clear(pool, bdf, &held, by);
        }
        let port = self.offered_port(bdf)?;
        quarantine::check_i_know(bdf, i_know)?;
        let cleared = port.engine.clear(bdf, &clean_text(by));
        cleared.map_err(|refusal| from_refusal(&refusal))?;
        tracing::warn!(%bdf, by, "cleared from quarantine by the operator, as it is");
        Ok(Outcome::Done)
    }

    fn undone(&self, bdf: Bdf, state: &OfferState) -> Outcome {
        let reason = match state {
            OfferState::Quarantine(why) | OfferState::Gone(why) => Some(why.clone()),
            _ => None,
        };
        self.undone_as(bdf, availability(state), reason)
    }

    fn undone_as(&self, bdf: Bdf, available: Availability, reason: Option<String>) -> Outcome {
        Outcome::Undone(UndoneFunction {
            fdid: FdidText::from(Fdid {
                node: self.config.node_id,
                bdf,
            }),
            available,
            reason,
        })
    }

    /// The same where it may not be in the pool at all.
    pub(super) fn forget_gone_of_the_pool(&self, bdf: Bdf) -> Result<(), VerbError> {
        let is_there = self.state().lent.contains_key(&bdf);
        match is_there {
            true => self.forget_gone(bdf),
            false => Ok(()),
        }
    }

    /// Forgets an offer whose function the kernel has taken away.
    pub(super) fn forget_gone(&self, bdf: Bdf) -> Result<(), VerbError> {
        let Some(port) = self.offered_at(bdf)? else {
            return Ok(());
        };
        let engine = &self.ports[port].engine;
        let is_gone = |status: vfio_shim::path::PortStatus| {
            let mut lent = status.lent.into_iter();
            lent.any(|l| l.offer.entry.bdf == bdf && matches!(l.offer.state, OfferState::Gone(_)))
        };
        if engine.status().is_some_and(is_gone) {
            let withdrawn = engine.withdraw(bdf);
            withdrawn.map_err(|refusal| from_refusal(&refusal))?;
            let mut state = self.state();
            let lent = state.lent.get_mut(&bdf).ok_or_else(|| not_in_pool(bdf))?;
            lent.offer = None;
        }
        Ok(())
    }
}

fn still_undoing(bdf: Bdf, error: &CallError) -> VerbError {
    match error {
        CallError::Timeout(ms) => {
            let text = format!(
                "the path to {bdf} is not undone after {} s; that goes on, and nobody gets the \
                 function before: see `sublet status`",
                ms / 1000
            );
            refuse(ErrorCode::Timeout, text)
        }
        error => from_call(error),
    }
}
