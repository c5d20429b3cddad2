//! The lender's verbs: which ports are to know a function, and which one it is offered through.

use super::{Router, VERB_DEADLINE, claimed, or_away, refuse};
use crate::daemon::host::way_out;
use crate::daemon::quarantine;
use crate::daemon::vocabulary::{ErrorCode, HostStatus, Outcome, Verb, VerbError};
use crate::pool::{FunctionKey, LeaseState};
use vfio_shim::model::{Bdf, Fdid};

const NO_PORT: &str = "the configuration has no [[port]]: nothing can be lent";

type Answer = Result<Outcome, VerbError>;

impl Router {
    /// Every port that is there takes it into its pool.
    pub(super) fn add(&self, bdf: Bdf, verb: &Verb) -> Answer {
        let _claim = self.claim(bdf)?;
        quarantine::check(&self.pool, bdf)?;
        let answers = self.ask_all(verb, VERB_DEADLINE);
        let refused = answers.iter().filter_map(|answer| answer.as_ref().err());
        // They judge alike: what one refuses is refused.
        if let Some(refusal) = refused.clone().find(|e| e.code != ErrorCode::PortAway) {
            return Err(refusal.clone());
        }
        one_of(answers)
    }

    pub(super) fn available(&self, bdf: Bdf, named: Option<&str>) -> Answer {
        let _claim = self.claim(bdf)?;
        quarantine::check(&self.pool, bdf)?;
        let offered = self.offered_at(bdf);
        let names: Vec<&str> = self.links.iter().map(|link| link.name.as_str()).collect();
        let at = match (offered, named) {
            (Some(at), None) => at,
            _ => way_out(&names, bdf, named)?,
        };
        if let Some(held) = offered.filter(|held| *held != at) {
            let text = format!(
                "{bdf} is offered through port `{}`, and a function goes through one: `sublet \
                 unavailable {bdf}` first",
                names[held]
            );
            return Err(refuse(ErrorCode::WrongState, text));
        }
        let verb = Verb::Available {
            bdf: bdf.into(),
            port: Some(names[at].to_owned()),
        };
        self.links[at].ask(&verb, VERB_DEADLINE)
    }

    /// At the port that offers it, else at all: each that knows it does the verb, or says why not.
    pub(super) fn wherever(&self, bdf: Bdf, verb: &Verb) -> Answer {
        let _claim = self.claim(bdf)?;
        self.where_offered(bdf, verb)
    }

    fn where_offered(&self, bdf: Bdf, verb: &Verb) -> Answer {
        let mut there = self.offering(bdf);
        there.extend(self.lent_at(bdf).filter(|at| !there.contains(at)));
        match there.is_empty() {
            true => one_of(self.ask_all(verb, VERB_DEADLINE)),
            false => self.ask_each(&there, verb),
        }
    }

    /// A function that no port offers is put back by the first port that is there.
    pub(super) fn retry(&self, bdf: Bdf) -> Answer {
        let _claim = self.claim(bdf)?;
        let held = quarantine::held_back(&self.pool, bdf);
        let verb = Verb::QuarantineRetry {
            bdf: bdf.into(),
            held: held.clone(),
        };
        if held.is_none() || self.offered_at(bdf).is_some() {
            return self.where_offered(bdf, &verb);
        }
        let mut answers = self.links.iter().map(|link| link.ask(&verb, VERB_DEADLINE));
        let there = |answer: &Answer| !is_refusal(answer, ErrorCode::PortAway);
        let first = answers.next();
        let first = first.ok_or_else(|| refuse(ErrorCode::Config, NO_PORT))?;
        match there(&first) {
            true => first,
            false => answers.find(there).unwrap_or(first),
        }
    }

    /// A function that no port has in quarantine is cleared in the store alone.
    pub(super) fn clear(&self, bdf: Bdf, i_know: bool, by: &str, verb: &Verb) -> Answer {
        let _claim = self.claim(bdf)?;
        let Some(held) = quarantine::held_back(&self.pool, bdf) else {
            return self.where_offered(bdf, verb);
        };
        if let Some(at) = self.offered_at(bdf) {
            let answer = self.links[at].ask(verb, VERB_DEADLINE);
            if !is_refusal(&answer, ErrorCode::WrongState) {
                return answer;
            }
        }
        quarantine::check_i_know(bdf, i_know)?;
        quarantine::clear(&self.pool, bdf, &held, by)
    }

    /// Which port has a function's lease, as it is written down.
    fn lent_at(&self, bdf: Bdf) -> Option<usize> {
        let function = FunctionKey::from(bdf);
        let leases = self.pool.status().unwrap_or_default().leases;
        let lease = leases.into_iter().find(|one| one.function == function)?;
        let holder = lease.holder.filter(|_| lease.state != LeaseState::Free)?;
        self.links.iter().position(|link| link.name == holder.port)
    }

    fn offered_at(&self, bdf: Bdf) -> Option<usize> {
        self.offering(bdf).first().copied()
    }

    /// Which ports say that they offer a function: one, unless one lies.
    fn offering(&self, bdf: Bdf) -> Vec<usize> {
        let node = self.config.node_id;
        let offers = |status: &Result<HostStatus, VerbError>| {
            let lent = status.as_ref().map(|status| &status.lent[..]);
            let mut lent = lent.unwrap_or_default().iter();
            lent.any(|lent| lent.fdid.0 == Fdid { node, bdf })
        };
        claimed(&self.statuses(), offers)
    }
}

fn is_refusal(answer: &Answer, code: ErrorCode) -> bool {
    answer.as_ref().is_err_and(|refusal| refusal.code == code)
}

/// Done, if one port has done it; otherwise what one of them says that answers, or that none does.
fn one_of(answers: Vec<Answer>) -> Answer {
    if answers.iter().any(Result::is_ok) {
        return Ok(Outcome::Done);
    }
    let refusals = answers.iter().filter_map(|answer| answer.as_ref().err());
    let mut said = refusals.clone();
    let said = said.find(|refusal| refusal.code != ErrorCode::PortAway);
    match (said, refusals.clone().next()) {
        (Some(refusal), _) => Err(or_away(refusal.clone(), &answers)),
        (None, Some(away)) => Err(away.clone()),
        (None, None) => Err(refuse(ErrorCode::Config, NO_PORT)),
    }
}
