//! A host's memory file, mapped once, and single accesses to it of exactly the asked width.
#![allow(unsafe_code)]
// Memory shared with another process can only be reached through raw pointers.

use std::ffi::c_void;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use thiserror::Error;

/// Why a memory file could not be used.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error("asking for the size of the memory file")]
    Stat(#[source] rustix::io::Errno),
    #[error("mapping {bytes} bytes of the memory file")]
    Map {
        bytes: u64,
        #[source]
        source: rustix::io::Errno,
    },
    #[error("the map ends at byte {end} of a file of {bytes}")]
    TooShort { end: u64, bytes: u64 },
}

/// What makes two descriptors the same file.
pub type FileId = (u64, u64);

/// Device and inode of a file, and its size.
pub fn identify(fd: &OwnedFd) -> Result<(FileId, u64), MemoryError> {
    let stat = rustix::fs::fstat(fd).map_err(MemoryError::Stat)?;
    Ok(((stat.st_dev, stat.st_ino), stat.st_size as u64))
}

/// The mapping of a whole memory file.
#[derive(Debug)]
pub struct MappedFile {
    start: NonNull<u8>,
    bytes: usize,
    writable: bool,
}

impl MappedFile {
    /// Maps `bytes` of a file, read-only when it does not allow more.
    pub fn new(fd: &OwnedFd, bytes: u64) -> Result<Self, MemoryError> {
        let error = |source| MemoryError::Map { bytes, source };
        let length = usize::try_from(bytes).map_err(|_| error(rustix::io::Errno::OVERFLOW))?;
        let map = |prot| {
            // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of
            // this process.
            unsafe {
                mmap(
                    std::ptr::null_mut(),
                    length,
                    prot,
                    MapFlags::SHARED,
                    fd.as_fd(),
                    0,
                )
            }
        };
        let (start, writable) = match map(ProtFlags::READ | ProtFlags::WRITE) {
            Ok(start) => (start, true),
            Err(rustix::io::Errno::ACCESS) => (map(ProtFlags::READ).map_err(error)?, false),
            Err(source) => return Err(error(source)),
        };
        let start = NonNull::new(start.cast()).ok_or_else(|| error(rustix::io::Errno::NOMEM))?;
        Ok(Self {
            start,
            bytes: length,
            writable,
        })
    }

    /// Bytes that are mapped.
    pub fn len(&self) -> u64 {
        self.bytes as u64
    }

    /// True for an empty file.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn at(&self, offset: u64, bytes: usize) -> Option<NonNull<u8>> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(bytes)? > self.bytes {
            return None;
        }
        // SAFETY: offset lies within the mapping, as was just checked.
        Some(unsafe { self.start.add(offset) })
    }

    /// Reads; false when the range is not in the file.
    #[must_use]
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let Some(from) = self.at(offset, data.len()) else {
            return false;
        };
        let aligned = from.as_ptr().align_offset(data.len().next_power_of_two()) == 0;
        // SAFETY: the range is mapped and stays so as long as self; it is aligned for the atomic
        // that is used; the bytes are shared with other processes only, never borrowed here.
        unsafe {
            match data.len() {
                8 if aligned => {
                    let value = from.cast::<AtomicU64>().as_ref().load(Ordering::Acquire);
                    data.copy_from_slice(&value.to_ne_bytes());
                }
                4 if aligned => {
                    let value = from.cast::<AtomicU32>().as_ref().load(Ordering::Acquire);
                    data.copy_from_slice(&value.to_ne_bytes());
                }
                2 if aligned => {
                    let value = from.cast::<AtomicU16>().as_ref().load(Ordering::Acquire);
                    data.copy_from_slice(&value.to_ne_bytes());
                }
                1 => data[0] = from.cast::<AtomicU8>().as_ref().load(Ordering::Acquire),
                bytes => std::ptr::copy(from.as_ptr(), data.as_mut_ptr(), bytes),
            }
        }
        true
    }

    /// Writes; false when the range is not in the file or the file is read-only.
    #[must_use]
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        if !self.writable {
            return false;
        }
        let Some(to) = self.at(offset, data.len()) else {
            return false;
        };
        let aligned = to.as_ptr().align_offset(data.len().next_power_of_two()) == 0;
        // SAFETY: as in read, and the mapping is writable.
        unsafe {
            match *data {
                [a, b, c, d, e, f, g, h] if aligned => {
                    let value = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
                    to.cast::<AtomicU64>()
                        .as_ref()
                        .store(value, Ordering::Release);
                }
                [a, b, c, d] if aligned => {
                    let value = u32::from_ne_bytes([a, b, c, d]);
                    to.cast::<AtomicU32>()
                        .as_ref()
                        .store(value, Ordering::Release);
                }
                [a, b] if aligned => {
                    let value = u16::from_ne_bytes([a, b]);
                    to.cast::<AtomicU16>()
                        .as_ref()
                        .store(value, Ordering::Release);
                }
                [a] => to.cast::<AtomicU8>().as_ref().store(a, Ordering::Release),
                _ => std::ptr::copy(data.as_ptr(), to.as_ptr(), data.len()),
            }
        }
        true
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: this object made the mapping and nothing borrowed from it outlives it.
        let result = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), self.bytes) };
        debug_assert!(result.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memory(bytes: u64) -> MappedFile {
        let fd = memfd_create("memory", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, bytes).expect("size");
        MappedFile::new(&fd, bytes).expect("map")
    }

    #[test]
    fn every_width_and_alignment_reads_what_was_written() {
        let memory = memory(4096);
        for offset in 0..16 {
            for bytes in 0..=16 {
                let data: Vec<u8> = (1..=bytes).map(|n| n + offset as u8).collect();
                assert!(memory.write(offset, &data));
                let mut back = vec![0; data.len()];
                assert!(memory.read(offset, &mut back));
                assert_eq!(back, data);
            }
        }
    }

    #[test]
    fn access_past_the_end_is_refused() {
        let memory = memory(4096);
        assert!(memory.write(4088, &[1; 8]));
        assert!(!memory.write(4089, &[1; 8]));
        assert!(!memory.read(u64::MAX, &mut [0; 8]));
    }
}
