//! Stores that a host has posted and that have not arrived yet; only a plan that holds stores fills it.

use std::collections::VecDeque;
use std::thread::ThreadId;

/// The most stores that are held; more than that pass as if none were to be held.
pub(super) const HELD_MAX: usize = 4096;

/// A store through a window.
pub(super) struct Store<'a> {
    pub(super) requester: u64,
    pub(super) window: usize,
    pub(super) offset: u64,
    pub(super) data: &'a [u8],
}

impl Store<'_> {
    pub(super) fn held(&self, due: u64) -> Held {
        Held {
            requester: self.requester,
            window: self.window,
            offset: self.offset,
            data: self.data.to_vec(),
            due,
        }
    }
}

/// A store on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) requester: u64,
    pub(super) window: usize,
    pub(super) offset: u64,
    pub(super) data: Vec<u8>,
    /// The operation at which it arrives at the latest.
    pub(super) due: u64,
}

impl Held {
    fn is_due(&self, now: Option<u64>) -> bool {
        now.is_none_or(|now| self.due <= now)
    }

    pub(super) fn as_store(&self) -> Store<'_> {
        Store {
            requester: self.requester,
            window: self.window,
            offset: self.offset,
            data: &self.data,
        }
    }
}

/// One side's stores on their way, in the order in which they were posted.
#[derive(Default)]
pub(super) struct Egress {
    held: VecDeque<Held>,
    /// Who delivers now, and whose store is under way with it.
    pub(super) deliverer: Option<ThreadId>,
    pub(super) under_way: Option<u64>,
}

impl Egress {
    /// Whether a store of this requester must wait for one before it.
    pub(super) fn blocks(&self, requester: u64) -> bool {
        self.under_way == Some(requester) || self.held.iter().any(|h| h.requester == requester)
    }

    pub(super) fn is_full(&self) -> bool {
        self.held.len() >= HELD_MAX
    }

    /// Takes a store in, never to arrive before an earlier one of its requester.
    pub(super) fn hold(&mut self, mut store: Held) {
        let before = self
            .held
            .iter()
            .rev()
            .find(|h| h.requester == store.requester);
        store.due = before.map_or(store.due, |before| store.due.max(before.due));
        self.held.push_back(store);
    }

    /// The next store to arrive: one that is due, or any (`None`).
    pub(super) fn next(&mut self, now: Option<u64>) -> Option<Held> {
        let at = self.held.iter().position(|held| held.is_due(now))?;
        self.held.remove(at)
    }

    /// Whether there is one.
    pub(super) fn is_due(&self, now: Option<u64>) -> bool {
        self.held.iter().any(|held| held.is_due(now))
    }

    /// The link went down: nothing of it arrives.
    pub(super) fn lose_all(&mut self) {
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(requester: u64, offset: u64, due: u64) -> Held {
        Held {
            requester,
            window: 0,
            offset,
            data: Vec::new(),
            due,
        }
    }

    #[test]
    fn stores_of_one_requester_keep_their_order_and_pass_those_of_another() {
        let mut egress = Egress::default();
        egress.hold(store(1, 10, 9));
        egress.hold(store(1, 11, 2));
        egress.hold(store(2, 20, 3));
        assert!(egress.blocks(1) && !egress.blocks(3));
        let mut at = |now| egress.next(now).map(|held| held.offset);
        assert_eq!(at(Some(2)), None);
        assert_eq!(at(Some(3)), Some(20));
        assert_eq!(at(Some(8)), None);
        assert_eq!(
            [at(Some(9)), at(Some(9)), at(None)],
            [Some(10), Some(11), None]
        );
    }
}
