//! A tenant at work all the time: blocks written, read back and compared, each with the time that it took in a log; and the eyes of whoever reads that log.

use crate::nvme_remote::{BLOCK_BYTES, BUFFERS, Controller};
use anyhow::{Context, Result, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// So that it keeps well below the rate that a vector may have.
const REST: Duration = Duration::from_millis(30);
/// Blocks that nobody else in the lab uses.
const FIRST_BLOCK: u64 = (32 << 20) / BLOCK_BYTES as u64;
const BLOCKS: u64 = 64;
const FROM: u64 = BUFFERS;
const TO: u64 = BUFFERS + 0x1000;
const POLL: Duration = Duration::from_millis(10);
/// Ten pieces of an idle machine take half a second.
const PATIENCE: Duration = Duration::from_secs(60);
/// An interrupt that has not come after this will not come.
const INTERRUPT_PATIENCE: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

/// Works until the file `stop` is there; a byte that is wrong or an interrupt that does not come is an error.
pub fn run(socket: &str, stop: &str, log: &str) -> Result<()> {
    let event = eventfd(0, EventfdFlags::CLOEXEC)?;
    let mut controller = Controller::start(socket, event.as_fd())?;
    let mut log = File::create(log).with_context(|| format!("cannot make {log}"))?;
    let mut pieces = 0_u64;
    while !Path::new(stop).exists() {
        let began = Instant::now();
        piece(&mut controller, &event, pieces)?;
        writeln!(log, "{}", began.elapsed().as_micros())?;
        pieces += 1;
        std::thread::sleep(REST);
    }
    println!("{pieces} pieces were right");
    Ok(())
}

fn piece(controller: &mut Controller, event: &OwnedFd, count: u64) -> Result<()> {
    let block = FIRST_BLOCK + count % BLOCKS;
    let data: Vec<u8> = (0..BLOCK_BYTES as u64 / 8)
        .flat_map(|word| {
            (count << 32 | word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes()
        })
        .collect();
    controller.ram.write_all_at(&data, FROM)?;
    controller.ram.write_all_at(&[0xee; BLOCK_BYTES], TO)?;
    controller.write((block, 1), FROM, || interrupt(event))?;
    controller.read((block, 1), TO, || interrupt(event))?;
    let mut back = [0; BLOCK_BYTES];
    controller.ram.read_exact_at(&mut back, TO)?;
    ensure!(
        back[..] == data[..],
        "piece {count} came back wrong: {back:x?}"
    );
    Ok(())
}

fn interrupt(event: &OwnedFd) -> Result<()> {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    let ready = poll(&mut fds, Some(&INTERRUPT_PATIENCE))?;
    ensure!(ready == 1, "no interrupt came");
    rustix::io::read(event, &mut [0; 8])?;
    Ok(())
}

/// The log of a witness, read by somebody else while it grows.
pub struct Eyes(File);

impl Eyes {
    /// Looks at it from its end on.
    pub fn open(log: &str) -> Result<Self> {
        let file = File::open(log).with_context(|| format!("cannot open {log}"))?;
        Ok(Eyes(file))
    }

    /// The middle one of the next so many pieces. The one under way began before.
    pub fn median(&mut self, pieces: usize) -> Result<Duration> {
        self.0.seek(SeekFrom::End(0))?;
        let (mut text, deadline) = (String::new(), Instant::now() + PATIENCE);
        while text.lines().count() <= pieces || !text.ends_with('\n') {
            ensure!(
                Instant::now() < deadline,
                "the witness stands still: {text}"
            );
            std::thread::sleep(POLL);
            self.0.read_to_string(&mut text)?;
        }
        let took = text.lines().skip(1).map(str::parse);
        let mut took: Vec<u64> = took.collect::<Result<_, _>>()?;
        took.sort_unstable();
        Ok(Duration::from_micros(took[took.len() / 2]))
    }
}
