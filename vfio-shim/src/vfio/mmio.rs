//! Loads and stores to mapped memory, each of one width, with holes that read as ones.
#![allow(unsafe_code)] // Volatile accesses at addresses that a live `FdMapping` promises.

use super::FdMapping;
use crate::model::{Aperture, Mapping, Span};
use std::{
    io,
    os::fd::BorrowedFd,
    sync::atomic::{Ordering, fence},
};

/// A mapped BAR or memory fd. Accesses go only to the areas; all else reads as ones.
pub struct MappedAperture {
    mapping: FdMapping,
    areas: Vec<Span>,
}

/// The widest access (at most 8 bytes) that is naturally aligned at `offset` and not longer than
/// `left`.
fn width(offset: u64, left: usize) -> usize {
    let aligned = 1 << offset.trailing_zeros().min(3);
    let fits = 1 << left.ilog2().min(3);
    aligned.min(fits)
}

impl MappedAperture {
    /// A BAR; see [`FdMapping::bar`].
    pub fn bar(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        areas: &[Span],
        physical: Option<u64>,
    ) -> io::Result<Self> {
        Ok(Self {
            mapping: FdMapping::bar(fd, offset, len, areas, physical)?,
            areas: areas.to_vec(),
        })
    }

    /// Memory of this host: `len` bytes of a memory fd.
    pub fn memory(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<Self> {
        let all = Span::new(0, len).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self {
            mapping: FdMapping::new(fd, offset, len)?,
            areas: vec![all],
        })
    }

    /// The areas behind which there is something, sorted.
    pub fn areas(&self) -> &[Span] {
        &self.areas
    }

    /// The address of `bytes` bytes at `offset` if an area holds all of them.
    fn address(&self, offset: u64, bytes: usize) -> Option<*mut u8> {
        let span = Span::new(offset, bytes as u64)?;
        if !self.areas.iter().any(|area| area.contains(span)) {
            return None;
        }
        // SAFETY: an area lies in the mapping (checked by `FdMapping::bar` and by construction),
        // so `offset` does.
        Some(unsafe { self.mapping.addr().as_ptr().add(offset as usize) })
    }

    /// Where an access of whole, aligned words begins, if an area holds all of it.
    fn words(&self, offset: u64, len: usize) -> Option<*mut u64> {
        let whole = offset.is_multiple_of(8) && len.is_multiple_of(8);
        let start = self.address(offset, len).filter(|_| whole);
        start.map(<*mut u8>::cast)
    }
}

/// Splits an access of `len` bytes at `offset` into naturally aligned ones: (offset, range).
pub(super) fn split(
    offset: u64,
    len: usize,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset.checked_add(done as u64)?;
        if done == len {
            return None;
        }
        let start = done;
        done += width(at, len - done);
        Some((at, start..done))
    })
}

impl Aperture for MappedAperture {
    fn len(&self) -> u64 {
        self.mapping.len()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(start) = self.words(offset, data.len()) {
            let (words, _) = data.as_chunks_mut::<8>();
            for (at, word) in words.iter_mut().enumerate() {
                // SAFETY: `words` says that all of `data.len()` bytes are mapped, and aligned; the
                // rest as below.
                *word = unsafe { start.add(at).read_volatile() }.to_ne_bytes();
            }
            return fence(Ordering::Acquire);
        }
        data.fill(0xff);
        for (at, range) in split(offset, data.len()) {
            let Some(address) = self.address(at, range.len()) else {
                continue;
            };
            let part = &mut data[range];
            // SAFETY: `address` holds for `part.len()` mapped bytes, aligned to that width as
            // `split` cuts and the mapping is page aligned. What devices and peers do to the
            // memory meanwhile is what volatile is for.
            unsafe {
                match part.len() {
                    8 => part.copy_from_slice(&address.cast::<u64>().read_volatile().to_ne_bytes()),
                    4 => part.copy_from_slice(&address.cast::<u32>().read_volatile().to_ne_bytes()),
                    2 => part.copy_from_slice(&address.cast::<u16>().read_volatile().to_ne_bytes()),
                    _ => part[0] = address.read_volatile(),
                }
            }
        }
        // Later loads of this thread stay behind these: a peer's commit word before its message.
        fence(Ordering::Acquire);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Earlier stores of this thread stay before these: a message before its commit word.
        fence(Ordering::Release);
        if let Some(start) = self.words(offset, data.len()) {
            let (words, _) = data.as_chunks::<8>();
            for (at, word) in words.iter().enumerate() {
                // SAFETY: as in `read`.
                unsafe { start.add(at).write_volatile(u64::from_ne_bytes(*word)) };
            }
            return;
        }
        for (at, range) in split(offset, data.len()) {
            let Some(address) = self.address(at, range.len()) else {
                continue;
            };
            let part = &data[range];
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            // The width's own bytes are the first ones, whatever the byte order.
            let [a, b, c, d, ..] = word;
            // SAFETY: as in `read`.
            unsafe {
                match part.len() {
                    8 => address
                        .cast::<u64>()
                        .write_volatile(u64::from_ne_bytes(word)),
                    4 => {
                        let value = u32::from_ne_bytes([a, b, c, d]);
                        address.cast::<u32>().write_volatile(value);
                    }
                    2 => address
                        .cast::<u16>()
                        .write_volatile(u16::from_ne_bytes([a, b])),
                    _ => address.write_volatile(a),
                }
            }
        }
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        Some(&self.mapping)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::os::fd::AsFd;

    #[test]
    fn natural_accesses_stay_whole_and_others_are_split() {
        let widths = |offset, len| -> Vec<usize> {
            split(offset, len).map(|(_, range)| range.len()).collect()
        };
        for len in [1, 2, 4, 8] {
            assert_eq!(widths(0x18, len), [len]);
        }
        assert_eq!(widths(1, 8), [1, 2, 4, 1]);
        assert_eq!(widths(4, 8), [4, 4]);
        assert_eq!(widths(0, 21), [8, 8, 4, 1]);
        assert_eq!(widths(u64::MAX, 4), [1]);
        assert!(widths(0, 0).is_empty());
    }

    #[test]
    fn holes_and_what_lies_past_the_end_read_as_ones_and_drop_writes() {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 0x4000).unwrap();
        let areas = [(0, 0x1000), (0x2000, 0x2000)].map(|(a, b)| Span::new(a, b).unwrap());
        let bar = MappedAperture::bar(fd.as_fd(), 0, 0x4000, &areas, None).unwrap();
        let memory = MappedAperture::memory(fd.as_fd(), 0, 0x4000).unwrap();
        memory.write(0, &[0x11; 0x4000]);
        bar.write(0xffe, &[0x22; 4]);
        bar.write(0x3ffe, &[0x33; 4]);
        let mut seen = [0; 4];
        bar.read(0xffe, &mut seen);
        assert_eq!(seen, [0x22, 0x22, 0xff, 0xff]);
        bar.read(0x3ffe, &mut seen);
        assert_eq!(seen, [0x33, 0x33, 0xff, 0xff]);
        memory.read(0x1000, &mut seen);
        assert_eq!(seen, [0x11; 4]);
        memory.read(0x3fff, &mut seen);
        assert_eq!(seen, [0x33, 0xff, 0xff, 0xff]);
    }
}
