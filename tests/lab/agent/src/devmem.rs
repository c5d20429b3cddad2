//! Reads and writes device registers through /dev/mem (hosts boot with `iomem=relaxed`).
// A mapping of device memory is only reachable by volatile accesses.
#![allow(unsafe_code)]

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::fs::OpenOptions;

const PAGE: u64 = 4096;
/// More than this is no register file.
const BYTES_MAX: usize = 1 << 20;

struct Mapping {
    base: *mut c_void,
    bytes: usize,
    skip: usize,
}

impl Mapping {
    fn new(phys: u64, bytes: usize) -> Result<Self> {
        ensure!(
            phys.is_multiple_of(4) && bytes.is_multiple_of(4),
            "not a multiple of 4 bytes"
        );
        ensure!(bytes <= BYTES_MAX, "more than {BYTES_MAX} bytes");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/mem")
            .context("cannot open /dev/mem")?;
        let skip = (phys % PAGE) as usize;
        let bytes = (skip + bytes).next_multiple_of(PAGE as usize);
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address; nothing else knows this mapping.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                prot,
                flags,
                &file,
                phys - skip as u64,
            )
        }
        .with_context(|| format!("cannot map {phys:#x}"))?;
        Ok(Mapping { base, bytes, skip })
    }

    fn word(&self, index: usize) -> *mut u32 {
        self.base
            .wrapping_byte_add(self.skip)
            .cast::<u32>()
            .wrapping_add(index)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no pointer into it outlives it.
        let _ = unsafe { munmap(self.base, self.bytes) };
    }
}

/// Prints words of 32 bits as hex, each read once.
pub fn read(phys: u64, bytes: usize) -> Result<()> {
    let mapping = Mapping::new(phys, bytes)?;
    for index in 0..bytes / 4 {
        // SAFETY: within the mapping, aligned (checked in `new`).
        println!("{:08x}", unsafe { mapping.word(index).read_volatile() });
    }
    Ok(())
}

/// Writes one word of 32 bits.
pub fn write(phys: u64, value: u32) -> Result<()> {
    let mapping = Mapping::new(phys, 4)?;
    // SAFETY: within the mapping, aligned (checked in `new`).
    unsafe { mapping.word(0).write_volatile(value) };
    Ok(())
}
