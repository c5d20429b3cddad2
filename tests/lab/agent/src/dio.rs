//! Direct I/O on a block device or file: pseudo-random bytes out or bytes in, with their SHA-256.

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// Suits every block device here; also the alignment of the buffer.
const ALIGN: usize = 4096;
const CHUNK_BYTES: usize = 128 << 10;

/// A buffer whose start is aligned, without an allocator's help.
struct Aligned {
    bytes: Vec<u8>,
    skip: usize,
}

impl Aligned {
    fn new() -> Self {
        let bytes = vec![0; CHUNK_BYTES + ALIGN];
        let skip = bytes.as_ptr().align_offset(ALIGN);
        Aligned { bytes, skip }
    }

    fn chunk(&mut self, bytes: usize) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + bytes]
    }
}

fn open(dev: &str, access: OFlags, offset: u64, bytes: u64) -> Result<File> {
    let aligned = offset.is_multiple_of(ALIGN as u64) && bytes.is_multiple_of(ALIGN as u64);
    ensure!(aligned, "offset and length are multiples of {ALIGN}");
    let fd = rustix::fs::open(
        dev,
        access | OFlags::DIRECT | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("cannot open {dev}"))?;
    Ok(fd.into())
}

/// Marsaglia's xorshift64: equal seeds give equal bytes on every machine.
pub fn fill(state: &mut u64, into: &mut [u8]) {
    for word in into.chunks_exact_mut(8) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

fn report(hash: Sha256, bytes: u64, since: Instant) {
    let sha256: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let took_ms = since.elapsed().as_millis();
    println!(
        "{}",
        serde_json::json!({ "sha256": sha256, "bytes": bytes, "took_ms": took_ms })
    );
}

fn each_chunk(bytes: u64, mut act: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let mut buffer = Aligned::new();
    let mut done = 0;
    while done < bytes {
        let step = (bytes - done).min(CHUNK_BYTES as u64);
        act(done, buffer.chunk(step as usize))?;
        done += step;
    }
    Ok(())
}

/// Writes bytes made from the seed.
pub fn write(dev: &str, offset: u64, bytes: u64, seed: u64) -> Result<()> {
    let file = open(dev, OFlags::WRONLY, offset, bytes)?;
    let (mut hash, since) = (Sha256::new(), Instant::now());
    // Zero is the one state that the generator cannot leave.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    each_chunk(bytes, |done, chunk| {
        fill(&mut state, chunk);
        hash.update(&*chunk);
        file.write_all_at(chunk, offset + done)
            .with_context(|| format!("cannot write {dev} at {:#x}", offset + done))
    })?;
    file.sync_data()
        .with_context(|| format!("cannot flush {dev}"))?;
    report(hash, bytes, since);
    Ok(())
}

/// Reads bytes past every cache.
pub fn read(dev: &str, offset: u64, bytes: u64) -> Result<()> {
    let file = open(dev, OFlags::RDONLY, offset, bytes)?;
    let (mut hash, since) = (Sha256::new(), Instant::now());
    each_chunk(bytes, |done, chunk| {
        file.read_exact_at(chunk, offset + done)
            .with_context(|| format!("cannot read {dev} at {:#x}", offset + done))?;
        hash.update(&*chunk);
        Ok(())
    })?;
    report(hash, bytes, since);
    Ok(())
}
