//! A second tenant of the same port that is a guest, with its own function and memory that is full of a pattern.

use super::client::Client;
use super::steps::{self, Attached};
use super::tenant::{VF, find};
use crate::guest::{Guest, GuestSpec};
use crate::lab::Lab;
use crate::sublet::ensure_no_lost_interrupt;
use anyhow::{Context, Result};
use std::sync::atomic::{AtomicU64, Ordering};

/// Where its pieces lie: behind what the first guest and clients use of the namespace, which all
/// functions have.
const AT: (&str, u64) = ("/dev/nvme0n1", 56 << 20);
const PIECE_BYTES: u64 = 16 << 10;
/// One huge page of the guest's: it begins where the window is looked at.
const MEMORY_MIB: u64 = 2;

/// It, up and at no work yet.
pub struct Second {
    guest: Guest,
    memory: Client,
    looks: AtomicU64,
    /// Its function.
    pub fdid: String,
    /// Where host A's outbound window leads to its memory.
    pub address: u64,
}

impl Second {
    /// Borrows, boots while the first guest stands still, and is found through the window.
    pub fn move_in(lab: &Lab, attached: &Attached) -> Result<Self> {
        let Attached { pair, lending, .. } = attached;
        let fdid = VF.lend(&pair.a.agent, lending)?;
        let (first, b) = (attached.guest.pid, &pair.b.agent);
        let mut spec = GuestSpec::stock("second", &lab.vmm()?).device(VF.socket);
        spec.cmdline = format!("hugepages={}", MEMORY_MIB / 2);
        let guest = b.while_still(first, || lab.boot_guest(&spec, &pair.b))?;
        steps::wait_namespace(&guest.agent)?;
        let memory = Client::huge_bystander(&guest.agent, "memory", MEMORY_MIB)?;
        let address = find(pair)?;
        Ok(Second {
            guest,
            memory,
            looks: AtomicU64::new(0),
            fdid,
            address,
        })
    }

    /// A piece that comes back as it was written.
    pub fn round(&self, number: u64) -> Result<String> {
        steps::round_at(&self.guest.agent, AT, (PIECE_BYTES, number))
    }

    /// Nobody has written to its memory.
    pub fn look(&self) -> Result<()> {
        let number = 1 + self.looks.fetch_add(1, Ordering::Relaxed);
        self.memory.look(number).context("the second tenant")
    }

    /// So many rounds were right, and its memory is as it was; it moves out.
    pub fn move_out(self, attached: &Attached, rounds: u64) -> Result<String> {
        self.look()?;
        ensure_no_lost_interrupt(&self.guest.dmesg("polled|timeout")?)?;
        self.memory.end()?;
        self.guest.shut_down()?;
        VF.take_back(&attached.pair.a.agent, &attached.lending, &self.fdid)?;
        Ok(format!("{rounds} rounds of {PIECE_BYTES} bytes"))
    }
}
