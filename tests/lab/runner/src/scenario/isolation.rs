//! Scenario `isolation`: a guest that drives the VF itself reaches its own memory and nothing else.

use super::nvme::{self, Since, Trapped, WORKS_CHECKS};
use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, Setup};
use super::tenant::Neighbour;
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::host::{NTB_BDF, VF_BDF};
use crate::lab::Lab;
use crate::pci;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::Duration;

/// The VF's own DMA engine is aimed at what is not the guest's.
pub const SCENARIO: Scenario = Scenario {
    name: "isolation",
    checks: ATTACH_CHECKS + 14 + WORKS_CHECKS + DETACH_CHECKS,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

const MIB: u64 = 1 << 20;
/// The guest's RAM; its kernel is told of one MiB less and so never uses the last page.
const RAM_BYTES: u64 = 128 * MIB;
const LAST_PAGE: u64 = RAM_BYTES - 4096;
/// Between the end of RAM below 4 GiB and the first device of any machine here.
const HOLE: u64 = 0xc000_0000;
/// Where x86 devices write to raise an interrupt.
const MSI_ADDRESS: u64 = 0xfee0_0000;
/// Bytes of the window that the borrower's guest cannot have been given: its far end.
const WINDOW_FAR: u64 = 900 * MIB;
/// In the mailbox's 64 KiB, behind everything that the protocol uses.
const MAILBOX_TAIL: u64 = 0xf000;
const FAULT_TIMEOUT: Duration = Duration::from_secs(5);
const FAULT_TRIES_MAX: usize = 5;

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let mut spec = GuestSpec::stock("g", &lab.vmm()?);
    // One hugepage for the queues of the guest's own tool.
    spec.cmdline = format!("mem={}M hugepages=1 iomem=relaxed", RAM_BYTES / MIB - 1);
    let setup = Setup {
        more_vfs: 1,
        ..Setup::default()
    };
    let attached = steps::attach(lab, checks, &setup, spec)?;
    let guest = &attached.guest.agent;
    let bdf = pci::find_nvme(guest)?;
    guest.sh(&format!("echo {bdf} > /sys/bus/pci/drivers/nvme/unbind"))?;
    checks.check("a DMA to the last page of RAM arrives", || {
        let outcome = drive(&attached, &bdf, "write", LAST_PAGE)?;
        ensure!(outcome["status"] == 0, "it ended with {outcome}");
        let page = LAST_PAGE.to_string();
        let first = guest.run(&["lab-agent", "devmem", "read", &page, "4"])?;
        // Identify Controller begins with the vendor's two ids, which are not zero.
        ensure!(first != "00000000", "the page is still zero");
        Ok(first)
    });
    aim_elsewhere(checks, &attached, &bdf)?;
    checks.check("no port saw a violation", || no_violation(&attached));
    let mut since = None;
    checks.must(
        "after a reset the same guest's driver finds its namespace",
        || {
            guest.sh(&format!("echo 1 > /sys/bus/pci/devices/{bdf}/reset"))?;
            since = Some(Since::now(&attached)?);
            guest.sh(&format!("echo {bdf} > /sys/bus/pci/drivers/nvme/bind"))?;
            steps::wait_namespace(guest).map(|()| "")
        },
    )?;
    // All that `nvme` checks.
    let since = since.context("no counters")?;
    nvme::works(checks, &attached, &since, Trapped::All)?;
    steps::detach(checks, attached)
}

/// The function aims at what is not its guest's, with a second tenant behind the same window.
fn aim_elsewhere(checks: &mut Checks, attached: &Attached, bdf: &str) -> Result<()> {
    let mut neighbour = None;
    checks.must(
        "a second tenant's memory lies behind the same window",
        || {
            let moved_in = Neighbour::move_in(attached)?;
            let address = format!("{:#x}", moved_in.address);
            neighbour = Some(moved_in);
            Ok(address)
        },
    )?;
    let neighbour = neighbour.context("no neighbour")?;
    let window = pci::bar_address(&attached.pair.a.agent, NTB_BDF, 2)?;
    for (what, direction, address) in [
        ("the first byte past RAM", "write", RAM_BYTES),
        ("the first byte past RAM, reading", "read", RAM_BYTES),
        ("the hole below 4 GiB", "write", HOLE),
        ("the window's far end", "write", window + WINDOW_FAR),
        ("the mailbox", "write", window + MAILBOX_TAIL),
        ("the neighbour's memory", "write", neighbour.address),
        ("the neighbour's memory, reading", "read", neighbour.address),
    ] {
        checks.check(&format!("a DMA to {what} is refused"), || {
            refused(attached, bdf, direction, address)
        });
    }
    checks.check("a DMA to the interrupt range raises nothing", || {
        no_interrupt(attached, bdf)
    });
    checks.check("the mailbox's tail is zero", || {
        let tail = (window + MAILBOX_TAIL).to_string();
        let argv = ["lab-agent", "devmem", "read", &tail, "4096"];
        let read = attached.pair.a.agent.run(&argv)?;
        ensure!(is_zero(&read), "it reads {read}");
        // The nonce is never zero: the same way does lead into host B's mailbox.
        let nonce = attached.pair.a.agent.run(&[
            "lab-agent",
            "devmem",
            "read",
            &window.to_string(),
            "8",
        ])?;
        ensure!(!is_zero(&nonce), "the mailbox is not reached");
        Ok("")
    });
    checks.check("the neighbour's memory is untouched", || {
        neighbour.move_out(attached)
    });
    Ok(())
}

/// Of hex words.
fn is_zero(words: &str) -> bool {
    words.split_whitespace().all(|word| word == "00000000")
}

/// One DMA by the guest's own hand.
pub(super) fn drive(
    attached: &Attached,
    bdf: &str,
    direction: &str,
    address: u64,
) -> Result<Value> {
    let address = address.to_string();
    let argv = ["lab-agent", "nvme-user", bdf, direction, &address];
    let text = attached.guest.agent.run(&argv)?;
    serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
}

/// The line is the proof: QEMU's NVMe ends a command well whose data went nowhere. QEMU keeps one
/// fault record and merges a fault into one that the kernel has not taken yet, which then has no
/// line of its own: one DMA at a time, each line waited for, and a DMA without a line done again.
pub(super) fn refused(
    attached: &Attached,
    bdf: &str,
    direction: &str,
    address: u64,
) -> Result<String> {
    let way = if direction == "read" { "Read" } else { "Write" };
    let line = format!("DMAR: .DMA {way}.*{VF_BDF}.*fault addr {address:#x} ");
    let host_a = &attached.pair.a.agent;
    let before = faults_seen(attached, &attached.fdid)?;
    for _ in 0..FAULT_TRIES_MAX {
        drive(attached, bdf, direction, address)?;
        let logged = host_a.wait_until(&format!("dmesg | grep -q '{line}'"), FAULT_TIMEOUT);
        if logged.is_ok() {
            let seen = faults_seen(attached, &attached.fdid)?;
            ensure!(seen > before, "`status` tells of {seen} faults, as before");
            return host_a.sh(&format!("dmesg | grep '{line}' | tail -n 1"));
        }
    }
    bail!("no line `{line}` in host a's log after {FAULT_TRIES_MAX} tries")
}

/// What the lender's `status` tells at a function's lease of DMA that was refused.
pub(super) fn faults_seen(attached: &Attached, fdid: &str) -> Result<u64> {
    let status = attached.lending.a.status()?;
    let lent = status["lent"].as_array().context("nothing is lent")?;
    let lease = lent.iter().find(|lent| lent["fdid"] == fdid);
    let seen = lease.and_then(|lease| lease["dma_faults_seen"].as_u64());
    seen.with_context(|| format!("no faults of {fdid} are told: {status}"))
}

/// Host A's IOMMU refuses it as the interrupt that it would be, and no processor of host A takes an
/// interrupt that it knows nothing of.
fn no_interrupt(attached: &Attached, bdf: &str) -> Result<String> {
    let host_a = &attached.pair.a.agent;
    // Linux counts here what came without a handler or an owner; newer ones tell no count of zero.
    let unknown = "grep -E '^ *(ERR|MIS|SPU):' /proc/interrupts || :; \
         dmesg | grep -c 'No irq handler for vector' || :";
    let line = "INTR-REMAP";
    let lines = format!("dmesg | grep -c '{line}' || :");
    let (seen, before) = (host_a.sh(unknown)?, host_a.sh(&lines)?);
    for _ in 0..FAULT_TRIES_MAX {
        drive(attached, bdf, "write", MSI_ADDRESS)?;
        let more = format!("test $(dmesg | grep -c '{line}') -gt {}", before.trim());
        if host_a.wait_until(&more, FAULT_TIMEOUT).is_ok() {
            let now = host_a.sh(unknown)?;
            ensure!(now == seen, "host a took interrupts: {seen}, {now}");
            return host_a.sh(&format!("dmesg | grep '{line}' | tail -n 1"));
        }
    }
    bail!("no line `{line}` in host a's log after {FAULT_TRIES_MAX} tries")
}

fn no_violation(attached: &Attached) -> Result<&'static str> {
    for daemon in [&attached.lending.a, &attached.lending.b] {
        let status = daemon.status()?;
        let violations = &status["ports"][0]["mailbox"]["violations"];
        ensure!(
            violations == &Value::from(0),
            "{violations} violations: {status}"
        );
    }
    Ok("")
}
