//! A software PCIe function: config space, BARs, DMA and message interrupts around one kind of device.

mod arc;
mod behaviour;
mod config;
mod engine;
mod page;
mod sriov;
mod vectors;

pub use arc::{
    ARC_BAR0_BYTES, ARC_COMPLETED, ARC_DESTINATION, ARC_DOORBELL, ARC_FLAGS, ARC_FROM_VRAM,
    ARC_GGTT, ARC_IDENT, ARC_IDENT_VALUE, ARC_IDS, ARC_LENGTH, ARC_MEMIRQ, ARC_MEMIRQ_ENABLE,
    ARC_MEMIRQ_SOURCE, ARC_MEMIRQ_STATUS, ARC_MEMIRQ_UNIT, ARC_SCRATCH, ARC_SOURCE, ARC_STATUS,
    ARC_TO_VRAM,
};
pub use engine::{
    CHECKSUM, COMPLETED, DESTINATION, DOORBELL, IDENT, IDENT_VALUE, LENGTH, OPERATION,
    OPERATION_CHECKSUM, OPERATION_COPY, SCRATCH, SOURCE, STATUS, STATUS_DONE, STATUS_FAILED,
    STATUS_IDLE, TRANSFER_BYTES_MAX, VECTOR,
};
pub use sriov::{SoftPf, SriovError, VFS_MAX, VfShape};

use super::armed::Armed;
use super::fault::{Fault, FaultPlan, Operation};
use super::{SoftHost, SoftSpace};
use crate::model::{
    AddressSpace, Aperture, COMMAND_MASTER, COMMAND_MEMORY, Function, FunctionError, FunctionIds,
    FunctionInfo, IrqIndex, IrqInfo, Mapping, RegionIndex, RegionInfo, Span,
};
use behaviour::{Behaviour, Bus};
use config::Config;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vectors::Vector;

/// The smallest and largest memory of a function of an Arc Pro's shape.
const VRAM_BYTES_MIN: u64 = 1 << 20;
const VRAM_BYTES_MAX: u64 = 1 << 40;

struct Device {
    behaviour: Box<dyn Behaviour>,
    config: Mutex<Config>,
    vectors: Mutex<Vec<Vector>>,
    /// The host's own irqs: an error of the device, and a wish to have it back.
    host_irqs: Mutex<[Option<OwnedFd>; 2]>,
    space: Arc<SoftSpace>,
    /// Its PF has destroyed it.
    gone: AtomicBool,
    resets: AtomicU64,
    planned: Armed,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    fn may(&self, command: u16) -> bool {
        !self.gone.load(Ordering::Acquire) && lock(&self.config).command() & command != 0
    }
}

impl Bus for Device {
    fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        self.may(COMMAND_MASTER) && self.space.read(address, data)
    }

    fn write(&self, address: u64, data: &[u8]) -> bool {
        self.may(COMMAND_MASTER) && self.space.write(address, data)
    }

    fn interrupt(&self, vector: u32) {
        if !self.may(COMMAND_MASTER) {
            return;
        }
        if let Some(vector) = lock(&self.vectors).get_mut(vector as usize) {
            vector.raise();
        }
    }
}

struct Bar {
    device: Arc<Device>,
    region: RegionIndex,
    bytes: u64,
}

impl Aperture for Bar {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if self.device.may(COMMAND_MEMORY) {
            self.device.behaviour.load(self.region, offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let device = &*self.device;
        if device.may(COMMAND_MEMORY) {
            device.behaviour.store(self.region, offset, data, device);
        }
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

/// A function in software; its registers are named in this module's constants.
pub struct SoftFunction {
    device: Arc<Device>,
    info: FunctionInfo,
    host: Option<Arc<SoftHost>>,
}

fn region(bytes: u64, mappable_bytes: u64) -> RegionInfo {
    let area = Span::new(0, mappable_bytes).filter(|area| !area.is_empty());
    RegionInfo {
        size: bytes,
        readable: true,
        writable: true,
        areas: area.into_iter().collect(),
    }
}

impl SoftFunction {
    /// A DMA and checksum engine with these ids and so many MSI-X vectors (1..=128, else the
    /// nearest).
    pub fn new(ids: FunctionIds, vectors: u16) -> Self {
        let vectors = vectors.clamp(1, engine::VECTORS_MAX);
        let config = engine::config(&ids, vectors, engine::CONFIG_BYTES);
        Self::engine_with(ids, vectors, config.seal())
    }

    fn engine_with(ids: FunctionIds, vectors: u16, config: Config) -> Self {
        let mut info = FunctionInfo {
            ids,
            resettable: true,
            ..FunctionInfo::default()
        };
        info.regions[0] = region(engine::BAR_BYTES, engine::BAR_BYTES / 2);
        info.regions[RegionIndex::CONFIG.0 as usize] = region(config.len(), 0);
        info.irqs[IrqIndex::Msix as usize] = IrqInfo {
            count: vectors.into(),
        };
        Self::of(info, config, Box::new(engine::Engine::new()))
    }

    /// A function of an Arc Pro B's shape with so much memory behind BAR2: a power of two from
    /// 1 MiB to 1 TiB, else the nearest. Only what is stored to takes room.
    pub fn arc_pro(vram_bytes: u64) -> io::Result<Self> {
        let vram_bytes = vram_bytes.clamp(VRAM_BYTES_MIN, VRAM_BYTES_MAX);
        let vram_bytes = vram_bytes.next_power_of_two();
        let config = arc::config(vram_bytes).seal();
        Self::arc_with(vram_bytes, config)
    }

    fn arc_with(vram_bytes: u64, config: Config) -> io::Result<Self> {
        let mut info = FunctionInfo {
            ids: ARC_IDS,
            resettable: true,
            ..FunctionInfo::default()
        };
        info.regions[0] = region(ARC_BAR0_BYTES, ARC_BAR0_BYTES);
        info.regions[2] = region(vram_bytes, vram_bytes);
        info.regions[RegionIndex::CONFIG.0 as usize] = region(config.len(), 0);
        info.irqs[IrqIndex::Msi as usize] = IrqInfo { count: 1 };
        let behaviour = Box::new(arc::Arc::new(vram_bytes)?);
        Ok(Self::of(info, config, behaviour))
    }

    fn of(mut info: FunctionInfo, config: Config, behaviour: Box<dyn Behaviour>) -> Self {
        // As vfio-pci gives them to any device.
        for index in [IrqIndex::Err, IrqIndex::Req] {
            info.irqs[index as usize] = IrqInfo { count: 1 };
        }
        let vectors = info.irqs.iter().map(|irq| irq.count).max().unwrap_or(0);
        let device = Device {
            behaviour,
            config: Mutex::new(config),
            vectors: Mutex::new((0..vectors).map(|_| Vector::default()).collect()),
            host_irqs: Mutex::default(),
            space: Arc::new(SoftSpace::new()),
            gone: AtomicBool::new(false),
            resets: AtomicU64::new(0),
            planned: Armed::default(),
        };
        Self {
            device: Arc::new(device),
            info,
            host: None,
        }
    }

    /// The same, that cannot be reset.
    pub fn without_reset(ids: FunctionIds, vectors: u16) -> Self {
        let mut this = Self::new(ids, vectors);
        this.info.resettable = false;
        this
    }

    /// The same in this host: while it is frozen, nobody there configures the function.
    #[must_use]
    pub fn in_host(mut self, host: Arc<SoftHost>) -> Self {
        self.host = Some(host);
        self
    }

    /// Its container, with the faults it has seen.
    pub fn space(&self) -> &Arc<SoftSpace> {
        &self.device.space
    }

    /// How often it was reset.
    pub fn resets(&self) -> u64 {
        self.device.resets.load(Ordering::Acquire)
    }

    /// How many of its vectors have a trigger.
    pub fn triggers(&self) -> usize {
        let vectors = lock(&self.device.vectors);
        vectors.iter().filter(|v| v.has_trigger()).count()
    }

    /// Whether the host's wish to have it back would be heard.
    pub fn hears_requests(&self) -> bool {
        lock(&self.device.host_irqs)[1].is_some()
    }

    /// From now on these operations fail, counted from 1. Maps fail by its space's plan.
    pub fn arm(&self, plan: FaultPlan) {
        self.device.planned.arm(plan);
    }

    /// Which faults of the plan have struck, and how often.
    pub fn struck(&self) -> BTreeMap<Fault, u64> {
        self.device.planned.struck()
    }

    /// It falls off the bus: reads as ones, does nothing any more.
    fn vanish(&self) {
        self.device.gone.store(true, Ordering::Release);
    }

    fn gone(&self) -> bool {
        self.device.gone.load(Ordering::Acquire)
    }

    fn act(&self) {
        if let Some(host) = &self.host {
            host.act();
        }
    }

    fn planned(&self, act: &'static str, operation: Operation) -> Result<(), FunctionError> {
        self.act();
        if self.gone() && operation != Operation::Config {
            return Err(FunctionError::Gone("its PF has destroyed it".into()));
        }
        match self.device.planned.roll(operation) {
            None => Ok(()),
            Some(_) => Err(FunctionError::Kernel {
                act,
                source: Errno::IO.into(),
            }),
        }
    }

    fn check(&self, region: RegionIndex, offset: u64, len: usize) -> Result<(), FunctionError> {
        // What would wrap is past the end of every region, however it is cut short.
        let len = (len as u64).min(u64::MAX - offset);
        let span = Span::new(offset, len);
        let inside = self.info.region(region).zip(span);
        match inside.filter(|(info, span)| span.end() <= info.size) {
            Some(_) => Ok(()),
            None => Err(FunctionError::OutOfRange {
                region: region.0,
                span: span.unwrap_or(Span::EMPTY),
            }),
        }
    }

    fn host_irq_exists(
        &self,
        index: IrqIndex,
        start: u32,
        count: usize,
    ) -> Result<(), FunctionError> {
        let there = self.info.irqs[index as usize].count;
        let end = u64::from(start) + count as u64;
        match end > u64::from(there) {
            true => Err(FunctionError::NoVector {
                index,
                start,
                end,
                count: there,
            }),
            false => Ok(()),
        }
    }

    fn with_vectors(
        &self,
        index: IrqIndex,
        start: u32,
        count: usize,
        mut act: impl FnMut(&mut Vector),
    ) -> Result<(), FunctionError> {
        self.act();
        let there = self.info.irqs[index as usize].count;
        let end = u64::from(start) + count as u64;
        if end > u64::from(there) {
            return Err(FunctionError::NoVector {
                index,
                start,
                end,
                count: there,
            });
        }
        // Only one index of the device's own has vectors, so `end` is within them.
        let mut vectors = lock(&self.device.vectors);
        let range = vectors.iter_mut().skip(start as usize).take(count);
        range.for_each(&mut act);
        Ok(())
    }
}

/// Which of the host's own irqs.
fn host_irq(index: IrqIndex) -> Option<usize> {
    match index {
        IrqIndex::Err => Some(0),
        IrqIndex::Req => Some(1),
        IrqIndex::Intx | IrqIndex::Msi | IrqIndex::Msix => None,
    }
}

impl Function for SoftFunction {
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
        data.fill(0xff);
        if let Some(bar) = self.bar(region) {
            self.act();
            bar.read(offset, data);
            return Ok(());
        }
        self.planned("read config space", Operation::Config)?;
        if !self.gone() {
            lock(&self.device.config).read(offset, data);
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
        if let Some(bar) = self.bar(region) {
            self.act();
            bar.write(offset, data);
            return Ok(());
        }
        self.planned("write config space", Operation::Config)?;
        let mut config = lock(&self.device.config);
        config.write(offset, data);
        let masked = config.msi_masked();
        drop(config);
        if self.info.irqs[IrqIndex::Msi as usize].count != 0 {
            let mut vectors = lock(&self.device.vectors);
            vectors.iter_mut().for_each(|v| v.mask_in_config(masked));
        }
        Ok(())
    }

    fn bar(&self, region: RegionIndex) -> Option<Arc<dyn Aperture>> {
        region.bar()?;
        let bytes = self.info.region(region)?.size;
        Some(Arc::new(Bar {
            device: Arc::clone(&self.device),
            region,
            bytes,
        }))
    }

    fn mmap_fd(&self, _region: RegionIndex) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        if let Some(irq) = host_irq(index) {
            self.host_irq_exists(index, start, triggers.len())?;
            if let Some(trigger) = triggers.into_iter().next() {
                lock(&self.device.host_irqs)[irq] = trigger;
            }
            return Ok(());
        }
        self.planned("set triggers", Operation::SetIrqs)?;
        let count = triggers.len();
        let mut triggers = triggers.into_iter();
        self.with_vectors(index, start, count, |vector| {
            vector.set_trigger(triggers.next().flatten());
        })
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError> {
        if let Some(irq) = host_irq(index) {
            lock(&self.device.host_irqs)[irq] = None;
            return Ok(());
        }
        let count = self.info.irqs[index as usize].count as usize;
        self.with_vectors(index, 0, count, Vector::disable)
    }

    fn mask_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        if host_irq(index).is_some() {
            return self.host_irq_exists(index, start, count as usize);
        }
        self.with_vectors(index, start, count as usize, |vector| vector.mask(masked))
    }

    fn raise_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError> {
        if let Some(irq) = host_irq(index) {
            self.host_irq_exists(index, start, count as usize)?;
            let triggers = lock(&self.device.host_irqs);
            if let Some(trigger) = triggers[irq].as_ref().filter(|_| count != 0) {
                let _ = rustix::io::write(trigger, &1u64.to_ne_bytes());
            }
            return Ok(());
        }
        self.with_vectors(index, start, count as usize, Vector::raise)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        if !self.info.resettable {
            return Err(FunctionError::NoReset);
        }
        self.planned("reset the function", Operation::Reset)?;
        let device = &self.device;
        lock(&device.config).reset();
        device.behaviour.reset();
        let mut vectors = lock(&device.vectors);
        vectors.iter_mut().for_each(|v| v.mask_in_config(false));
        drop(vectors);
        device.resets.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self.act();
        &*self.device.space
    }
}
