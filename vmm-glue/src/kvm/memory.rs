//! Memory of an fd mapped into this process for a guest, with its unmapping after its memory slot.
#![allow(unsafe_code)] // mmap(2), munmap(2) and volatile copies; the guard is the only owner of its addresses.

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::{ffi::c_void, io, os::fd::BorrowedFd, ptr::NonNull};

/// Host and guest addresses agree modulo this, so that KVM can use the largest pages.
const ALIGN: usize = 1 << 30;

/// A shared mapping, unmapped on drop.
pub struct Memory {
    addr: NonNull<c_void>,
    len: usize,
}

// SAFETY: it is an address and a length; unmapping from any thread is fine.
unsafe impl Send for Memory {}
// SAFETY: methods by `&self` make volatile accesses of bytes, as the guest does beside them.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` bytes from `offset` of `fd`, at an address that is `guest` modulo 1 GiB.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: u64, guest: u64) -> io::Result<Self> {
        let too_long = || io::Error::from(io::ErrorKind::OutOfMemory);
        let len = usize::try_from(len).map_err(|_| too_long())?;
        let padded = len.checked_add(ALIGN).ok_or_else(too_long)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), padded, ProtFlags::empty(), flags)? };
        let skip = (guest as usize).wrapping_sub(start as usize) & (ALIGN - 1);
        // SAFETY: head, tail and middle lie in the mapping just made, which nobody has seen:
        // `skip` is under `ALIGN`. Giving back a part at its border cannot need a new mapping.
        unsafe {
            let middle = start.byte_add(skip);
            if skip != 0 {
                munmap(start, skip)?;
            }
            if padded != skip + len {
                munmap(middle.byte_add(len), padded - skip - len)?;
            }
            let addr = NonNull::new(middle).ok_or_else(too_long)?;
            let this = Self { addr, len };
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            mmap(
                middle,
                len,
                prot,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                offset,
            )?;
            Ok(this)
        }
    }

    /// Its address in this process, for a memory slot.
    pub fn host_address(&self) -> u64 {
        self.addr.as_ptr() as u64
    }

    fn at(&self, offset: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(offset).ok()?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        // SAFETY: `offset + len` lies in the mapping.
        inside.then(|| unsafe { self.addr.as_ptr().cast::<u8>().add(offset) })
    }

    /// Loads bytes, each once, in order. False past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let Some(from) = self.at(offset, data.len()) else {
            return false;
        };
        for (at, byte) in data.iter_mut().enumerate() {
            // SAFETY: within `data.len()` bytes from `from`, which are mapped. The guest may store
            // there meanwhile: the access is volatile, and any value is one.
            *byte = unsafe { from.add(at).read_volatile() };
        }
        true
    }

    /// Stores bytes, each once, in order. False past the end.
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let Some(to) = self.at(offset, data.len()) else {
            return false;
        };
        for (at, byte) in data.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { to.add(at).write_volatile(*byte) };
        }
        true
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the run is ours alone; a memory slot over it is gone (`Slot::drop`).
        if let Err(error) = unsafe { munmap(self.addr.as_ptr(), self.len) } {
            tracing::error!(%error, "munmap failed");
        }
    }
}
