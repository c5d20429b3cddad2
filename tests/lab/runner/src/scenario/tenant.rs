//! A second tenant of the same port: a client with its own function, at work all the time, beside memory that is full of a pattern.
//!
//! `two-tenants` has a second guest instead, which takes a boot.

use super::client::Client;
use super::steps::Attached;
use super::vf::Vf;
use crate::host::NTB_BDF;
use crate::lab::Pair;
use crate::pci;
use anyhow::{Context, Result};

/// The VF after the guest's.
pub(super) const VF: Vf = Vf {
    bdf: "0000:01:00.2",
    controller: 2,
    socket: "/run/sublet/neighbour.sock",
};
/// Where its pieces lie, in blocks of 512 bytes: behind what a guest uses of the namespace, which
/// both have.
const LBA: u64 = 48 << 11;
/// What its memory is full of that nobody may write: `lab-agent`'s canary.
const PATTERN: &str = "ca4a4e50";
/// RAM slices begin where their guest-physical address does, modulo this.
const STEP: u64 = 2 << 20;
const WINDOW_BYTES: u64 = 1 << 30;

/// The neighbour, while its memory is mapped.
pub struct Neighbour {
    client: Client,
    /// Its function.
    pub fdid: String,
    /// Where host A's outbound window leads to its memory.
    pub address: u64,
}

impl Neighbour {
    /// Borrows the second function, goes to work, and is found through the window.
    pub fn move_in(attached: &Attached) -> Result<Self> {
        let fdid = VF.lend(&attached.pair.a.agent, &attached.lending)?;
        let b = &attached.pair.b.agent;
        let client = Client::start(b, "neighbour", VF.socket, LBA)?;
        client.order("open")?;
        client.order("map")?;
        client.tell("go")?;
        client.goes_on(2)?;
        let address = find(&attached.pair)?;
        Ok(Neighbour {
            client,
            fdid,
            address,
        })
    }

    /// Another piece comes back as it was written, and its memory is as it was: it looks at all of
    /// that after each piece.
    pub fn goes_on(&self) -> Result<()> {
        // The piece that is on its way may have been looked at before.
        self.client.goes_on(2).context("the neighbour")
    }

    /// Its memory is as it was; it moves out.
    pub fn move_out(self, attached: &Attached) -> Result<String> {
        self.goes_on()?;
        let pieces = self.client.pieces()?;
        self.client.end()?;
        VF.take_back(&attached.pair.a.agent, &attached.lending, &self.fdid)?;
        Ok(format!("{pieces} pieces of 4 KiB"))
    }
}

/// The pattern, seen by host A through its window: the NTB does lead there.
pub(super) fn find(pair: &Pair) -> Result<u64> {
    let host_a = &pair.a.agent;
    let window = pci::bar_address(host_a, NTB_BDF, 2)?;
    let steps = WINDOW_BYTES / STEP;
    let found = host_a.sh(&format!(
        "i=0; while [ $i -lt {steps} ]; do at=$(({window} + i * {STEP})); \
         if [ \"$(lab-agent devmem read $at 4)\" = {PATTERN} ]; then echo $at; exit; fi; \
         i=$((i + 1)); done"
    ))?;
    let found = found.trim().parse();
    found.context("host a does not see the neighbour's memory through its window")
}
