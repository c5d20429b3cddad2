//! A tenant without a guest: a vfio-user client that drives an NVMe function through its socket, step by step as it is told.
//!
//! Each order's end is a line: `done ORDER MS`, or `failed ORDER: why`, which also ends it. Under
//! `go` there is a line `right` for every piece that was written and came back as it was. Beside its
//! memory there is a canary, looked at after each piece, and by whoever opens nothing at `look`.

use crate::canary::Canary;
use crate::nvme_remote::{
    ACQ, AQA, ASQ, BLOCK_BYTES, BUFFERS, CC, CSTS, Controller, INTMS, PATIENCE, VS, within,
};
use crate::vfio_user::{DEVICE_GET_INFO, device_info};
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Instant;

const WRITTEN: u64 = BUFFERS;
const READ_BACK: u64 = BUFFERS + 0x1000;
const PIECE_BYTES: usize = 4096;
const PIECE_BLOCKS: u32 = (PIECE_BYTES / BLOCK_BYTES) as u32;
/// Left in the interrupt mask, for a reset to undo.
const PATTERN: u32 = 0x5a5a_a5a5;
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
