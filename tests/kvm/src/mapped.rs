//! A software function whose BAR has one page that can be mapped, as a real function's.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vfio_shim::model::{
    AddressSpace, Aperture, Function, FunctionError, FunctionInfo, IrqIndex, RegionIndex,
};
use vfio_shim::ntb::soft::SoftFunction;

/// Where BAR0 begins in the fd.
const OFFSET: u64 = 0x3000;
const PAGE: u64 = 4096;

/// The first page of BAR0 is memory; all else is the software function's.
pub struct MappedFunction {
    inner: SoftFunction,
    memory: OwnedFd,
    accesses: AtomicU64,
}

impl MappedFunction {
    /// With zeroes in its page.
    pub fn new(inner: SoftFunction) -> Self {
        let memory = memfd_create("bar", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, OFFSET + PAGE).unwrap();
        Self {
            inner,
            memory,
            accesses: AtomicU64::new(0),
        }
    }

    /// What is in its page.
    pub fn page(&self) -> Vec<u8> {
        let mut page = vec![0; PAGE as usize];
        rustix::io::pread(&self.memory, &mut page, OFFSET).unwrap();
        page
    }

    /// How many accesses to BAR0 did not go to memory.
    pub fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Acquire)
    }

    fn count(&self, region: RegionIndex) {
        if region.bar().is_some() {
            self.accesses.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Function for MappedFunction {
    fn info(&self) -> &FunctionInfo {
        self.inner.info()
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.count(region);
        self.inner.region_read(region, offset, data)
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.count(region);
        self.inner.region_write(region, offset, data)
    }

    fn bar(&self, _region: RegionIndex) -> Option<Arc<dyn Aperture>> {
        None
    }

    fn mmap_fd(&self, region: RegionIndex) -> Option<(BorrowedFd<'_>, u64)> {
        (region.0 == 0).then(|| (self.memory.as_fd(), OFFSET))
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        self.inner.set_irqs(index, start, triggers)
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError> {
        self.inner.disable_irqs(index)
    }

    fn mask_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        self.inner.mask_irqs(index, start, count, masked)
    }

    fn raise_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError> {
        self.inner.raise_irqs(index, start, count)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.inner.reset()
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self.inner.address_space()
    }
}
