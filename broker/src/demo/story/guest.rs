//! A guest drives the borrowed VF: registers, DMA, interrupts, and DMA that is refused.

use super::{Shown, Story};
use crate::daemon::vocabulary::BarMode;
use crate::demo::claim::{Claim, DemoError};
use crate::demo::fabric::plan;
use crate::demo::guest::{Done, Guest};
use crate::demo::linux;
use crate::demo::program::{DATA_BYTES, Phase, Program, RAM_BYTES, ROUNDS, STRAY};
use crate::demo::report::Report;
use crate::demo::vmm::GuestKind;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::AsFd;
use vfio_shim::model::{Access, AddressSpace, DmaMap, Function, IrqIndex, Memory, Span};
use vfio_shim::ntb::NtbPort;
use vfio_shim::ntb::soft::{Fault, SoftFault};

const PAGE: u64 = 4096;
/// Which of the VF's stores is lost: one amid the data that comes back.
const LOST_STORE: u64 = 43;

impl Story<'_> {
    /// Lets the guest do a phase. `claims` are what breaks when it waits for ever, and when it
    /// sees something wrong.
    fn go(&mut self, phase: Phase, claims: [Claim; 2]) -> Result<Done, DemoError> {
        let stop = self.stop;
        let done = self.running(claims[1])?.go(phase, claims, stop)?;
        let expected = match &self.wish.linux {
            Some(_) => linux::interrupts_after(phase),
            None => Program::interrupts_after(phase),
        };
        let taken = done.interrupts;
        // In the last phase it goes on.
        let right = taken == expected || phase == Phase::Busy && taken > expected;
        Claim::Interrupts.check(right, || {
            format!("the guest took {taken} interrupts where {expected} were raised")
        })?;
        Ok(done)
    }

    pub(super) fn registers(&mut self, report: &mut Report) -> Shown {
        let claim = Claim::Registers;
        self.guest = Some(self.launch()?);
        let guest = self.running(claim)?;
        report.guest = Some(guest.kind);
        report.guest_why.clone_from(&guest.why);
        let pid = guest.pid();
        let runs = match (guest.kind, &guest.why) {
            (GuestKind::Kvm, _) => format!("process {pid}: a VM of KVM"),
            (GuestKind::Linux, why) => format!(
                "process {pid}: {}",
                why.as_deref().unwrap_or("Linux").trim_end()
            ),
            (GuestKind::StandIn, why) => format!(
                "process {pid}: a user-space stand-in for a VM ({})",
                why.as_deref().unwrap_or("no reason was given")
            ),
        };
        if self.breaks(claim) {
            self.fabric.link.port(0).window_close(0);
        }
        self.go(Phase::Registers, [claim; 2])?;
        let status = self.borrowed(claim)?;
        let seen = &status.counters;
        let connected = status.state == "connected" && status.vmm_pid == Some(pid);
        claim.check(connected && status.bars == BarMode::Trapped, || {
            format!("host 8's status shows {status:?}")
        })?;
        claim.check(seen.trapped_reads != 0 && seen.trapped_writes != 0, || {
            "no access went through host 8".to_owned()
        })?;
        let maps = self.vf(claim)?.space().maps();
        let reach: Vec<String> = maps.iter().map(|(span, _)| span.to_string()).collect();
        let reach = reach.join(", ");
        let own = Span::new(0, RAM_BYTES).map(|span| (span, Access::READ_WRITE));
        // QEMU maps its firmware's memory too.
        let right = match &self.wish.linux {
            Some(_) => !maps.is_empty(),
            None => maps.first().copied() == own && maps.len() == 1,
        };
        claim.check(right, || {
            format!("the VF may reach {reach}, not the guest's memory")
        })?;
        Ok(vec![
            runs,
            format!("the VF may reach {reach}, the guest's memory, and nothing else"),
        ])
    }

    fn launch(&self) -> Result<Guest, DemoError> {
        match &self.wish.linux {
            Some(qemu) => Guest::boot(qemu, &self.socket, &self.guest_folder(), self.stop),
            None => Guest::launch(&self.socket, self.stop),
        }
    }

    pub(super) fn dma(&mut self, report: &mut Report) -> Shown {
        let claim = Claim::Dma;
        if self.breaks(claim) {
            let plan = plan().nth(Fault::DmaLost, LOST_STORE);
            let armed = self.fabric.link.arm(plan);
            armed.map_err(|error| claim.broken(error.to_string()))?;
        }
        let done = self.go(Phase::Dma, [Claim::Interrupts, claim])?;
        let [sent, returned] = done.checksums;
        claim.check(sent == returned, || {
            format!("CRC-32C {sent:08x} was sent, {returned:08x} came back")
        })?;
        report.figures.dma_bytes = 2 * DATA_BYTES;
        let kib = DATA_BYTES >> 10;
        Ok(vec![format!(
            "{kib} KiB to the VF's memory and {kib} KiB back: CRC-32C {returned:08x}"
        )])
    }

    pub(super) fn interrupts(&mut self, report: &mut Report) -> Shown {
        let claim = Claim::Interrupts;
        if self.breaks(claim) {
            let masked = self.vf(claim)?.mask_irqs(IrqIndex::Msi, 0, 1, true);
            masked.map_err(|error| claim.broken(error.to_string()))?;
        }
        if self.breaks(Claim::Order) {
            let armed = self.fabric.link.arm(plan().nth(Fault::DmaLost, 1));
            armed.map_err(|error| claim.broken(error.to_string()))?;
        }
        let before = self.stores_held();
        let done = self.go(Phase::Interrupts, [claim, Claim::Order])?;
        report.figures.stores_held = self.stores_held() - before;
        report.figures.interrupts = done.interrupts;
        let taken = done.interrupts;
        // Counters of both hosts are told a moment after the guest was.
        let mut seen = [0; 4];
        let counted = self.stop.until(
            claim,
            || {
                seen = self.counted()?;
                // Linux does not halt for each, so one signal can stand for several.
                let some = seen.iter().all(|count| (1..=taken).contains(count));
                let same = match &self.wish.linux {
                    Some(_) => seen[0] == taken && some,
                    None => seen == [taken; 4],
                };
                Ok(same.then_some(()))
            },
            String::new,
        );
        let [raised, fences, scanned, signals] = seen;
        let guest = match &self.wish.linux {
            Some(_) => "found by the guest in its status page; its kernel tells of the MSI",
            None => "taken by the guest",
        };
        let shown = format!(
            "{raised} raised on host 4, {fences} fences, {scanned} found by host 8, {signals} \
             signalled, {taken} {guest}"
        );
        match counted {
            Err(DemoError::Broken { .. }) => Err(claim.broken(shown)),
            Err(other) => Err(other),
            Ok(()) => Ok(vec![shown]),
        }
    }

    /// Raised, fenced, scanned, signalled.
    fn counted(&self) -> Result<[u64; 4], DemoError> {
        let claim = Claim::Interrupts;
        let lender = self.fabric.lender.status();
        let lender = lender.map_err(|refusal| claim.broken(refusal.text))?;
        let lent = lender.lent.iter().find(|lent| lent.fdid.0 == self.fdid);
        let lent = lent.and_then(|lent| lent.vectors.first().copied());
        let borrowed = self.borrowed(claim)?.vectors.first().copied();
        let (lent, borrowed) = (lent.unwrap_or_default(), borrowed.unwrap_or_default());
        Ok([lent.raised, lent.fences, borrowed.scanned, borrowed.signals])
    }

    fn stores_held(&self) -> u64 {
        let struck = self.fabric.link.struck();
        let held = struck
            .iter()
            .filter(|(f, _)| matches!(f, Fault::DmaHeld(_)));
        held.map(|(_, count)| count).sum()
    }

    /// The guest itself has looked, round by round; what is left is whether it was hard.
    pub(super) fn order(&mut self, report: &Report) -> Shown {
        let held = report.figures.stores_held;
        Claim::Order.check(held >= ROUNDS, || {
            format!("the fabric held back only {held} stores of the VF, so nothing was shown")
        })?;
        Ok(vec![format!(
            "status and data were there at all {ROUNDS} interrupts; {held} stores of the VF were \
             held back meanwhile"
        )])
    }

    pub(super) fn stray(&mut self, report: &mut Report) -> Shown {
        let claim = Claim::Stray;
        let vf = self.vf(claim)?;
        if self.breaks(claim) {
            let fd = memfd_create("stray", MemfdFlags::CLOEXEC);
            let fd = fd.map_err(|error| claim.broken(error.to_string()))?;
            ftruncate(&fd, PAGE).map_err(|error| claim.broken(error.to_string()))?;
            let map = DmaMap {
                span: Span::new(STRAY, PAGE).unwrap_or(Span::EMPTY),
                access: Access::READ_WRITE,
                memory: Memory::Fd(fd.as_fd(), 0),
            };
            let mapped = vf.space().map(&[map]);
            mapped.map_err(|error| claim.broken(error.to_string()))?;
        }
        let before = vf.space().fault_count();
        self.go(Phase::Stray, [Claim::Interrupts, claim])?;
        let faults = vf.space().faults();
        let expected = SoftFault {
            address: STRAY,
            write: true,
        };
        let recorded = vf.space().fault_count() == before + 1 && faults.last() == Some(&expected);
        claim.check(recorded, || {
            format!("the VF's IOMMU has on record {faults:x?}")
        })?;
        report.figures.refused_address = Some(STRAY);
        Ok(vec![format!(
            "IOMMU of {}: a write to {STRAY:#x} was refused; the guest read that its copy failed",
            self.fdid.bdf
        )])
    }
}
