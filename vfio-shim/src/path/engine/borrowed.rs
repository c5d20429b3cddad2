//! The borrowed function: the borrower's end of a path as a `Function`, for the vfio-user server.

use super::path_port::{InProcess, PathPort, SliceAperture};
use super::{Engine, LeaseShared, MAP_WAIT_MS, RESET_WAIT_MS, Signals, UNMAP_WAIT_MS, lock};
use crate::model::{
    AddressSpace, Aperture, BAR_COUNT, DmaMap, Function, FunctionError, FunctionIds, FunctionInfo,
    IrqIndex, MapError, Memory, RegionIndex, Runtime, ShadowConfig, Span, Task, WindowOffset,
};
use crate::path::borrower::{Answer, Call, CallError, GuestMap, MAPS_MAX, OpenedPath};
use crate::path::message::{LeaseId, Request};
use crate::path::refusal::RefusalCode;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::collections::{HashMap, hash_map::Entry};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// Interrupt requests on x86: an address space of guest RAM never maps them (Intel SDM 3A, 12.11).
const MSI_HOLE: (u64, u64) = (0xfee0_0000, 0xfef0_0000);
/// What guest-physical addresses can be at most: 52 bits.
const GUEST_END: u64 = 1 << 52;

struct Trigger {
    fd: Option<OwnedFd>,
    masked: bool,
    held: bool,
    signals: u64,
}

struct Triggers {
    armed: Option<IrqIndex>,
    vectors: Vec<Trigger>,
    /// Where the VMM wants to be asked to let go of the function.
    request: Option<OwnedFd>,
}

/// A function of another host, as this host's VMM sees it.
pub struct BorrowedFunction {
    port: Arc<dyn PathPort>,
    lease: LeaseId,
    info: FunctionInfo,
    slices: [Option<WindowOffset>; BAR_COUNT],
    shadow: Mutex<ShadowConfig>,
    state: Arc<LeaseShared>,
    triggers: Arc<Mutex<Triggers>>,
    stop: OwnedFd,
    signaller: Mutex<Option<Task>>,
}

impl BorrowedFunction {
    /// Served in the port's own process: a thread of it writes the VMM's eventfds.
    pub(super) fn start(
        engine: Arc<Engine>,
        lease: LeaseId,
        (ids, opened): (FunctionIds, OpenedPath),
        state: Arc<LeaseShared>,
    ) -> Result<Arc<Self>, CallError> {
        let runtime = Arc::clone(engine.runtime());
        let port = Arc::new(InProcess {
            engine,
            state: Arc::clone(&state),
        });
        let function = Self::of(port, lease, (ids, opened), state)?;
        let failed = |error: std::io::Error| CallError::Gone(error.to_string());
        let signaller = Signaller {
            state: Arc::clone(&function.state),
            triggers: Arc::clone(&function.triggers),
            stop: function.stop.try_clone().map_err(failed)?,
        };
        let name = format!("irq-lease-{lease}");
        let spawned = runtime.spawn(name, Box::new(|| signaller.run()));
        *lock(&function.signaller) = Some(spawned.map_err(failed)?);
        Ok(Arc::new(function))
    }

    /// Served in a worker's own process, whose owner waits for `wake_fd` and then calls `deliver`.
    pub fn at(
        runtime: Arc<dyn Runtime>,
        port: Arc<dyn PathPort>,
        lease: LeaseId,
        (ids, opened): (FunctionIds, OpenedPath),
    ) -> Result<Self, CallError> {
        let failed = |error: std::io::Error| CallError::Gone(error.to_string());
        let irqs = &opened.function.irqs;
        let count = irqs[IrqIndex::Msi as usize].count;
        let count = count.max(irqs[IrqIndex::Msix as usize].count);
        let signals = Signals::new(count).map_err(failed)?;
        let state = LeaseShared::new(runtime, signals);
        Self::of(port, lease, (ids, opened), state)
    }

    fn of(
        port: Arc<dyn PathPort>,
        lease: LeaseId,
        (ids, opened): (FunctionIds, OpenedPath),
        state: Arc<LeaseShared>,
    ) -> Result<Self, CallError> {
        let (info, slices) = opened.function.into_parts();
        let info = told(info, ids);
        let shadow = ShadowConfig::new(&opened.config, &info)
            .map_err(|error| CallError::Gone(crate::path::words(&error)))?;
        let count = vector_count(&info);
        let vector = || Trigger {
            fd: None,
            masked: false,
            held: false,
            signals: 0,
        };
        let triggers = Triggers {
            armed: None,
            vectors: (0..count).map(|_| vector()).collect(),
            request: None,
        };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = eventfd(0, flags);
        Ok(Self {
            port,
            lease,
            info,
            slices,
            shadow: Mutex::new(shadow),
            state,
            triggers: Arc::new(Mutex::new(triggers)),
            stop: stop.map_err(|error| CallError::Gone(error.to_string()))?,
            signaller: Mutex::new(None),
        })
    }

    /// Readable when `deliver` has something to look at.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.state.signals.wake_fd()
    }

    /// A vector was raised at the port.
    pub fn raise(&self, vector: u32) {
        self.state.signals.raise(vector);
    }

    /// Writes the VMM's eventfds of all vectors that were raised and are not masked.
    pub fn deliver(&self) {
        deliver(&self.state, &self.triggers);
    }

    /// The lease is over: when it returns, no load or store of it is under way and none begins.
    pub fn lose(&self, why: &str) {
        self.state.lose(why.to_owned());
    }

    pub(super) fn state(&self) -> &Arc<LeaseShared> {
        &self.state
    }

    /// The lease.
    pub fn lease(&self) -> LeaseId {
        self.lease
    }

    /// Why the lease is lost, if it is.
    pub fn lost(&self) -> Option<String> {
        self.state.runtime.lock(&self.state.lost).clone()
    }

    /// Per vector: how often its eventfd was signalled.
    pub fn signals(&self) -> Vec<u64> {
        lock(&self.triggers)
            .vectors
            .iter()
            .map(|vector| vector.signals)
            .collect()
    }

    /// Per vector: how often a scan found it raised.
    pub fn scanned(&self) -> Vec<u64> {
        self.state.signals.scanned()
    }

    fn forward(
        &self,
        act: &'static str,
        request: Request,
        wait_ms: u64,
    ) -> Result<Answer, FunctionError> {
        if let Some(why) = self.lost() {
            return Err(FunctionError::Gone(why));
        }
        let answer = self.port.call(Call::Forward(self.lease, request), wait_ms);
        answer.map_err(|error| match error {
            CallError::Gone(why) => FunctionError::Gone(why),
            CallError::Timeout(ms) => FunctionError::Timeout { act, ms },
            other => FunctionError::Peer {
                act,
                cause: other.to_string(),
            },
        })
    }

    fn check(&self, region: RegionIndex, offset: u64, len: usize) -> Result<(), FunctionError> {
        let size = self.info.region(region).map_or(0, |region| region.size);
        match Span::new(offset, len as u64) {
            Some(span) if span.end() <= size => Ok(()),
            span => {
                let span = span.or(Span::new(offset, 0)).unwrap_or(EMPTY);
                Err(FunctionError::OutOfRange {
                    region: region.0,
                    span,
                })
            }
        }
    }

    fn in_area(&self, region: RegionIndex, offset: u64, len: usize) -> bool {
        let Some(info) = self.info.region(region) else {
            return false;
        };
        let span = Span::new(offset, len as u64);
        span.is_some_and(|span| info.areas.iter().any(|area| area.contains(span)))
    }

    fn config_write(&self, offset: u64, data: &[u8]) -> Result<(), FunctionError> {
        let effects = lock(&self.shadow).write(offset, data);
        if let Some(enable) = effects.bus_master {
            let request = Request::BusMaster {
                lease: self.lease,
                enable,
            };
            self.forward("set bus mastering", request, MAP_WAIT_MS)?;
        }
        if effects.flr {
            self.reset()?;
        }
        if let Some(mask) = effects.msi_mask {
            self.mask_msi(mask)?;
        }
        Ok(())
    }

    /// A plain MSI's mask bits live in config space (PCI 3.0 section 6.8.1.7).
    fn mask_msi(&self, mask: u32) -> Result<(), FunctionError> {
        for vector in 0..self.info.irqs[IrqIndex::Msi as usize].count.min(32) {
            let masked = mask & 1 << vector != 0;
            if lock(&self.triggers).vectors[vector as usize].masked != masked {
                self.mask_irqs(IrqIndex::Msi, vector, 1, masked)?;
            }
        }
        Ok(())
    }

    /// A register that no slice covers, by way of the lender. One that is gone reads as ones.
    fn read_far(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        let (lease, region) = (self.lease, region.0 as u8);
        let request = Request::RegionRead {
            lease,
            region,
            offset,
            len: data.len() as u8,
        };
        match self.forward("read a register", request, MAP_WAIT_MS) {
            Ok(Answer::Bytes(bytes)) if bytes.len() == data.len() => data.copy_from_slice(&bytes),
            Ok(_) | Err(FunctionError::Gone(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn write_far(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        let (lease, region, data) = (self.lease, region.0 as u8, data.to_vec());
        let request = Request::RegionWrite {
            lease,
            region,
            offset,
            data,
        };
        match self.forward("write a register", request, MAP_WAIT_MS) {
            Ok(_) | Err(FunctionError::Gone(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whichever of MSI and MSI-X the guest uses: all its vectors are armed on the lender at the
    /// first trigger, and stay so until a reset. A trigger swap after that is local.
    fn arm(&self, index: IrqIndex) -> Result<(), FunctionError> {
        {
            let mut held = lock(&self.triggers);
            if held.armed == Some(index) {
                return Ok(());
            }
            // The lender takes those off first, also where it then cannot arm these.
            held.armed = None;
        }
        let request = Request::Irqs {
            lease: self.lease,
            index,
            enable: true,
        };
        self.forward("enable interrupts", request, RESET_WAIT_MS)?;
        lock(&self.triggers).armed = Some(index);
        Ok(())
    }

    /// So that both ends agree again, also where this one has forgotten its masks.
    fn unmask_all(&self, index: IrqIndex) -> Result<(), FunctionError> {
        let request = Request::Mask {
            lease: self.lease,
            index,
            start: 0,
            count: self.info.irqs[index as usize].count,
            masked: false,
        };
        match self.forward("unmask interrupts", request, MAP_WAIT_MS) {
            Ok(_) | Err(FunctionError::Gone(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The function is reset. The masks went with that, here as at the lender, and with them what
    /// was raised before it: a guest that is about to lose the function may have masked it.
    fn forget(&self) {
        lock(&self.shadow).reset();
        let mut held = lock(&self.triggers);
        self.state.signals.take(|_| {});
        for vector in &mut held.vectors {
            (vector.masked, vector.held) = (false, false);
        }
    }

    fn vectors(
        &self,
        index: IrqIndex,
        start: u32,
        count: usize,
    ) -> Result<std::ops::Range<usize>, FunctionError> {
        let have = self.info.irqs[index as usize].count;
        let end = u64::from(start) + count as u64;
        if end > u64::from(have) {
            return Err(FunctionError::NoVector {
                index,
                start,
                end,
                count: have,
            });
        }
        Ok(start as usize..end as usize)
    }
}

/// An access cut into naturally aligned pieces of at most 8 bytes, as a message takes them.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let end = offset + len as u64;
    let mut at = offset;
    std::iter::from_fn(move || {
        let left = end.checked_sub(at).filter(|left| *left != 0)?;
        let aligned = 1u64 << at.trailing_zeros().min(3);
        let piece = aligned.min(1 << left.ilog2());
        let this = at;
        at += piece;
        Some((this, piece as usize))
    })
}

const EMPTY: Span = match Span::new(0, 0) {
    Some(span) => span,
    None => panic!("an empty span fits"),
};

fn vector_count(info: &FunctionInfo) -> u32 {
    info.irqs[IrqIndex::Msi as usize]
        .count
        .max(info.irqs[IrqIndex::Msix as usize].count)
}

impl Function for BorrowedFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.check(region, offset, data.len())?;
        if region == RegionIndex::CONFIG {
            lock(&self.shadow).read(offset, data);
            return Ok(());
        }
        data.fill(0xff);
        if let Some(bar) = self.bar(region)
            && self.in_area(region, offset, data.len())
        {
            bar.read(offset, data);
            return Ok(());
        }
        for (at, len) in pieces(offset, data.len()) {
            let from = (at - offset) as usize;
            self.read_far(region, at, &mut data[from..from + len])?;
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.check(region, offset, data.len())?;
        if region == RegionIndex::CONFIG {
            return self.config_write(offset, data);
        }
        if let Some(bar) = self.bar(region)
            && self.in_area(region, offset, data.len())
        {
            bar.write(offset, data);
            return Ok(());
        }
        for (at, len) in pieces(offset, data.len()) {
            let from = (at - offset) as usize;
            self.write_far(region, at, &data[from..from + len])?;
        }
        Ok(())
    }

    fn bar(&self, region: RegionIndex) -> Option<Arc<dyn Aperture>> {
        let slice = self.slices[region.bar()?]?;
        let (window, base) = self.port.window(region.bar()?, slice);
        Some(Arc::new(SliceAperture {
            window,
            base,
            len: self.info.region(region)?.size,
            state: Arc::clone(&self.state),
        }))
    }

    fn mmap_fd(&self, region: RegionIndex) -> Option<(BorrowedFd<'_>, u64)> {
        let slice = self.slices[region.bar()?]?;
        let (fd, window) = self.port.window_fd()?;
        Some((fd, window + slice.0))
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        let range = self.vectors(index, start, triggers.len())?;
        if !index.is_message() {
            if index == IrqIndex::Req {
                lock(&self.triggers).request = triggers.into_iter().next().flatten();
                // Of a lease that is lost already it is fired at once.
                self.state.signals.wake();
            }
            return Ok(());
        }
        let any = triggers.iter().any(Option::is_some);
        {
            let mut held = lock(&self.triggers);
            for (vector, fd) in range.zip(triggers) {
                held.vectors[vector].fd = fd;
            }
        }
        if any {
            self.arm(index)?;
        }
        // What was raised while there was no trigger is delivered now.
        self.state.signals.wake();
        Ok(())
    }

    /// Also where the lender could not arm them: triggers and masks are held here all the same.
    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError> {
        let mut held = lock(&self.triggers);
        match index {
            IrqIndex::Req => held.request = None,
            _ if index.is_message() && held.armed.is_none_or(|armed| armed == index) => {
                let masked = held.vectors.iter().any(|vector| vector.masked);
                for vector in &mut held.vectors {
                    vector.fd = None;
                    vector.masked = false;
                    vector.held = false;
                }
                drop(held);
                if masked {
                    return self.unmask_all(index);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn mask_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        let range = self.vectors(index, start, count as usize)?;
        if !index.is_message() {
            // Errors and requests have no mask; there is nothing to tell the lender.
            return Ok(());
        }
        for vector in &mut lock(&self.triggers).vectors[range] {
            vector.masked = masked;
        }
        // What was held back comes, whatever the lender says.
        self.state.signals.wake();
        // The lender stops too, so that a masked storm crosses no cable.
        let request = Request::Mask {
            lease: self.lease,
            index,
            start,
            count,
            masked,
        };
        self.forward("mask interrupts", request, MAP_WAIT_MS)
            .map(drop)
    }

    fn raise_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError> {
        let range = self.vectors(index, start, count as usize)?;
        for vector in range.filter(|_| index.is_message()) {
            self.state.signals.raise(vector as u32);
        }
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        let request = Request::Reset { lease: self.lease };
        // The lender begins with taking them off, and may fail or be late after that.
        let armed = lock(&self.triggers).armed.take();
        let reset = self.forward("reset the function", request, RESET_WAIT_MS);
        if reset.is_ok() {
            self.forget();
        }
        // Whatever else the signaller was woken for.
        self.state.signals.wake();
        let used = lock(&self.triggers)
            .vectors
            .iter()
            .any(|vector| vector.fd.is_some());
        let again = armed.filter(|_| used);
        let again = again.map_or(Ok(()), |index| self.arm(index));
        reset.and(again)
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self
    }
}

impl AddressSpace for BorrowedFunction {
    fn usable(&self) -> Vec<Span> {
        let low = Span::new(0, MSI_HOLE.0);
        let high = Span::new(MSI_HOLE.1, GUEST_END - MSI_HOLE.1);
        low.into_iter().chain(high).collect()
    }

    fn available(&self) -> u32 {
        MAPS_MAX as u32
    }

    fn map(&self, maps: &[DmaMap<'_>]) -> Result<(), MapError> {
        let mut guest = Vec::with_capacity(maps.len());
        // A guest's memory is in few files, however many maps it is cut into.
        let mut files: HashMap<RawFd, Arc<OwnedFd>> = HashMap::new();
        for map in maps {
            let Memory::Fd(fd, fd_offset) = map.memory else {
                return Err(MapError::NoMapping(map.span));
            };
            let (span, access) = (map.span, map.access);
            let fd = match files.entry(fd.as_raw_fd()) {
                Entry::Occupied(held) => Arc::clone(held.get()),
                Entry::Vacant(room) => {
                    let failed = |source| MapError::Kernel {
                        act: "map",
                        span,
                        source,
                    };
                    let fd = fd.try_clone_to_owned().map_err(failed)?;
                    Arc::clone(room.insert(Arc::new(fd)))
                }
            };
            guest.push(GuestMap {
                span,
                access,
                fd,
                fd_offset,
            });
        }
        let all = maps.first().map_or(EMPTY, |map| map.span);
        match self.port.call(Call::Map(self.lease, guest), MAP_WAIT_MS) {
            Ok(_) => Ok(()),
            Err(error) => Err(map_error(all, error)),
        }
    }

    fn unmap(&self, span: Span) -> Result<u64, MapError> {
        let unmap = || self.port.call(Call::Unmap(self.lease, span), UNMAP_WAIT_MS);
        let unmapped = match unmap() {
            // Of a lease that has ended meanwhile; now this is answered behind the end's own unpin.
            Err(CallError::Gone(_)) => unmap(),
            answered => answered,
        };
        match unmapped {
            Ok(Answer::Unmapped(bytes)) => Ok(bytes),
            // The port has stopped, its mapper before it.
            Ok(_) | Err(CallError::Gone(_)) => Ok(0),
            Err(error) => Err(map_error(span, error)),
        }
    }
}

fn map_error(span: Span, error: CallError) -> MapError {
    match error {
        CallError::Gone(why) => MapError::Gone(why),
        CallError::Timeout(ms) => MapError::Timeout(span, ms),
        CallError::Overlap(span) => MapError::Overlap(span),
        CallError::Bisect(span) => MapError::Bisect(span),
        CallError::Align(span) => MapError::Align(span),
        // Guest RAM lies behind the own window: only this host's end can run out of it.
        CallError::Refused(refusal) if refusal.code == RefusalCode::WindowFull => {
            MapError::Here(refusal.text)
        }
        CallError::Pin(_) => MapError::Here(error.to_string()),
        other => MapError::Peer {
            span,
            cause: other.to_string(),
        },
    }
}

impl Drop for BorrowedFunction {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        let signaller = lock(&self.signaller).take();
        if let Some(signaller) = signaller {
            signaller.join();
        }
    }
}

/// The thread that writes the VMM's eventfds: the port's threads never touch them.
struct Signaller {
    state: Arc<LeaseShared>,
    triggers: Arc<Mutex<Triggers>>,
    stop: OwnedFd,
}

impl Signaller {
    fn run(self) {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.state.signals.wake_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
            ];
            if let Err(error) = self.state.runtime.poll(&mut fds) {
                tracing::error!(%error, "interrupts of a borrowed function stop");
                return;
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            deliver(&self.state, &self.triggers);
        }
    }
}

fn deliver(state: &LeaseShared, triggers: &Mutex<Triggers>) {
    let lost = state.is_lost.load(Ordering::SeqCst);
    let mut held = lock(triggers);
    // Once: QEMU then takes the device out of its machine.
    if lost && let Some(request) = held.request.take() {
        signal(request.as_fd());
    }
    state.signals.take(|vector| {
        if let Some(vector) = held.vectors.get_mut(vector as usize) {
            vector.held = true;
        }
    });
    for vector in held
        .vectors
        .iter_mut()
        .filter(|vector| vector.held && !vector.masked)
    {
        if let Some(fd) = &vector.fd {
            vector.held = false;
            vector.signals += u64::from(signal(fd.as_fd()));
        }
    }
}

/// What a VMM is told of the function.
fn told(mut info: FunctionInfo, ids: FunctionIds) -> FunctionInfo {
    info.ids = ids;
    // What cannot be reset is never lent.
    info.resettable = true;
    // QEMU stops the whole machine at an error interrupt. A function that is lost reads as ones
    // instead, which drivers know from a device that was pulled, and the guest goes on.
    info.irqs[IrqIndex::Err as usize].count = 0;
    info
}

/// Writes an eventfd that came from a VMM; one at its limit is left alone: it is readable anyway.
/// A VMM that fills a blocking one between the look and the write has this thread stand until it
/// reads it, and with that its own session and its end, until the lease ends and its worker is
/// killed. The lock is held meanwhile all the same: what is masked or has another eventfd now must
/// not come to the old one.
fn signal(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    let ready = poll(
        &mut fds,
        Some(&rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    );
    ready.is_ok_and(|count| count == 1) && rustix::io::write(fd, &1u64.to_ne_bytes()).is_ok()
}

#[cfg(test)]
#[path = "borrowed_tests.rs"]
mod tests;
