//! A software PCIe function: copies between DMA addresses at a doorbell, then raises an MSI-X vector.

use super::SoftSpace;
use super::registers::{
    BAR_BYTES, COMMAND_MEMORY, CONFIG_BYTES, PAGE, Registers, STATUS_DONE, STATUS_FAILED,
    TRANSFER_BYTES_MAX, Transfer,
};
use crate::model::{
    AddressSpace, Aperture, Function, FunctionError, FunctionIds, FunctionInfo, IrqIndex, IrqInfo,
    Mapping, RegionIndex, RegionInfo, Span,
};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The most MSI-X vectors: as many as the table's half page holds.
const VECTORS_MAX: u16 = 128;
const BAR: RegionIndex = RegionIndex(0);

#[derive(Default)]
struct Vector {
    trigger: Option<OwnedFd>,
    masked: bool,
    pending: bool,
}

impl Vector {
    fn raise(&mut self) {
        if self.masked {
            self.pending = true;
        } else if let Some(trigger) = &self.trigger {
            // Only fails when the counter is at its limit, and then it is readable.
            let _ = rustix::io::write(trigger, &1u64.to_ne_bytes());
        }
    }
}

struct Device {
    registers: Mutex<Registers>,
    vectors: Mutex<Vec<Vector>>,
    space: Arc<SoftSpace>,
    resets: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// Loads from BAR0. Only the registers' page answers: VFIO hides the MSI-X table's.
    fn load(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let registers = lock(&self.registers);
        if registers.command() & COMMAND_MEMORY == 0 || offset >= PAGE as u64 {
            return;
        }
        for (byte, value) in data.iter_mut().zip(&registers.page[offset as usize..]) {
            *byte = *value;
        }
    }

    fn store(&self, offset: u64, data: &[u8]) {
        let mut registers = lock(&self.registers);
        if registers.command() & COMMAND_MEMORY == 0 || offset >= PAGE as u64 {
            return;
        }
        let transfer = registers.store(offset as usize, data);
        // The copy may come back to this function's registers through a window.
        drop(registers);
        if let Some(transfer) = transfer {
            self.copy(transfer);
        }
    }

    fn copy(&self, transfer: Transfer) {
        let mut data = vec![0; transfer.length.min(TRANSFER_BYTES_MAX) as usize];
        let done = transfer.allowed
            && transfer.length <= TRANSFER_BYTES_MAX
            && self.space.read(transfer.source, &mut data)
            && self.space.write(transfer.destination, &data);
        let status = if done { STATUS_DONE } else { STATUS_FAILED };
        lock(&self.registers).completed(status);
        // A message interrupt is a DMA write: without bus mastering there is none.
        let vector = usize::try_from(transfer.vector).unwrap_or(usize::MAX);
        if let (true, Some(vector)) = (transfer.allowed, lock(&self.vectors).get_mut(vector)) {
            vector.raise();
        }
    }
}

struct Bar(Arc<Device>);

impl Aperture for Bar {
    fn len(&self) -> u64 {
        BAR_BYTES
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.load(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.store(offset, data);
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

/// A function with a copy engine; its registers are named in this module's constants.
pub struct SoftFunction {
    device: Arc<Device>,
    info: FunctionInfo,
}

impl SoftFunction {
    /// A function with these ids and so many MSI-X vectors (1..=128, else the nearest).
    pub fn new(ids: FunctionIds, vectors: u16) -> Self {
        let vectors = vectors.clamp(1, VECTORS_MAX);
        let mut info = FunctionInfo {
            ids,
            resettable: true,
            ..FunctionInfo::default()
        };
        info.regions[BAR.0 as usize] = RegionInfo {
            size: BAR_BYTES,
            readable: true,
            writable: true,
            areas: Span::new(0, PAGE as u64).into_iter().collect(),
        };
        info.regions[RegionIndex::CONFIG.0 as usize] = RegionInfo {
            size: CONFIG_BYTES as u64,
            readable: true,
            writable: true,
            areas: Vec::new(),
        };
        info.irqs[IrqIndex::Msix as usize] = IrqInfo {
            count: vectors.into(),
        };
        let device = Device {
            registers: Mutex::new(Registers::new(&ids, vectors)),
            vectors: Mutex::new((0..vectors).map(|_| Vector::default()).collect()),
            space: Arc::new(SoftSpace::new()),
            resets: AtomicU64::new(0),
        };
        Self {
            device: Arc::new(device),
            info,
        }
    }

    /// The same, that cannot be reset.
    pub fn without_reset(ids: FunctionIds, vectors: u16) -> Self {
        let mut this = Self::new(ids, vectors);
        this.info.resettable = false;
        this
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
        vectors.iter().filter(|v| v.trigger.is_some()).count()
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

    fn with_vectors(
        &self,
        index: IrqIndex,
        start: u32,
        count: usize,
        mut act: impl FnMut(usize, &mut Vector),
    ) -> Result<(), FunctionError> {
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
        // Only MSI-X has vectors, so `end` is within them.
        let mut vectors = lock(&self.device.vectors);
        let range = vectors.iter_mut().skip(start as usize).take(count);
        range.enumerate().for_each(|(at, vector)| act(at, vector));
        Ok(())
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
        if region == BAR {
            self.device.load(offset, data);
        } else {
            let start = offset as usize;
            let registers = lock(&self.device.registers);
            data.copy_from_slice(&registers.config[start..start + data.len()]);
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
        if region == BAR {
            self.device.store(offset, data);
        } else {
            lock(&self.device.registers).config_write(offset as usize, data);
        }
        Ok(())
    }

    fn bar(&self, region: RegionIndex) -> Option<Arc<dyn Aperture>> {
        (region == BAR).then(|| Arc::new(Bar(Arc::clone(&self.device))) as Arc<dyn Aperture>)
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
        let count = triggers.len();
        let mut triggers = triggers.into_iter();
        self.with_vectors(index, start, count, |_, vector| {
            vector.trigger = triggers.next().flatten();
        })
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError> {
        let count = self.info.irqs[index as usize].count as usize;
        self.with_vectors(index, 0, count, |_, vector| *vector = Vector::default())
    }

    fn mask_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        self.with_vectors(index, start, count as usize, |_, vector| {
            vector.masked = masked;
            if !masked && std::mem::take(&mut vector.pending) {
                vector.raise();
            }
        })
    }

    fn raise_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError> {
        self.with_vectors(index, start, count as usize, |_, vector| vector.raise())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        if !self.info.resettable {
            return Err(FunctionError::NoReset);
        }
        lock(&self.device.registers).reset();
        self.device.resets.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn address_space(&self) -> &dyn AddressSpace {
        &*self.device.space
    }
}
