//! Scenario `reboot`: a function that comes to the next guest session bears no trace of the last.

use super::steps::{self, ATTACH_CHECKS, DETACH_CHECKS, SOCKET, Setup};
use super::{Scenario, When};
use crate::agent::Agent;
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec, Machine};
use crate::host::VF_BDF;
use crate::lab::Lab;
use crate::pci::{self, NvmeRegisters};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// The guest reboots; then its VMM is killed and another one comes.
pub const SCENARIO: Scenario = Scenario {
    name: "reboot",
    checks: ATTACH_CHECKS + 7 + DETACH_CHECKS,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// A VF that nobody borrows.
const SPARE_BDF: &str = "0000:01:00.2";
const SPARE_CONTROLLER: u32 = 2;
/// No driver masks interrupts like this.
const PATTERN: u32 = 0x5a5a_a5a5;
const BYTES: u64 = 64 << 10;
const SESSION_END_TIMEOUT: Duration = Duration::from_secs(20);
const REBOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// Before any driver is loaded: what the last session left in the registers.
const FIRST_READ: &str = "D=$(dirname $(grep -l 0x010802 /sys/bus/pci/devices/*/class | head -n 1))\n\
    lab-agent nvme-user ${D##*/} registers > /tmp/first-read 2>&1";

fn spec(name: &str, lab: &Lab) -> Result<GuestSpec> {
    let mut spec = GuestSpec::stock(name, &lab.vmm()?);
    // SeaBIOS would drive the function before the kernel could look at it.
    spec.machine = Machine::Microvm;
    spec.reboots = true;
    // For the queues of the guest's own tool.
    spec.cmdline = "hugepages=1".to_owned();
    spec.early = FIRST_READ.to_owned();
    Ok(spec)
}

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let setup = Setup {
        more_vfs: 1,
        ..Setup::default()
    };
    let mut attached = steps::attach(lab, checks, &setup, spec("g", lab)?)?;
    let host_a = attached.pair.a.agent.clone();
    checks.check("what the controller's own reset leaves is known", || {
        // Offline, it would answer with zeros, whatever it holds.
        pci::nvme_online(&host_a, SPARE_CONTROLLER, 2, 1)?;
        let left = pci::after_own_reset(&host_a, SPARE_BDF)?;
        pci::nvme_offline(&host_a, SPARE_CONTROLLER)?;
        // Known of QEMU 11: then what follows shows the lender's own clearing of them.
        let queues = match left.queues_are_gone() {
            true => "clears AQA, ASQ and ACQ",
            false => "keeps AQA, ASQ and ACQ: the lender clears them",
        };
        Ok(format!("a function level reset {queues}: {left:x?}"))
    });
    checks.check("a controller left running is seen by host a", || {
        leave_running(&attached.guest, &host_a)
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
    leave_running(&attached.guest, &host_a)?;
    attached.guest.kill()?;
    checks.check("after a killed VMM host a finds the function reset", || {
        attached
            .lending
            .b
            .wait_status("end of the session", SESSION_END_TIMEOUT, |status| {
                status["borrowed"][0]["vmm_pid"].is_null()
            })?;
        let left = pci::nvme_registers(&host_a, VF_BDF)?;
        left.ensure_reset()?;
        Ok(format!("{left:x?}"))
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
fn leave_running(guest: &Guest, host_a: &Agent) -> Result<String> {
    let bdf = pci::find_nvme(&guest.agent)?;
    guest
        .agent
        .sh(&format!("echo {bdf} > /sys/bus/pci/drivers/nvme/unbind"))?;
    guest.agent.run(&[
        "lab-agent",
        "nvme-user",
        &bdf,
        "leave",
        &PATTERN.to_string(),
    ])?;
    let seen = pci::nvme_registers(host_a, VF_BDF)?;
    let running = seen.intms == PATTERN && seen.cc & 1 == 1 && seen.csts & 1 == 1;
    let queues = seen.aqa != 0 && seen.asq != 0 && seen.acq != 0;
    ensure!(running && queues, "host a sees {seen:x?}");
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
    let found: NvmeRegisters =
        serde_json::from_str(&text).with_context(|| format!("first read: {text}"))?;
    found.ensure_reset()?;
    Ok(text)
}
