//! A PCIe function of this host through VFIO, with a container of its own.

use super::{
    Container, Door, Group, MappedAperture, OpenError, OpenGroup,
    caps::RawRegion,
    ioctl,
    irqs::{self, Irq},
    regions,
};
use crate::{
    model::{
        AddressSpace, Aperture, BAR_COUNT, Bdf, CAP_PM, COMMAND, COMMAND_MASTER, COMMAND_MEMORY,
        CONFIG_BYTES_MAX, ConfigView, EXT_CAP_ATS, Function, FunctionError, FunctionInfo, IrqIndex,
        RegionIndex, Span,
    },
    sysfs::{BarAddress, Sysfs},
};
use rustix::io::{Errno, pread, pwrite};
use std::{
    any::Any,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET};

/// How long a reset is tried again while somebody holds the device's lock.
const RESET_BUSY_MAX: Duration = Duration::from_secs(5);
/// How long between two tries: the kernel offers nothing to wait on.
const RESET_BUSY_STEP: Duration = Duration::from_millis(20);
/// ATS control register (PCIe 6.0 section 10.5.1.3) and its enable bit.
const ATS_CONTROL: u16 = 6;
const ATS_ENABLE: u16 = 1 << 15;
/// PM control and status (PCI PM 1.2 section 3.2.4) and its power state, 0 = D0.
const PM_CONTROL: u16 = 4;
const PM_STATE: u16 = 3;

/// An open function. Dropping it closes the device (the kernel then stops its DMA and resets it),
/// unless a mapped BAR is still held somewhere.
pub struct VfioFunction {
    // The order of the fields is the order of closing: mapped BARs, the device, its group, then the
    // container, whose mappings the device's DMA went through, and last what was kept for it.
    bars: Mutex<[Option<Arc<MappedAperture>>; BAR_COUNT]>,
    irqs: Mutex<[Irq; IrqIndex::COUNT]>,
    device: OwnedFd,
    group: Group,
    container: Container,
    _kept: Option<Box<dyn Any + Send + Sync>>,
    bdf: Bdf,
    info: FunctionInfo,
    raw: [RawRegion; RegionIndex::COUNT as usize],
    addresses: [BarAddress; BAR_COUNT],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kernel(act: &'static str) -> impl FnOnce(Errno) -> FunctionError {
    move |errno| FunctionError::Kernel {
        act,
        source: errno.into(),
    }
}

impl VfioFunction {
    /// Opens a function that is bound to vfio-pci, with memory decoding on and bus mastering off.
    /// The first open of a device resets it.
    pub fn open(bdf: Bdf, sysfs: &Sysfs) -> Result<Self, OpenError> {
        Self::open_with(bdf, sysfs, Door::default().open(bdf, sysfs)?)
    }

    /// The same with a group that somebody else has opened.
    pub fn open_with(bdf: Bdf, sysfs: &Sysfs, opened: OpenGroup) -> Result<Self, OpenError> {
        let looked_up = sysfs.ids(bdf).and_then(|ids| Ok((ids, sysfs.bars(bdf)?)));
        let (ids, addresses) = looked_up.map_err(|error| OpenError::Sysfs(bdf, error))?;
        let group = Group::adopt(bdf, opened.group, sysfs)?;
        let container = Container::with_group(opened.container, group.as_fd())?;
        check_interrupts_are_safe(bdf, sysfs)?;
        let device = group.device(bdf)?;
        let device_info = ioctl::device_info(device.as_fd())
            .map_err(OpenError::kernel("tell what it knows of", bdf))?;
        if device_info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            let driver = "a driver that is no PCI one".to_owned();
            return Err(OpenError::NotVfio { bdf, driver });
        }
        let raw = regions::read(device.as_fd(), bdf)?;
        let config = read_config(device.as_fd(), &raw)
            .map_err(OpenError::kernel("read the config space of", bdf))?;
        let config = ConfigView::new(&config).map_err(|error| OpenError::Config(bdf, error))?;
        check_ats(bdf, config)?;
        let msix = regions::msix_pages(&config);
        let mut info = FunctionInfo {
            ids,
            resettable: device_info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            ..Default::default()
        };
        for (index, (region, raw)) in info.regions.iter_mut().zip(&raw).enumerate() {
            *region = regions::to_model(index as u32, raw, &msix);
        }
        let mut irqs: [Irq; IrqIndex::COUNT] = Default::default();
        for index in IrqIndex::ALL {
            let irq = Irq::read(device.as_fd(), index)
                .map_err(OpenError::kernel("tell the interrupts of", bdf))?;
            info.irqs[index as usize] = irq.info;
            irqs[index as usize] = irq;
        }
        let this = Self {
            bars: Mutex::default(),
            irqs: Mutex::new(irqs),
            device,
            group,
            container,
            _kept: opened.kept,
            bdf,
            info,
            raw,
            addresses,
        };
        this.power_on()
            .map_err(|error| OpenError::kernel("turn on", bdf)(io::Error::other(error)))?;
        Ok(this)
    }

    /// Its address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Its IOMMU group.
    pub fn group(&self) -> u32 {
        self.group.number()
    }

    /// Where its BARs lie in physical address space.
    pub fn bar_addresses(&self) -> &[BarAddress; BAR_COUNT] {
        &self.addresses
    }

    /// Its config space as VFIO shows it, 256 or 4096 bytes.
    pub fn config_space(&self) -> Result<Vec<u8>, FunctionError> {
        read_config(self.device.as_fd(), &self.raw).map_err(|source| FunctionError::Kernel {
            act: "read the config space",
            source,
        })
    }

    /// Turns bus mastering (DMA and message interrupts) on or off.
    pub fn set_bus_master(&self, enable: bool) -> Result<(), FunctionError> {
        self.change_command(COMMAND_MASTER, enable)
    }

    /// Turns memory decoding on or off. While it is off, an access to a mapped BAR kills this
    /// process with SIGBUS.
    pub fn set_memory_decoding(&self, enable: bool) -> Result<(), FunctionError> {
        self.change_command(COMMAND_MEMORY, enable)
    }

    /// Brings it to D0 and turns memory decoding on.
    pub fn power_on(&self) -> Result<(), FunctionError> {
        let config = self.config_space()?;
        let pm = ConfigView::new(&config)
            .ok()
            .and_then(|config| Some((config, config.capability(CAP_PM)?)));
        if let Some((config, at)) = pm {
            let control = config.u16(at + PM_CONTROL);
            if control & PM_STATE != 0 {
                self.config_write(at + PM_CONTROL, control & !PM_STATE)?;
            }
        }
        self.set_memory_decoding(true)
    }

    fn change_command(&self, bits: u16, enable: bool) -> Result<(), FunctionError> {
        let mut word = [0; 2];
        self.region_read(RegionIndex::CONFIG, COMMAND.into(), &mut word)?;
        let old = u16::from_le_bytes(word);
        let new = if enable { old | bits } else { old & !bits };
        if new == old {
            return Ok(());
        }
        self.config_write(COMMAND, new)
    }

    fn config_write(&self, offset: u16, value: u16) -> Result<(), FunctionError> {
        self.region_write(RegionIndex::CONFIG, offset.into(), &value.to_le_bytes())
    }

    /// Tried again for so long while somebody holds the device's lock.
    fn reset_within(&self, busy_max: Duration) -> Result<(), FunctionError> {
        if !self.info.resettable {
            return Err(FunctionError::NoReset);
        }
        self.set_bus_master(false)?;
        let deadline = Instant::now() + busy_max;
        loop {
            match ioctl::device_reset(self.device.as_fd()) {
                Ok(()) => return Ok(()),
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline =>
                {
                    std::thread::sleep(RESET_BUSY_STEP);
                }
                Err(source) => {
                    let act = "reset the function";
                    return Err(FunctionError::Kernel { act, source });
                }
            }
        }
    }

    /// The position in the device fd of `len` bytes at `offset` of a region.
    fn position(&self, region: RegionIndex, offset: u64, len: usize) -> Result<u64, FunctionError> {
        let refused = |span| FunctionError::OutOfRange {
            region: region.0,
            span,
        };
        // An access that would wrap is past the end of every region, however it is cut short.
        let len = (len as u64).min(u64::MAX - offset);
        let span = Span::new(offset, len).ok_or_else(|| refused(Span::EMPTY))?;
        let inside = |raw: &&RawRegion| span.end() <= raw.size;
        let raw = self.raw.get(region.0 as usize).filter(inside);
        let position = raw.and_then(|raw| raw.offset.checked_add(offset));
        position.ok_or_else(|| refused(span))
    }
}

/// All of config space; the kernel wants no more than one access of at most 8 bytes at a time
/// for some of it, and splits the rest itself.
fn read_config(device: BorrowedFd<'_>, raw: &[RawRegion]) -> io::Result<Vec<u8>> {
    let region = &raw[RegionIndex::CONFIG.0 as usize];
    let len = (region.size as usize).min(CONFIG_BYTES_MAX);
    let mut config = vec![0xff; len];
    let mut done = 0;
    while done < len {
        match pread(device, &mut config[done..], region.offset + done as u64)? {
            0 => break,
            bytes => done += bytes,
        }
    }
    Ok(config)
}

fn check_interrupts_are_safe(bdf: Bdf, sysfs: &Sysfs) -> Result<(), OpenError> {
    let parameter = sysfs
        .module_parameter("vfio_iommu_type1", "allow_unsafe_interrupts")
        .map_err(|error| OpenError::Sysfs(bdf, error))?;
    match parameter.as_deref() {
        Some("N") => Ok(()),
        Some(other) => Err(OpenError::UnsafeInterrupts(other.to_owned())),
        None => Err(OpenError::UnsafeInterrupts("unknown".to_owned())),
    }
}

/// The kernel turns ATS on when the group is attached, so this comes after.
fn check_ats(bdf: Bdf, config: ConfigView<'_>) -> Result<(), OpenError> {
    let extended = config
        .extended_capabilities()
        .map_err(|error| OpenError::Config(bdf, error))?;
    let ats = extended.iter().find(|cap| cap.id == EXT_CAP_ATS);
    match ats.map(|cap| config.u16(cap.offset + ATS_CONTROL)) {
        Some(control) if control & ATS_ENABLE != 0 => Err(OpenError::Ats(bdf)),
        _ => Ok(()),
    }
}

/// Splits an access into ones of 8, 4, 2 or 1 bytes, each naturally aligned: (offset, range).
fn naturally(offset: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    super::mmio::split(offset, len)
}

impl Function for VfioFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        let position = self.position(region, offset, data.len())?;
        for (at, range) in naturally(offset, data.len()) {
            let part = &mut data[range];
            let read = pread(&self.device, &mut *part, position + (at - offset))
                .map_err(kernel("read a region"))?;
            part[read..].fill(0xff);
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        let position = self.position(region, offset, data.len())?;
        for (at, range) in naturally(offset, data.len()) {
            let part = &data[range];
            let written = pwrite(&self.device, part, position + (at - offset))
                .map_err(kernel("write a region"))?;
            if written != part.len() {
                return Err(kernel("write a region")(Errno::IO));
            }
        }
        Ok(())
    }

    fn bar(&self, region: RegionIndex) -> Option<Arc<dyn Aperture>> {
        let bar = region.bar()?;
        let info = self.info.region(region).filter(|r| !r.areas.is_empty())?;
        let mut bars = lock(&self.bars);
        if let Some(mapped) = &bars[bar] {
            return Some(Arc::clone(mapped) as Arc<dyn Aperture>);
        }
        let physical = Some(self.addresses[bar].physical).filter(|address| *address != 0);
        let mapped = MappedAperture::bar(
            self.device.as_fd(),
            self.raw[bar].offset,
            info.size,
            &info.areas,
            physical,
        )
        .inspect_err(
            |error| tracing::error!(bdf = %self.bdf, bar, %error, "the BAR cannot be mapped"),
        )
        .ok()?;
        let mapped = Arc::new(mapped);
        bars[bar] = Some(Arc::clone(&mapped));
        Some(mapped)
    }

    fn mmap_fd(&self, region: RegionIndex) -> Option<(BorrowedFd<'_>, u64)> {
        let info = self.info.region(region)?;
        if info.areas.is_empty() {
            return None;
        }
        Some((self.device.as_fd(), self.raw[region.0 as usize].offset))
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        lock(&self.irqs)[index as usize].set(self.device.as_fd(), index, start, triggers)
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError> {
        lock(&self.irqs)[index as usize].disable(self.device.as_fd(), index)
    }

    /// VFIO cannot mask MSI and MSI-X (ENOTTY): whoever relays the interrupt does it. So this is
    /// always an error, and not a mask that masks nothing.
    fn mask_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        _masked: bool,
    ) -> Result<(), FunctionError> {
        irqs::check(index, self.info.irqs[index as usize], start, count.into())?;
        Err(kernel("mask")(Errno::NOTTY))
    }

    fn raise_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError> {
        lock(&self.irqs)[index as usize].raise(self.device.as_fd(), index, start, count)
    }

    /// Bus mastering is off afterwards. The kernel puts COMMAND and the MSI-X enable bit back as
    /// they were, so whoever wants vectors quiet too disables them first.
    fn reset(&self) -> Result<(), FunctionError> {
        self.reset_within(RESET_BUSY_MAX)
    }

    fn try_reset(&self) -> Result<(), FunctionError> {
        self.reset_within(Duration::ZERO)
    }

    fn address_space(&self) -> &dyn AddressSpace {
        &self.container
    }
}
