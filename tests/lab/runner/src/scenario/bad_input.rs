//! Scenario `bad-input`: what must be refused is refused in words, and nothing of it stays behind.

use super::steps::SOCKET;
use super::{Scenario, When};
use crate::agent::RUN_TIMEOUT;
use crate::check::Checks;
use crate::host::{HostSpec, NTB_BDF, PF_BDF, VF_BDF};
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::sublet::{Daemon, Lending, config};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::time::Duration;

/// Every kind of bad input that a stock kernel or a VMM can show; a forging peer is for unit tests.
pub const SCENARIO: Scenario = Scenario {
    name: "bad-input",
    checks: 5 + 8 + BORROWS.len() + 2 + 2 + VMM_CASES.len() + 3,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// On q35's chipset: one group of a bridge, a SATA controller and an SMBus controller, which has
/// no way to be reset.
const SATA_BDF: &str = "0000:00:1f.2";
const SMBUS_BDF: &str = "0000:00:1f.3";
/// Of the lab's own virtio-serial, which no policy allows.
const SERIAL_BDF: &str = "0000:00:08.0";
const ALLOW: &str = r#"["0000:01:00.*", "0000:00:1f.*", "0000:02:00.0"]"#;
const REFUSED: i32 = 3;
const CONFIG: i32 = 6;
const PEER: i32 = 7;
const SESSION_TIMEOUT: Duration = Duration::from_secs(20);
/// NVMe 1.4, as the lab's controller says.
const NVME_VERSION: u64 = 0x0001_0400;

/// What `borrow` is asked for on host B, its exit code and its words.
const BORROWS: [(&str, &[&str], i32, &str); 8] = [
    (
        "a function that nobody offers",
        &["40107", "--socket", SOCKET],
        REFUSED,
        "0000:01:00.7 is not in this lender's pool: see `sublet list`",
    ),
    (
        "a function of a node that no port leads to",
        &["90100", "--socket", SOCKET],
        PEER,
        "no port leads to node 9 (ntb0 leads to node 4): check the fdid with `sublet list`, and \
         the link with `sublet status`",
    ),
    (
        "a function of this very host",
        &["80100", "--socket", SOCKET],
        REFUSED,
        "80100 is a function of this very host: give it to a VM by VFIO",
    ),
    (
        "more RAM than the window holds",
        &["40101", "--socket", SOCKET, "--ram", "2G"],
        REFUSED,
        "the guest's RAM needs 2147483648 bytes of the NTB window; 1073676288 of 1073741824 are \
         free: a window of 4294967296 bytes would do (set it in both hosts' firmware), or use \
         less memory",
    ),
    (
        "mapped BARs for a VMM that is not trusted",
        &["40101", "--socket", SOCKET, "--bars", "mapped"],
        REFUSED,
        "mapped BARs make the VMM as powerful as port `ntb0`: say --trust-vmm if it is to be, or \
         use --bars trapped",
    ),
    (
        "mapped BARs for another trust domain",
        &[
            "40101",
            "--socket",
            SOCKET,
            "--bars",
            "mapped",
            "--trust-vmm",
            "--trust-domain",
            "other",
        ],
        REFUSED,
        "port `ntb0` is of trust domain `lab`, and a mapped lease of `other` could reach what is \
         of `lab`: use --bars trapped",
    ),
    (
        "a socket where a file is",
        &["40101", "--socket", "/init"],
        REFUSED,
        "/init exists and is no socket; choose another path",
    ),
    (
        "a socket in a folder that is not there",
        &["40101", "--socket", "/nowhere/vf.sock"],
        REFUSED,
        "cannot listen on /nowhere/vf.sock: No such file or directory (os error 2)",
    ),
];

/// What the client without a VMM does, and the words of `status` afterwards.
const VMM_CASES: [(&str, &str); 10] = [
    (
        "version",
        "the VMM's capabilities are not understood: invalid type: integer `7`, expected an \
         object of capabilities at line 1 column 18",
    ),
    (
        "early",
        "the VMM sent DeviceGetInfo out of turn: VERSION comes first, and once",
    ),
    (
        "oversized",
        "the VMM sent a malformed message: the RegionWrite message has 1073741824 bytes; it must \
         have 32 to 1048608, header included",
    ),
    (
        "private",
        "DMA_MAP of 0x0+0x200000 is refused: process PID does not map bytes 0x0+0x200000 of that \
         memory shared, so DMA would reach pages that the guest never sees; start the VMM with \
         share=on (QEMU) or shared=on (cloud-hypervisor)",
    ),
    (
        "became-private",
        "guest memory cannot be reached by the device as the guest enables bus mastering: process \
         PID does not map bytes 0x0+0x200000 of that memory shared, so DMA would reach pages that \
         the guest never sees; start the VMM with share=on (QEMU) or shared=on (cloud-hypervisor)",
    ),
    (
        "file",
        "DMA_MAP of 0x0+0x1000 is refused: the memory's fd is no memfd or hugetlbfs file; give \
         the guest memory by memory-backend-memfd with share=on (QEMU) or shared=on \
         (cloud-hypervisor)",
    ),
    (
        "short",
        "DMA_MAP of 0x0+0x400000 is refused: the memory's fd has 0x200000 bytes, and the map \
         needs them up to 0x400000",
    ),
    (
        "read-only",
        "DMA_MAP of 0x0+0x200000 is refused: the memory's fd cannot be written, and the map lets \
         the device do that",
    ),
    (
        "reserved",
        "DMA_MAP of 0xfee00000+0x1000 is refused: the IOMMU cannot map those addresses; it can \
         map 0x0..=0xfedfffff and 0xfef00000..=0xfffffffffffff: give the guest a memory layout \
         inside them",
    ),
    (
        "window",
        "guest memory cannot be reached by the device as the guest enables bus mastering: the \
         device's address space refused it: the guest's RAM needs 4294967296 bytes of the NTB \
         window; 1073676288 of 1073741824 are free: a window of 8589934592 bytes would do (set \
         it in both hosts' firmware), or use less memory",
    ),
];

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let ntb = lab.ntb(&[])?;
    let mut pair = None;
    checks.must("both hosts boot", || {
        let mut a = HostSpec::stock("a", &lab.cache)?.lender();
        a.modules.push("ahci".to_owned());
        let a = a.ntb(&ntb.socket_a);
        let b = HostSpec::stock("b", &lab.cache)?.borrower();
        let b = b.ntb(&ntb.socket_b);
        pair = Some(lab.boot(&a, &b, Some(ntb))?);
        Ok("")
    })?;
    let pair = pair.context("no hosts")?;
    pci::wait_namespace(&pair.a.agent)?;
    let before = pair.snapshot()?;
    let mut lending = None;
    checks.must("both daemons agree on a session", || {
        let started = start(lab, &pair)?;
        started.wait_link()?;
        lending = Some(started);
        Ok("")
    })?;
    let lending = lending.context("no daemons")?;
    lender_refuses(checks, &pair, &lending.a)?;
    let fdid = checks.must("host a offers the VF and host b sees it", || {
        pci::bind(&pair.a.agent, VF_BDF, "vfio-pci")?;
        lending.offer()
    })?;
    let idle = pair.snapshot()?;
    for (what, words, code, text) in BORROWS {
        checks.check(&format!("borrow refuses {what}"), || {
            refused(&lending.b, &[&["borrow"], words].concat(), code, text)
        });
    }
    daemons_refuse(checks, lab, &pair, &lending.b);
    checks.check("nothing of what was refused is left", || {
        pair.ensure_unchanged(&idle)
    });
    checks.must("host b borrows it", || lending.borrow(&fdid, SOCKET, &[]))?;
    leased(checks, &pair, &lending, &fdid)?;
    checks.check(
        "the function is returned and nothing of the lease is left",
        || {
            lending.b.verb(&["return", &fdid])?;
            pair.ensure_unchanged(&idle)
        },
    );
    checks.check("both hosts are as before", || {
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

/// Both daemons, and no VF yet; host A's policy allows more than can be lent.
fn start(lab: &Lab, pair: &Pair) -> Result<Lending> {
    let program = lab.share_binary("sublet")?;
    let a = config("a.toml")?.replace(r#"["0000:01:00.*"]"#, ALLOW);
    ensure!(a.contains(ALLOW), "the sample configuration has changed");
    fs::write(lab.dir.join("a.toml"), a)?;
    fs::write(lab.dir.join("b.toml"), config("b.toml")?)?;
    for host in [&pair.a, &pair.b] {
        pci::bind(&host.agent, NTB_BDF, "vfio-pci")?;
    }
    Ok(Lending {
        a: Daemon::start(&pair.a, &program, &pair.a.shared("a.toml"))?,
        b: Daemon::start(&pair.b, &program, &pair.b.shared("b.toml"))?,
        keepers: Vec::new(),
    })
}

/// A verb that must fail with this exit code and these words, and nothing else.
fn refused(daemon: &Daemon, words: &[&str], code: i32, text: &str) -> Result<&'static str> {
    let output = daemon.try_verb(words, RUN_TIMEOUT)?;
    let expected = (Some(code), format!("sublet: {text}"), "");
    let got = (output.code, output.stderr, output.stdout.as_str());
    ensure!(got == expected, "got {got:?}, not {expected:?}");
    Ok("")
}

/// What host A does not take into its pool. Leaves a VF that is online and has no driver.
fn lender_refuses(checks: &mut Checks, pair: &Pair, daemon: &Daemon) -> Result<()> {
    let agent = &pair.a.agent;
    let mut refuses = |what: &str, bdf: &str, text: &str| {
        checks.check(&format!("add refuses {what}"), || {
            refused(daemon, &["add", bdf], REFUSED, text)
        });
    };
    let missing = "0000:01:00.7";
    let text = format!("there is no PCI function {missing} on this host: look with lspci -D");
    refuses("a function that is not there", missing, &text);
    let text = format!(
        "policy.allow in the configuration does not name {SERIAL_BDF}: add it there, and restart \
         the daemon"
    );
    refuses("what policy does not allow", SERIAL_BDF, &text);
    let text = format!("{NTB_BDF} is the NTB of port `ntb0`: it cannot be lent");
    refuses("a port's own NTB", NTB_BDF, &text);
    let text = format!(
        "{PF_BDF} is driven by nvme on this host: stop what uses it, then unbind it: echo \
         {PF_BDF} > /sys/bus/pci/drivers/nvme/unbind"
    );
    refuses("a function that a driver has", PF_BDF, &text);
    let dir = format!("/sys/bus/pci/devices/{SMBUS_BDF}/iommu_group");
    let group = agent.sh(&format!("basename $(readlink {dir})"))?;
    let text = format!(
        "{SMBUS_BDF} shares IOMMU group {group} with devices that this host uses (0000:00:1f.0 \
         (no driver), {SATA_BDF} (ahci)): the IOMMU cannot tell them apart. Unbind those, or put \
         the device into a slot with ACS"
    );
    refuses("a function whose group is in use", SMBUS_BDF, &text);
    let ahci = "/sys/bus/pci/drivers/ahci";
    agent.sh(&format!("echo {SATA_BDF} > {ahci}/unbind"))?;
    let text = format!(
        "{SMBUS_BDF} has no reset method, so one tenant's state would reach the next: it cannot \
         be lent"
    );
    refuses("a function without a reset method", SMBUS_BDF, &text);
    agent.sh(&format!("echo {SATA_BDF} > {ahci}/bind"))?;
    pci::make_vfs(agent, 1)?;
    pci::nvme_online(agent, 1, 2, 1)?;
    let text = format!(
        "{PF_BDF} has SR-IOV on (1 virtual functions): lend those, or remove them first with echo \
         0 > /sys/bus/pci/devices/{PF_BDF}/sriov_numvfs"
    );
    refuses("a physical function with SR-IOV on", PF_BDF, &text);
    checks.check("available refuses what is not in the pool", || {
        let text = format!("{PF_BDF} is not in the pool: `sublet add {PF_BDF}` first");
        refused(daemon, &["available", PF_BDF], REFUSED, &text)
    });
    Ok(())
}

/// A configuration with a mistyped key, and a second daemon.
fn daemons_refuse(checks: &mut Checks, lab: &Lab, pair: &Pair, daemon: &Daemon) {
    let start = |name: &str, code: i32, text: &str| {
        let path = pair.b.shared(name);
        let words = ["daemon", "--in-process", "--config", &path];
        refused(daemon, &words, code, text)
    };
    checks.check("a mistyped key is refused with its place and the nearest", || {
        let text = config("b.toml")?.replace("lost_after_ms", "lost_aftr_ms");
        let line = text.lines().position(|line| line.starts_with("lost_aftr_ms"));
        let line = line.context("the sample configuration has changed")? + 1;
        fs::write(lab.dir.join("mistyped.toml"), text)?;
        let path = pair.b.shared("mistyped.toml");
        let text = format!(
            "{path}:{line}:1: unknown key `lost_aftr_ms`; the nearest known key is `lost_after_ms`"
        );
        start("mistyped.toml", CONFIG, &text)
    });
    checks.check("a second daemon is refused and the first goes on", || {
        let text = format!(
            "process {} serves /run/sublet/control.sock already; stop it first, or set `control` \
             to another path",
            daemon.pid()
        );
        start("b.toml", REFUSED, &text)?;
        daemon.status().map(|_| "")
    });
}

/// While host B has it: nobody else gets it, and VMMs that misbehave cost themselves alone.
fn leased(checks: &mut Checks, pair: &Pair, lending: &Lending, fdid: &str) -> Result<()> {
    checks.check("borrow refuses a function that is taken", || {
        let text =
            format!("{fdid} is borrowed here already, at {SOCKET}: `sublet return {fdid}` first");
        let words = ["borrow", fdid, "--socket", "/run/sublet/other.sock"];
        refused(&lending.b, &words, REFUSED, &text)
    });
    checks.check("unavailable refuses a function that is borrowed", || {
        let text = format!("{VF_BDF} is borrowed: return it on the borrower first");
        let output = lending.a.try_verb(&["unavailable", VF_BDF], RUN_TIMEOUT)?;
        ensure!(output.stderr == format!("sublet: {text}"), "{output:?}");
        Ok("")
    });
    let before = pair.snapshot()?;
    for (case, text) in VMM_CASES {
        checks.check(
            &format!("a VMM's bad input, {case}, ends its session"),
            || {
                let answer = vmm(pair, case)?;
                let expected = text.replace("PID", &answer["pid"].to_string());
                idle_with(&lending.b, &expected)
            },
        );
    }
    checks.check(
        "the next VMM is served, its memory mapped on both hosts",
        || {
            let answer = vmm(pair, "good")?;
            let version = answer["vs"].as_u64();
            ensure!(version == Some(NVME_VERSION), "the VF says {answer}");
            lending
                .b
                .wait_status("idle endpoint", SESSION_TIMEOUT, idle)?;
            pair.ensure_unchanged(&before)
        },
    );
    Ok(())
}

fn vmm(pair: &Pair, case: &str) -> Result<Value> {
    let words = ["lab-agent", "vfio-user", SOCKET, case];
    let answer = pair.b.agent.run(&words)?;
    serde_json::from_str(&answer).with_context(|| format!("no JSON: {answer}"))
}

fn idle(status: &Value) -> bool {
    status["borrowed"][0]["state"] == "waiting"
}

/// The session's end is told in words, and the endpoint waits for the next VMM.
fn idle_with(daemon: &Daemon, expected: &str) -> Result<&'static str> {
    let status = daemon.wait_status("idle endpoint", SESSION_TIMEOUT, idle)?;
    let told = status["borrowed"][0]["last_error"].as_str().unwrap_or("");
    ensure!(told == expected, "status says `{told}`, not `{expected}`");
    Ok("")
}
