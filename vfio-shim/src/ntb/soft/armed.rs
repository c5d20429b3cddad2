//! A fault plan that several threads roll for, at no cost while nothing is planned.

use super::fault::{Fault, FaultDice, FaultPlan, Operation};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Default)]
pub(super) struct Armed {
    active: AtomicBool,
    dice: Mutex<FaultDice>,
}

impl Armed {
    pub(super) fn new(plan: FaultPlan) -> Self {
        let this = Self::default();
        this.arm(plan);
        this
    }

    /// From now on, counted from 1.
    pub(super) fn arm(&self, plan: FaultPlan) {
        let active = !plan.is_empty();
        *self.lock() = FaultDice::new(plan);
        self.active.store(active, Ordering::Release);
    }

    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    pub(super) fn roll(&self, operation: Operation) -> Option<Fault> {
        if !self.is_active() {
            return None;
        }
        self.lock().roll(operation)
    }

    pub(super) fn struck(&self) -> BTreeMap<Fault, u64> {
        self.lock().struck().clone()
    }

    fn lock(&self) -> MutexGuard<'_, FaultDice> {
        self.dice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
