//! A tenant without a guest: a vfio-user client that drives an NVMe function through its socket, step by step as it is told.
//!
//! Each order's end is a line: `done ORDER MS`, or `failed ORDER: why`, which also ends it. Under
//! `go` there is a line `right` for every piece that was written and came back as it was.

use crate::vfio_user::{self as wire, BAR0, Client, Memory};
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::MapFlags;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// NVMe Base Specification 2.0, 3.1.3: controller properties.
const VS: u64 = 0x08;
const INTMS: u64 = 0x0c;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
/// CC: 64-byte submission and 16-byte completion entries, enabled.
const CC_ENABLE: u32 = 6 << 16 | 4 << 20 | 1;
const CSTS_READY: u32 = 1;
/// Opcodes of the admin queue, and of an I/O queue.
const CREATE_SUBMISSION: u32 = 0x01;
const CREATE_COMPLETION: u32 = 0x05;
const WRITE: u32 = 0x01;
const READ: u32 = 0x02;
const CONTIGUOUS: u32 = 1;

const RAM_BYTES: u64 = 2 << 20;
const ENTRIES: u32 = 4;
/// Where things lie in memory: a page for each ring, then what is written and what is read.
const ADMIN: [u64; 2] = [0x1_0000, 0x1_1000];
const IO: [u64; 2] = [0x1_2000, 0x1_3000];
const WRITTEN: u64 = 0x2_0000;
const READ_BACK: u64 = 0x3_0000;
const PIECE_BYTES: usize = 4096;
const BLOCK_BYTES: usize = 512;
/// Left in the interrupt mask, for a reset to undo.
const PATTERN: u32 = 0x5a5a_a5a5;
/// A frozen process on the way costs 5 s.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(2);
/// Between two pieces: others have the machine, too.
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A submission and a completion queue.
struct Queue {
    id: u64,
    rings: [u64; 2],
    tail: u32,
    head: u32,
    phase: bool,
}

/// One command: what differs between them.
#[derive(Default)]
struct Command {
    opcode: u32,
    namespace: u32,
    address: u64,
    words: [u32; 3],
}

/// The tenant.
struct Vmm {
    client: Client,
    /// Mapped shared, as the server wants to see it, and reached by its descriptor.
    _memory: Memory,
    ram: File,
    admin: Queue,
    io: Queue,
    lba: u64,
    pieces: u64,
}

impl Queue {
    fn new(id: u64, rings: [u64; 2]) -> Self {
        Queue {
            id,
            rings,
            tail: 0,
            head: 0,
            phase: true,
        }
    }

    fn doorbell(&self, completion: u64) -> u64 {
        DOORBELLS + (2 * self.id + completion) * 4
    }
}

impl Vmm {
    fn connect(socket: &str, lba: u64) -> Result<Self> {
        let memory = Memory::new(RAM_BYTES, MapFlags::SHARED)?;
        Ok(Vmm {
            client: Client::connect(socket)?,
            ram: File::from(memory.fd.try_clone()?),
            _memory: memory,
            admin: Queue::new(0, ADMIN),
            io: Queue::new(1, IO),
            lba,
            pieces: 0,
        })
    }

    fn read(&mut self, offset: u64) -> Result<u32> {
        let body = wire::access(BAR0, offset, 4, None);
        let answer = self.client.ask(wire::REGION_READ, &body, &[])?;
        let value = answer.get(wire::HEADER_BYTES..);
        let value = value.context("a read without data")?;
        Ok(u32::from_le_bytes(value.try_into().context("not 4 bytes")?))
    }

    fn write(&mut self, offset: u64, value: u32) -> Result<()> {
        let body = wire::access(BAR0, offset, 4, Some(&value.to_le_bytes()));
        self.client.ask(wire::REGION_WRITE, &body, &[]).map(drop)
    }

    /// As far as firmware goes; whoever had the function before has left nothing in it.
    fn open(&mut self) -> Result<()> {
        self.client.agree()?;
        let info = wire::device_info();
        self.client.ask(wire::DEVICE_GET_INFO, &info, &[])?;
        let version = self.read(VS)?;
        ensure!(
            version != 0 && version != u32::MAX,
            "the function does not answer: its version is {version:#x}"
        );
        for offset in [INTMS, CC, CSTS, AQA, ASQ, ASQ + 4, ACQ, ACQ + 4] {
            let left = self.read(offset)?;
            ensure!(left == 0, "left behind at {offset:#x}: {left:#x}");
        }
        Ok(())
    }

    /// Memory, bus mastering, and the controller's queues.
    fn map(&mut self) -> Result<()> {
        let body = wire::dma_map(0, RAM_BYTES);
        self.client.ask(wire::DMA_MAP, &body, &[self.ram.as_fd()])?;
        self.client.enable(true)?;
        self.write(AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1))?;
        for (offset, address) in [(ASQ, ADMIN[0]), (ACQ, ADMIN[1])] {
            self.write(offset, address as u32)?;
            self.write(offset + 4, (address >> 32) as u32)?;
        }
        self.write(INTMS, PATTERN)?;
        self.write(CC, CC_ENABLE)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.read(CSTS)?;
            if status == CSTS_READY {
                break;
            }
            ensure!(Instant::now() < deadline, "CSTS stays at {status:#x}");
            std::thread::sleep(POLL);
        }
        let (id, size) = (self.io.id as u32, (ENTRIES - 1) << 16);
        for (opcode, ring, flags) in [
            (CREATE_COMPLETION, IO[1], CONTIGUOUS),
            (CREATE_SUBMISSION, IO[0], id << 16 | CONTIGUOUS),
        ] {
            self.run(
                true,
                &Command {
                    opcode,
                    address: ring,
                    words: [size | id, flags, 0],
                    ..Command::default()
                },
            )?;
        }
        Ok(())
    }

    /// Submits a command and waits for its completion.
    fn run(&mut self, admin: bool, command: &Command) -> Result<()> {
        let queue = match admin {
            true => &mut self.admin,
            false => &mut self.io,
        };
        let mut entry = [0; 16];
        // The id is the entry's number: one command at a time.
        entry[0] = command.opcode | queue.tail << 16;
        entry[1] = command.namespace;
        entry[6] = command.address as u32;
        entry[7] = (command.address >> 32) as u32;
        entry[10..13].copy_from_slice(&command.words);
        let bytes = entry.map(u32::to_le_bytes).concat();
        let at = queue.rings[0] + u64::from(queue.tail) * bytes.len() as u64;
        self.ram.write_all_at(&bytes, at)?;
        queue.tail = (queue.tail + 1) % ENTRIES;
        let (doorbell, tail) = (queue.doorbell(0), queue.tail);
        let (done, at) = (
            queue.doorbell(1),
            queue.rings[1] + u64::from(queue.head) * 16,
        );
        let phase = u32::from(queue.phase);
        queue.head = (queue.head + 1) % ENTRIES;
        queue.phase ^= queue.head == 0;
        let head = queue.head;
        self.write(doorbell, tail)?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            let mut word = [0; 4];
            self.ram.read_exact_at(&mut word, at + 12)?;
            let word = u32::from_le_bytes(word);
            if word >> 16 & 1 == phase {
                break word >> 17;
            }
            ensure!(Instant::now() < deadline, "no completion");
            std::thread::sleep(POLL);
        };
        self.write(done, head)?;
        ensure!(status == 0, "a command ends with status {status:#x}");
        Ok(())
    }

    /// One piece, with another content each time: written, read back, compared.
    fn work(&mut self) -> Result<()> {
        self.pieces += 1;
        let mut state = self.pieces.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.lba | 1;
        let mut piece = vec![0; PIECE_BYTES];
        crate::dio::fill(&mut state, &mut piece);
        self.ram.write_all_at(&piece, WRITTEN)?;
        let blocks = (PIECE_BYTES / BLOCK_BYTES) as u32;
        for (opcode, address) in [(WRITE, WRITTEN), (READ, READ_BACK)] {
            self.run(
                false,
                &Command {
                    opcode,
                    namespace: 1,
                    address,
                    words: [self.lba as u32, (self.lba >> 32) as u32, blocks - 1],
                },
            )?;
        }
        let mut back = vec![0; PIECE_BYTES];
        self.ram.read_exact_at(&mut back, READ_BACK)?;
        ensure!(back == piece, "piece {} came back as another", self.pieces);
        Ok(())
    }
}

/// Does as the FIFO says until it says `end`. The function is left running: whoever has it next
/// must not see that.
pub fn run(socket: &str, orders: &str, lba: u64) -> Result<()> {
    // Its own end for writing stays open: a writer that goes is no end.
    let fifo = OpenOptions::new().read(true).write(true).open(orders);
    let fifo = fifo.with_context(|| format!("cannot open {orders}"))?;
    let mut lines = BufReader::new(fifo);
    let mut vmm = None;
    loop {
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let order = line.trim();
        if order == "end" {
            return Ok(());
        }
        let since = Instant::now();
        match obey(order, &mut vmm, socket, lba, lines.get_ref()) {
            Ok(()) => println!("done {order} {}", since.elapsed().as_millis()),
            Err(error) => {
                println!("failed {order}: {error:#}");
                bail!("{order} failed");
            }
        }
    }
}

fn obey(order: &str, vmm: &mut Option<Vmm>, socket: &str, lba: u64, orders: &File) -> Result<()> {
    if order == "open" {
        let mut connected = Vmm::connect(socket, lba)?;
        connected.open()?;
        *vmm = Some(connected);
        return Ok(());
    }
    let vmm = vmm.as_mut().context("nothing is open")?;
    match order {
        "map" => vmm.map(),
        "work" => vmm.work(),
        "go" => {
            // Until there is another order.
            let mut ready = [PollFd::new(orders, PollFlags::IN)];
            while poll(&mut ready, Some(&PAUSE))? == 0 {
                vmm.work()?;
                println!("right");
            }
            Ok(())
        }
        _ => bail!("no order: {order}"),
    }
}
