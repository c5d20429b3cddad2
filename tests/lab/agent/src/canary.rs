//! Memory that nobody may write: full of a pattern, half of it mapped for a function, half of it nobody's, and looked at again and again.

use crate::vfio_user::{Client, DMA_MAP, DMA_UNMAP, Memory, dma_map, dma_unmap};
use anyhow::{Result, bail};
use rustix::mm::MapFlags;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const PATTERN: u32 = 0xca4a_4e50;
const BYTES: u64 = 1 << 20;
/// What is filled and looked at at a time.
const PIECE_BYTES: usize = 1 << 20;
/// Far from the tenant's own memory, which begins at 0.
const ADDRESS: u64 = 1 << 28;

/// The memory, in which nothing but the pattern was ever written by its owner.
pub struct Canary {
    file: File,
    bytes: u64,
    pattern: Vec<u8>,
    _memory: Memory,
}

impl Canary {
    /// Fills it.
    pub fn plant() -> Result<Self> {
        Self::fill(Memory::new(BYTES, MapFlags::SHARED)?, BYTES)
    }

    /// Fills so many MiB of huge pages, which is what guests have had before.
    pub fn plant_huge(mib: u64) -> Result<Self> {
        Self::fill(Memory::huge(mib)?, mib << 20)
    }

    fn fill(mut memory: Memory, bytes: u64) -> Result<Self> {
        let pattern = PATTERN.to_le_bytes().repeat(PIECE_BYTES / 4);
        memory.fill(&pattern);
        Ok(Canary {
            file: File::from(memory.fd.try_clone()?),
            bytes,
            pattern,
            _memory: memory,
        })
    }

    /// Gives the function its first half, which the function is never told of.
    pub fn map(&self, client: &mut Client) -> Result<()> {
        let body = dma_map(ADDRESS, self.bytes / 2);
        client.ask(DMA_MAP, &body, &[self.file.as_fd()]).map(drop)
    }

    /// Takes it away again.
    pub fn unmap(&self, client: &mut Client) -> Result<()> {
        let body = dma_unmap(ADDRESS, self.bytes / 2);
        client.ask(DMA_UNMAP, &body, &[]).map(drop)
    }

    /// That all of it is as it was.
    pub fn look(&self) -> Result<()> {
        let mut now = vec![0; PIECE_BYTES];
        for from in (0..self.bytes).step_by(PIECE_BYTES) {
            self.file.read_exact_at(&mut now, from)?;
            if now == self.pattern {
                continue;
            }
            let both = now.chunks(16).zip(self.pattern.chunks(16));
            let broken = both.enumerate().find(|(_, (now, was))| now != was);
            if let Some((index, (now, _))) = broken {
                bail!("canary broken at {:#x}: {now:x?}", from + index as u64 * 16);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_seen_and_told_where() {
        let long = 3 * BYTES;
        for (bytes, at) in [
            (BYTES, 0),
            (BYTES, BYTES / 2 + 5),
            (BYTES, BYTES - 1),
            (long, BYTES),
            (long, long - 1),
        ] {
            let memory = Memory::new(bytes, MapFlags::SHARED).unwrap();
            let canary = Canary::fill(memory, bytes).unwrap();
            canary.look().unwrap();
            canary.file.write_all_at(&[0], at).unwrap();
            let told = canary.look().unwrap_err().to_string();
            assert!(told.contains(&format!("{:#x}", at / 16 * 16)), "{told}");
        }
    }
}
