//! The borrower's port stands still while what it had borrowed has another tenant, at a third host.

use super::{Rig, Victim, WAIT, is_lost};
use crate::agent::SIGCONT;
use crate::host::VF_BDF;
use crate::ntb::Ntb;
use crate::pci;
use crate::scenario::client::Client;
use crate::scenario::third::{SECOND_NTB_BDF, SECOND_PORT, Third};
use crate::sublet::PORT;
use anyhow::{Context, Result};

const SOCKET: &str = "/run/sublet/elsewhere.sock";
/// Where its pieces lie, in blocks of 512 bytes: behind what a guest uses of the namespace.
const LBA: u64 = 48 << 11;
/// So many pieces have begun and ended since.
const PIECES: u64 = 3;

impl Rig<'_> {
    /// A host behind the lender's second port, which nobody uses yet.
    pub(super) fn begin_third(&mut self, cable: &Ntb) -> Result<&'static str> {
        let a = &self.attached.pair.a.agent;
        pci::bind(a, SECOND_NTB_BDF, "vfio-pci")?;
        let third = Third::start(self.lab, cable, &self.attached.lending.a)?;
        self.bystanders.push(Client::bystander(&third.host.agent)?);
        self.third = Some(third);
        Ok("")
    }

    /// The tenant at the third host comes and works while the old one's stores go on, from a worker
    /// whose port stands still; then that port goes on, with all that it had yet to do, and nothing
    /// of it reaches the tenant. Then the function is offered at the first port again. How many
    /// pieces of the tenant's were right.
    pub(super) fn lend_on_elsewhere(&mut self, frozen: u32) -> Result<u64> {
        let third = self.third.take().context("no third host")?;
        let (fdid, tenant) = self.move_in_elsewhere(&third)?;
        self.stores_go_on(&self.attached.guest)
            .context("beside the tenant at host c")?;
        self.ensure_unreached(&tenant)?;
        let b = self.attached.pair.b.agent.clone();
        b.sh(&format!("grep -q '^State:.T' /proc/{frozen}/status"))
            .context("the port did not stand still all the time")?;
        b.kill(frozen, SIGCONT)?;
        let lending = &self.attached.lending;
        lending.b.wait_status("lost lease", WAIT, is_lost)?;
        self.late_stores_come(Victim::BorrowerPort)?;
        self.ensure_unreached(&tenant)?;
        let pieces = tenant.pieces()?;
        tenant.end()?;
        third.daemon.verb(&["return", &fdid])?;
        self.end_third(third)?;
        Ok(pieces)
    }

    fn move_in_elsewhere(&self, third: &Third) -> Result<(String, Client)> {
        let a = &self.attached.lending.a;
        // Of what was added before it a port knows nothing.
        a.verb(&["unavailable", VF_BDF])?;
        a.verb(&["remove", VF_BDF])?;
        let fdid = a.offer(VF_BDF, SECOND_PORT, &third.daemon)?;
        let borrow = ["borrow", &fdid, "--socket", SOCKET];
        third.daemon.verb(&borrow)?;
        let tenant = Client::start(&third.host.agent, "tenant", SOCKET, LBA)?;
        tenant.order("open")?;
        tenant.order("map")?;
        tenant.tell("go")?;
        Ok((fdid, tenant))
    }

    /// Its pieces come back as they were written, with its memory whole after each; its function
    /// bears no store of the old tenant's, and memory of nobody's is as it was.
    fn ensure_unreached(&mut self, tenant: &Client) -> Result<()> {
        tenant.goes_on(PIECES).context("the tenant at host c")?;
        self.ensure_no_store_of_last()?;
        self.look_at_bystanders()
    }

    fn end_third(&mut self, third: Third) -> Result<()> {
        let bystander = self.bystanders.pop().context("no bystander at host c")?;
        bystander.end()?;
        let lending = &self.attached.lending;
        lending.a.verb(&["unavailable", VF_BDF])?;
        lending.a.verb(&["remove", VF_BDF])?;
        third.end(&lending.a)?;
        pci::unbind(&self.attached.pair.a.agent, SECOND_NTB_BDF)?;
        // The peer of a port that stood still for long is another session's.
        lending.wait_link()?;
        lending.a.verb(&["add", VF_BDF])?;
        lending.a.verb(&["available", VF_BDF, "--port", PORT])?;
        Ok(())
    }
}
