//! Functions that could not be put back: nobody is granted a lease of one until a port has told that it is mended.
//!
//! The mark is the last lease's end, which is in the store: it outlives the offer, the port and the
//! daemon.

use super::super::record::{End, FunctionKey, Move, Scrubbed};
use super::{Action, Entry, LeaseMachine, LeaseState, LeaseStatus, Now, Writing, refuse};
use vfio_shim::path::{Refusal, RefusalCode};

impl LeaseStatus {
    /// Why nobody gets the function.
    pub fn quarantine(&self) -> Option<&str> {
        why(self.holder.is_some(), self.last_end.as_ref())
    }
}

fn why(held: bool, last_end: Option<&End>) -> Option<&str> {
    match &last_end?.scrubbed {
        Scrubbed::Failed(why) if !held => Some(why),
        _ => None,
    }
}

impl LeaseMachine {
    /// The function of a lease that is over may be lent again, where it might not.
    pub(super) fn mended(
        &mut self,
        function: &FunctionKey,
        epoch: u64,
        scrubbed: Scrubbed,
        now: Now,
        out: &mut Vec<Action>,
    ) {
        let entry = self.entries.get_mut(function);
        let entry = entry.filter(|entry| entry.epoch == epoch && entry.quarantine().is_some());
        let is_mend = !matches!(scrubbed, Scrubbed::Failed(_) | Scrubbed::NoPath);
        if let Some(entry) = entry.filter(|_| is_mend) {
            entry.mend = Some(scrubbed);
            self.serve(function, now, out);
        }
    }
}

impl Entry {
    pub(super) fn quarantine(&self) -> Option<&str> {
        why(self.holder.is_some(), self.last_end.as_ref())
    }

    /// Writes down what has become of a free function, and refuses whoever asks for one that
    /// nobody gets. Whether it can be granted.
    pub(super) fn may_be_lent(&mut self, now: Now, out: &mut Vec<Action>) -> bool {
        let Some(why) = self.quarantine().map(str::to_owned) else {
            self.mend = None;
            return true;
        };
        if let (Some(scrubbed), Some(end)) = (self.mend.take(), &mut self.last_end) {
            end.scrubbed = scrubbed.clone();
            self.become_(LeaseState::Ending);
            self.write(Writing::End, Move::Mended(scrubbed), now, out);
        } else if let Some(ask) = self.waiting.take() {
            let refusal = Refusal::new(RefusalCode::Quarantine, self.epoch, why);
            out.push(refuse(ask, refusal));
        }
        false
    }
}
