//! A function's regions as the kernel tells them, with the MSI-X pages cut out of what may be mapped.

use super::{OpenError, caps::RawRegion, ioctl};
use crate::model::{Bdf, CAP_MSIX, ConfigView, RegionIndex, RegionInfo, Span};
use std::os::fd::BorrowedFd;
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

const PAGE: u64 = 4096;
const REGIONS: usize = RegionIndex::COUNT as usize;

/// What the kernel says of all regions, by index.
pub(super) fn read(device: BorrowedFd<'_>, bdf: Bdf) -> Result<[RawRegion; REGIONS], OpenError> {
    let mut regions: [RawRegion; REGIONS] = Default::default();
    for (index, region) in regions.iter_mut().enumerate() {
        match ioctl::region_info(device, index as u32) {
            Ok(bytes) => *region = RawRegion::parse(&bytes),
            // No such region: VGA on what is no VGA.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
            Err(error) => return Err(OpenError::kernel("tell the regions of", bdf)(error)),
        }
    }
    Ok(regions)
}

/// The pages of the MSI-X table and of its pending bits: (BAR, pages).
pub(super) fn msix_pages(config: &ConfigView<'_>) -> Vec<(u32, Span)> {
    let Some(at) = config.capability(CAP_MSIX) else {
        return Vec::new();
    };
    // PCI 3.0 section 6.8.2: message control at 2, table offset and BIR at 4, PBA at 8.
    let vectors = u64::from(config.u16(at + 2) & 0x7ff) + 1;
    let table = (config.u32(at + 4), vectors * 16);
    let pba = (config.u32(at + 8), vectors.div_ceil(64) * 8);
    let pages = |(word, len): (u32, u64)| {
        let first = u64::from(word & !7);
        let start = first & !(PAGE - 1);
        let end = (first + len).next_multiple_of(PAGE);
        Some((word & 7, Span::new(start, end - start)?))
    };
    [table, pba].into_iter().filter_map(pages).collect()
}

/// `areas` without `hole`, both page aligned.
fn cut(areas: Vec<Span>, hole: Span) -> Vec<Span> {
    let mut left = Vec::with_capacity(areas.len() + 1);
    for area in areas {
        if !area.overlaps(hole) {
            left.push(area);
            continue;
        }
        let before = hole.start().saturating_sub(area.start());
        let after = area.end().saturating_sub(hole.end());
        left.extend(Span::new(area.start(), before).filter(|s| !s.is_empty()));
        left.extend(Span::new(hole.end(), after).filter(|s| !s.is_empty()));
    }
    left
}

/// The region as the model has it. The MSI-X pages are cut out always, also where the kernel
/// would let them be mapped.
pub(super) fn to_model(index: u32, raw: &RawRegion, msix: &[(u32, Span)]) -> RegionInfo {
    let whole = Span::new(0, raw.size & !(PAGE - 1));
    let mut areas = match raw.flags & VFIO_REGION_INFO_FLAG_MMAP {
        0 => Vec::new(),
        _ => raw
            .sparse
            .clone()
            .unwrap_or_else(|| whole.into_iter().collect()),
    };
    areas.retain(|area| !area.is_empty());
    areas.sort_unstable();
    for (_, hole) in msix.iter().filter(|(bar, _)| *bar == index) {
        areas = cut(areas, *hole);
    }
    let mut info = RegionInfo {
        size: raw.size,
        readable: raw.flags & VFIO_REGION_INFO_FLAG_READ != 0,
        writable: raw.flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        areas,
    };
    if !info.areas_are_sound() {
        tracing::error!(
            index,
            ?info,
            "the kernel tells areas that cannot be; none is mapped"
        );
        info.areas.clear();
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64) -> Span {
        Span::new(start, len).unwrap()
    }

    fn raw(size: u64, sparse: Option<Vec<Span>>) -> RawRegion {
        RawRegion {
            flags: 7,
            size,
            offset: 0,
            sparse,
        }
    }

    #[test]
    fn msix_pages_are_cut_out_even_where_the_kernel_would_map_them() {
        let msix = [(0, span(0x4000, 0x1000)), (0, span(0x5000, 0x1000))];
        let info = to_model(0, &raw(0x10000, None), &msix);
        assert_eq!(info.areas, [span(0, 0x4000), span(0x6000, 0xa000)]);
        let other = to_model(2, &raw(0x10000, None), &msix);
        assert_eq!(other.areas, [span(0, 0x10000)]);
        let sparse = to_model(0, &raw(0x10000, Some(vec![span(0x4000, 0x2000)])), &msix);
        assert_eq!(sparse.areas, []);
    }

    #[test]
    fn a_bar_under_a_page_or_with_unsound_areas_is_not_mapped() {
        assert_eq!(to_model(0, &raw(0x100, None), &[]).areas, []);
        let beyond = Some(vec![span(0x1000, 0x2000)]);
        assert_eq!(to_model(0, &raw(0x2000, beyond), &[]).areas, []);
    }

    #[test]
    fn the_table_and_the_pending_bits_are_found_in_config_space() {
        let mut config = [0u8; 256];
        config[6] = 0x10;
        config[0x34] = 0x80;
        config[0x80..0x8c].copy_from_slice(&[
            0x11, 0, 0x20, 0, // 33 vectors
            0, 0x40, 0, 0, // table: BAR 0, 0x4000
            2, 0x58, 0, 0, // PBA: BAR 2, 0x5800
        ]);
        let pages = msix_pages(&ConfigView::new(&config).unwrap());
        assert_eq!(
            pages,
            [(0, span(0x4000, 0x1000)), (2, span(0x5000, 0x1000))]
        );
    }
}
