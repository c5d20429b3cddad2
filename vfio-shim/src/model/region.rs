//! A function's regions as VFIO numbers them, and the areas of them that may be mapped.

use super::Span;

/// How many of a function's regions are BARs.
pub const BAR_COUNT: usize = 6;

/// A region index of vfio-pci (`VFIO_PCI_*_REGION_INDEX`): 0..=5 BARs, 6 ROM, 7 config, 8 VGA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionIndex(pub u32);

impl RegionIndex {
    /// The expansion ROM.
    pub const ROM: Self = Self(6);
    /// Config space.
    pub const CONFIG: Self = Self(7);
    /// How many indices vfio-pci has.
    pub const COUNT: u32 = 9;

    /// The BAR's number, if this is a BAR.
    pub fn bar(self) -> Option<usize> {
        ((self.0 as usize) < BAR_COUNT).then_some(self.0 as usize)
    }
}

/// A part of a region that may be mapped: offset and length in the region, page aligned.
pub type MmapArea = Span;

/// What a region is: its size, what may be done with it, and where it may be mapped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Size in bytes; 0 = there is no such region.
    pub size: u64,
    /// Reads are possible.
    pub readable: bool,
    /// Writes are possible.
    pub writable: bool,
    /// The areas that may be mapped. Never a page of the MSI-X table or PBA.
    pub areas: Vec<MmapArea>,
}

impl RegionInfo {
    /// Whether the areas lie inside the region, page aligned, sorted and apart.
    pub fn areas_are_sound(&self) -> bool {
        let sound = |a: &MmapArea| !a.is_empty() && a.is_aligned(4096) && a.end() <= self.size;
        self.areas.iter().all(sound)
            && self
                .areas
                .windows(2)
                .all(|pair| pair[0].end() <= pair[1].start())
    }
}
