//! Witnesses: a tenant beside the one who is struck, or at a third host that does nothing else, whose checksummed I/O goes on; and bystanders, whose memory is nobody's.

use super::cell::Witnessed;
use super::hosts::WITNESS_BDF;
use super::rig::Rig;
use crate::host::VF_BDF;
use crate::pci;
use crate::scenario::client::Client;
use crate::scenario::third::{SECOND_PORT, Third};
use crate::sublet::{Daemon, PORT};
use anyhow::{Context, Result};

const SOCKET: &str = "/run/sublet/witness.sock";
/// Where its pieces lie, in blocks of 512 bytes.
const LBA: u64 = 48 << 11;

/// A tenant at work all the time.
pub struct Witness {
    client: Client,
    place: Witnessed,
    bdf: &'static str,
    fdid: String,
    third: Option<Third>,
}

impl Rig<'_> {
    /// A second tenant, which works all the time.
    pub fn begin_witness(&mut self, place: Witnessed) -> Result<String> {
        let bdf = match place {
            Witnessed::Beside | Witnessed::FromLender => WITNESS_BDF,
            Witnessed::FromBorrower => {
                pci::make_vfs(&self.pair.b.agent, 1)?;
                pci::nvme_online(&self.pair.b.agent, 1, 2, 1)?;
                VF_BDF
            }
        };
        let third = match place {
            Witnessed::Beside => None,
            _ => Some(self.third(place)?),
        };
        let (agent, borrower, port) = match &third {
            None => (&self.pair.b.agent, &self.lending.b, PORT),
            Some(third) => (&third.host.agent, &third.daemon, SECOND_PORT),
        };
        let fdid = self.lender_of(place).offer(bdf, port, borrower)?;
        borrower.verb(&["borrow", &fdid, "--socket", SOCKET])?;
        let client = Client::start(agent, "witness", SOCKET, LBA)?;
        client.order("open")?;
        client.order("map")?;
        client.tell("go")?;
        client.goes_on(2)?;
        self.witness = Some(Witness {
            client,
            place,
            bdf,
            fdid: fdid.clone(),
            third,
        });
        Ok(fdid)
    }

    fn lender_of(&self, place: Witnessed) -> &Daemon {
        match place {
            Witnessed::FromBorrower => &self.lending.b,
            _ => &self.lending.a,
        }
    }

    /// A third host at the end of the second cable of one that stays.
    fn third(&self, place: Witnessed) -> Result<Third> {
        let cable = &self.cables[usize::from(place == Witnessed::FromBorrower)];
        Third::start(self.lab, cable, self.lender_of(place))
    }

    /// It moves out, its function goes out of the pool, and the third host is no more.
    pub fn end_witness(&mut self) -> Result<String> {
        let witness = self.witness.take().context("no witness")?;
        let Witness {
            client,
            place,
            bdf,
            fdid,
            third,
        } = witness;
        let pieces = client.pieces()?;
        client.end()?;
        let borrower = third
            .as_ref()
            .map_or(&self.lending.b, |third| &third.daemon);
        borrower.verb(&["return", &fdid])?;
        let lender = self.lender_of(place);
        lender.verb(&["unavailable", bdf])?;
        lender.verb(&["remove", bdf])?;
        if let Some(third) = third {
            third.end(lender)?;
        }
        if place == Witnessed::FromBorrower {
            pci::nvme_offline(&self.pair.b.agent, 1)?;
            pci::remove_vfs(&self.pair.b.agent)?;
        }
        Ok(format!("{pieces} pieces"))
    }

    /// Who must not notice.
    pub fn witness(&self) -> Result<&Client> {
        Ok(&self.witness.as_ref().context("no witness")?.client)
    }

    /// Does something while the witness rests, if it works on the tenant's host.
    pub fn while_witness_rests<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let witness = self.witness.as_ref().context("no witness")?;
        if witness.place != Witnessed::Beside {
            return act();
        }
        self.pair.b.agent.while_still(witness.client.pid, act)
    }

    /// Memory of both hosts that is no tenant's is as it was.
    pub fn look_at_bystanders(&mut self) -> Result<()> {
        self.looks += 1;
        let mut all = self.bystanders.iter();
        all.try_for_each(|bystander| bystander.look(self.looks))
    }
}
