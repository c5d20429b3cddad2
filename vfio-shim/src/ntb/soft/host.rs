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
    pace: Option<Box<Pace>>,
}

/// What is called before each thing that a host's software does with a port or a function.
type Pace = dyn Fn() + Send + Sync;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SoftHost {
    /// A running host without ports.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// One whose software calls `pace` before each thing that it does with a port or a function,
    /// and goes on when that returns: a scheduler may let others run there.
    pub fn paced(pace: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            pace: Some(Box::new(pace)),
            ..Self::default()
        })
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
        if let Some(pace) = &self.pace {
            pace();
        }
        let mut power = lock(&self.power);
        while *power == Power::Frozen {
            let woken = self.changed.wait(power);
            power = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SoftLink, SoftPortConfig, fault::FaultPlan};
    use super::*;
    use crate::model::{Access, DmaMap, Memory, PortIova, Span};
    use crate::ntb::NtbPort;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn paced_hosts_software_is_paced_and_its_hardware_is_not() {
        let paces = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&paces);
        let paced = SoftHost::paced(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        let config = SoftPortConfig {
            window_bytes: [1 << 20; 2],
        };
        let hosts = [paced, SoftHost::new()];
        let link = SoftLink::between(hosts, [config; 2], FaultPlan::default()).unwrap();
        let own = link.port(0);
        own.window_open(0, PortIova(0), 1 << 20).unwrap();
        (0..2).for_each(|side| link.port(side).link_enable(true));
        assert_eq!(paces.load(Ordering::Relaxed), 2);
        let map = DmaMap {
            span: Span::new(0, 4096).unwrap(),
            access: Access::READ_WRITE,
            memory: Memory::Aperture(own.window(0), 0),
        };
        own.address_space().map(&[map]).unwrap();
        assert_eq!(paces.load(Ordering::Relaxed), 3);
        // The peer's store goes through this host's IOMMU into this host's own window.
        link.port(1).window(0).write(0, &[1]);
        assert_eq!(paces.load(Ordering::Relaxed), 3);
    }
}
