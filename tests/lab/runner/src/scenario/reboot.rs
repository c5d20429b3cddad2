//! Scenario `reboot`: a function that comes to the next guest session bears no trace of the last.

use super::Scenario;
use super::steps::{self, ATTACH_CHECKS, DETACH_CHECKS, SOCKET};
use crate::agent::Agent;
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec, Machine};
use crate::host::VF_BDF;
use crate::lab::Lab;
use crate::pci::{self, NVME_RESET, NvmeRegisters};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// The guest reboots; then its VMM is killed and another one comes.
pub const SCENARIO: Scenario = Scenario {
    name: "reboot",
    checks: ATTACH_CHECKS + 6 + DETACH_CHECKS,
    gate: false,
    deadline: Duration::from_secs(420),
    run,
};

/// An address that no driver would choose, aligned as ASQ must be.
const PATTERN: u64 = 0x5a5a_a000;
const BYTES: u64 = 64 << 10;
const SESSION_END_TIMEOUT: Duration = Duration::from_secs(20);
const REBOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// Before any driver is loaded: what the last session left in the registers.
const FIRST_READ: &str = "D=$(dirname $(grep -l 0x010802 /sys/bus/pci/devices/*/class | head -n 1))\n\
    lab-agent nvme-user ${D##*/} registers > /tmp/first-read 2>&1";

fn spec(name: &str, lab: &Lab) -> Result<GuestSpec> {
    let mut spec = GuestSpec::stock(name, &lab.vmm()?);
    // SeaBIOS would drive the function before the kernel could look at it.
    spec.machine = Machine::Microvm;
    spec.reboots = true;
    spec.early = FIRST_READ.to_owned();
    Ok(spec)
}

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let mut attached = steps::attach(lab, checks, &[], spec("g", lab)?)?;
    let host_a = attached.pair.a.agent.clone();
    checks.check("a pattern in ASQ is seen by host a", || {
        leave_pattern(&attached.guest, &host_a)
    });
    checks.must(
        "after a reboot the guest's first read finds no trace",
        || {
            reboot(&attached.guest)?;
            first_read(&attached.guest.agent)
        },
    )?;
    checks.check("the rebooted guest writes and reads back", || {
        steps::wait_namespace(&attached.guest.agent)?;
        steps::write_and_read_back(&attached.guest.agent, BYTES)
    });
    leave_pattern(&attached.guest, &host_a)?;
    attached.guest.kill()?;
    checks.check("after a killed VMM host a finds the function reset", || {
        attached
            .lending
            .b
            .wait_status("end of the session", SESSION_END_TIMEOUT, |status| {
                status["borrowed"][0]["vmm_pid"].is_null()
            })?;
        let left = pci::nvme_registers(&host_a, VF_BDF)?;
        ensure!(left == NVME_RESET, "left behind: {left:x?}");
        Ok("")
    });
    let mut next = None;
    checks.must(
        "another VMM boots on the same socket and finds no trace",
        || {
            let guest = lab.boot_guest(&spec("h", lab)?.device(SOCKET), &attached.pair.b)?;
            let found = first_read(&guest.agent);
            next = Some(guest);
            found
        },
    )?;
    attached.guest = next.context("no guest")?;
    checks.check("its guest writes and reads back", || {
        steps::wait_namespace(&attached.guest.agent)?;
        steps::write_and_read_back(&attached.guest.agent, BYTES)
    });
    steps::detach(checks, attached)
}

/// The control of what follows: what the guest leaves is there, and host A can see it.
fn leave_pattern(guest: &Guest, host_a: &Agent) -> Result<String> {
    let bdf = pci::find_nvme(&guest.agent)?;
    guest
        .agent
        .sh(&format!("echo {bdf} > /sys/bus/pci/drivers/nvme/unbind"))?;
    let pattern = PATTERN.to_string();
    guest
        .agent
        .run(&["lab-agent", "nvme-user", &bdf, "pattern", &pattern])?;
    let seen = pci::nvme_registers(host_a, VF_BDF)?;
    ensure!(seen.asq == PATTERN, "host a sees {seen:x?}");
    Ok(format!("{seen:x?}"))
}

/// A marker in the guest's memory tells the old boot from the new one.
fn reboot(guest: &Guest) -> Result<()> {
    guest.agent.put("/tmp/old-boot", b"")?;
    // The answer is lost with the guest.
    let _ = guest
        .agent
        .try_run(&["reboot", "-f"], &[], Duration::from_secs(1));
    guest.wait_ready()?;
    guest
        .agent
        .wait_until("! test -e /tmp/old-boot", REBOOT_TIMEOUT)?;
    Ok(())
}

fn first_read(agent: &Agent) -> Result<String> {
    let text = agent.text("/tmp/first-read")?;
    let read: Value = serde_json::from_str(&text).with_context(|| format!("first read: {text}"))?;
    let number = |name: &str| {
        read[name]
            .as_u64()
            .with_context(|| format!("no {name} in {text}"))
    };
    let found = NvmeRegisters {
        cc: number("cc")? as u32,
        csts: number("csts")? as u32,
        aqa: number("aqa")? as u32,
        asq: number("asq")?,
    };
    ensure!(found == NVME_RESET, "the guest found {found:x?}");
    Ok(text)
}
