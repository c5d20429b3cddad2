//! A BAR as a worker reaches it: its slice of the window, mapped, or through the port; taken away when the lease is lost.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex},
};
use vfio_shim::{
    model::{Aperture, BAR_COUNT, Mapping, RegionInfo, Runtime},
    vfio::MappedAperture,
};

/// How each BAR is reached.
pub type Bars = [BarWindow; BAR_COUNT];

/// How one BAR is reached.
#[derive(Default)]
pub enum BarWindow {
    /// By loads and stores of this process.
    Mapped(Arc<Slice>),
    /// By messages: the port does it.
    Far {
        /// Which.
        bar: u8,
        /// Its size.
        bytes: u64,
    },
    /// Not at all.
    #[default]
    None,
}

/// A mapped slice that can be taken away.
pub struct Slice {
    bytes: u64,
    runtime: Arc<dyn Runtime>,
    /// Locked over each access: when it is taken away, none is under way.
    mapped: Mutex<Option<Box<dyn Aperture>>>,
}

impl BarWindow {
    /// A BAR's slice as this process loads and stores it.
    pub fn near(runtime: Arc<dyn Runtime>, bytes: u64, slice: Box<dyn Aperture>) -> Self {
        Self::Mapped(Arc::new(Slice {
            bytes,
            runtime,
            mapped: Mutex::new(Some(slice)),
        }))
    }

    /// Maps a BAR's areas from `offset` of the window's descriptor.
    pub(super) fn mapped(
        runtime: Arc<dyn Runtime>,
        fd: BorrowedFd<'_>,
        offset: u64,
        info: &RegionInfo,
    ) -> io::Result<Self> {
        if info.areas.is_empty() {
            return Ok(Self::None);
        }
        let mapped = MappedAperture::bar(fd, offset, info.size, &info.areas, None)?;
        Ok(Self::near(runtime, info.size, Box::new(mapped)))
    }

    /// When it returns, nothing of the slice is mapped here.
    pub(super) fn let_go(&self) {
        if let Self::Mapped(slice) = self {
            drop(slice.runtime.lock(&slice.mapped).take());
        }
    }
}

impl Aperture for Slice {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mapped = self.runtime.lock(&self.mapped);
        match &*mapped {
            Some(mapped) => mapped.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mapped = self.runtime.lock(&self.mapped);
        if let Some(mapped) = &*mapped {
            mapped.write(offset, data);
        }
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}
