//! Memory of a device or a memory fd mapped into this process, at an address that suits the IOMMU.
#![allow(unsafe_code)] // mmap(2) and munmap(2); the guard below is the only owner of its addresses.

use crate::model::{Access, Mapping, Span};
use rustix::{
    fs::fstatfs,
    mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};
use std::{ffi::c_void, io, os::fd::BorrowedFd, ptr::NonNull};

/// With the virtual address equal to the physical one modulo this, the kernel maps a BAR with its
/// largest pages, and so does the IOMMU: 1 ms instead of 308 for 256 MiB (NTB.md).
pub const BAR_ALIGN: u64 = 1 << 30;
const PAGE: u64 = 4096;
/// `f_type` of hugetlbfs (linux/magic.h), memfds with MFD_HUGETLB included.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

fn to_usize(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

/// Owns a run of this process's address space, and gives it back on drop.
struct Reservation {
    addr: NonNull<c_void>,
    len: usize,
}

// SAFETY: it is an address and a length; unmapping from any thread is fine.
unsafe impl Send for Reservation {}
// SAFETY: no method takes `&self` but to read the two fields.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// `len` bytes without access at an address that is `congruent` modulo `BAR_ALIGN`.
    fn aligned(len: usize, congruent: u64) -> io::Result<Self> {
        let align = BAR_ALIGN as usize;
        let padded = len.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), padded, ProtFlags::empty(), flags)? };
        let skip = (congruent as usize).wrapping_sub(start as usize) & (align - 1);
        let tail = padded - skip - len;
        // SAFETY: head and tail lie in the mapping just made, which nobody has seen; `skip` is
        // under `align`, so `skip + len <= padded`.
        unsafe {
            if skip != 0 {
                munmap(start, skip)?;
            }
            if tail != 0 {
                munmap(start.byte_add(skip + len), tail)?;
            }
            Self::of(start.byte_add(skip), len)
        }
    }

    fn of(addr: *mut c_void, len: usize) -> io::Result<Self> {
        let addr = NonNull::new(addr).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { addr, len })
    }

    /// Lays `len` bytes of `fd` over the reservation, `at` bytes into it.
    fn lay(&self, at: usize, len: usize, fd: Option<(BorrowedFd<'_>, u64)>) -> io::Result<()> {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the range lies in the reservation (asserted), which is ours alone, and nobody
        // has a reference into it: users get raw addresses and make volatile accesses.
        unsafe {
            let addr = self.addr.as_ptr().byte_add(at);
            match fd {
                Some((fd, offset)) => {
                    mmap(
                        addr,
                        len,
                        prot,
                        MapFlags::SHARED | MapFlags::FIXED,
                        fd,
                        offset,
                    )?;
                }
                None => {
                    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
                    mmap_anonymous(addr, len, prot, flags)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the run is ours alone, and whoever borrowed an address has let go of the guard.
        let result = unsafe { munmap(self.addr.as_ptr(), self.len) };
        if let Err(error) = result {
            tracing::error!(%error, "munmap failed");
        }
    }
}

/// Memory of an fd, readable and writable, mapped until dropped. It keeps the file behind the fd
/// open: a mapped BAR keeps its VFIO group busy.
pub struct FdMapping {
    run: Reservation,
    len: u64,
}

// SAFETY: `new` and `bar` map all of `len` bytes readable and writable, only drop unmaps them.
unsafe impl Mapping for FdMapping {
    fn addr(&self) -> NonNull<u8> {
        self.run.addr.cast()
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl FdMapping {
    /// Maps `len` bytes from `offset` of a memory fd.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<Self> {
        let pages = Pages::map(fd, offset, len, Access::READ_WRITE)?;
        if pages.skip != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            run: pages.run,
            len,
        })
    }

    /// Maps a BAR of `len` bytes whose first byte is at `offset` of a device fd: its `areas` from
    /// the fd, and private memory in the holes between them, so that a stray access in this
    /// process harms nobody. `physical` is the BAR's physical address, if known.
    pub fn bar(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        areas: &[Span],
        physical: Option<u64>,
    ) -> io::Result<Self> {
        let sound = |a: &Span| a.is_aligned(PAGE) && a.end() <= len && !a.is_empty();
        if len == 0 || !areas.iter().all(sound) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let padded = len
            .checked_next_multiple_of(PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let run = Reservation::aligned(to_usize(padded)?, physical.unwrap_or(0) & !(PAGE - 1))?;
        if areas != [Span::new(0, padded).ok_or(io::ErrorKind::InvalidInput)?] {
            run.lay(0, run.len, None)?;
        }
        for area in areas {
            let from = offset
                .checked_add(area.start())
                .ok_or(io::ErrorKind::InvalidInput)?;
            run.lay(
                to_usize(area.start())?,
                to_usize(area.len())?,
                Some((fd, from)),
            )?;
        }
        Ok(Self { run, len })
    }
}

/// Pages of a memory fd, mapped only so that the kernel can pin them; never touched here.
pub(super) struct Pages {
    run: Reservation,
    skip: usize,
}

impl Pages {
    /// Maps `len` bytes from `offset`. Huge pages are mapped whole, as hugetlbfs insists.
    pub fn map(fd: BorrowedFd<'_>, offset: u64, len: u64, access: Access) -> io::Result<Self> {
        let stat = fstatfs(fd)?;
        let page = match stat.f_type as i64 {
            HUGETLBFS_MAGIC => (stat.f_bsize as u64).max(PAGE),
            _ => PAGE,
        };
        if len == 0 || !page.is_power_of_two() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let first = offset & !(page - 1);
        let end = offset
            .checked_add(len)
            .and_then(|end| end.checked_next_multiple_of(page))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let bytes = to_usize(end - first)?;
        let prot = match access.write {
            true => ProtFlags::READ | ProtFlags::WRITE,
            false => ProtFlags::READ,
        };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let addr = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                prot,
                MapFlags::SHARED,
                fd,
                first,
            )?
        };
        Ok(Self {
            run: Reservation::of(addr, bytes)?,
            skip: to_usize(offset - first)?,
        })
    }

    /// The address of the first byte asked for.
    pub fn vaddr(&self) -> u64 {
        (self.run.addr.as_ptr() as usize + self.skip) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::{AsFd, OwnedFd};

    fn memfd(len: u64) -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn a_bar_is_mapped_at_its_physical_address_modulo_one_gib() {
        let fd = memfd(0x20_0000);
        for physical in [0, 0x3f_e010_0000, 0x1234_5000, BAR_ALIGN - 4096] {
            let areas = [Span::new(0, 0x20_0000).unwrap()];
            let map = FdMapping::bar(fd.as_fd(), 0, 0x20_0000, &areas, Some(physical)).unwrap();
            let addr = map.addr().as_ptr() as u64;
            assert_eq!(addr % BAR_ALIGN, physical % BAR_ALIGN);
        }
    }

    #[test]
    fn areas_outside_the_bar_or_unaligned_are_refused() {
        let fd = memfd(0x4000);
        for (start, len) in [(0, 0x5000), (0x800, 0x1000), (0x1000, 0)] {
            let areas = [Span::new(start, len).unwrap()];
            assert!(FdMapping::bar(fd.as_fd(), 0, 0x4000, &areas, None).is_err());
        }
    }

    #[test]
    fn pages_of_a_read_only_fd_map_for_reading_only() {
        let fd = memfd(0x3000);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let read_only = std::fs::File::open(path).unwrap();
        let map = |access| Pages::map(read_only.as_fd(), 0x1000, 0x2000, access);
        assert!(map(Access::READ).is_ok());
        assert!(map(Access::READ_WRITE).is_err());
    }
}
