//! The guest is killed, the VF is reset and goes back into the pool, and nothing is left.

use super::{Shown, Story};
use crate::cli::list_line;
use crate::daemon::vocabulary::{Availability, FdidText, Verb};
use crate::demo::claim::{Claim, DemoError};
use crate::demo::left::{Left, anonymous_bytes};
use crate::demo::program::{DATA_BYTES, Phase, SCRATCH_VALUE, VRAM_DATA, VRAM_SECRET, VRAM_WORDS};
use crate::demo::report::Report;
use rustix::event::{EventfdFlags, eventfd};
use vfio_shim::model::{CAP_MSI, COMMAND, COMMAND_MEMORY, ConfigView, Function, RegionIndex};
use vfio_shim::ntb::soft::{
    ARC_COMPLETED, ARC_DESTINATION, ARC_IDENT, ARC_IDENT_VALUE, ARC_LENGTH, ARC_MEMIRQ,
    ARC_SCRATCH, ARC_SOURCE, ARC_STATUS, Fault, FaultPlan,
};
use vmm_glue::vfio_user::Client;

const SIGKILL: i32 = 9;
/// The limit of what all may hold besides the guest's memory, and what the fault adds.
const MEMORY_MAX: u64 = 64 << 20;
const MEMORY_FAULT: usize = 80 << 20;
/// Room for what the guest may have left in the VF's memory.
const SECRET_BYTES: u64 = 4096;

impl Story<'_> {
    pub(super) fn kill(&mut self, report: &mut Report) -> Shown {
        let claim = Claim::Kill;
        let stop = self.stop;
        let claims = [Claim::Interrupts, Claim::Dma];
        let amid = self.running(claim)?.go(Phase::Busy, claims, stop)?;
        let Some(guest) = self.guest.take() else {
            return Err(claim.broken("no guest runs"));
        };
        let pid = guest.pid();
        report.figures.vmm_rss_anon_bytes = anonymous_bytes(pid)?;
        report.figures.rss_anon_bytes = anonymous_bytes(std::process::id())?;
        let vf = self.vf(claim)?;
        self.resets = vf.resets();
        if self.breaks(Claim::Reset) {
            vf.arm(FaultPlan::default().nth(Fault::ResetFails, 1));
        }
        let ended = match self.breaks(claim) {
            true => guest.leave(),
            false => guest.kill(),
        };
        let signal = ended.map_err(|error| claim.broken(error.to_string()))?;
        if self.wish.linux.is_some() {
            let removed = std::fs::remove_dir_all(self.guest_folder());
            removed.map_err(|error| claim.broken(error.to_string()))?;
        }
        claim.check(signal == Some(SIGKILL), || {
            format!("process {pid} ended, but not by SIGKILL: {signal:?}")
        })?;
        let status = stop.until(
            claim,
            || {
                let status = self.borrowed(claim)?;
                let over = !matches!(status.state.as_str(), "connected" | "undoing");
                Ok(over.then_some(status))
            },
            || "host 8 still has its session".to_owned(),
        )?;
        let counters = &status.counters;
        report.figures.register_accesses = counters.trapped_reads + counters.trapped_writes;
        // Where the reset fails nothing may be taken away before it: that is the next claim's.
        if !self.breaks(Claim::Reset) {
            // The lender is told of the last unmap without being waited for.
            stop.until(
                claim,
                || Ok(vf.space().maps().is_empty().then_some(())),
                || format!("the VF still reaches {:?}", vf.space().maps()),
            )?;
        }
        Ok(vec![format!(
            "process {pid} took interrupt {} and died of SIGKILL; its memory is out of the VF's \
             reach",
            amid.interrupts
        )])
    }

    /// As the next VMM at the same socket finds it.
    pub(super) fn reset(&mut self) -> Shown {
        let claim = Claim::Reset;
        let status = self.borrowed(claim)?;
        let resets = self.vf(claim)?.resets();
        claim.check(status.state == "waiting" && resets > self.resets, || {
            let why = status.last_error.unwrap_or_default();
            format!(
                "host 8 takes no next VMM, its endpoint is {}: {why}",
                status.state
            )
        })?;
        let client = Client::connect(&self.socket);
        let client = client.map_err(|error| claim.broken(vfio_shim::path::words(&error)))?;
        let found = stale(&client).map_err(|error| claim.broken(error))?;
        claim.check(found.is_empty(), || {
            format!("the next VMM finds {}", found.join(", "))
        })?;
        drop(client);
        self.stop.until(
            claim,
            || Ok((self.borrowed(claim)?.state == "waiting").then_some(())),
            || "host 8 does not undo the next session".to_owned(),
        )?;
        Ok(vec![
            "a next VMM at the same socket finds every register at its reset value".to_owned(),
            format!("and zeros where the guest left {SCRATCH_VALUE:#x} and its data"),
        ])
    }

    pub(super) fn give_back(&mut self) -> Shown {
        let claim = Claim::Return;
        if self.breaks(claim) {
            let plan = FaultPlan::default().nth(Fault::ResetFails, 1);
            self.vf(claim)?.arm(plan);
        }
        let fdid = FdidText::from(self.fdid);
        let returned = self.fabric.borrower.ask(&Verb::Return { fdid });
        returned.map_err(|refusal| claim.broken(refusal.text))?;
        let listed = self.list(claim)?;
        let entry = listed.iter().find(|entry| entry.fdid.0 == self.fdid);
        let entry = entry.ok_or_else(|| claim.broken("host 8 does not list it"))?;
        claim.check(entry.available == Availability::Available, || {
            list_line(entry)
        })?;
        Ok(vec![list_line(entry)])
    }

    pub(super) fn left(&mut self) -> Shown {
        let claim = Claim::Left;
        if self.breaks(claim) {
            let fd = eventfd(0, EventfdFlags::CLOEXEC);
            self.held
                .push(Box::new(fd.map_err(|e| claim.broken(e.to_string()))?));
        }
        let Some(before) = self.before.take() else {
            return Err(claim.broken("nothing was counted before the lease"));
        };
        let mut differs = String::new();
        let same = self.stop.until(
            claim,
            || {
                differs = Left::look(&self.fabric, self.folder)?.against(&before);
                Ok(differs.is_empty().then_some(()))
            },
            String::new,
        );
        match same {
            Err(DemoError::Broken { .. }) => Err(claim.broken(differs)),
            Err(other) => Err(other),
            Ok(()) => Ok(vec!["all as it was before the lease".to_owned()]),
        }
    }

    pub(super) fn memory(&mut self, report: &mut Report) -> Shown {
        let claim = Claim::Memory;
        if self.breaks(claim) {
            self.held.push(Box::new(vec![1u8; MEMORY_FAULT]));
        }
        let figures = &mut report.figures;
        let now = anonymous_bytes(std::process::id())?;
        figures.rss_anon_bytes = figures.rss_anon_bytes.max(now);
        // QEMU's own memory is not ours to answer for.
        let vmm = match &self.wish.linux {
            Some(_) => 0,
            None => figures.vmm_rss_anon_bytes,
        };
        let all = figures.rss_anon_bytes + vmm;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let shown = format!(
            "{:.1} MiB in this process, {:.1} MiB in the VMM",
            mib(figures.rss_anon_bytes),
            mib(figures.vmm_rss_anon_bytes)
        );
        claim.check(all < MEMORY_MAX, || shown.clone())?;
        Ok(vec![shown])
    }
}

/// Everything that is not as after power-on.
fn stale(client: &Client) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    let words = |error: vfio_shim::model::FunctionError| vfio_shim::path::words(&error);
    let mut config = vec![0; client.info().regions[RegionIndex::CONFIG.0 as usize].size as usize];
    let read = client.region_read(RegionIndex::CONFIG, 0, &mut config);
    read.map_err(words)?;
    let view = ConfigView::new(&config).map_err(|error| error.to_string())?;
    if view.u16(COMMAND) != 0 {
        found.push(format!("COMMAND {:#x}", view.u16(COMMAND)));
    }
    let capabilities = view.capabilities().map_err(|error| error.to_string())?;
    let msi = capabilities
        .iter()
        .find(|capability| capability.id == u16::from(CAP_MSI));
    let msi = msi.ok_or("no MSI capability")?;
    if view.u16(msi.offset + 2) & 1 != 0 {
        found.push("its MSI enabled".to_owned());
    }
    let enable = COMMAND_MEMORY.to_le_bytes();
    let written = client.region_write(RegionIndex::CONFIG, COMMAND.into(), &enable);
    written.map_err(words)?;
    let registers = [
        (ARC_IDENT, ARC_IDENT_VALUE),
        (ARC_STATUS, 0),
        (ARC_SOURCE, 0),
        (ARC_DESTINATION, 0),
        (ARC_LENGTH, 0),
        (ARC_MEMIRQ, 0),
        (ARC_SCRATCH, 0),
        (ARC_SCRATCH + 4, 0),
        (ARC_COMPLETED, 0),
    ];
    for (register, expected) in registers {
        let mut word = [0; 4];
        let read = client.region_read(RegionIndex(0), register, &mut word);
        read.map_err(words)?;
        let word = u32::from_le_bytes(word);
        if word != expected {
            found.push(format!("register {register:#x} at {word:#x}"));
        }
    }
    for (start, bytes) in [
        (VRAM_SECRET, SECRET_BYTES),
        (VRAM_WORDS, SECRET_BYTES),
        (VRAM_DATA, DATA_BYTES),
    ] {
        let mut memory = vec![0xff; bytes as usize];
        let read = client.region_read(RegionIndex(2), start, &mut memory);
        read.map_err(words)?;
        if memory.iter().any(|byte| *byte != 0) {
            found.push(format!("data in its memory from {start:#x} on"));
        }
    }
    Ok(found)
}
