//! The lender's VFs after the first: each is brought online, offered and borrowed, and goes all the way back.

use crate::agent::Agent;
use crate::pci;
use crate::sublet::Lending;
use anyhow::Result;

/// One of them, by its place on its bus, its controller's number, and where its worker listens.
#[derive(Clone, Copy, Debug)]
pub struct Vf {
    /// Of host A.
    pub bdf: &'static str,
    /// The secondary controller's id.
    pub controller: u32,
    /// On host B.
    pub socket: &'static str,
}

impl Vf {
    /// Puts it into the pool, where nothing else is available, and borrows it; its fabric device id.
    pub fn lend(&self, a: &Agent, lending: &Lending) -> Result<String> {
        pci::nvme_online(a, self.controller, 2, 1)?;
        pci::bind(a, self.bdf, "vfio-pci")?;
        let fdid = lending.offer_function(self.bdf)?;
        lending.borrow(&fdid, self.socket, &[])?;
        Ok(fdid)
    }

    /// As before it was lent.
    pub fn take_back(&self, a: &Agent, lending: &Lending, fdid: &str) -> Result<()> {
        lending.b.verb(&["return", fdid])?;
        lending.a.verb(&["unavailable", self.bdf])?;
        lending.a.verb(&["remove", self.bdf])?;
        pci::unbind(a, self.bdf)?;
        pci::nvme_offline(a, self.controller)
    }
}
