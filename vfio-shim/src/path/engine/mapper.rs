//! The mapper: pins and unpins guest RAM in the port's own container, one piece after the other.
//!
//! A pin of much memory takes long, and all tenants of the port wait for it. By an unpin a tenant
//! ends: it goes before every pin that has not begun, but for those of its own lease.

use super::control::Input;
use crate::model::{DmaMap, MapError, Memory, PortIova, Runtime, Span, UndoStep};
use crate::ntb::NtbPort;
use crate::path::borrower::{CallError, Pin, Step};
use crate::path::core::Event;
use crate::path::message::LeaseId;
use std::collections::{HashSet, VecDeque};
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};

/// One piece of the mapper's work.
pub(super) enum MapperJob {
    Pin(Step, LeaseId, Vec<Pin>),
    Unpin(Step, LeaseId, Vec<Span>),
    /// Tells that all of the lease that came before is done.
    Tell(LeaseId, Box<dyn FnOnce() + Send>),
}

/// Takes out what is done next of what waits, if anything does.
fn next(waiting: &mut VecDeque<MapperJob>) -> Option<MapperJob> {
    let mut pins = HashSet::new();
    let goes_first = |job: &MapperJob| match job {
        MapperJob::Pin(_, lease, _) => {
            pins.insert(*lease);
            false
        }
        MapperJob::Unpin(_, lease, _) | MapperJob::Tell(lease, _) => !pins.contains(lease),
    };
    let at = waiting.iter().position(goes_first);
    waiting.remove(at.unwrap_or(0))
}

pub(super) struct Mapper {
    pub(super) port: Arc<dyn NtbPort>,
    pub(super) base: PortIova,
    pub(super) inbox: mpsc::Sender<Input>,
    pub(super) runtime: Arc<dyn Runtime>,
}

impl Mapper {
    /// Works until the senders of `jobs` are gone.
    pub(super) fn run(self, jobs: &mpsc::Receiver<MapperJob>) {
        let mut waiting = VecDeque::new();
        while let Ok(job) = self.runtime.receive(jobs, None) {
            waiting.push_back(job);
            self.work_off(&mut waiting, jobs);
        }
    }

    fn work_off(&self, waiting: &mut VecDeque<MapperJob>, jobs: &mpsc::Receiver<MapperJob>) {
        loop {
            waiting.extend(jobs.try_iter());
            let (step, result) = match next(waiting) {
                Some(MapperJob::Pin(step, _, pins)) => (step, self.pin(&pins)),
                Some(MapperJob::Unpin(step, _, spans)) => (step, self.unpin(&spans)),
                Some(MapperJob::Tell(_, told)) => {
                    told();
                    continue;
                }
                None => return,
            };
            let result = result.map_err(|error| CallError::Pin(crate::path::words(&error)));
            // When control is gone, so is everybody who waits for the answer.
            let _ = self.inbox.send(Input::Event(Event::Pinned(step, result)));
        }
    }

    fn pin(&self, pins: &[Pin]) -> Result<(), MapError> {
        let mut maps = Vec::with_capacity(pins.len());
        for pin in pins {
            let start = self.base.0.saturating_add(pin.offset.0);
            let Some(span) = Span::new(start, pin.map.span.len()) else {
                return Err(MapError::Align(pin.map.span));
            };
            let memory = Memory::Fd(pin.map.fd.as_fd(), pin.map.fd_offset);
            maps.push(DmaMap {
                span,
                access: pin.map.access,
                memory,
            });
        }
        self.port.address_space().map(&maps)
    }

    /// Every span is tried, also behind one that failed; the first failure is told.
    fn unpin(&self, spans: &[Span]) -> Result<(), MapError> {
        let mut first = Ok(());
        for span in spans {
            self.runtime.reach(UndoStep::Unpin);
            if let Err(error) = self.port.address_space().unmap(*span) {
                tracing::error!(%span, %error, "guest memory stays pinned in the port's container");
                first = first.and(Err(error));
            }
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In which order these are done: steps, counted from 0.
    fn order(jobs: &[(bool, u64)]) -> Vec<u64> {
        let job = |(step, &(pin, lease)): (u64, &(bool, u64))| match pin {
            true => MapperJob::Pin(Step(step), LeaseId(lease), Vec::new()),
            false => MapperJob::Unpin(Step(step), LeaseId(lease), Vec::new()),
        };
        let mut waiting: VecDeque<_> = (0..).zip(jobs).map(job).collect();
        let next = || next(&mut waiting);
        let step = |job| match job {
            MapperJob::Pin(Step(step), ..) | MapperJob::Unpin(Step(step), ..) => step,
            MapperJob::Tell(..) => unreachable!("none is among them"),
        };
        std::iter::from_fn(next).map(step).collect()
    }

    #[test]
    fn unpin_goes_before_pins_of_other_leases_and_behind_all_that_is_of_its_own() {
        let (pin, unpin) = (true, false);
        assert_eq!(order(&[(pin, 1), (pin, 2), (unpin, 3)]), [2, 0, 1]);
        assert_eq!(order(&[(pin, 1), (pin, 2), (unpin, 2)]), [0, 1, 2]);
        let both = [(unpin, 1), (pin, 2), (unpin, 2), (unpin, 2), (unpin, 1)];
        assert_eq!(order(&both), [0, 4, 1, 2, 3]);
    }
}
