//! A type 1 v2 container as an address space: every map is all or none, every error is returned.
#![allow(unsafe_code)] // MAP_DMA hands memory to a device; the reasons stand at the two calls.

use super::{
    OpenError,
    caps::IommuInfo,
    ioctl,
    mapping::Pages,
    table::{Entry, Table, steps},
};
use crate::model::{Access, AddressSpace, Aperture, DmaMap, MapError, Memory, Span, overlap_among};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE1v2_IOMMU,
};

const PAGE: u64 = 4096;
const ERRNO_INVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();
const ERRNO_FAULT: i32 = rustix::io::Errno::FAULT.raw_os_error();
const ERRNO_NOMEM: i32 = rustix::io::Errno::NOMEM.raw_os_error();

/// A DMA address space of the kernel's IOMMU. Dropping it unmaps everything.
pub struct Container {
    // The fd goes first: closing it ends the IOMMU mappings, and only then may the memory that
    // the table keeps mapped go.
    fd: OwnedFd,
    table: Mutex<Table>,
    usable: Vec<Span>,
}

fn kernel(act: &'static str, span: Span) -> impl FnOnce(io::Error) -> MapError {
    move |source| MapError::Kernel { act, span, source }
}

/// Of pages that were to be pinned.
fn pinning(span: Span) -> impl FnOnce(io::Error) -> MapError {
    move |source| match source.raw_os_error() {
        Some(ERRNO_FAULT) => MapError::NoPages(span),
        Some(ERRNO_NOMEM) => MapError::NotLocked(span),
        _ => kernel("map", span)(source),
    }
}

fn flags(access: Access) -> u32 {
    let read = if access.read {
        VFIO_DMA_MAP_FLAG_READ
    } else {
        0
    };
    let write = if access.write {
        VFIO_DMA_MAP_FLAG_WRITE
    } else {
        0
    };
    read | write
}

impl Container {
    /// Attaches the group to a container of nothing else. Close the group before the container.
    pub(super) fn with_group(fd: OwnedFd, group: BorrowedFd<'_>) -> Result<Self, OpenError> {
        let object = "a VFIO container";
        let version = ioctl::api_version(fd.as_fd())
            .map_err(OpenError::kernel("tell the API version of", object))?;
        let type1 = ioctl::has_extension(fd.as_fd(), VFIO_TYPE1v2_IOMMU)
            .map_err(OpenError::kernel("tell the extensions of", object))?;
        if version != VFIO_API_VERSION as i32 || !type1 {
            return Err(OpenError::NoType1 { version });
        }
        ioctl::group_set_container(group, fd.as_fd())
            .map_err(OpenError::kernel("attach the group to", object))?;
        ioctl::set_iommu(fd.as_fd(), VFIO_TYPE1v2_IOMMU).map_err(OpenError::kernel(
            "use the type 1 v2 IOMMU for (without interrupt remapping it says EPERM)",
            object,
        ))?;
        let info = ioctl::iommu_info(fd.as_fd())
            .map_err(OpenError::kernel("tell the address ranges of", object))?;
        let mut usable = IommuInfo::parse(&info).usable;
        if usable.is_empty() {
            // Kernels before 5.4 do not tell; then MAP_DMA alone decides.
            usable.extend(Span::from_inclusive(0, u64::MAX));
        }
        Ok(Self {
            fd,
            table: Mutex::default(),
            usable,
        })
    }

    fn check(&self, table: &Table, maps: &[DmaMap<'_>]) -> Result<(), MapError> {
        for DmaMap { span, memory, .. } in maps {
            let (Memory::Fd(_, offset) | Memory::Aperture(_, offset)) = memory;
            if span.is_empty() || !span.is_aligned(PAGE) || offset % PAGE != 0 {
                return Err(MapError::Align(*span));
            }
            if !self.usable.iter().any(|range| range.contains(*span)) {
                let usable: Vec<_> = self.usable.iter().map(range_in_words).collect();
                return Err(MapError::Unusable {
                    span: *span,
                    usable: usable.join(", "),
                });
            }
            table.check_free(*span)?;
        }
        let spans = || maps.iter().map(|map| map.span);
        if let Some(span) = overlap_among(spans()) {
            return Err(MapError::Overlap(span));
        }
        let wanted: u64 = spans().map(|span| steps(span).count() as u64).sum();
        let left = u64::from(self.available());
        if wanted > left {
            return Err(MapError::TooMany((left + table.steps()) as u32));
        }
        Ok(())
    }

    fn map_one(&self, map: &DmaMap<'_>) -> Result<Entry, MapError> {
        let span = map.span;
        let mut done = span.start();
        let mut behind = None;
        let result = match &map.memory {
            Memory::Fd(fd, offset) => {
                steps(span).try_for_each(|step| {
                    // No overflow: `map_pages` is first asked for the end of the whole run.
                    let at = offset.checked_add(step.start() - span.start());
                    self.map_pages(*fd, at, map.access, step)?;
                    done = step.end();
                    Ok(())
                })
            }
            Memory::Aperture(aperture, offset) => {
                behind = Some(Arc::clone(aperture));
                steps(span).try_for_each(|step| {
                    let at = offset.checked_add(step.start() - span.start());
                    self.map_aperture(aperture.as_ref(), at, map.access, step)?;
                    done = step.end();
                    Ok(())
                })
            }
        };
        let Err(error) = result else {
            return Ok(Entry { span, behind });
        };
        if let Some(made) = Span::new(span.start(), done - span.start()) {
            self.undo(made);
        }
        Err(error)
    }

    /// Pins pages of a memory fd. The mapping is only for the kernel to find the pages by.
    fn map_pages(
        &self,
        fd: BorrowedFd<'_>,
        offset: Option<u64>,
        access: Access,
        step: Span,
    ) -> Result<(), MapError> {
        let offset = offset.ok_or(MapError::Align(step))?;
        let pages = Pages::map(fd, offset, step.len(), access)
            .map_err(kernel("map the memory of", step))?;
        // SAFETY: the pages are mapped until `pages` drops. They belong to whoever sent the fd,
        // and this process never looks into them.
        unsafe {
            ioctl::map_dma(
                self.fd.as_fd(),
                flags(access),
                pages.vaddr(),
                step.start(),
                step.len(),
            )
        }
        .map_err(pinning(step))
    }

    fn map_aperture(
        &self,
        aperture: &dyn Aperture,
        offset: Option<u64>,
        access: Access,
        step: Span,
    ) -> Result<(), MapError> {
        let mapping = aperture.mapping().ok_or(MapError::NoMapping(step))?;
        let part = offset.and_then(|offset| Span::new(offset, step.len()));
        let part = part.filter(|part| part.end() <= mapping.len());
        let part = part.ok_or(MapError::NoMapping(step))?;
        let vaddr = mapping.addr().as_ptr() as u64 + part.start();
        // SAFETY: the implementor of `Mapping` promises `len()` bytes, and the part lies within.
        // An aperture is only ever accessed as volatile memory.
        unsafe {
            ioctl::map_dma(
                self.fd.as_fd(),
                flags(access),
                vaddr,
                step.start(),
                step.len(),
            )
        }
        .map_err(kernel("map", step))
    }

    /// Takes kernel mappings away that cover `span`, step by step.
    fn unmap_steps(&self, span: Span) -> Result<u64, MapError> {
        let mut bytes = 0;
        for step in steps(span) {
            let unmapped = ioctl::unmap_dma(self.fd.as_fd(), step.start(), step.len());
            bytes += unmapped.map_err(|source| match source.raw_os_error() {
                Some(ERRNO_INVAL) => MapError::Bisect(step),
                _ => kernel("unmap", step)(source),
            })?;
        }
        Ok(bytes)
    }

    fn undo(&self, span: Span) {
        if let Err(error) = self.unmap_steps(span) {
            // Only a kernel that has lost our mapping says no here; the container's end is then
            // the end of the mapping.
            tracing::error!(%span, %error, "a half-made DMA mapping could not be undone");
        }
    }
}

fn range_in_words(range: &Span) -> String {
    format!("{:#x}..={:#x}", range.start(), range.end() - 1)
}

impl AddressSpace for Container {
    fn usable(&self) -> Vec<Span> {
        self.usable.clone()
    }

    fn available(&self) -> u32 {
        match ioctl::iommu_info(self.fd.as_fd()) {
            Ok(info) => IommuInfo::parse(&info).available.unwrap_or(u32::MAX),
            Err(error) => {
                tracing::error!(%error, "the container does not tell how many mappings are left");
                0
            }
        }
    }

    fn map(&self, maps: &[DmaMap<'_>]) -> Result<(), MapError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        self.check(&table, maps)?;
        let mut made: Vec<Entry> = Vec::with_capacity(maps.len());
        for map in maps {
            match self.map_one(map) {
                Ok(entry) => made.push(entry),
                Err(error) => {
                    made.iter().rev().for_each(|entry| self.undo(entry.span));
                    return Err(error);
                }
            }
        }
        made.into_iter().for_each(|entry| table.insert(entry));
        Ok(())
    }

    fn unmap(&self, span: Span) -> Result<u64, MapError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = 0;
        for whole in table.whole_within(span)? {
            bytes += self.unmap_steps(whole)?;
            table.remove(whole.start());
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_cannot_be_pinned_are_told_with_what_to_do() {
        let span = Span::new(0x1000, 0x2000).expect("a span");
        let told = |errno| pinning(span)(io::Error::from_raw_os_error(errno)).to_string();
        assert!(told(ERRNO_FAULT).contains("has to stay for as long as it runs"));
        assert!(told(ERRNO_NOMEM).contains("LimitMEMLOCK=infinity"));
        assert!(told(ERRNO_INVAL).contains("the kernel refused to map 0x1000+0x2000"));
    }
}
