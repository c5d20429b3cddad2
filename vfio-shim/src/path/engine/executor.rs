//! The executor of one lent function: does its work piece by piece, and undoes a path in one order.
//!
//! The one order of undoing, for return, revoke, session end and a failed open alike; each step
//! is idempotent, and has a name (`UndoStep`):
//! 1. interrupts off (`SET_IRQS`), and the relay confirms that it rings no more
//! 2. bus mastering off: no DMA begins after this
//! 3. BAR slices out of the port's container: the peer reaches no register
//! 4. reset, and what it is known to leave behind
//! 5. guest RAM out of the function's container
//! 6. a read through its window, which pushes its last writes before it
//! 7. its own memory is cleared, where something else does that and can be waited for

use super::control::Input;
use super::guest_maps::GuestMaps;
use super::irq::{IrqCommand, IrqHandle, Relay, VectorCounters};
use super::keep::{Keep, ScrubPlan};
use super::requests;
use super::scrub::scrub;
use crate::model::{
    Access, AddressSpace, BAR_COUNT, Bdf, DmaMap, Function, FunctionError, IrqIndex, MapError,
    Memory, PortIova, RegionIndex, Runtime, Span, UndoStep, WindowOffset,
};
use crate::ntb::NtbPort;
use crate::path::core::Event;
use crate::path::grant::Scrub;
use crate::path::lender::JobId;
use crate::path::message::{MapRange, Refusal, RefusalCode};
use crate::path::work::{FunctionWork, OpenPlan, WorkOutcome};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;

type Done = Result<WorkOutcome, Refusal>;

/// What `status` reads of an executor.
#[derive(Default)]
pub(super) struct ExecutorShared {
    /// Of the current path, or the last one.
    pub(super) counters: Mutex<Arc<[VectorCounters]>>,
    /// Guest RAM behind the function: maps and bytes.
    pub(super) maps: AtomicU64,
    pub(super) mapped_bytes: AtomicU64,
}

pub(super) struct Executor {
    pub(super) function: Arc<dyn Function>,
    pub(super) port: Arc<dyn NtbPort>,
    pub(super) base: PortIova,
    pub(super) irq: IrqHandle,
    pub(super) inbox: mpsc::Sender<Input>,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) shared: Arc<ExecutorShared>,
    pub(super) path: Option<OpenPath>,
    pub(super) bdf: Bdf,
    /// Told when the kernel wants the function back.
    pub(super) hurry: mpsc::Receiver<()>,
    pub(super) hurried: bool,
    /// Whether its memory was cleared after its last tenant.
    pub(super) clean: bool,
    /// Dropped after the function.
    pub(super) keep: Keep,
}

pub(super) struct OpenPath {
    plan: OpenPlan,
    slices: Vec<Span>,
    maps: GuestMaps,
    armed: Option<IrqIndex>,
}

impl OpenPath {
    fn is_undone(&self) -> bool {
        self.armed.is_none() && self.slices.is_empty() && self.maps.is_empty()
    }
}

impl Executor {
    /// Works until the senders of `jobs` are gone; a path still open then is undone.
    pub(super) fn run(mut self, jobs: &mpsc::Receiver<(JobId, FunctionWork)>) {
        let runtime = Arc::clone(&self.runtime);
        requests::arm(&*self.function, self.bdf, &self.irq);
        while let Ok((job, work)) = runtime.receive(jobs, None) {
            let result = self.work(work);
            let _ = self.inbox.send(Input::Event(Event::Worked(job, result)));
        }
        if let Err(refusal) = self.close() {
            tracing::error!(%refusal, "a lent function was not put back to power-on state");
        }
        requests::disarm(&*self.function, self.bdf, &self.irq);
    }

    pub(super) fn work(&mut self, work: FunctionWork) -> Done {
        match work {
            FunctionWork::Open(plan) => self.open(plan),
            FunctionWork::Close => self.close().map(WorkOutcome::Closed),
            FunctionWork::Stop => self.stop().map(|()| WorkOutcome::Done),
            FunctionWork::PutBack => self.put_back_again().map(WorkOutcome::Closed),
            FunctionWork::Map(ranges) => self.map(&ranges),
            FunctionWork::Unmap(spans) => self.unmap(&spans),
            FunctionWork::Irqs(index, enable) => self.irqs(index, enable),
            FunctionWork::Mask {
                index: _,
                start,
                count,
                masked,
            } => {
                let lease = self.path()?.plan.lease;
                self.irq.send(IrqCommand::Mask {
                    lease,
                    start,
                    count,
                    masked,
                });
                Ok(WorkOutcome::Done)
            }
            FunctionWork::BusMaster(enable) => {
                self.command(COMMAND_BUS_MASTER, enable)?;
                Ok(WorkOutcome::Done)
            }
            FunctionWork::Reset => self.reset(),
            FunctionWork::Config { offset, len } => {
                self.read(RegionIndex::CONFIG, offset.into(), len.into())
            }
            FunctionWork::Read {
                region,
                offset,
                len,
            } => self.read(region, offset, len.into()),
            FunctionWork::Write {
                region,
                offset,
                data,
            } => {
                // Config space is the lender's: a peer that turned decoding off, or the power,
                // would have every access to the mapped BARs end in an error on this host.
                if region.bar().is_none() {
                    let text = format!("region {} is not written for a borrower", region.0);
                    return Err(Refusal::new(RefusalCode::NotAllowed, 0, text));
                }
                self.function.region_write(region, offset, &data)?;
                Ok(WorkOutcome::Done)
            }
        }
    }

    fn path(&mut self) -> Result<&mut OpenPath, Refusal> {
        self.path.as_mut().ok_or_else(Refusal::not_open)
    }

    fn read(&self, region: RegionIndex, offset: u64, len: usize) -> Done {
        let mut data = vec![0xff; len];
        self.function.region_read(region, offset, &mut data)?;
        Ok(WorkOutcome::Bytes(data))
    }

    fn command(&self, bits: u16, on: bool) -> Result<(), FunctionError> {
        let mut bytes = [0; 2];
        self.function
            .region_read(RegionIndex::CONFIG, COMMAND, &mut bytes)?;
        let old = u16::from_le_bytes(bytes);
        let new = if on { old | bits } else { old & !bits };
        self.function
            .region_write(RegionIndex::CONFIG, COMMAND, &new.to_le_bytes())
    }

    fn open(&mut self, plan: OpenPlan) -> Done {
        // What a failed undoing has left is in the way of the next tenant.
        self.close()?;
        let counters = (0..plan.irq_count)
            .map(|_| VectorCounters::default())
            .collect();
        *super::lock(&self.shared.counters) = counters;
        self.path = Some(OpenPath {
            plan,
            slices: Vec::new(),
            maps: GuestMaps::default(),
            armed: None,
        });
        let opened = self.prepare();
        if opened.is_err() {
            // The first cause is what the peer is told; a failed reset shows at the next open.
            let _ = self.close();
        }
        opened
    }

    /// The reset that counts: at the start of a lease.
    fn prepare(&mut self) -> Done {
        self.command(COMMAND_BUS_MASTER, false)?;
        self.put_back()?;
        if !self.clean {
            // Whoever had it before, nobody here has seen its memory cleared.
            self.scrub()?;
        }
        self.clean = false;
        if let Some(begins) = &self.keep.begins {
            begins();
        }
        self.map_slices()?;
        let config = self.function.info().regions[RegionIndex::CONFIG.0 as usize].size;
        Ok(WorkOutcome::Opened {
            config_len: config.min(4096) as u16,
        })
    }

    fn map_slices(&mut self) -> Result<(), Refusal> {
        let plan = self.path()?.plan.clone();
        for bar in 0..BAR_COUNT {
            let Some(slice) = plan.slices[bar] else {
                continue;
            };
            let areas = &self.function.info().regions[bar].areas;
            if areas.is_empty() {
                continue;
            }
            let aperture = self.function.bar(RegionIndex(bar as u32)).ok_or_else(|| {
                let text = format!("BAR {bar} cannot be mapped: see the lender's log");
                Refusal::new(RefusalCode::Kernel, 0, text)
            })?;
            let mut maps = Vec::new();
            for area in areas {
                maps.push(DmaMap {
                    span: self.port_span(slice, area.start(), area.len())?,
                    access: Access::READ_WRITE,
                    memory: Memory::Aperture(Arc::clone(&aperture), area.start()),
                });
            }
            self.port.address_space().map(&maps)?;
            let path = self.path()?;
            path.slices.extend(maps.iter().map(|map| map.span));
        }
        Ok(())
    }

    fn port_span(&self, slice: WindowOffset, offset: u64, len: u64) -> Result<Span, Refusal> {
        let start = self
            .base
            .0
            .checked_add(slice.0)
            .and_then(|start| start.checked_add(offset));
        start
            .and_then(|start| Span::new(start, len))
            .ok_or_else(Refusal::not_open)
    }

    fn unmap_slices(&mut self) -> Result<(), MapError> {
        let Some(path) = &mut self.path else {
            return Ok(());
        };
        unmap_each(self.port.address_space(), &mut path.slices)
    }

    fn map(&mut self, ranges: &[MapRange]) -> Done {
        let window = self.port.window(0);
        let map = |range: &MapRange| DmaMap {
            span: range.span,
            access: range.access,
            memory: Memory::Aperture(Arc::clone(&window), range.offset.0),
        };
        let maps: Vec<DmaMap<'_>> = ranges.iter().map(map).collect();
        self.path()?;
        self.function.address_space().map(&maps)?;
        let path = self.path()?;
        ranges.iter().for_each(|range| path.maps.insert(range.span));
        self.tell_maps();
        Ok(WorkOutcome::Done)
    }

    fn unmap(&mut self, spans: &[Span]) -> Done {
        self.path()?;
        let mut first = Ok(());
        for span in spans {
            match self.function.address_space().unmap(*span) {
                Ok(_) => self.path()?.maps.remove_within(*span),
                Err(error) => first = first.and(Err(error)),
            }
        }
        self.tell_maps();
        self.drain();
        first?;
        Ok(WorkOutcome::Done)
    }

    /// What the function has written has arrived when this returns, as a read through its window
    /// cannot pass it. Without it a confirmation could overtake a late write, which would land in
    /// whatever the borrower put behind the window next. Over a cut cable it reads ones: then all
    /// that was under way is lost.
    fn drain(&self) {
        let _ = self.port.window(0).read_u32(0);
    }

    fn irqs(&mut self, index: IrqIndex, enable: bool) -> Done {
        if !index.is_message() {
            // By the others this host's own kernel asks for the function back.
            let text = format!("interrupts {index:?} are not switched for a borrower");
            return Err(Refusal::new(RefusalCode::NotAllowed, 0, text));
        }
        let count = self.function.info().irqs[index as usize].count;
        let plan = self.path()?.plan.clone();
        self.irqs_off()?;
        if !enable {
            return Ok(WorkOutcome::Done);
        }
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let count = count.min(plan.irq_count);
        let made: Result<Vec<OwnedFd>, _> = (0..count).map(|_| eventfd(0, flags)).collect();
        let eventfds = made.map_err(|error| kernel("make an eventfd", error.into()))?;
        let given: Result<Vec<Option<OwnedFd>>, _> =
            eventfds.iter().map(|fd| fd.try_clone().map(Some)).collect();
        let given = given.map_err(|error| kernel("clone an eventfd", error))?;
        let counters = Arc::clone(&super::lock(&self.shared.counters));
        // The relay first: a vector that fires at once finds its reader.
        let relay = Relay {
            lease: plan.lease,
            first: plan.irq_first,
            eventfds,
            counters,
        };
        let watched = self.irq.arm(&*self.runtime, relay);
        watched.map_err(|errno| kernel("watch an interrupt", errno.into()))?;
        self.path()?.armed = Some(index);
        self.function.set_irqs(index, 0, given)?;
        Ok(WorkOutcome::Done)
    }

    fn irqs_off(&mut self) -> Result<(), FunctionError> {
        let Some(path) = &mut self.path else {
            return Ok(());
        };
        if let Some(index) = path.armed {
            let disabled = self.function.disable_irqs(index);
            // Also where that failed: a relay that went on would ring in words of the next tenant.
            self.irq.disarm(&*self.runtime, path.plan.lease);
            disabled?;
            path.armed = None;
        }
        Ok(())
    }

    fn reset(&mut self) -> Done {
        self.irqs_off()?;
        self.command(COMMAND_BUS_MASTER, false)?;
        self.unmap_slices()?;
        self.put_back()?;
        self.drain();
        self.map_slices()?;
        Ok(WorkOutcome::Done)
    }

    /// To power-on state, but for memory decoding.
    fn put_back(&mut self) -> Result<(), FunctionError> {
        if let Some(word) = &mut self.keep.reset_word {
            word.before();
        }
        match self.is_hurried() {
            // The kernel holds the function for itself while it takes it away: waiting for it
            // would be waiting for ourselves.
            true => self.function.try_reset()?,
            false => self.function.reset()?,
        }
        self.command(COMMAND_MEMORY, true)?;
        scrub(&*self.function)
    }

    /// Whether the kernel wants the function back.
    fn is_hurried(&mut self) -> bool {
        self.hurried = self.hurried || self.hurry.try_recv().is_ok();
        self.hurried
    }

    /// After a reset: the function's own memory is cleared of its tenant, as far as is known.
    fn scrub(&mut self) -> Result<Scrub, Refusal> {
        let scrub = match self.keep.scrub {
            ScrubPlan::Reset => Scrub::No,
            ScrubPlan::DriverWaits => Scrub::Waited,
            ScrubPlan::Wait { ms } => {
                let until_ms = self.runtime.now_ms().saturating_add(ms);
                let cut_short = match self.is_hurried() {
                    true => Some("the kernel took it away"),
                    false => match self.runtime.receive(&self.hurry, Some(until_ms)) {
                        Ok(()) => Some("the kernel took it away"),
                        Err(mpsc::RecvTimeoutError::Disconnected) => Some("the daemon ended"),
                        Err(mpsc::RecvTimeoutError::Timeout) => None,
                    },
                };
                if let Some(who) = cut_short {
                    self.hurried = true;
                    let text = format!("{who} before its memory was cleared");
                    return Err(Refusal::new(RefusalCode::Kernel, 0, text));
                }
                Scrub::Assumed
            }
        };
        match self.keep.reset_word.as_mut().and_then(|word| word.failed()) {
            Some(line) => Err(Refusal::new(RefusalCode::Kernel, 0, line)),
            None => Ok(scrub),
        }
    }

    fn stop(&self) -> Result<(), Refusal> {
        match &self.keep.stop {
            Some(stop) => stop().map_err(|error| kernel("stop the function", error).into()),
            None => Ok(()),
        }
    }

    /// Whatever of undoing has failed, once more, and the reset in any case.
    fn put_back_again(&mut self) -> Result<Scrub, Refusal> {
        if self.path.is_some() {
            return self.close();
        }
        self.command(COMMAND_BUS_MASTER, false)?;
        self.put_back()?;
        let scrub = self.scrub()?;
        self.clean = true;
        self.drain();
        Ok(scrub)
    }

    /// The one order of undoing. Every step is tried even when one before it failed; the first
    /// failure is told.
    fn close(&mut self) -> Result<Scrub, Refusal> {
        if self.path.is_none() {
            return Ok(Scrub::No);
        }
        let runtime = Arc::clone(&self.runtime);
        runtime.reach(UndoStep::Interrupts);
        let irqs = self.irqs_off().map_err(Refusal::from);
        runtime.reach(UndoStep::BusMaster);
        let bus_master = self.command(COMMAND_BUS_MASTER, false);
        let bus_master = bus_master.map_err(Refusal::from);
        runtime.reach(UndoStep::Slices);
        let slices = self.unmap_slices().map_err(Refusal::from);
        runtime.reach(UndoStep::Reset);
        let reset = self.put_back().map_err(Refusal::from);
        runtime.reach(UndoStep::Memory);
        let maps = self.unmap_all().map_err(Refusal::from);
        // What is still armed or mapped is tried again before anybody else gets the function.
        self.path.take_if(|path| path.is_undone());
        self.tell_maps();
        runtime.reach(UndoStep::Drain);
        self.drain();
        irqs.and(bus_master).and(slices).and(reset).and(maps)?;
        // Last, as it can take its time: by now nobody's memory is behind the function.
        runtime.reach(UndoStep::Scrub);
        let scrub = self.scrub()?;
        self.clean = true;
        Ok(scrub)
    }

    fn tell_maps(&self) {
        let maps = self.path.as_ref().map(|path| &path.maps);
        let (count, bytes) = maps.map_or((0, 0), |maps| (maps.count(), maps.bytes()));
        self.shared.maps.store(count, Ordering::Relaxed);
        self.shared.mapped_bytes.store(bytes, Ordering::Relaxed);
    }

    fn unmap_all(&mut self) -> Result<(), MapError> {
        let Some(path) = &mut self.path else {
            return Ok(());
        };
        let mut left = path.maps.spans();
        let unmapped = unmap_each(self.function.address_space(), &mut left);
        path.maps = GuestMaps::default();
        left.into_iter().for_each(|span| path.maps.insert(span));
        unmapped
    }
}

/// Every span is tried; what could not be unmapped stays in the list, and the first failure is told.
fn unmap_each(space: &dyn AddressSpace, spans: &mut Vec<Span>) -> Result<(), MapError> {
    let mut first = Ok(());
    spans.retain(|span| match space.unmap(*span) {
        Ok(_) => false,
        Err(error) => {
            tracing::error!(%span, %error, "a mapping of an ended path stays");
            if first.is_ok() {
                first = Err(error);
            }
            true
        }
    });
    first
}

fn kernel(act: &'static str, source: std::io::Error) -> FunctionError {
    FunctionError::Kernel { act, source }
}
