//! A second tenant of the same port: a client with its own function and its own memory, full of a pattern.

use super::steps::Attached;
use crate::host::NTB_BDF;
use crate::pci;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// The VF after the guest's.
const NEIGHBOUR_BDF: &str = "0000:01:00.2";
const SOCKET: &str = "/run/sublet/neighbour.sock";
/// The client looks at its memory when somebody writes here.
const GATE: &str = "/run/neighbour.gate";
const LOG: &str = "/run/neighbour.log";
/// What its memory is full of.
const PATTERN: &str = "5ca1ab1e";
/// RAM slices begin where their guest-physical address does, modulo this.
const STEP: u64 = 2 << 20;
const WINDOW_BYTES: u64 = 1 << 30;
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// The neighbour, while its memory is mapped.
pub struct Neighbour {
    fdid: String,
    pid: u32,
    /// Where host A's outbound window leads to its memory.
    pub address: u64,
}

impl Neighbour {
    /// Borrows the second function, maps memory behind it, and finds it through the window.
    pub fn move_in(attached: &Attached) -> Result<Self> {
        let (a, b) = (&attached.pair.a.agent, &attached.pair.b.agent);
        pci::bind(a, NEIGHBOUR_BDF, "vfio-pci")?;
        let fdid = attached.lending.offer_function(NEIGHBOUR_BDF)?;
        attached.lending.borrow(&fdid, SOCKET, &[])?;
        b.sh(&format!("mkfifo {GATE}"))?;
        let pid = b.spawn(&["lab-agent", "vfio-user", SOCKET, "tenant", GATE], LOG)?;
        b.wait_until(&format!("grep -q planted {LOG}"), READY_TIMEOUT)?;
        let address = find(attached)?;
        Ok(Neighbour { fdid, pid, address })
    }

    /// Its memory is as it was; it moves out.
    pub fn move_out(self, attached: &Attached) -> Result<String> {
        let (a, b) = (&attached.pair.a.agent, &attached.pair.b.agent);
        b.sh(&format!("echo > {GATE}"))?;
        let code = b.wait(self.pid, READY_TIMEOUT)?;
        let log = b.text(LOG)?;
        ensure!(code == Some(0), "the client ended with {code:?}: {log}");
        b.sh(&format!("rm {GATE} {LOG}"))?;
        attached.lending.b.verb(&["return", &self.fdid])?;
        attached.lending.a.verb(&["unavailable", NEIGHBOUR_BDF])?;
        attached.lending.a.verb(&["remove", NEIGHBOUR_BDF])?;
        pci::unbind(a, NEIGHBOUR_BDF)?;
        Ok(log)
    }
}

/// The pattern, seen by host A through its window: the NTB does lead there.
fn find(attached: &Attached) -> Result<u64> {
    let host_a = &attached.pair.a.agent;
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
