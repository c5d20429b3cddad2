//! A tenant without a guest: a vfio-user client that drives an NVMe function through its socket, step by step as it is told.
//!
//! Each order's end is a line: `done ORDER MS`, or `failed ORDER: why`, which also ends it. Under
//! `go` there is a line `right` for every piece that was written and came back as it was. Beside its
//! memory there is a canary, looked at after each piece, and by whoever opens nothing at `look`.

use crate::canary::Canary;
use crate::nvme_remote::{
    ACQ, AQA, ASQ, BLOCK_BYTES, BUFFERS, CC, CSTS, Controller, INTMS, PATIENCE, VS, within,
};
use crate::vfio_user::{
    DEVICE_GET_INFO, DEVICE_RESET, DMA_MAP, DMA_UNMAP, Memory, SET_IRQS, device_info, dma_map_of,
    dma_unmap, no_triggers, trigger,
};
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::mm::MapFlags;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Instant;

const WRITTEN: u64 = BUFFERS;
const READ_BACK: u64 = BUFFERS + 0x1000;
const PIECE_BYTES: usize = 4096;
const PIECE_BLOCKS: u32 = (PIECE_BYTES / BLOCK_BYTES) as u32;
/// Left in the interrupt mask, for a reset to undo.
const PATTERN: u32 = 0x5a5a_a5a5;
/// Small regions of memory beside the controller's own: to take them away one by one is long enough
/// for a strike in the middle.
const REGIONS: u64 = 64;
const REGION_BYTES: u64 = 16 << 10;
/// Far from the controller's memory and from the canary.
const REGIONS_AT: u64 = 1 << 29;
/// Between two pieces: others have the machine, too.
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// The tenant.
struct Vmm {
    controller: Controller,
    canary: Rc<Canary>,
    lba: u64,
    pieces: u64,
    /// The small regions, and who hears of interrupts, where there are any.
    more: Option<(Memory, OwnedFd)>,
}

/// Where each of the small regions is, in their memory.
fn regions() -> impl Iterator<Item = u64> {
    (0..REGIONS).map(|index| index * REGION_BYTES)
}

impl Vmm {
    /// As far as firmware goes; whoever had the function before has left nothing in it.
    fn open(socket: &str, lba: u64, canary: &Rc<Canary>) -> Result<Self> {
        let mut controller = Controller::connect(socket)?;
        let info = device_info();
        controller.client.ask(DEVICE_GET_INFO, &info, &[])?;
        let version = controller.get(VS)?;
        ensure!(
            version != 0 && version != u32::MAX,
            "the function does not answer: its version is {version:#x}"
        );
        for offset in [INTMS, CC, CSTS, AQA, ASQ, ASQ + 4, ACQ, ACQ + 4] {
            let left = controller.get(offset)?;
            ensure!(left == 0, "left behind at {offset:#x}: {left:#x}");
        }
        Ok(Vmm {
            controller,
            canary: canary.clone(),
            lba,
            pieces: 0,
            more: None,
        })
    }

    /// Memory, bus mastering, and the controller's queues, which nobody is told of by interrupts.
    fn map(&mut self) -> Result<()> {
        self.canary.map(&mut self.controller.client)?;
        self.controller.map()?;
        self.controller.set(INTMS, PATTERN)?;
        self.controller.begin(false)
    }

    /// One piece, with another content each time: written, read back, compared.
    fn work(&mut self) -> Result<()> {
        self.pieces += 1;
        let mut state = self.pieces.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.lba | 1;
        let mut piece = vec![0; PIECE_BYTES];
        crate::dio::fill(&mut state, &mut piece);
        let (controller, blocks) = (&mut self.controller, (self.lba, PIECE_BLOCKS));
        controller.ram.write_all_at(&piece, WRITTEN)?;
        controller.write(blocks, WRITTEN, within(PATIENCE))?;
        controller.read(blocks, READ_BACK, within(PATIENCE))?;
        let mut back = vec![0; PIECE_BYTES];
        controller.ram.read_exact_at(&mut back, READ_BACK)?;
        ensure!(back == piece, "piece {} came back as another", self.pieces);
        self.canary.look()
    }

    /// What a VMM has beside: a trigger for interrupts, and memory in many small regions.
    fn more(&mut self) -> Result<()> {
        let memory = Memory::new(REGIONS * REGION_BYTES, MapFlags::SHARED)?;
        let heard = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let client = &mut self.controller.client;
        client.ask(SET_IRQS, &trigger(), &[heard.as_fd()])?;
        for offset in regions() {
            let body = dma_map_of(offset, REGIONS_AT + offset, REGION_BYTES);
            client.ask(DMA_MAP, &body, &[memory.fd.as_fd()])?;
        }
        self.more = Some((memory, heard));
        Ok(())
    }

    /// Takes its function apart, as a VMM does whose guest shuts down: interrupts, queues, memory
    /// region by region, a reset, and last the connection.
    fn leave(mut self) -> Result<()> {
        let more = self.more.take();
        let client = &mut self.controller.client;
        client.ask(SET_IRQS, &no_triggers(), &[])?;
        self.controller.end()?;
        let client = &mut self.controller.client;
        for offset in regions().take_while(|_| more.is_some()) {
            let body = dma_unmap(REGIONS_AT + offset, REGION_BYTES);
            client.ask(DMA_UNMAP, &body, &[])?;
        }
        self.canary.unmap(client)?;
        self.controller.unmap()?;
        let client = &mut self.controller.client;
        client.ask(DEVICE_RESET, &[], &[]).map(drop)?;
        self.canary.look()
    }
}

/// Does as the FIFO says until it says `end`. The function is left running: whoever has it next
/// must not see that.
pub fn run(socket: &str, orders: &str, lba: u64, huge_mib: Option<u64>) -> Result<()> {
    // Its own end for writing stays open: a writer that goes is no end.
    let fifo = OpenOptions::new().read(true).write(true).open(orders);
    let fifo = fifo.with_context(|| format!("cannot open {orders}"))?;
    let mut lines = BufReader::new(fifo);
    let canary = huge_mib.map_or_else(Canary::plant, Canary::plant_huge);
    let canary = Rc::new(canary?);
    let mut vmm = None;
    loop {
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let order = line.trim();
        if order == "end" {
            return Ok(());
        }
        let since = Instant::now();
        let done = match order {
            "open" => Vmm::open(socket, lba, &canary).map(|opened| vmm = Some(opened)),
            _ if order.starts_with("look") => canary.look(),
            _ => obey(order, &mut vmm, lines.get_ref()),
        };
        match done {
            Ok(()) => println!("done {order} {}", since.elapsed().as_millis()),
            Err(error) => {
                println!("failed {order}: {error:#}");
                bail!("{order} failed");
            }
        }
    }
}

fn obey(order: &str, vmm: &mut Option<Vmm>, orders: &File) -> Result<()> {
    if order == "leave" {
        return vmm.take().context("nothing is open")?.leave();
    }
    let vmm = vmm.as_mut().context("nothing is open")?;
    match order {
        "map" => vmm.map(),
        "work" => vmm.work(),
        "more" => vmm.more(),
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
