//! VFs are made, offered, listed and one is borrowed, all by the operators' verbs.

use super::{Shown, Story};
use crate::cli::{borrowed_block, list_line};
use crate::daemon::vocabulary::{
    Availability, BarMode, BdfText, BorrowedFunction, FdidText, Location, Outcome, Verb,
};
use crate::demo::claim::{Claim, DemoError};
use crate::demo::fabric::{LENDER, VFS, VRAM_BYTES};
use crate::demo::functions::config_space;
use crate::demo::left::Left;
use crate::demo::report::Report;
use vfio_shim::model::{Bdf, ConfigView, EXT_CAP_SRIOV};
use vfio_shim::ntb::soft::{ARC_IDS, Fault, FaultPlan, SoftFunction};

/// The number of VFs in the SR-IOV capability (PCIe 6.0 section 9.3.3.7).
const NUM_VFS: u16 = 0x10;

impl Story<'_> {
    pub(super) fn vfs(&mut self, report: &mut Report) -> Shown {
        let claim = Claim::Vfs;
        let pf = &self.fabric.pf;
        let made = pf.set_num_vfs(VFS);
        made.map_err(|error| claim.broken(error.to_string()))?;
        let vfs = pf.vfs();
        if let (true, Some((_, vf))) = (self.breaks(claim), vfs.get(2)) {
            vf.arm(FaultPlan::default().nth(Fault::ConfigFails, 1));
        }
        let config = config_space(&**pf.function()).map_err(|e| claim.broken(e.text))?;
        let told = num_vfs(&config);
        claim.check(told == Some(VFS) && vfs.len() == usize::from(VFS), || {
            format!("the PF tells of {told:?} VFs, and there are {}", vfs.len())
        })?;
        report.figures.vfs = vfs.len();
        vfs.iter().map(|(bdf, vf)| answers(*bdf, vf)).collect()
    }

    pub(super) fn pool(&mut self) -> Shown {
        let claim = Claim::Pool;
        for (bdf, _) in self.fabric.pf.vfs() {
            let bdf = BdfText::from(bdf);
            for verb in [Verb::Add { bdf }, Verb::Available { bdf, port: None }] {
                let done = self.fabric.lender.ask(&verb);
                done.map_err(|refusal| claim.broken(refusal.text))?;
            }
        }
        self.stop.until(
            claim,
            || {
                let status = self.fabric.borrower.status();
                let status = status.map_err(|refusal| claim.broken(refusal.text))?;
                let port = status.ports.into_iter().next();
                Ok(port.and_then(|port| port.session.peer_node))
            },
            || "no link session was opened".to_owned(),
        )?;
        if self.breaks(claim) {
            self.fabric.link.cut();
        }
        let listed: Vec<String> = self.list(claim)?.iter().map(list_line).collect();
        // The device's name is the database's, and changes with it.
        let in_form = |(vf, line): (u16, &String)| {
            line.starts_with(&format!(
                "44a0{vf}: VGA compatible controller Intel Corporation "
            )) && line.ends_with(" [available]")
        };
        let right = listed.len() == usize::from(VFS) && (1..).zip(&listed).all(in_form);
        claim.check(right, || format!("`list` on host 8 shows {listed:?}"))?;
        Ok(listed)
    }

    pub(super) fn borrow(&mut self) -> Shown {
        let claim = Claim::Borrow;
        self.before = Some(Left::look(&self.fabric, self.folder)?);
        if self.breaks(claim) {
            let plan = FaultPlan::default().nth(Fault::ResetFails, 1);
            self.vf(claim)?.arm(plan);
        }
        let verb = Verb::Borrow {
            fdid: FdidText::from(self.fdid),
            socket: "vm1.sock".into(),
            ram: Some(self.guest_bytes()),
            bars: Some(BarMode::Trapped),
            trust_vmm: false,
            trust_domain: None,
        };
        let borrowed = match self.fabric.borrower.ask(&verb) {
            Ok(Outcome::Borrowed(borrowed)) => *borrowed,
            Ok(other) => return Err(claim.broken(format!("the daemon answered with {other:?}"))),
            Err(refusal) => return Err(claim.broken(refusal.text)),
        };
        self.check_borrowed(&borrowed)?;
        self.socket.clone_from(&borrowed.socket);
        Ok(borrowed_block(&borrowed)
            .lines()
            .map(str::to_owned)
            .collect())
    }

    fn check_borrowed(&self, told: &BorrowedFunction) -> Result<(), DemoError> {
        let claim = Claim::Borrow;
        let right = told.location == Location::Remote
            && told.node_id == LENDER
            && told.remote_bdf.0 == self.fdid.bdf
            && told.available == Availability::InUse;
        claim.check(right, || format!("`borrow` shows {told:?}"))?;
        let listed = self.list(claim)?;
        let mut in_use = listed.iter().filter(|l| l.available == Availability::InUse);
        let alone = in_use.next().map(|entry| entry.fdid.0) == Some(self.fdid);
        claim.check(alone && in_use.next().is_none(), || {
            format!("`list` on host 8 shows {listed:?}")
        })
    }
}

fn num_vfs(config: &[u8]) -> Option<u16> {
    let view = ConfigView::new(config).ok()?;
    let extended = view.extended_capabilities().ok()?;
    let sriov = extended.iter().find(|cap| cap.id == EXT_CAP_SRIOV)?;
    Some(view.u16(sriov.offset + NUM_VFS))
}

/// A line of a VF that answers with the right ids.
fn answers(bdf: Bdf, vf: &SoftFunction) -> Result<String, DemoError> {
    let claim = Claim::Vfs;
    let config = config_space(vf).map_err(|e| claim.broken(format!("{bdf}: {}", e.text)))?;
    let ids = ConfigView::new(&config).map(|view| (view.u16(0), view.u16(2)));
    let ids = ids.map_err(|error| claim.broken(format!("{bdf}: {error}")))?;
    claim.check(ids == (ARC_IDS.vendor, ARC_IDS.device), || {
        format!("{bdf} answers with {ids:04x?}")
    })?;
    let gib = VRAM_BYTES >> 30;
    Ok(format!(
        "{bdf} {:04x}:{:04x}, {gib} GiB of memory",
        ids.0, ids.1
    ))
}
