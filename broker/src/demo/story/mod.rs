//! The demonstration's story: each claim is checked in order, on what hosts, fabric and guest show.

mod guest;
mod pool;
mod undo;

use super::claim::{Claim, DemoError};
use super::fabric::Fabric;
use super::guest::Guest;
use super::left::Left;
use super::linux::Qemu;
use super::program::RAM_BYTES;
use super::report::{Report, Step};
use super::stop::Stop;
use super::{Watch, Wish, ms};
use crate::daemon::status::BorrowedStatus;
use crate::daemon::vocabulary::{ListEntry, Outcome, Verb};
use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use vfio_shim::model::Fdid;
use vfio_shim::ntb::soft::SoftFunction;

/// What is borrowed: 4a:00.1 of node 4.
const FDID: &str = "44a01";

/// What stands so far. Fields end in order: the guest before the hosts.
pub(super) struct Story<'a> {
    guest: Option<Guest>,
    fabric: Fabric,
    wish: &'a Wish,
    folder: &'a Path,
    stop: &'a Stop,
    fdid: Fdid,
    socket: PathBuf,
    /// What was there before the lease.
    before: Option<Left>,
    /// Resets of the VF before the guest was killed.
    resets: u64,
    /// What a fault holds on to.
    held: Vec<Box<dyn Any>>,
}

type Shown = Result<Vec<String>, DemoError>;

impl<'a> Story<'a> {
    pub(super) fn new(folder: &'a Path, wish: &'a Wish, stop: &'a Stop) -> Result<Self, DemoError> {
        let fdid = FDID
            .parse()
            .map_err(super::claim::setup("name what it borrows"))?;
        Ok(Self {
            guest: None,
            fabric: Fabric::start(folder)?,
            wish,
            folder,
            stop,
            fdid,
            socket: PathBuf::new(),
            before: None,
            resets: 0,
            held: Vec::new(),
        })
    }

    pub(super) fn tell(
        &mut self,
        watch: &mut dyn Watch,
        report: &mut Report,
    ) -> Result<(), DemoError> {
        for claim in Claim::ALL.iter().copied() {
            self.stop.check()?;
            watch.begins(claim);
            let start = Instant::now();
            let shown = self.check(claim, report)?;
            let step = Step {
                claim,
                says: claim.says(),
                ms: ms(start.elapsed()),
                shown,
            };
            watch.holds(&step);
            report.steps.push(step);
        }
        Ok(())
    }

    fn check(&mut self, claim: Claim, report: &mut Report) -> Shown {
        match claim {
            Claim::Vfs => self.vfs(report),
            Claim::Pool => self.pool(),
            Claim::Borrow => self.borrow(),
            Claim::Registers => self.registers(report),
            Claim::Dma => self.dma(report),
            Claim::Interrupts => self.interrupts(report),
            Claim::Order => self.order(report),
            Claim::Stray => self.stray(report),
            Claim::Kill => self.kill(report),
            Claim::Reset => self.reset(),
            Claim::Return => self.give_back(),
            Claim::Left => self.left(),
            Claim::Memory => self.memory(report),
        }
    }

    /// Where the files of a Linux guest lie, as long as it runs.
    fn guest_folder(&self) -> PathBuf {
        self.folder.join("guest")
    }

    /// How much memory the guest has.
    fn guest_bytes(&self) -> u64 {
        match &self.wish.linux {
            Some(_) => Qemu::MEMORY_BYTES,
            None => RAM_BYTES,
        }
    }

    /// Whether this claim is to be made false.
    fn breaks(&self, claim: Claim) -> bool {
        self.wish.fault == Some(claim)
    }

    fn vf(&self, claim: Claim) -> Result<Arc<SoftFunction>, DemoError> {
        let vf = self.fabric.vf().map(|(_, vf)| vf);
        vf.ok_or_else(|| claim.broken("the VF is gone"))
    }

    fn running(&mut self, claim: Claim) -> Result<&mut Guest, DemoError> {
        let guest = self.guest.as_mut();
        guest.ok_or_else(|| claim.broken("no guest runs"))
    }

    /// Host 8's `list`.
    fn list(&self, claim: Claim) -> Result<Vec<ListEntry>, DemoError> {
        match self.fabric.borrower.ask(&Verb::List) {
            Ok(Outcome::List(entries)) => Ok(entries),
            Ok(other) => Err(claim.broken(format!("the daemon answered with {other:?}"))),
            Err(refusal) => Err(claim.broken(refusal.text)),
        }
    }

    /// What host 8's `status` shows of the borrowed function.
    fn borrowed(&self, claim: Claim) -> Result<BorrowedStatus, DemoError> {
        let status = self.fabric.borrower.status();
        let status = status.map_err(|refusal| claim.broken(refusal.text))?;
        let mut held = status.borrowed.into_iter();
        let found = held.find(|held| held.fdid.0 == self.fdid);
        found.ok_or_else(|| claim.broken("host 8's status does not show it as borrowed"))
    }
}
