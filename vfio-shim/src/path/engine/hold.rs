//! Who can reach the slices of a borrowed lease besides the port's process, and who waits until nobody can.

use super::{LeaseShared, lock};
use crate::model::UndoStep;
use std::sync::{Arc, mpsc};

/// Makes a worker in another process let go of the lease's slices. Called once, by the thread that
/// ends the lease, for which it must not wait.
pub type LetGo = Box<dyn FnOnce(&str, HasLetGo) + Send>;

/// Called when no store of that worker can reach the slices any more.
pub type HasLetGo = Box<dyn FnOnce() + Send>;

/// Whether somebody besides this process can reach the slices.
#[derive(Default)]
pub(crate) enum Hold {
    /// Nobody, or nobody any more.
    #[default]
    Nobody,
    /// A worker.
    Worker(LetGo),
    /// A worker that was asked to let go; who waits for that.
    Ending(Vec<HasLetGo>),
}

impl LeaseShared {
    pub(crate) fn on_lost(self: &Arc<Self>, let_go: LetGo) {
        *lock(&self.hold) = Hold::Worker(let_go);
        let lost = self.runtime.lock(&self.lost).clone();
        if let Some(why) = lost {
            self.ask_to_let_go(&why);
        }
    }

    pub(super) fn ask_to_let_go(self: &Arc<Self>, why: &str) {
        let mut hold = lock(&self.hold);
        if !matches!(*hold, Hold::Worker(_)) {
            return;
        }
        let worker = std::mem::replace(&mut *hold, Hold::Ending(Vec::new()));
        drop(hold);
        if let Hold::Worker(let_go) = worker {
            self.runtime.reach(UndoStep::LetGo);
            let state = Arc::clone(self);
            let_go(why, Box::new(move || state.has_let_go()));
        }
    }

    fn has_let_go(&self) {
        let hold = std::mem::take(&mut *lock(&self.hold));
        if let Hold::Ending(waiting) = hold {
            waiting.into_iter().for_each(|told| told());
        }
    }

    /// Tells when nobody can reach the slices any more, by whichever thread ends that. Of a lease
    /// that is lost.
    pub(super) fn when_let_go(&self, told: HasLetGo) {
        let mut hold = lock(&self.hold);
        match &mut *hold {
            Hold::Ending(waiting) => waiting.push(told),
            Hold::Nobody | Hold::Worker(_) => {
                drop(hold);
                told();
            }
        }
    }

    /// Whether nobody can reach the slices any more; waits for that, at most so long.
    pub(super) fn waits_until_let_go(&self, wait_ms: u64) -> bool {
        let (told, has_let_go) = mpsc::channel();
        self.when_let_go(Box::new(move || {
            // Nobody waits any more after the time.
            let _ = told.send(());
        }));
        let until_ms = self.runtime.now_ms().saturating_add(wait_ms);
        self.runtime.receive(&has_let_go, Some(until_ms)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::OsRuntime, path::engine::Signals};

    #[test]
    fn lease_is_held_until_its_worker_has_let_go_and_everybody_who_waits_is_told() {
        let state = LeaseShared::new(Arc::new(OsRuntime), Signals::new(1).unwrap());
        assert!(state.waits_until_let_go(0), "without a worker nobody holds");
        let (asked, told) = mpsc::channel();
        let let_go = move |why: &str, gone| asked.send((why.to_owned(), gone)).unwrap();
        state.on_lost(Box::new(let_go));
        state.lose("over".into());
        state.lose("once more".into());
        let (why, has_let_go) = told.recv().unwrap();
        assert_eq!(why, "over");
        assert!(told.try_recv().is_err(), "asked twice");
        assert!(!state.waits_until_let_go(1));
        let (tell, waiting) = mpsc::channel();
        for who in 0..2 {
            let tell = tell.clone();
            state.when_let_go(Box::new(move || tell.send(who).unwrap()));
        }
        assert!(waiting.try_recv().is_err(), "told too early");
        has_let_go();
        assert_eq!(waiting.try_iter().collect::<Vec<_>>(), [0, 1]);
        assert!(state.waits_until_let_go(0));
    }
}
