//! The hosts of the kill matrix: two with a cable between them and one to a third host each, whose power goes, and who boot again.

use super::cell::Victim;
use super::rig::Rig;
use crate::host::{Host, HostSpec};
use crate::lab::{Lab, Pair};
use crate::ntb::Ntb;
use crate::pci;
use crate::scenario::client::Client;
use crate::scenario::third;
use crate::sublet::{Daemon, Keeper, Workers};
use anyhow::Result;

/// The lender's VF for a witness, after the tenant's.
pub const WITNESS_BDF: &str = "0000:01:00.2";
pub const WITNESS_CONTROLLER: u32 = 2;

/// The specs of both hosts, each with the socket of its first and of its second cable.
pub fn specs(lab: &Lab, ntb: &Ntb, cables: &[Ntb; 2]) -> Result<[HostSpec; 2]> {
    let a = HostSpec::stock("a", &lab.cache)?.lender();
    // It lends, too, where the third host borrows from it.
    let b = HostSpec::stock("b", &lab.cache)?.borrower().lender();
    Ok([
        third::plugged(a.ntb(&ntb.socket_a), &cables[0]),
        third::plugged(b.ntb(&ntb.socket_b), &cables[1]),
    ])
}

/// A sample configuration with the second port, and an NVMe that may be lent.
pub fn config(text: &str) -> String {
    third::config(&text.replace("allow = []", r#"allow = ["0000:01:00.*"]"#))
}

/// What the daemon keeps outlives its host, as on a disk.
pub fn keep_store(host: &Host) -> Result<()> {
    let kept = host.shared(&format!("store-{}", host.name));
    let mount = format!("mkdir -p {kept} /var/lib/sublet; mount --bind {kept} /var/lib/sublet");
    host.agent.sh(&mount).map(drop)
}

impl Rig<'_> {
    fn host(&mut self, victim: Victim) -> Option<&mut Host> {
        match victim {
            Victim::LenderHost => Some(&mut self.pair.a),
            Victim::BorrowerHost => Some(&mut self.pair.b),
            _ => None,
        }
    }

    /// Power goes, and whoever was there with it. False where the victim is no host.
    pub fn power_off(&mut self, victim: Victim) -> Result<bool> {
        let Some(host) = self.host(victim) else {
            return Ok(false);
        };
        host.kill()?;
        if victim == Victim::BorrowerHost {
            (self.client, self.guest) = (None, None);
        }
        Ok(true)
    }

    /// A host without power boots again, and all of it is started as before.
    pub fn power_on(&mut self, victim: Victim) -> Result<()> {
        let Some(host) = self.host(victim) else {
            return Ok(());
        };
        if host.qemu.ensure_alive().is_ok() {
            return Ok(());
        }
        let side = usize::from(victim == Victim::BorrowerHost);
        let mut booted = self.lab.start_host(&self.specs[side])?;
        booted.wait_ready()?;
        keep_store(&booted)?;
        self.bystanders[side] = Client::bystander(&booted.agent)?;
        pci::wait_namespace(&booted.agent)?;
        if victim == Victim::LenderHost {
            make_vfs(&booted)?;
        }
        let config = booted.shared(&format!("{}.toml", booted.name));
        self.lending.keepers[side] = Keeper::start(&booted, &self.program, &config)?;
        let daemon = Daemon::start_as(&booted, &self.program, &config, Workers::Kept)?;
        let Pair { a, b, .. } = &mut self.pair;
        let (host, old) = match side {
            0 => (a, &mut self.lending.a),
            _ => (b, &mut self.lending.b),
        };
        (*host, *old) = (booted, daemon);
        Ok(())
    }
}

/// The tenant's VF, and the witness's.
fn make_vfs(host: &Host) -> Result<()> {
    pci::make_vfs(&host.agent, 2)?;
    pci::nvme_online(&host.agent, 1, 2, 1)?;
    pci::nvme_online(&host.agent, WITNESS_CONTROLLER, 2, 1)
}
