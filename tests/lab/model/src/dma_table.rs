//! What one client has mapped for DMA: a sorted table over memory files that are mapped once each.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};

use thiserror::Error;

use crate::memory::{FileId, MappedFile, MemoryError, identify};
use crate::wire::DMA_MAPS_MAX;

/// The host's DMA may read this range.
pub const FLAG_READ: u32 = 1;
/// The host's DMA may write this range.
pub const FLAG_WRITE: u32 = 2;
/// An unmap of everything.
pub const FLAG_UNMAP_ALL: u32 = 2;

/// Why a map was refused.
#[derive(Debug, Error)]
pub enum DmaError {
    #[error("a map of {size:#x} bytes at {iova:#x} is empty or wraps")]
    Range { iova: u64, size: u64 },
    #[error("a map of {size:#x} bytes at {iova:#x} overlaps another one")]
    Overlap { iova: u64, size: u64 },
    #[error("more than {DMA_MAPS_MAX} maps")]
    Full,
    #[error("using the memory file of a map")]
    Memory(#[from] MemoryError),
}

impl DmaError {
    /// The error number for the client.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Range { .. } | Self::Memory(MemoryError::TooShort { .. }) => libc::EINVAL,
            Self::Overlap { .. } => libc::EEXIST,
            Self::Full => libc::ENOSPC,
            Self::Memory(_) => libc::EFAULT,
        }
    }
}

/// One range; `file` is where it lies when it came with a descriptor.
#[derive(Debug, Clone)]
pub struct DmaMap {
    pub size: u64,
    pub flags: u32,
    file: Option<(Rc<MappedFile>, u64)>,
}

impl DmaMap {
    /// True when the range came with a descriptor.
    pub fn has_fd(&self) -> bool {
        self.file.is_some()
    }

    fn same_as(&self, other: &Self) -> bool {
        let file = |map: &Self| map.file.as_ref().map(|(file, at)| (Rc::as_ptr(file), *at));
        (self.size, self.flags, file(self)) == (other.size, other.flags, file(other))
    }

    /// The part of this range that starts `skip` bytes into it.
    fn part(&self, skip: u64, size: u64) -> Self {
        let file = self
            .file
            .as_ref()
            .map(|(file, at)| (Rc::clone(file), at + skip));
        Self {
            size,
            flags: self.flags,
            file,
        }
    }
}

/// The table.
#[derive(Debug, Default)]
pub struct DmaTable {
    maps: BTreeMap<u64, DmaMap>,
    files: HashMap<FileId, Weak<MappedFile>>,
}

impl DmaTable {
    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The maps by their DMA address.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &DmaMap)> {
        self.maps.iter().map(|(iova, map)| (*iova, map))
    }

    /// Enters a range. The same range again is no error: QEMU replays its maps.
    pub fn map(
        &mut self,
        iova: u64,
        size: u64,
        flags: u32,
        file: Option<(OwnedFd, u64)>,
    ) -> Result<(), DmaError> {
        let end = iova.checked_add(size).filter(|_| size > 0);
        let end = end.ok_or(DmaError::Range { iova, size })?;
        let file = match file {
            Some((fd, offset)) => Some((self.file(&fd, offset, size)?, offset)),
            None => None,
        };
        let map = DmaMap { size, flags, file };
        let last_below = self.maps.range(..end).next_back();
        if let Some((at, old)) = last_below.filter(|(at, old)| *at + old.size > iova) {
            let same = *at == iova && old.same_as(&map);
            return if same {
                Ok(())
            } else {
                Err(DmaError::Overlap { iova, size })
            };
        }
        if self.maps.len() >= DMA_MAPS_MAX {
            return Err(DmaError::Full);
        }
        self.maps.insert(iova, map);
        Ok(())
    }

    fn file(
        &mut self,
        fd: &OwnedFd,
        offset: u64,
        size: u64,
    ) -> Result<Rc<MappedFile>, MemoryError> {
        let (id, bytes) = identify(fd)?;
        let end = offset.saturating_add(size);
        if end > bytes {
            return Err(MemoryError::TooShort { end, bytes });
        }
        let known = self.files.get(&id).and_then(Weak::upgrade);
        if let Some(file) = known.filter(|file| file.len() >= end) {
            return Ok(file);
        }
        let file = Rc::new(MappedFile::new(fd, bytes)?);
        self.files.retain(|_, file| file.strong_count() > 0);
        self.files.insert(id, Rc::downgrade(&file));
        Ok(file)
    }

    /// Takes a range out, also out of the middle of a map; returns the bytes that were mapped.
    pub fn unmap(&mut self, iova: u64, size: u64) -> u64 {
        let end = iova.saturating_add(size);
        let mut touched: Vec<u64> = self.maps.range(iova..end).map(|(at, _)| *at).collect();
        let below = self.maps.range(..iova).next_back();
        touched.extend(
            below
                .filter(|(at, map)| *at + map.size > iova)
                .map(|(at, _)| *at),
        );
        let mut bytes = 0;
        for at in touched {
            let Some(map) = self.maps.remove(&at) else {
                continue;
            };
            let map_end = at + map.size;
            bytes += map_end.min(end) - at.max(iova);
            if at < iova {
                self.maps.insert(at, map.part(0, iova - at));
            }
            if map_end > end {
                self.maps.insert(end, map.part(end - at, map_end - end));
            }
        }
        bytes
    }

    /// Takes everything out; returns the bytes that were mapped.
    pub fn unmap_all(&mut self) -> u64 {
        let bytes = self.maps.values().map(|map| map.size).sum();
        self.clear();
        bytes
    }

    /// Walks the parts of a range; `None` when not all of it lies in files with these rights.
    fn parts(&self, iova: u64, bytes: u64, rights: u32) -> Option<Vec<(&MappedFile, u64, u64)>> {
        let end = iova.checked_add(bytes)?;
        let mut parts = Vec::with_capacity(1);
        let mut at = iova;
        while at < end {
            let (start, map) = self.maps.range(..=at).next_back()?;
            let skip = at - start;
            let (file, offset) = map.file.as_ref()?;
            if skip >= map.size || map.flags & rights != rights {
                return None;
            }
            let taken = (map.size - skip).min(end - at);
            parts.push((&**file, offset + skip, taken));
            at += taken;
        }
        Some(parts)
    }

    /// Reads the host's memory directly; false when that is not possible.
    #[must_use]
    pub fn read(&self, iova: u64, data: &mut [u8]) -> bool {
        let Some(parts) = self.parts(iova, data.len() as u64, FLAG_READ) else {
            return false;
        };
        let mut rest = data;
        for (file, offset, bytes) in parts {
            let (part, after) = rest.split_at_mut(bytes as usize);
            if !file.read(offset, part) {
                return false;
            }
            rest = after;
        }
        true
    }

    /// Writes the host's memory directly; false when that is not possible.
    #[must_use]
    pub fn write(&self, iova: u64, data: &[u8]) -> bool {
        let Some(parts) = self.parts(iova, data.len() as u64, FLAG_WRITE) else {
            return false;
        };
        let mut rest = data;
        for (file, offset, bytes) in parts {
            let (part, after) = rest.split_at(bytes as usize);
            if !file.write(offset, part) {
                return false;
            }
            rest = after;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    const PAGE: u64 = 4096;
    const BOTH: u32 = FLAG_READ | FLAG_WRITE;

    fn memory(pages: u64) -> OwnedFd {
        let fd = memfd_create("memory", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, pages * PAGE).expect("size");
        fd
    }

    fn file(fd: &OwnedFd, page: u64) -> Option<(OwnedFd, u64)> {
        Some((fd.try_clone().expect("dup"), page * PAGE))
    }

    #[test]
    fn access_crosses_from_one_map_to_the_next_and_not_into_a_hole() {
        let fd = memory(8);
        let mut table = DmaTable::default();
        table.map(0x10_0000, PAGE, BOTH, file(&fd, 5)).expect("map");
        table.map(0x10_1000, PAGE, BOTH, file(&fd, 2)).expect("map");
        assert!(table.write(0x10_0FFC, &[1, 2, 3, 4, 5, 6, 7, 8]));
        let whole = MappedFile::new(&fd, 8 * PAGE).expect("map");
        let (mut low, mut high) = ([0; 4], [0; 4]);
        assert!(whole.read(6 * PAGE - 4, &mut low) && whole.read(2 * PAGE, &mut high));
        assert_eq!((low, high), ([1, 2, 3, 4], [5, 6, 7, 8]));
        assert!(!table.read(0x10_1FFC, &mut [0; 8]));
        assert!(!table.read(0x0F_FFFC, &mut [0; 8]));
        assert_eq!(table.files.len(), 1, "one mapping for one file");
    }

    #[test]
    fn rights_are_honoured() {
        let fd = memory(2);
        let mut table = DmaTable::default();
        table.map(0, PAGE, FLAG_READ, file(&fd, 0)).expect("map");
        assert!(table.read(0, &mut [0; 8]));
        assert!(!table.write(0, &[0; 8]));
    }

    #[test]
    fn range_without_a_descriptor_is_remembered_and_not_accessed() {
        let mut table = DmaTable::default();
        table.map(0, PAGE, BOTH, None).expect("map");
        assert!(!table.read(0, &mut [0; 8]));
        assert!(table.iter().all(|(_, map)| !map.has_fd()));
    }

    #[test]
    fn same_map_again_is_accepted_and_another_one_over_it_is_not() {
        let fd = memory(4);
        let mut table = DmaTable::default();
        table.map(PAGE, 2 * PAGE, BOTH, file(&fd, 0)).expect("map");
        table
            .map(PAGE, 2 * PAGE, BOTH, file(&fd, 0))
            .expect("again");
        for (iova, size) in [(PAGE, 2 * PAGE), (0, 2 * PAGE), (2 * PAGE, PAGE)] {
            let error = table
                .map(iova, size, BOTH, file(&fd, 1))
                .expect_err("overlap");
            assert_eq!(error.errno(), libc::EEXIST);
        }
    }

    #[test]
    fn map_that_is_empty_wraps_or_passes_the_end_of_its_file_is_refused() {
        let fd = memory(1);
        let mut table = DmaTable::default();
        for (iova, size) in [(0, 0), (u64::MAX, 2), (0, 2 * PAGE), (0, u64::MAX)] {
            let error = table
                .map(iova, size, BOTH, file(&fd, 0))
                .expect_err("refused");
            assert_eq!(error.errno(), libc::EINVAL, "{error}");
        }
        assert!(
            table
                .map(0, PAGE, BOTH, Some((memory(1), u64::MAX)))
                .is_err()
        );
    }

    #[test]
    fn unmap_takes_several_maps_or_the_middle_of_one() {
        let fd = memory(8);
        let mut table = DmaTable::default();
        table.map(0, PAGE, BOTH, file(&fd, 0)).expect("map");
        table.map(PAGE, 6 * PAGE, BOTH, file(&fd, 1)).expect("map");
        assert_eq!(table.unmap(2 * PAGE, PAGE), PAGE);
        assert!(table.read(PAGE, &mut [0; 8]) && table.read(3 * PAGE, &mut [0; 8]));
        assert!(!table.read(2 * PAGE, &mut [0; 8]));
        assert_eq!(table.unmap(0, u64::MAX), 6 * PAGE);
        assert_eq!(table.iter().count(), 0);
        assert_eq!(table.unmap(0, PAGE), 0);
    }

    #[test]
    fn table_takes_its_maximum_and_not_one_more() {
        let mut table = DmaTable::default();
        for n in 0..DMA_MAPS_MAX as u64 {
            table
                .map(2 * n * PAGE, PAGE, BOTH, None)
                .expect("below the maximum");
        }
        let error = table.map(1 << 40, PAGE, BOTH, None).expect_err("full");
        assert_eq!(error.errno(), libc::ENOSPC);
    }
}
