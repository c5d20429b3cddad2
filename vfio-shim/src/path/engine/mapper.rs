//! The mapper: pins and unpins guest RAM in the port's own container, one piece after the other.

use super::control::Input;
use crate::model::{DmaMap, MapError, Memory, PortIova, Runtime, Span, UndoStep};
use crate::ntb::NtbPort;
use crate::path::borrower::{CallError, Pin, Step};
use crate::path::core::Event;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};

/// One piece of the mapper's work.
pub(super) enum MapperJob {
    Pin(Step, Vec<Pin>),
    Unpin(Step, Vec<Span>),
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
        while let Ok(job) = self.runtime.receive(jobs, None) {
            let (step, result) = match job {
                MapperJob::Pin(step, pins) => (step, self.pin(&pins)),
                MapperJob::Unpin(step, spans) => (step, self.unpin(&spans)),
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
