//! A function attached to a VM: its BARs and config space at guest addresses, its DMA, its interrupts.

use super::interrupts::Interrupts;
use super::ioeventfd::DoorbellFd;
use super::{AttachError, DOORBELLS_MAX, Doorbell, IrqError, Msi, Ram, Slot, Vm};
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use vfio_shim::model::{
    Access, Aperture, BAR_COUNT, DmaMap, Function, FunctionError, Memory, RegionIndex, Span,
};

/// Config space in ECAM: 4 KiB for each function (PCIe 6.0 section 7.2.2).
const ECAM_BYTES: u64 = 4096;
/// The first BAR's register, and in it that the next one is its upper half.
const BAR0: u64 = 0x10;
const BAR_64_BIT: u32 = 1 << 2;

/// Where a function's regions are in the guest. As a guest of firmware finds them: it does not
/// move them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Placement {
    /// Its 4 KiB of config space.
    pub config: u64,
    /// Its BARs, by index; naturally aligned.
    pub bars: [Option<u64>; BAR_COUNT],
    /// Whether areas that can be mapped are memory slots. Without it every access is an exit.
    pub mapped: bool,
}

struct Bar {
    region: RegionIndex,
    span: Span,
    direct: Option<Arc<dyn Aperture>>,
}

/// An attached function. [`Attachment::detach`], or dropping it, undoes everything.
pub struct Attachment {
    function: Arc<dyn Function>,
    vm: Option<Arc<VmFd>>,
    config: Span,
    bars: Vec<Bar>,
    /// Held for reading over each access, so that none is under way when the function is reset.
    open: RwLock<bool>,
    interrupts: Mutex<Interrupts>,
    doorbells: Mutex<Vec<Arc<DoorbellFd>>>,
    slots: Mutex<Vec<Slot>>,
    dma: Mutex<Vec<Span>>,
    trouble: Mutex<Option<IrqError>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn place(what: &str, address: u64, len: u64) -> Result<Span, AttachError> {
    let refused = |cause| AttachError::Placement {
        what: what.to_owned(),
        address,
        cause,
    };
    let aligned = len
        .checked_next_power_of_two()
        .is_some_and(|align| address.is_multiple_of(align));
    match Span::new(address, len) {
        Some(span) if aligned => Ok(span),
        Some(_) => Err(refused("it must be aligned to its size")),
        None => Err(refused("it ends past the last address")),
    }
}

fn refused(act: &'static str) -> impl Fn(FunctionError) -> AttachError {
    move |source| AttachError::Function { act, source }
}

impl Attachment {
    /// Attaches a function, whose DMA reaches `ram` and nothing else from now on.
    pub fn new(
        vm: &Vm,
        function: Arc<dyn Function>,
        placement: &Placement,
        ram: &[&Ram],
    ) -> Result<Arc<Self>, AttachError> {
        let (config, bars) = places(&*function, placement, ram)?;
        let interrupts = Interrupts::new(&*function, Arc::clone(vm.routes()));
        let this = Self {
            function,
            vm: vm.fd().cloned(),
            config,
            bars,
            open: RwLock::new(true),
            interrupts: Mutex::new(interrupts),
            doorbells: Mutex::default(),
            slots: Mutex::default(),
            dma: Mutex::default(),
            trouble: Mutex::default(),
        };
        // From here on a failure drops `this`, which undoes what was done.
        this.tell_addresses()?;
        for ram in ram {
            this.map_dma(ram)?;
        }
        if placement.mapped {
            for bar in &this.bars {
                let slots = vm.slots();
                let mapped = slots.map_region(&*this.function, bar.region, bar.span.start())?;
                lock(&this.slots).extend(mapped);
            }
        }
        Ok(Arc::new(this))
    }

    /// Writes the BARs' addresses into config space, as firmware does.
    fn tell_addresses(&self) -> Result<(), AttachError> {
        for bar in &self.bars {
            let register = BAR0 + 4 * u64::from(bar.region.0);
            let mut word = [0; 4];
            self.function
                .region_read(RegionIndex::CONFIG, register, &mut word)
                .map_err(refused("read its BAR registers"))?;
            let bytes = bar.span.start().to_le_bytes();
            let wide = u32::from_le_bytes(word) & BAR_64_BIT != 0;
            for half in 0..=usize::from(wide) {
                let at = register + 4 * half as u64;
                self.function
                    .region_write(RegionIndex::CONFIG, at, &bytes[4 * half..4 * half + 4])
                    .map_err(refused("write its BAR registers"))?;
            }
        }
        Ok(())
    }

    fn map_dma(&self, ram: &Ram) -> Result<(), AttachError> {
        let map = DmaMap {
            span: ram.span(),
            access: Access::READ_WRITE,
            memory: Memory::Fd(ram.fd(), 0),
        };
        let act = "given to";
        self.function
            .address_space()
            .map(&[map])
            .map_err(|source| AttachError::Map { act, source })?;
        lock(&self.dma).push(ram.span());
        Ok(())
    }

    /// Lets the guest ring this doorbell without an exit; `serve_doorbells` has to run.
    pub fn add_doorbell(&self, bell: Doorbell) -> Result<(), AttachError> {
        let bar = self.bars.iter().find(|bar| bar.region == bell.region);
        let span = bar.and_then(|bar| {
            let start = bar.span.start().checked_add(bell.offset)?;
            Span::new(start, 4).filter(|span| bar.span.contains(*span))
        });
        let misplaced = |address, cause| AttachError::Placement {
            what: "a doorbell".to_owned(),
            address,
            cause,
        };
        let span = span.ok_or(misplaced(bell.offset, "it is outside of the placed BARs"))?;
        if lock(&self.slots)
            .iter()
            .any(|slot| slot.span().overlaps(span))
        {
            return Err(misplaced(
                span.start(),
                "the guest reaches it without an exit",
            ));
        }
        let mut doorbells = lock(&self.doorbells);
        if doorbells.len() >= DOORBELLS_MAX {
            return Err(AttachError::Doorbells(DOORBELLS_MAX));
        }
        let bell = DoorbellFd::new(self.vm.clone(), bell, span.start())?;
        doorbells.push(Arc::new(bell));
        Ok(())
    }

    /// Makes the stores of the doorbells that exist now, until `stop` is readable.
    pub fn serve_doorbells(&self, stop: BorrowedFd<'_>) -> io::Result<()> {
        let doorbells = lock(&self.doorbells).clone();
        loop {
            let bells = doorbells
                .iter()
                .map(|bell| PollFd::new(bell.event(), PollFlags::IN));
            let mut fds: Vec<_> = bells
                .chain([PollFd::from_borrowed_fd(stop, PollFlags::IN)])
                .collect();
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let Some(_open) = self.enter() else {
                return Ok(());
            };
            if fds.last().is_some_and(|stop| !stop.revents().is_empty()) {
                return Ok(());
            }
            doorbells.iter().for_each(|bell| bell.ring(&*self.function));
        }
    }

    /// The access's right to go on, unless the function is detached.
    fn enter(&self) -> Option<RwLockReadGuard<'_, bool>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.then_some(open)
    }

    /// The region and the bytes of it at a guest address.
    fn find(&self, address: u64, len: usize) -> Option<(RegionIndex, Span, Option<&dyn Aperture>)> {
        let access = Span::new(address, len as u64)?;
        let inside = |outer: Span| Span::new(address - outer.start(), access.len());
        if self.config.contains(access) {
            return Some((RegionIndex::CONFIG, inside(self.config)?, None));
        }
        let bar = self.bars.iter().find(|bar| bar.span.contains(access))?;
        let span = inside(bar.span)?;
        let areas = &self.function.info().regions[bar.region.0 as usize].areas;
        let direct = areas.iter().any(|area| area.contains(span));
        Some((bar.region, span, bar.direct.as_deref().filter(|_| direct)))
    }

    /// A guest's load. False if the address is none of this function's, and then `data` is as it
    /// was; what the function refuses reads as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((region, span, direct)) = self.find(address, data.len()) else {
            return false;
        };
        data.fill(0xff);
        let Some(_open) = self.enter() else {
            return true;
        };
        self.ring_doorbells();
        let interrupts = lock(&self.interrupts);
        if interrupts.holds(region, span) {
            interrupts.read(region, span, data);
            return true;
        }
        drop(interrupts);
        if let Some(bar) = direct {
            bar.read(span.start(), data);
        } else if let Err(error) = self.function.region_read(region, span.start(), data) {
            tracing::debug!(region = region.0, %span, %error, "a load was answered with ones");
            data.fill(0xff);
        }
        true
    }

    /// A guest's store. False if the address is none of this function's; what the function
    /// refuses is dropped.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((region, span, direct)) = self.find(address, data.len()) else {
            return false;
        };
        let Some(_open) = self.enter() else {
            return true;
        };
        self.ring_doorbells();
        let mut interrupts = lock(&self.interrupts);
        if interrupts.holds(region, span) {
            let followed = interrupts.write(&*self.function, region, span, data);
            self.note(followed);
            return true;
        }
        drop(interrupts);
        if let Some(bar) = direct {
            bar.write(span.start(), data);
        } else if let Err(error) = self.function.region_write(region, span.start(), data) {
            tracing::debug!(region = region.0, %span, %error, "a store was dropped");
        }
        if region == RegionIndex::CONFIG {
            let followed = lock(&self.interrupts).follow(&*self.function);
            self.note(followed);
        }
        true
    }

    fn ring_doorbells(&self) {
        let doorbells = lock(&self.doorbells);
        doorbells.iter().for_each(|bell| bell.ring(&*self.function));
    }

    fn note(&self, result: Result<(), IrqError>) {
        if let Err(error) = result {
            tracing::warn!(%error, "the guest's interrupts could not follow");
            lock(&self.trouble).get_or_insert(error);
        }
    }

    /// In a stand-in, a load from a memory slot; none where there is no slot.
    pub(super) fn load(&self, address: u64, len: usize) -> Option<[u8; 8]> {
        let mut word = [0; 8];
        let load = |slot: &Slot| {
            let offset = address.checked_sub(slot.span().start());
            let data = &mut word[..len.min(8)];
            offset.is_some_and(|offset| slot.memory().read(offset, data))
        };
        lock(&self.slots).iter().any(load).then_some(word)
    }

    /// In a stand-in, a store to a memory slot. False where there is none.
    pub(super) fn store(&self, address: u64, data: &[u8]) -> bool {
        lock(&self.slots).iter().any(|slot| {
            let offset = address.checked_sub(slot.span().start());
            offset.is_some_and(|offset| slot.memory().write(offset, data))
        })
    }

    /// In a stand-in, the interrupts that are due; after at most `wait`, where that is given.
    pub(super) fn take_due(&self, wait: Option<&Timespec>) -> Vec<Msi> {
        let interrupts = lock(&self.interrupts);
        if let Some(limit) = wait {
            interrupts.vectors().wait_due(limit);
        }
        interrupts.vectors().take_due()
    }

    /// Why the guest's interrupts could not be set up as it asked, if so; taken by asking.
    pub fn take_trouble(&self) -> Option<IrqError> {
        lock(&self.trouble).take()
    }

    /// How many vectors raise interrupts in the guest at the moment.
    pub fn wired_vectors(&self) -> usize {
        lock(&self.interrupts).vectors().wired()
    }

    /// Ends everything, in this order: the guest's accesses and doorbells; its memory slots; DMA,
    /// by a reset; its memory in the function's address space; triggers, irqfds and routes. Goes
    /// on after a failure and returns the first; the function must then serve nobody else. Fine
    /// where it was done before.
    pub fn detach(&self) -> Result<(), AttachError> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *open, false) {
            return Ok(());
        }
        lock(&self.doorbells).clear();
        lock(&self.slots).clear();
        let reset = self.function.reset().map_err(refused("reset"));
        let mut done = vec![reset];
        for span in lock(&self.dma).drain(..) {
            let unmapped = self.function.address_space().unmap(span);
            let act = "taken away from";
            done.push(
                unmapped
                    .map(drop)
                    .map_err(|source| AttachError::Map { act, source }),
            );
        }
        let disabled = lock(&self.interrupts).disable(&*self.function);
        done.push(disabled.map_err(Into::into));
        done.into_iter().collect()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            tracing::error!(%error, "a function could not be detached whole");
        }
    }
}

/// Checks the placement: what exists, aligned, and nothing over anything else.
fn places(
    function: &dyn Function,
    placement: &Placement,
    ram: &[&Ram],
) -> Result<(Span, Vec<Bar>), AttachError> {
    let config = place("config space", placement.config, ECAM_BYTES)?;
    let mut bars: Vec<Bar> = Vec::new();
    let placed = (0..).zip(placement.bars);
    for (index, address) in placed.filter_map(|(index, at)| Some((index, at?))) {
        let region = RegionIndex(index);
        let what = format!("BAR{index}");
        let refused = |cause| AttachError::Placement {
            what: what.clone(),
            address,
            cause,
        };
        let info = function.info().region(region);
        let size = info.ok_or(refused("the function has no such BAR"))?.size;
        let span = place(&what, address, size)?;
        let taken = bars.iter().map(|bar| bar.span).chain([config]);
        if taken
            .chain(ram.iter().map(|ram| ram.span()))
            .any(|t| t.overlaps(span))
        {
            return Err(refused("something else is there"));
        }
        bars.push(Bar {
            region,
            span,
            direct: function.bar(region),
        });
    }
    Ok((config, bars))
}
