//! A host of the soft fabric: the power switch and the freezer of all its ports and functions.

use super::link::Fabric;
use super::space::in_hardware;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Power {
    #[default]
    Running,
    Frozen,
    Stopped,
}

/// A host. Its memory and its functions are hardware and go on while it is frozen; what its
/// software asks of a port or function then waits until it is thawed, as a stopped process would.
#[derive(Default)]
pub struct SoftHost {
    power: Mutex<Power>,
    changed: Condvar,
    links: Mutex<Vec<(Weak<Fabric>, usize)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SoftHost {
    /// A running host without ports.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Its software stands still. The links stay up, and the peer's accesses are served.
    pub fn freeze(&self) {
        let mut power = lock(&self.power);
        if *power == Power::Running {
            *power = Power::Frozen;
        }
    }

    /// Its software goes on where it stood.
    pub fn thaw(&self) {
        let mut power = lock(&self.power);
        if *power == Power::Frozen {
            *power = Power::Running;
        }
        self.changed.notify_all();
    }

    /// It loses power: its ports' registers are gone, and its links are down. What its software
    /// still does has no effect on anybody else.
    pub fn stop(&self) {
        self.switch(Power::Stopped);
    }

    /// It has power again, with its ports as after a reset.
    pub fn start(&self) {
        self.switch(Power::Running);
    }

    fn switch(&self, to: Power) {
        *lock(&self.power) = to;
        self.changed.notify_all();
        let links: Vec<_> = lock(&self.links).clone();
        for (fabric, side) in links {
            if let Some(fabric) = fabric.upgrade() {
                fabric.set_power(side, to != Power::Stopped);
            }
        }
    }

    pub(super) fn attach(&self, fabric: &Arc<Fabric>, side: usize) {
        let mut links = lock(&self.links);
        links.retain(|(link, _)| link.strong_count() != 0);
        links.push((Arc::downgrade(fabric), side));
    }

    /// Software of this host does something: waits while the host is frozen.
    pub(super) fn act(&self) {
        if in_hardware() {
            return;
        }
        let mut power = lock(&self.power);
        while *power == Power::Frozen {
            let woken = self.changed.wait(power);
            power = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}
