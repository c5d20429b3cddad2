//! Functions in quarantine as the store of leases knows them, whether they are offered or not.

use super::status::{HostStatus, QuarantinedFunction};
use super::vocabulary::{
    Availability, ErrorCode, FdidText, HeldBack, ListEntry, Outcome, VerbError,
};
use crate::pool::{FunctionKey, LeaseStatus, PoolService, PoolStatus, Scrubbed};
use vfio_shim::model::{Bdf, Fdid};
use vfio_shim::path::clean_text;

fn of(pool: &PoolStatus, bdf: Bdf) -> Option<HeldBack> {
    let function = FunctionKey::from(bdf);
    let lease = pool
        .leases
        .iter()
        .find(|lease| lease.function == function)?;
    held(lease)
}

fn held(lease: &LeaseStatus) -> Option<HeldBack> {
    Some(HeldBack {
        epoch: lease.epoch,
        reason: lease.quarantine()?.to_owned(),
    })
}

/// What the store knows of a function that nobody gets.
pub(super) fn held_back(pool: &PoolService, bdf: Bdf) -> Option<HeldBack> {
    of(&pool.status()?, bdf)
}

/// Refused while nobody gets the function.
pub(super) fn check(pool: &PoolService, bdf: Bdf) -> Result<(), VerbError> {
    match held_back(pool, bdf) {
        None => Ok(()),
        Some(HeldBack { reason, .. }) => {
            let text = format!(
                "{bdf} is in quarantine: {reason}. `sublet quarantine retry {bdf}` puts it back, \
                 `sublet quarantine clear {bdf} --i-know` gives it out as it is"
            );
            Err(VerbError::new(ErrorCode::Quarantine, text))
        }
    }
}

/// Refused to who has not said that he knows.
pub(super) fn check_i_know(bdf: Bdf, i_know: bool) -> Result<(), VerbError> {
    match i_know {
        true => Ok(()),
        false => {
            let text = format!(
                "{bdf} was not put back to power-on state, and its next tenant may see what the \
                 last one left in it: try `sublet quarantine retry {bdf}` first, or say --i-know"
            );
            Err(VerbError::new(ErrorCode::NotAllowed, text))
        }
    }
}

/// Gives out a function that is not offered, at the word of this operator.
pub(super) fn clear(
    pool: &PoolService,
    bdf: Bdf,
    held: &HeldBack,
    by: &str,
) -> Result<Outcome, VerbError> {
    let cleared = Scrubbed::Cleared(clean_text(by));
    pool.mend(FunctionKey::from(bdf), held.epoch, cleared);
    let status = pool.status().unwrap_or_default();
    if of(&status, bdf).is_none() {
        tracing::warn!(%bdf, by, "cleared from quarantine by the operator, as it is");
        return Ok(Outcome::Done);
    }
    let why = status.store_error.unwrap_or_else(|| "it is busy".into());
    let text = format!("that {bdf} is cleared could not be written down ({why}): try again");
    Err(VerbError::new(ErrorCode::Kernel, text))
}

/// What no port tells, as it does not offer the function.
pub(super) fn add_unoffered(report: &mut HostStatus, pool: &PoolStatus) {
    let node = report.node.id;
    for lease in &pool.leases {
        let (Some(held), Ok(bdf)) = (held(lease), lease.function.as_ref().parse()) else {
            continue;
        };
        let fdid = FdidText::from(Fdid { node, bdf });
        let told = &mut report.quarantine.functions;
        if told.iter().all(|function| function.fdid != fdid) {
            told.push(QuarantinedFunction {
                fdid,
                reason: held.reason,
                for_ms: None,
            });
        }
    }
}

/// The same in a list.
pub(super) fn mark(entries: &mut [ListEntry], node: u16, pool: &PoolStatus) {
    for entry in entries {
        let fdid = entry.fdid.0;
        if fdid.node == node && of(pool, fdid.bdf).is_some() {
            entry.available = Availability::Quarantine;
        }
    }
}
