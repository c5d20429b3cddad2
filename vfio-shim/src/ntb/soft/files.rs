//! The memory files behind a soft IOMMU: each mapped once, however many mappings of a device lie in it.

use crate::model::Aperture;
use crate::vfio::MappedAperture;
use rustix::{fs::fstat, io::Errno};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

const PAGE: u64 = 4096;

/// The files that are mapped, by device and inode. A process has room for 65,530 mappings of its
/// own, a container for as many of a device.
#[derive(Default)]
pub(super) struct MemoryFiles(BTreeMap<(u64, u64), Weak<MappedAperture>>);

impl MemoryFiles {
    /// What holds `len` bytes from `offset` of the file, and where in it they begin.
    pub(super) fn aperture(
        &mut self,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
    ) -> io::Result<(Arc<dyn Aperture>, u64)> {
        let stat = fstat(fd)?;
        let end = offset.checked_add(len).ok_or(Errno::FAULT)?;
        let whole = stat.st_size as u64 & !(PAGE - 1);
        if end > whole {
            return Err(Errno::FAULT.into());
        }
        let key = (stat.st_dev, stat.st_ino);
        let held = self.0.get(&key).and_then(Weak::upgrade);
        // A file that has grown since is mapped anew.
        if let Some(held) = held.filter(|held| held.len() >= end) {
            return Ok((held, offset));
        }
        let Ok(mapped) = MappedAperture::memory(fd, 0, whole) else {
            // A file can be larger than an address space, and sparse.
            return Ok((Arc::new(MappedAperture::memory(fd, offset, len)?), 0));
        };
        let mapped = Arc::new(mapped);
        self.0.retain(|_, held| held.strong_count() != 0);
        self.0.insert(key, Arc::downgrade(&mapped));
        Ok((mapped, offset))
    }
}
