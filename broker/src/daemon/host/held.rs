//! The lender's verbs that take: a lease from its borrower, a function out of quarantine.

use super::borrow::from_call;
use super::claim::Named;
use super::lend::{from_refusal, not_in_pool};
use super::report::availability;
use super::{LocalHost, OpenPort, refuse};
use crate::daemon::vocabulary::{
    ErrorCode, FdidText, Outcome, QuarantineList, QuarantinedPort, UndoneFunction, VerbError,
};
use vfio_shim::model::{Bdf, Fdid};
use vfio_shim::path::{CallError, OfferState};

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

    pub(super) fn retry(&self, bdf: Bdf) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        let port = self.offered_port(bdf)?;
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

    pub(super) fn clear(&self, bdf: Bdf, i_know: bool) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        let port = self.offered_port(bdf)?;
        if !i_know {
            let text = format!(
                "{bdf} was not put back to power-on state, and its next tenant may see what the \
                 last one left in it: try `sublet quarantine retry {bdf}` first, or say --i-know"
            );
            return Err(refuse(ErrorCode::NotAllowed, text));
        }
        let cleared = port.engine.clear(bdf);
        cleared.map_err(|refusal| from_refusal(&refusal))?;
        tracing::warn!(%bdf, "cleared from quarantine by the operator, as it is");
        Ok(Outcome::Done)
    }

    fn undone(&self, bdf: Bdf, state: &OfferState) -> Outcome {
        Outcome::Undone(UndoneFunction {
            fdid: FdidText::from(Fdid {
                node: self.config.node_id,
                bdf,
            }),
            available: availability(state),
            reason: match state {
                OfferState::Quarantine(why) | OfferState::Gone(why) => Some(why.clone()),
                _ => None,
            },
        })
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
