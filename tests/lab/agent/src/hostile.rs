//! A VMM that means harm: what it does to its worker goes on beside a witness, whose pieces tell what that costs others.
//!
//! As `broker/tests/hostile.rs` judges: pairs by turns of a baseline, beside threads that only take
//! as many processors as the attack does, and of the attack. Ends in one line of JSON.

use crate::fuse::Unread;
use crate::nvme_remote::{BUFFERS, Controller, PATIENCE, within};
use crate::vfio_user::{
    BAR0, Client, DMA_MAP, Memory, RAM_BYTES, REGION_READ, access, dma_map, map,
};
use crate::witness::Eyes;
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use rustix::mm::MapFlags;
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::Duration;

/// Pairs of a baseline and an attack. The one in the middle is the verdict.
const PAIRS: usize = 5;
/// Pieces of the witness for a median.
const PIECES: usize = 12;
/// Requests that are sent before an answer is read.
const DEPTH: usize = 32;
const PAGE: u64 = 4096;
/// NVMe Base Specification 2.0, 3.1.3: the version's property, which a slice of the window covers.
const NEAR: u64 = 8;
/// In the page of the MSI-X table, which none covers: the worker asks its port, and that the lender.
const FAR: u64 = 0x3000;
const MAPS_MAX: u64 = 65_535;
/// Where the memory that is taken away lies for the function.
const VICTIM: u64 = RAM_BYTES;
/// A block that the witness does not use.
const BLOCK: (u64, u32) = (4096, 1);
const FUSE_DIR: &str = "/run/hostile";

/// One attack; how often it did what it does until `stop`.
type Attack<'a> = dyn Fn(&AtomicBool) -> Result<u64> + Sync + 'a;

/// Runs one case, the worker's socket being `socket`, and the witness's log `log`.
pub fn run(socket: &str, case: &str, log: &str) -> Result<()> {
    let mut eyes = Eyes::open(log)?;
    // So many threads are busy: the VMM's, and its worker's.
    let report = match case {
        "flood" => beside(&mut eyes, 2, &|stop| flood(socket, NEAR, stop))?,
        "far" => beside(&mut eyes, 1, &|stop| flood(socket, FAR, stop))?,
        "unread" => beside(&mut eyes, 0, &|stop| unread(socket, stop))?,
        "storm" => beside(&mut eyes, 1, &|stop| {
            storm(socket, || stop.load(Ordering::Relaxed))
        })?,
        "fuse" => fuse(socket, &mut eyes)?,
        "stuck" => return stuck(socket),
        "truncated" => {
            let report = taken_away(socket, &mut eyes, truncate)?;
            early(socket, truncate)?;
            report
        }
        "punched" => taken_away(socket, &mut eyes, punch)?,
        "maps" => {
            let report = beside(&mut eyes, 2, &|stop| {
                maps(socket, MAPS_MAX, stop).map(|(n, _)| n)
            })?;
            one_too_many(socket)?;
            report
        }
        _ => bail!("no case {case}"),
    };
    println!("{report}");
    Ok(())
}

/// What the witness's pieces take beside an attack, in terms of what they take beside threads that
/// only take processors.
fn beside(eyes: &mut Eyes, busy: usize, attack: &Attack<'_>) -> Result<Value> {
    let burn = |stop: &AtomicBool| {
        while !stop.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
        Ok(0)
    };
    compare(eyes, (busy, &burn), attack)
}

/// The same, in terms of what they take beside anything else.
fn compare(
    eyes: &mut Eyes,
    (threads, baseline): (usize, &Attack<'_>),
    attack: &Attack<'_>,
) -> Result<Value> {
    let (mut pairs, mut did) = (Vec::new(), 0);
    for _ in 0..PAIRS {
        let without = under(eyes, threads, baseline)?;
        let with = under(eyes, 1, attack)?;
        did += with.1;
        pairs.push((without.0, with.0));
    }
    let ratio = |(without, with): &(Duration, Duration)| with.as_secs_f64() / without.as_secs_f64();
    let mut ratios: Vec<f64> = pairs.iter().map(ratio).collect();
    ratios.sort_by(f64::total_cmp);
    let pairs: Vec<[u128; 2]> = pairs
        .iter()
        .map(|(without, with)| [without.as_micros(), with.as_micros()])
        .collect();
    Ok(json!({"ratio": ratios[PAIRS / 2], "did": did, "pairs_us": pairs}))
}

/// The witness's median while so many threads do this, and how often they did it.
fn under(eyes: &mut Eyes, threads: usize, act: &Attack<'_>) -> Result<(Duration, u64)> {
    let stop = AtomicBool::new(false);
    scope(|scope| {
        let acting: Vec<_> = (0..threads).map(|_| scope.spawn(|| act(&stop))).collect();
        let median = eyes.median(PIECES);
        stop.store(true, Ordering::Relaxed);
        let mut did = 0;
        for thread in acting {
            did += thread.join().ok().context("an attack panicked")??;
        }
        Ok((median?, did))
    })
}

fn agreed(socket: &str) -> Result<Client> {
    let mut client = Client::connect(socket)?;
    client.agree()?;
    Ok(client)
}

/// Reads of a register, as many as the worker answers.
fn flood(socket: &str, offset: u64, stop: &AtomicBool) -> Result<u64> {
    let mut client = agreed(socket)?;
    let (read, mut did) = (access(BAR0, offset, 4, None), 0);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..DEPTH {
            client.send(REGION_READ, &read, &[])?;
        }
        for _ in 0..DEPTH {
            client.answer(REGION_READ)?;
        }
        did += DEPTH as u64;
    }
    Ok(did)
}

/// Requests until the worker takes no more, as nobody reads what it answers.
fn unread(socket: &str, stop: &AtomicBool) -> Result<u64> {
    let mut client = agreed(socket)?;
    client.send_within(Duration::from_millis(200))?;
    let (read, mut did) = (access(BAR0, NEAR, 4, None), 0);
    while client.send(REGION_READ, &read, &[]).is_ok() {
        did += 1;
    }
    until(stop);
    Ok(did)
}

fn until(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Interrupts into an eventfd that takes none: whoever writes to it waits for ever.
fn storm(socket: &str, is_over: impl Fn() -> bool) -> Result<u64> {
    let full = eventfd(0, EventfdFlags::CLOEXEC)?;
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes())?;
    let mut controller = Controller::start(socket, full.as_fd())?;
    let mut did = 0;
    while !is_over() {
        controller.nothing(within(PATIENCE))?;
        did += 1;
    }
    Ok(did)
}

/// The same until the file `stop` is there, beside nobody that it looks at.
pub fn storm_until(socket: &str, stop: &str) -> Result<()> {
    let did = storm(socket, || Path::new(stop).exists())?;
    println!("{did} commands");
    Ok(())
}

/// Sessions with memory of a file system that answers no READ.
fn fuse(socket: &str, eyes: &mut Eyes) -> Result<Value> {
    let unread = Unread::mount(Path::new(FUSE_DIR), RAM_BYTES, true)?;
    let file = unread.open()?.into();
    // As a VMM has it, and never touches it: that would wait for ever.
    map(&file, RAM_BYTES, MapFlags::SHARED)?;
    beside(eyes, 1, &|stop| {
        let mut did = 0;
        while !stop.load(Ordering::Relaxed) {
            let mut client = agreed(socket)?;
            client.send(DMA_MAP, &dma_map(0, RAM_BYTES), &[file.as_fd()])?;
            // Where the map was taken, this is when it is pinned.
            let _ = client.enable(false);
            client.wait_end()?;
            did += 1;
        }
        Ok(did)
    })
}

/// A worker that closes a file whose file system does not answer: no signal ends it.
fn stuck(socket: &str) -> Result<()> {
    let unread = Unread::mount(Path::new(FUSE_DIR), RAM_BYTES, false)?;
    let file = unread.open()?;
    let mut client = agreed(socket)?;
    client.send(DMA_MAP, &dma_map(0, RAM_BYTES), &[file.as_fd()])?;
    println!("sent");
    loop {
        std::thread::park();
    }
}

fn truncate(memory: &File) -> Result<()> {
    Ok(ftruncate(memory, 0)?)
}

fn punch(memory: &File) -> Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(fallocate(memory, flags, 0, RAM_BYTES)?)
}

/// Beside DMA of the same function into memory that stays: two tenants share a cable and a device,
/// and an emulated one is busy with either.
fn taken_away(socket: &str, eyes: &mut Eyes, take: fn(&File) -> Result<()>) -> Result<Value> {
    let stays: &Attack<'_> = &|stop| dma(socket, None, stop);
    compare(eyes, (1, stays), &|stop| dma(socket, Some(take), stop))
}

/// DMA into memory that was taken out of its file: it goes where it went before, and what the file
/// has there now stays as it is.
fn dma(socket: &str, take: Option<fn(&File) -> Result<()>>, stop: &AtomicBool) -> Result<u64> {
    let event = eventfd(0, EventfdFlags::CLOEXEC)?;
    let mut controller = Controller::start(socket, event.as_fd())?;
    let memory = Memory::new(RAM_BYTES, MapFlags::SHARED)?;
    let body = dma_map(VICTIM, RAM_BYTES);
    controller
        .client
        .ask(DMA_MAP, &body, &[memory.fd.as_fd()])?;
    let file = File::from(memory.fd.try_clone()?);
    let mut word = [0xa5; 8];
    controller.ram.write_all_at(&word, BUFFERS)?;
    controller.write(BLOCK, BUFFERS, within(PATIENCE))?;
    controller.read(BLOCK, VICTIM, within(PATIENCE))?;
    file.read_exact_at(&mut word, 0)?;
    ensure!(
        word == [0xa5; 8],
        "no DMA has reached the memory: {word:x?}"
    );
    if let Some(take) = take {
        take(&file)?;
    }
    let mut did = 0;
    while !stop.load(Ordering::Relaxed) {
        controller.read(BLOCK, VICTIM, within(PATIENCE))?;
        // What was there is still there for the function.
        controller.write(BLOCK, VICTIM, within(PATIENCE))?;
        did += 1;
    }
    if take.is_none() {
        return Ok(did);
    }
    ftruncate(&file, RAM_BYTES)?;
    file.read_exact_at(&mut word, 0)?;
    ensure!(word == [0; 8], "DMA reaches the file's new page: {word:x?}");
    controller.read(BLOCK, BUFFERS, within(PATIENCE))?;
    controller.ram.read_exact_at(&mut word, BUFFERS)?;
    ensure!(word == [0xa5; 8], "the function reads {word:x?} there");
    Ok(did)
}

/// Memory that is gone between its map and the first bus mastering, when it is pinned.
fn early(socket: &str, take: fn(&File) -> Result<()>) -> Result<()> {
    let mut client = agreed(socket)?;
    let memory = Memory::new(RAM_BYTES, MapFlags::SHARED)?;
    client.ask(DMA_MAP, &dma_map(0, RAM_BYTES), &[memory.fd.as_fd()])?;
    take(&File::from(memory.fd.try_clone()?))?;
    client.enable(false)?;
    client.wait_end()
}

/// So many maps of one page each, or as many as there is time for.
fn maps(socket: &str, most: u64, stop: &AtomicBool) -> Result<(u64, Client)> {
    let mut client = agreed(socket)?;
    let page = Memory::new(PAGE, MapFlags::SHARED)?;
    let mut did = 0;
    while did < most && !stop.load(Ordering::Relaxed) {
        let some = (most - did).min(DEPTH as u64);
        for at in did..did + some {
            client.send(DMA_MAP, &dma_map(at * PAGE, PAGE), &[page.fd.as_fd()])?;
        }
        for at in did..did + some {
            client
                .answer(DMA_MAP)
                .with_context(|| format!("map {at}"))?;
        }
        did += some;
    }
    Ok((did, client))
}

/// All that there can be, and another.
fn one_too_many(socket: &str) -> Result<()> {
    let (did, mut client) = maps(socket, MAPS_MAX, &AtomicBool::new(false))?;
    ensure!(did == MAPS_MAX, "{did} maps only");
    let page = Memory::new(PAGE, MapFlags::SHARED)?;
    let body = dma_map(MAPS_MAX * PAGE, PAGE);
    client.send(DMA_MAP, &body, &[page.fd.as_fd()])?;
    client.wait_end()
}
