//! An NVMe controller behind a vfio-user socket, driven from a memfd: what a tenant without a guest does with its function.

use crate::vfio_user::{
    BAR0, Client, DMA_MAP, DMA_UNMAP, Memory, RAM_BYTES, REGION_READ, REGION_WRITE, SET_IRQS,
    access, dma_map, dma_unmap, trigger,
};
use anyhow::{Context, Result, ensure};
use rustix::mm::MapFlags;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// What the namespace's blocks have.
pub const BLOCK_BYTES: usize = 512;
/// The controller's own memory from here on is free for data.
pub const BUFFERS: u64 = 0x10000;

/// NVMe Base Specification 2.0, 3.1.3: controller properties.
pub const VS: u64 = 0x08;
pub const INTMS: u64 = 0x0c;
pub const CC: u64 = 0x14;
pub const CSTS: u64 = 0x1c;
pub const AQA: u64 = 0x24;
pub const ASQ: u64 = 0x28;
pub const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
/// CC: 64-byte submission and 16-byte completion entries, enabled.
const CC_ENABLE: u32 = 6 << 16 | 4 << 20 | 1;
const READY: u32 = 1;
/// CC: a normal shutdown; CSTS: it is complete.
const CC_SHUT_DOWN: u32 = 1 << 14;
const SHUT_DOWN_MASK: u32 = 3 << 2;
const SHUT_DOWN: u32 = 2 << 2;

const OPCODE_DELETE_SUBMISSION: u32 = 0x00;
const OPCODE_CREATE_SUBMISSION: u32 = 0x01;
const OPCODE_DELETE_COMPLETION: u32 = 0x04;
const OPCODE_CREATE_COMPLETION: u32 = 0x05;
const OPCODE_GET_FEATURES: u32 = 0x0a;
const FEATURE_QUEUES: u32 = 7;
const OPCODE_WRITE: u32 = 0x01;
const OPCODE_READ: u32 = 0x02;
const NAMESPACE: u32 = 1;
const CONTIGUOUS: u32 = 1;
const WITH_INTERRUPTS: u32 = 2;

const ENTRIES: u32 = 16;
const ENTRY_BYTES: u64 = 64;
const COMPLETION_BYTES: u64 = 16;
/// Longer than any command takes.
pub const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(1);

/// A submission entry.
type Command = [u32; 16];

/// A pair of queues.
struct Queue {
    submissions: u64,
    completions: u64,
    tail: u32,
    head: u32,
    phase: u32,
}

impl Queue {
    fn at(submissions: u64, completions: u64) -> Self {
        Queue {
            submissions,
            completions,
            tail: 0,
            head: 0,
            phase: 1,
        }
    }
}

/// The controller, with an admin queue and one for I/O whose interrupts are the first vector's.
pub struct Controller {
    /// The session.
    pub client: Client,
    /// Its memory, at address 0.
    pub ram: File,
    queues: [Queue; 2],
    _ram: Memory,
}

impl Controller {
    /// Attaches to the function and starts the controller.
    pub fn start(socket: &str, interrupts: BorrowedFd<'_>) -> Result<Self> {
        let mut controller = Self::connect(socket)?;
        controller.map()?;
        let client = &mut controller.client;
        client.ask(SET_IRQS, &trigger(), &[interrupts])?;
        controller.begin(true)?;
        Ok(controller)
    }

    /// Agrees on the protocol, and no more.
    pub fn connect(socket: &str) -> Result<Self> {
        let mut client = Client::connect(socket)?;
        client.agree()?;
        let ram = Memory::new(RAM_BYTES, MapFlags::SHARED)?;
        Ok(Controller {
            client,
            ram: File::from(ram.fd.try_clone()?),
            queues: [Queue::at(0, 0x1000), Queue::at(0x2000, 0x3000)],
            _ram: ram,
        })
    }

    /// Gives the function its memory, and lets it do DMA.
    pub fn map(&mut self) -> Result<()> {
        let body = dma_map(0, RAM_BYTES);
        self.client.ask(DMA_MAP, &body, &[self.ram.as_fd()])?;
        self.client.enable(true)
    }

    /// Starts it; its I/O queue has interrupts, or is looked at by whoever waits.
    pub fn begin(&mut self, interrupts: bool) -> Result<()> {
        self.set(CC, 0)?;
        self.wait_ready(0)?;
        self.set(AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1))?;
        for (register, address) in [
            (ASQ, self.queues[0].submissions),
            (ACQ, self.queues[0].completions),
        ] {
            self.set(register, address as u32)?;
            self.set(register + 4, (address >> 32) as u32)?;
        }
        self.set(CC, CC_ENABLE)?;
        self.wait_ready(READY)?;
        let [_, io] = &self.queues;
        let (submissions, completions) = (io.submissions, io.completions);
        for (opcode, address, flags) in [
            (
                OPCODE_CREATE_COMPLETION,
                completions,
                CONTIGUOUS | (u32::from(interrupts) * WITH_INTERRUPTS),
            ),
            (OPCODE_CREATE_SUBMISSION, submissions, CONTIGUOUS | 1 << 16),
        ] {
            let mut command = command(opcode, address);
            command[10] = (ENTRIES - 1) << 16 | 1;
            command[11] = flags;
            self.run(0, command, within(PATIENCE))?;
        }
        Ok(())
    }

    /// Takes its I/O queue away and shuts it down, as a driver does.
    pub fn end(&mut self) -> Result<()> {
        for opcode in [OPCODE_DELETE_SUBMISSION, OPCODE_DELETE_COMPLETION] {
            let mut command = command(opcode, 0);
            command[10] = 1;
            self.run(0, command, within(PATIENCE))?;
        }
        self.set(CC, CC_ENABLE | CC_SHUT_DOWN)?;
        self.wait_status(SHUT_DOWN_MASK, SHUT_DOWN)?;
        self.set(CC, 0)?;
        self.wait_ready(0)
    }

    /// Takes its memory away from the function.
    pub fn unmap(&mut self) -> Result<()> {
        let body = dma_unmap(0, RAM_BYTES);
        self.client.ask(DMA_UNMAP, &body, &[]).map(drop)
    }

    /// A register of BAR 0.
    pub fn get(&mut self, offset: u64) -> Result<u32> {
        let answer = self
            .client
            .ask(REGION_READ, &access(BAR0, offset, 4, None), &[])?;
        let value = answer.last_chunk().context("a read without data")?;
        Ok(u32::from_le_bytes(*value))
    }

    /// Stores into one.
    pub fn set(&mut self, offset: u64, value: u32) -> Result<()> {
        let body = access(BAR0, offset, 4, Some(&value.to_le_bytes()));
        self.client.ask(REGION_WRITE, &body, &[]).map(drop)
    }

    fn wait_ready(&mut self, ready: u32) -> Result<()> {
        self.wait_status(READY, ready)
    }

    fn wait_status(&mut self, mask: u32, wanted: u32) -> Result<()> {
        let mut wait = within(PATIENCE);
        loop {
            let status = self.get(CSTS)?;
            if status & mask == wanted {
                return Ok(());
            }
            ensure!(status != u32::MAX, "the controller does not answer");
            wait().with_context(|| format!("CSTS stays at {status:#x}"))?;
        }
    }

    /// Has it do a command, and calls `wait` until it is done, once at least.
    fn run(
        &mut self,
        queue: usize,
        command: Command,
        mut wait: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let Queue {
            submissions, tail, ..
        } = self.queues[queue];
        let at = submissions + u64::from(tail) * ENTRY_BYTES;
        let entry = command.map(u32::to_le_bytes).concat();
        self.ram.write_all_at(&entry, at)?;
        self.queues[queue].tail = (tail + 1) % ENTRIES;
        let doorbell = DOORBELLS + 8 * queue as u64;
        self.set(doorbell, self.queues[queue].tail)?;
        let status = loop {
            wait()?;
            if let Some(status) = self.completion(queue)? {
                break status;
            }
        };
        ensure!(status == 0, "a command ended with status {status:#x}");
        self.set(doorbell + 4, self.queues[queue].head)
    }

    /// The status of the next command that is done.
    fn completion(&mut self, queue: usize) -> Result<Option<u32>> {
        let queue = &mut self.queues[queue];
        let mut word = [0; 4];
        let at = queue.completions + u64::from(queue.head) * COMPLETION_BYTES;
        self.ram.read_exact_at(&mut word, at + 12)?;
        let word = u32::from_le_bytes(word);
        if word >> 16 & 1 != queue.phase {
            return Ok(None);
        }
        queue.head = (queue.head + 1) % ENTRIES;
        if queue.head == 0 {
            queue.phase ^= 1;
        }
        Ok(Some(word >> 17))
    }

    /// Blocks out of memory at `address`, within a page, to the namespace.
    pub fn write(
        &mut self,
        blocks: (u64, u32),
        address: u64,
        wait: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        self.run(1, transfer(OPCODE_WRITE, blocks, address), wait)
    }

    /// Blocks of the namespace into memory at `address`.
    pub fn read(
        &mut self,
        blocks: (u64, u32),
        address: u64,
        wait: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        self.run(1, transfer(OPCODE_READ, blocks, address), wait)
    }

    /// A command without data: an interrupt, and little else.
    pub fn nothing(&mut self, wait: impl FnMut() -> Result<()>) -> Result<()> {
        let mut command = command(OPCODE_GET_FEATURES, 0);
        command[10] = FEATURE_QUEUES;
        self.run(0, command, wait)
    }
}

fn command(opcode: u32, address: u64) -> Command {
    let mut command = [0; 16];
    command[0] = opcode;
    command[6] = address as u32;
    command[7] = (address >> 32) as u32;
    command
}

fn transfer(opcode: u32, (block, count): (u64, u32), address: u64) -> Command {
    let mut command = command(opcode, address);
    command[1] = NAMESPACE;
    command[10] = block as u32;
    command[11] = (block >> 32) as u32;
    command[12] = count - 1;
    command
}

/// Looks again after a little while, so long at most: for what only memory tells.
pub fn within(patience: Duration) -> impl FnMut() -> Result<()> {
    let deadline = Instant::now() + patience;
    move || {
        ensure!(Instant::now() < deadline, "not done within {patience:?}");
        std::thread::sleep(POLL);
        Ok(())
    }
}
