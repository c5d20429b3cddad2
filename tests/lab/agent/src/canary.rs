//! Memory that nobody may write: full of a pattern, half of it mapped for a function, half of it nobody's, and looked at again and again.

use crate::vfio_user::{Client, DMA_MAP, DMA_UNMAP, Memory, dma_map, dma_unmap};
use anyhow::{Result, bail};
use rustix::mm::MapFlags;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const PATTERN: u32 = 0xca4a_4e50;
const BYTES: usize = 1 << 20;
/// Far from the tenant's own memory, which begins at 0.
const ADDRESS: u64 = 1 << 28;

/// The memory, in which nothing but the pattern was ever written by its owner.
pub struct Canary {
    file: File,
    pattern: Vec<u8>,
    _memory: Memory,
}

impl Canary {
    /// Fills it.
    pub fn plant() -> Result<Self> {
        let memory = Memory::new(BYTES as u64, MapFlags::SHARED)?;
        let file = File::from(memory.fd.try_clone()?);
        let pattern = PATTERN.to_le_bytes().repeat(BYTES / 4);
        file.write_all_at(&pattern, 0)?;
        Ok(Canary {
            file,
            pattern,
            _memory: memory,
        })
    }

    /// Gives the function its first half, which the function is never told of.
    pub fn map(&self, client: &mut Client) -> Result<()> {
        let body = dma_map(ADDRESS, BYTES as u64 / 2);
        client.ask(DMA_MAP, &body, &[self.file.as_fd()]).map(drop)
    }

    /// Takes it away again.
    pub fn unmap(&self, client: &mut Client) -> Result<()> {
        let body = dma_unmap(ADDRESS, BYTES as u64 / 2);
        client.ask(DMA_UNMAP, &body, &[]).map(drop)
    }

    /// That all of it is as it was.
    pub fn look(&self) -> Result<()> {
        let mut now = vec![0; BYTES];
        self.file.read_exact_at(&mut now, 0)?;
        let broken = now.chunks(16).zip(self.pattern.chunks(16));
        let broken = broken.enumerate().find(|(_, (now, was))| now != was);
        if let Some((index, (now, _))) = broken {
            bail!("canary broken at {:#x}: {now:x?}", index * 16);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_seen_and_told_where() {
        for at in [0, BYTES / 2 + 5, BYTES - 1] {
            let canary = Canary::plant().unwrap();
            canary.look().unwrap();
            canary.file.write_all_at(&[0], at as u64).unwrap();
            let told = canary.look().unwrap_err().to_string();
            assert!(told.contains(&format!("{:#x}", at / 16 * 16)), "{told}");
        }
    }
}
