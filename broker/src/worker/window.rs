//! A BAR as a worker reaches it: its slice of the window, mapped, or through the port; taken away when the lease is lost.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, PoisonError, RwLock},
};
use vfio_shim::{
    model::{Aperture, Mapping, RegionInfo},
    vfio::MappedAperture,
};

/// How one BAR is reached.
pub(super) enum BarWindow {
    /// By loads and stores of this process.
    Mapped(Arc<Slice>),
    /// By messages: the port does it.
    Far { bar: u8, bytes: u64 },
    /// Not at all.
    None,
}

/// A mapped slice that can be taken away.
pub(super) struct Slice {
    bytes: u64,
    mapped: RwLock<Option<MappedAperture>>,
}

impl BarWindow {
    pub(super) fn none() -> Self {
        Self::None
    }

    pub(super) fn far(bar: u8, bytes: u64) -> Self {
        Self::Far { bar, bytes }
    }

    /// Maps a BAR's areas from `offset` of the window's descriptor.
    pub(super) fn mapped(fd: BorrowedFd<'_>, offset: u64, info: &RegionInfo) -> io::Result<Self> {
        if info.areas.is_empty() {
            return Ok(Self::None);
        }
        let mapped = MappedAperture::bar(fd, offset, info.size, &info.areas, None)?;
        Ok(Self::Mapped(Arc::new(Slice {
            bytes: info.size,
            mapped: RwLock::new(Some(mapped)),
        })))
    }

    /// When it returns, nothing of the slice is mapped here.
    pub(super) fn let_go(&self) {
        if let Self::Mapped(slice) = self {
            let mut mapped = slice.mapped.write().unwrap_or_else(PoisonError::into_inner);
            drop(mapped.take());
        }
    }
}

impl Aperture for Slice {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mapped = self.mapped.read().unwrap_or_else(PoisonError::into_inner);
        match &*mapped {
            Some(mapped) => mapped.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mapped = self.mapped.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(mapped) = &*mapped {
            mapped.write(offset, data);
        }
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}
