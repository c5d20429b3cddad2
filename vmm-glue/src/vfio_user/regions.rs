//! A function's regions as the VMM sees them: what is told of them, and the way of an access.

use super::{options::BarMode, shared::SessionCounters, wire};
use std::{mem::size_of, os::fd::BorrowedFd, sync::Arc};
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_shim::model::{
    Aperture, BAR_COUNT, Function, FunctionError, MmapArea, RegionIndex, RegionInfo, Span,
};

/// The low byte of COMMAND in config space, and in it bus mastering (PCIe 6.0 section 7.5.1.1.3).
const COMMAND: u64 = 4;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// Where the header of config space ends.
const HEADER_BYTES: u64 = 0x40;

/// Why a write was dropped.
#[derive(Debug)]
pub enum Dropped {
    /// There is no such region, or it ends before.
    Outside,
    /// The function did not take it.
    Refused(FunctionError),
}

/// A function's regions in one guest session.
pub struct Regions<'f> {
    function: &'f dyn Function,
    mode: BarMode,
    /// The BARs that this process can load and store itself.
    bars: [Option<Arc<dyn Aperture>>; BAR_COUNT],
}

impl<'f> Regions<'f> {
    /// Captures the BARs as they are at the start of a session.
    pub fn new(function: &'f dyn Function, mode: BarMode) -> Self {
        let bars = std::array::from_fn(|bar| function.bar(RegionIndex(bar as u32)));
        Self {
            function,
            mode,
            bars,
        }
    }

    /// The fd by which the VMM may map the region's areas, and where the region starts in it.
    fn mapped(&self, region: RegionIndex, info: &RegionInfo) -> Option<(BorrowedFd<'f>, u64)> {
        if self.mode == BarMode::Trapped || info.areas.is_empty() || region.bar().is_none() {
            return None;
        }
        self.function.mmap_fd(region)
    }

    /// Answers GET_REGION_INFO. A request with too little room gets the structure alone, which
    /// tells how much is needed; the fd goes with the full answer, and only with it.
    pub fn info(
        &self,
        request: &wire::RegionInfo,
        reply: &mut wire::Reply,
    ) -> Option<BorrowedFd<'f>> {
        let region = RegionIndex(request.index.get());
        let mut answer = wire::RegionInfo {
            argsz: (size_of::<wire::RegionInfo>() as u32).into(),
            index: request.index,
            ..wire::RegionInfo::default()
        };
        if region.0 >= RegionIndex::COUNT {
            reply.push(&answer);
            reply.fail(rustix::io::Errno::INVAL.raw_os_error() as u32);
            return None;
        }
        let Some(info) = self.function.info().region(region) else {
            reply.push(&answer);
            return None;
        };
        let mut flags = 0;
        flags |= if info.readable {
            VFIO_REGION_INFO_FLAG_READ
        } else {
            0
        };
        flags |= if info.writable {
            VFIO_REGION_INFO_FLAG_WRITE
        } else {
            0
        };
        answer.size = info.size.into();
        let Some((fd, offset)) = self.mapped(region, info) else {
            answer.flags = flags.into();
            reply.push(&answer);
            return None;
        };
        let areas_bytes = info.areas.len() * size_of::<wire::SparseArea>();
        let full = size_of::<wire::RegionInfo>() + size_of::<wire::SparseMmap>() + areas_bytes;
        answer.flags = (flags | VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS).into();
        answer.argsz = (full as u32).into();
        // Also in the short answer: QEMU refuses capabilities at offset 0 there.
        answer.cap_offset = (size_of::<wire::RegionInfo>() as u32).into();
        answer.offset = offset.into();
        reply.push(&answer);
        if (request.argsz.get() as usize) < full {
            return None;
        }
        push_areas(&info.areas, reply);
        Some(fd)
    }

    /// Reads into `data`; what cannot be read is all ones. False if it was refused.
    pub fn read(
        &self,
        access: &wire::RegionAccess,
        data: &mut [u8],
        counters: &SessionCounters,
    ) -> bool {
        let region = RegionIndex(access.region.get());
        match region {
            RegionIndex::CONFIG => counters.config_reads.count(),
            _ => counters.bar_reads.count(),
        }
        let Some(span) = self.span(region, access.offset.get(), data.len()) else {
            data.fill(0xff);
            return false;
        };
        if let Some(bar) = self.direct(region, span) {
            bar.read(span.start(), data);
            return true;
        }
        match self.function.region_read(region, span.start(), data) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(region = region.0, %span, %error, "a read was answered with ones");
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; what cannot be written is dropped, and why is told.
    pub fn write(
        &self,
        access: &wire::RegionAccess,
        data: &[u8],
        counters: &SessionCounters,
    ) -> Result<(), Dropped> {
        let region = RegionIndex(access.region.get());
        match region {
            RegionIndex::CONFIG => counters.config_writes.count(),
            _ => counters.bar_writes.count(),
        }
        let Some(span) = self.span(region, access.offset.get(), data.len()) else {
            return Err(Dropped::Outside);
        };
        if let Some(bar) = self.direct(region, span) {
            bar.write(span.start(), data);
            return Ok(());
        }
        let written = self.function.region_write(region, span.start(), data);
        written.map_err(|error| {
            tracing::debug!(region = region.0, %span, %error, "a write was dropped");
            Dropped::Refused(error)
        })
    }

    /// The bytes of the access, if they all lie in the region.
    fn span(&self, region: RegionIndex, offset: u64, bytes: usize) -> Option<Span> {
        let span = Span::new(offset, bytes as u64)?;
        let size = self.function.info().region(region)?.size;
        (span.end() <= size).then_some(span)
    }

    /// The aperture to use where the access lies in an area that may be mapped; outside of areas,
    /// as in the MSI-X table, the function itself has to look at it.
    fn direct(&self, region: RegionIndex, span: Span) -> Option<&dyn Aperture> {
        let bar = self.bars.get(region.bar()?)?.as_deref()?;
        let areas = &self.function.info().regions[region.0 as usize].areas;
        areas.iter().any(|area| area.contains(span)).then_some(bar)
    }
}

fn push_areas(areas: &[MmapArea], reply: &mut wire::Reply) {
    reply.push(&wire::SparseMmap {
        id: (VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16).into(),
        version: 1.into(),
        next: 0.into(),
        areas: (areas.len() as u32).into(),
        reserved: 0.into(),
    });
    for area in areas {
        reply.push(&wire::SparseArea {
            offset: area.start().into(),
            len: area.len().into(),
        });
    }
}

/// Whether the write sets bus mastering, so that the function may do DMA once it is through.
pub fn enables_bus_master(access: &wire::RegionAccess, data: &[u8]) -> bool {
    let byte = COMMAND
        .checked_sub(access.offset.get())
        .and_then(|at| data.get(usize::try_from(at).ok()?));
    access.region.get() == RegionIndex::CONFIG.0
        && byte.is_some_and(|byte| byte & COMMAND_BUS_MASTER != 0)
}

/// Whether the write can change the function's own state. The header of config space, but for
/// bus mastering, is only a shadow: VMMs write there before every reset.
pub fn touches(access: &wire::RegionAccess, data: &[u8]) -> bool {
    let end = access.offset.get().saturating_add(data.len() as u64);
    access.region.get() != RegionIndex::CONFIG.0
        || end > HEADER_BYTES
        || enables_bus_master(access, data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn access(region: u32, offset: u64) -> wire::RegionAccess {
        wire::RegionAccess {
            offset: offset.into(),
            region: region.into(),
            count: 0.into(),
        }
    }

    #[test]
    fn bus_mastering_is_seen_in_writes_of_every_width_that_cover_it() {
        for (offset, data) in [
            (4, &[4][..]),
            (4, &[6, 0]),
            (4, &[7, 0, 0, 0]),
            (3, &[0, 4]),
            (0, &[0, 0, 0, 0, 4, 0, 0, 0]),
        ] {
            assert!(enables_bus_master(&access(7, offset), data), "{offset}");
            assert!(!enables_bus_master(&access(0, offset), data), "{offset}");
        }
        for (offset, data) in [(4, &[3][..]), (5, &[4]), (0, &[4, 4, 4, 4]), (4, &[])] {
            assert!(!enables_bus_master(&access(7, offset), data), "{offset}");
        }
    }

    #[test]
    fn what_vmms_write_before_a_reset_does_not_touch_the_function() {
        assert!(!touches(&access(7, 4), &[3, 0]));
        assert!(!touches(&access(7, 0x10), &[0xff; 4]));
        assert!(touches(&access(7, 4), &[4, 0]));
        assert!(touches(&access(7, 0x3e), &[0; 4]));
        assert!(touches(&access(7, 0x70), &[0; 2]));
        assert!(touches(&access(0, 0), &[0; 4]));
    }

    proptest! {
        #[test]
        fn any_access_is_judged(region in any::<u32>(), offset in any::<u64>(), data in proptest::collection::vec(any::<u8>(), 0..16)) {
            let access = access(region, offset);
            let _ = (enables_bus_master(&access, &data), touches(&access, &data));
        }
    }
}
