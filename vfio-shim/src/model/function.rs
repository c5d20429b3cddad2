//! A PCIe function as VFIO shows it: regions, interrupts, reset, and the address space of its DMA.

use super::{AddressSpace, Aperture, IrqIndex, IrqInfo, RegionIndex, RegionInfo, Span};
use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
};

/// The ids by which drivers and people know a function (PCI config space 00h..2Fh).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FunctionIds {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem device id.
    pub subsystem_device: u16,
    /// Class code, 24 bits: base class, subclass, programming interface.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
}

/// What a function is; fixed as long as it is open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FunctionInfo {
    /// Ids and class.
    pub ids: FunctionIds,
    /// Regions by vfio-pci's index; absent ones have size 0.
    pub regions: [RegionInfo; RegionIndex::COUNT as usize],
    /// Interrupts by vfio-pci's index.
    pub irqs: [IrqInfo; IrqIndex::COUNT],
    /// Whether it can be reset (`VFIO_DEVICE_FLAGS_RESET`).
    pub resettable: bool,
}

impl FunctionInfo {
    /// The region, if the index is one and the region is there.
    pub fn region(&self, index: RegionIndex) -> Option<&RegionInfo> {
        self.regions
            .get(index.0 as usize)
            .filter(|region| region.size != 0)
    }
}

/// Why a function did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// No such region, or past its end.
    #[error("access to region {region} at {span} is outside of it")]
    OutOfRange {
        /// The region's index.
        region: u32,
        /// Offset and length.
        span: Span,
    },
    /// No such vector.
    #[error("interrupt {index:?} vectors {start}..{end} do not exist; there are {count}")]
    NoVector {
        /// The irq index.
        index: IrqIndex,
        /// First vector asked for.
        start: u32,
        /// One past the last.
        end: u64,
        /// How many there are.
        count: u32,
    },
    /// It has no reset.
    #[error(
        "the function has no reset method, so it cannot be lent: its state would leak to the next tenant"
    )]
    NoReset,
    /// The path to it is gone.
    #[error("the path to the function has ended: {0}")]
    Gone(String),
    /// The other host refused or failed.
    #[error("the lender could not {act}: {cause}")]
    Peer {
        /// What was asked.
        act: &'static str,
        /// Its words.
        cause: String,
    },
    /// Not answered in time.
    #[error("{act} was not answered within {ms} ms")]
    Timeout {
        /// What was asked.
        act: &'static str,
        /// How long was waited.
        ms: u64,
    },
    /// The kernel refused.
    #[error("the kernel refused to {act}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

/// A PCIe function as VFIO shows it. DMA and interrupt identity travel in this one type, so that
/// they cannot diverge.
pub trait Function: Send + Sync {
    /// What it is.
    fn info(&self) -> &FunctionInfo;

    /// Reads `data.len()` bytes. A function that is gone reads as ones, without an error.
    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError>;

    /// Writes. A write to config space that sets bus mastering returns when the function may do
    /// DMA. A function that is gone drops writes, without an error.
    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError>;

    /// The BAR as this process can load and store it; `None` where it cannot be mapped.
    fn bar(&self, region: RegionIndex) -> Option<Arc<dyn Aperture>>;

    /// The fd, and the offset of the region's first byte in it, by which another process may map
    /// the region's areas (`RegionInfo::areas`); `None` = every access goes through this trait.
    fn mmap_fd(&self, region: RegionIndex) -> Option<(BorrowedFd<'_>, u64)>;

    /// Gives vectors `start..start + triggers.len()` their eventfds; `None` takes one away. A new
    /// trigger takes over at once.
    fn set_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError>;

    /// Takes all triggers of the index away. Fine where there are none.
    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError>;

    /// Masks or unmasks vectors. A vector raised while masked fires once at unmask.
    fn mask_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        masked: bool,
    ) -> Result<(), FunctionError>;

    /// Fires vectors as if the device had.
    fn raise_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError>;

    /// Stops DMA and resets the function to power-on state. Triggers and DMA mappings stay.
    fn reset(&self) -> Result<(), FunctionError>;

    /// The same, where nobody else holds the function; else an error at once, and nothing is done.
    fn try_reset(&self) -> Result<(), FunctionError> {
        self.reset()
    }

    /// The address space of its DMA.
    fn address_space(&self) -> &dyn AddressSpace;
}
