//! Reads VFIO's info structures and their chains of capabilities out of bytes, without trust.

use crate::model::Span;
use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS,
};

/// Links of a chain that are followed at most; the kernel has under ten kinds.
const CAPS_MAX: usize = 64;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let raw = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_ne_bytes(raw.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(raw.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let raw = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(raw.try_into().ok()?))
}

/// The offset of the capability `id` in the chain that begins at `first`.
fn find(bytes: &[u8], first: u32, id: u32) -> Option<usize> {
    let mut at = first;
    for _ in 0..CAPS_MAX {
        if at == 0 {
            return None;
        }
        // struct vfio_info_cap_header { u16 id, version; u32 next; }
        if u32::from(u16_at(bytes, at as usize)?) == id {
            return Some(at as usize);
        }
        at = u32_at(bytes, at as usize + 4)?;
    }
    None
}

/// A list of `{u64, u64}` whose length is a u32 at offset 8 of the capability, from offset 16 on.
fn pairs(bytes: &[u8], at: usize) -> Vec<(u64, u64)> {
    let count = u32_at(bytes, at + 8).unwrap_or(0) as usize;
    (0..count)
        .map_while(|i| {
            let entry = i.checked_mul(16)?.checked_add(at + 16)?;
            Some((u64_at(bytes, entry)?, u64_at(bytes, entry + 8)?))
        })
        .collect()
}

/// What `VFIO_IOMMU_GET_INFO` tells.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct IommuInfo {
    /// The ranges that can be mapped; empty if the kernel does not say.
    pub usable: Vec<Span>,
    /// How many more mappings fit; `None` if the kernel does not say.
    pub available: Option<u32>,
}

impl IommuInfo {
    /// From a `vfio_iommu_type1_info`: argsz, flags, u64 iova_pgsizes, cap_offset, pad.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut info = Self::default();
        let flags = u32_at(bytes, 4).unwrap_or(0);
        if flags & VFIO_IOMMU_INFO_CAPS == 0 {
            return info;
        }
        let first = u32_at(bytes, 16).unwrap_or(0);
        if let Some(at) = find(bytes, first, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
            info.usable = pairs(bytes, at)
                .into_iter()
                .filter_map(|(first, last)| Span::from_inclusive(first, last))
                .collect();
            info.usable.sort_unstable();
        }
        info.available = find(bytes, first, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)
            .and_then(|at| u32_at(bytes, at + 8));
        info
    }
}

/// What `VFIO_DEVICE_GET_REGION_INFO` tells.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct RawRegion {
    pub flags: u32,
    pub size: u64,
    pub offset: u64,
    /// The areas that may be mapped; `None` = the kernel names none, so all of it if MMAP is set.
    pub sparse: Option<Vec<Span>>,
}

impl RawRegion {
    /// From a `vfio_region_info`: argsz, flags, index, cap_offset, u64 size, u64 offset.
    pub fn parse(bytes: &[u8]) -> Self {
        let flags = u32_at(bytes, 4).unwrap_or(0);
        let first = match flags & VFIO_REGION_INFO_FLAG_CAPS {
            0 => 0,
            _ => u32_at(bytes, 12).unwrap_or(0),
        };
        let sparse = find(bytes, first, VFIO_REGION_INFO_CAP_SPARSE_MMAP).map(|at| {
            let areas = pairs(bytes, at).into_iter();
            areas.filter_map(|(at, len)| Span::new(at, len)).collect()
        });
        Self {
            flags,
            size: u64_at(bytes, 16).unwrap_or(0),
            offset: u64_at(bytes, 24).unwrap_or(0),
            sparse,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(list: &[u32]) -> Vec<u8> {
        list.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn iommu_info_gives_ranges_and_what_is_left() {
        let bytes = words(&[
            0,
            VFIO_IOMMU_INFO_CAPS,
            0x1000,
            0,
            24,
            0, // header, first capability at 24
            0x1_0003,
            36,
            65535, // dma_avail
            0x1_0001,
            0,
            2,
            0, // iova ranges, at 36
            0,
            0,
            0xfedf_ffff,
            0, // 0..=0xfedfffff
            0xfef0_0000,
            0,
            u32::MAX,
            0x7f, // 0xfef00000..=0x7fffffffff
        ]);
        let info = IommuInfo::parse(&bytes);
        assert_eq!(info.available, Some(65535));
        let usable: Vec<_> = info.usable.iter().map(|s| (s.start(), s.end())).collect();
        assert_eq!(usable, [(0, 0xfee0_0000), (0xfef0_0000, 0x80_0000_0000)]);
    }

    #[test]
    fn region_info_gives_sparse_areas_and_a_chain_in_a_loop_ends() {
        let mut list = vec![0, 0xf, 0, 32, 0x4000, 0, 0, 0];
        list.extend([0x1_0001, 0, 1, 0, 0x1000, 0, 0x3000, 0]);
        let region = RawRegion::parse(&words(&list));
        assert_eq!(region.size, 0x4000);
        assert_eq!(
            region.sparse,
            Some(vec![Span::new(0x1000, 0x3000).unwrap()])
        );
        list[8] = 0x1_0002;
        list[9] = 32;
        assert_eq!(RawRegion::parse(&words(&list)).sparse, None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            IommuInfo::parse(&bytes);
            RawRegion::parse(&bytes);
        }
    }
}
