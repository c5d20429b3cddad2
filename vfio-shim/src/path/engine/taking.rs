//! Control's part in leases that are taken back, functions that leave quarantine, and functions that leave the host.

use super::control::{Control, Input};
use super::requests::Wish;
use crate::model::{Bdf, Task};
use crate::path::borrower::CallError;
use crate::path::lender::OfferState;
use crate::path::message::Refusal;
use std::sync::mpsc;

/// What is done to a function until nobody has it.
pub(crate) enum Take {
    /// Its lease ends, for this reason.
    Revoke(String),
    /// It is put back once more.
    Retry,
}

/// Told where the function stands when nothing is under way any more.
pub(crate) type TakeReply = mpsc::Sender<Result<OfferState, CallError>>;

impl Control {
    pub(super) fn take(&mut self, bdf: Bdf, take: Take, reply: TakeReply) {
        let now = self.shared.now_ms();
        let actions = match take {
            Take::Retry => self.core.retry(bdf, now),
            Take::Revoke(why) => {
                let may = self.core.lender.check_revoke(bdf);
                may.map(|()| self.core.revoke(bdf, &why, now))
            }
        };
        match actions {
            Ok(actions) => {
                self.perform(actions);
                self.takes.push((bdf, reply));
            }
            Err(refusal) => drop(reply.send(Err(CallError::Refused(refusal)))),
        }
    }

    pub(super) fn clear(&mut self, bdf: Bdf, by: &str, reply: &mpsc::Sender<Result<(), Refusal>>) {
        let cleared = self.core.clear(bdf, by, self.shared.now_ms());
        let cleared = cleared.map(|actions| self.perform(actions));
        let _ = reply.send(cleared);
    }

    /// Answers those whose function is at rest.
    pub(super) fn tell_takers(&mut self) {
        let lender = &self.core.lender;
        self.takes.retain(|(bdf, reply)| match lender.state(*bdf) {
            Some(state) if state.is_in_use() => true,
            state => {
                let state = state.cloned();
                let gone = || CallError::Gone(format!("{bdf} has left the pool meanwhile"));
                let _ = reply.send(state.ok_or_else(gone));
                false
            }
        });
    }

    pub(super) fn wish(&mut self, bdf: Bdf, wish: Wish) {
        tracing::warn!(port = self.config.name, %bdf, "{}", wish.cause());
        let now = self.shared.now_ms();
        let actions = match wish {
            Wish::Error => self.core.revoke(bdf, wish.cause(), now),
            Wish::Return => {
                // Whatever its executor waits for, the kernel waits with it.
                if let Some(worker) = self.workers.get(&bdf) {
                    let _ = worker.hurry.send(());
                }
                self.core.taken_away(bdf, wish.cause(), now)
            }
        };
        self.perform(actions);
    }

    /// The kernel wants nothing back of a function whose maker has let go of it: it is found.
    pub(super) fn look_for_orphans(&mut self) {
        let makers = self.makers.iter();
        let orphans = makers.filter_map(|(bdf, orphaned)| Some((*bdf, orphaned()?)));
        let orphans: Vec<_> = orphans.collect();
        for (bdf, why) in orphans {
            tracing::warn!(port = self.config.name, %bdf, "{why}");
            self.makers.remove(&bdf);
            let actions = self.core.taken_away(bdf, &why, self.shared.now_ms());
            self.perform(actions);
        }
    }

    /// Its executor closes it by itself; nobody waits for that here.
    pub(super) fn gone(&mut self, bdf: Bdf) {
        self.makers.remove(&bdf);
        if let Some(worker) = self.workers.remove(&bdf) {
            drop((worker.jobs, worker.hurry));
            self.leaving.insert(bdf, worker.handle);
        }
    }

    /// Whoever asks waits for the executor's end: closing a function can take its time.
    pub(super) fn withdraw(&mut self, bdf: Bdf) -> Result<Option<Task>, Refusal> {
        self.core.lender.withdraw(bdf)?;
        self.gone(bdf);
        Ok(self.leaving.remove(&bdf))
    }
}

impl Input {
    pub(super) fn revoke(
        bdf: Bdf,
        why: &str,
    ) -> (Self, mpsc::Receiver<Result<OfferState, CallError>>) {
        let (reply, answer) = mpsc::channel();
        (Self::Take(bdf, Take::Revoke(why.to_owned()), reply), answer)
    }

    pub(super) fn retry(bdf: Bdf) -> (Self, mpsc::Receiver<Result<OfferState, CallError>>) {
        let (reply, answer) = mpsc::channel();
        (Self::Take(bdf, Take::Retry, reply), answer)
    }
}
