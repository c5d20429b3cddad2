//! Scenario `nvme-keeper`: no process that faces a stranger is root; the keeper is, and may die at any time.

use super::nvme::{Since, Trapped, WORKS_CHECKS, worker_holds_no_door, works};
use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, Setup};
use super::{Scenario, When};
use crate::agent::Agent;
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::host::VF_BDF;
use crate::lab::Lab;
use crate::pci;
use crate::snapshot;
use crate::sublet::{USER, Workers, ensure_no_lost_interrupt, trapped_accesses};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// As `nvme`, with daemons that have no right but to ask the keeper.
pub const SCENARIO: Scenario = Scenario {
    name: "nvme-keeper",
    checks: ATTACH_CHECKS + WORKS_CHECKS + OWN_CHECKS + DETACH_CHECKS,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

const OWN_CHECKS: usize = 5;
const NO_CAPABILITY: &str = "0000000000000000";
/// CAP_SYS_PTRACE (capability.h: 19), which is what reading another's memory map takes.
const SYS_PTRACE: &str = "0000000000080000";
/// Many seconds of it, so that it is under way when the keepers die.
const BYTES: u64 = 1 << 20;
/// Doorbells of the first few of its some thirty commands.
const UNDER_WAY: u64 = 4;
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let spec = GuestSpec::stock("g", &lab.vmm()?);
    let setup = Setup {
        borrow: &["--bars", "trapped"],
        workers: Workers::Kept,
        ..Setup::default()
    };
    let mut attached = steps::attach(lab, checks, &setup, spec)?;
    let since = Since::of_path(&attached)?;
    checks.check(
        "no process but the keepers is root, and none has more than it needs",
        || rights(&attached),
    );
    checks.check(
        "the worker is in its sandbox, with no door to the NTB",
        || worker_holds_no_door(&attached, Trapped::All),
    );
    works(checks, &attached, &since, Trapped::All)?;
    checks.check(
        "both keepers are killed under I/O, and the guest does not notice",
        || killed_under_io(&attached),
    );
    checks.check(
        "keepers are started again and take over what is bound",
        || {
            for keeper in &mut attached.lending.keepers {
                keeper.begin()?;
            }
            attached.lending.a.status()?;
            bound(&attached, true)
        },
    );
    // A keeper that was started anew has no connections of old.
    attached.idle = snapshot::without_programs(attached.idle, " keeper");
    detach(checks, attached)
}

/// As [`steps::detach`], with `unavailable` by the keeper that was started anew.
fn detach(checks: &mut Checks, attached: Attached) -> Result<()> {
    let Attached {
        guest,
        lending,
        fdid,
        before,
        idle,
        pair,
    } = attached;
    checks.check(
        "the function is returned and nothing of the lease is left",
        || {
            guest.shut_down()?;
            lending.b.verb(&["return", &fdid])?;
            snapshot::ensure_both_equal(&idle, || {
                Ok(snapshot::without_programs(pair.look()?, " keeper"))
            })?;
            Ok("")
        },
    );
    checks.check(
        "`unavailable` has the new keeper undo what the killed one did",
        || {
            lending.a.verb(&["unavailable", VF_BDF])?;
            pci::wait_unbound(&pair.a.agent, VF_BDF)?;
            let dir = format!("/sys/bus/pci/devices/{VF_BDF}");
            let left = pair.a.agent.text(&format!("{dir}/driver_override"))?;
            ensure!(left == "(null)", "its driver_override is {left}");
            Ok("")
        },
    );
    checks.check("both hosts are as before", || {
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

/// What the kernels say of a process: its user, what it may, and how it is shut in.
fn ensure_process(agent: &Agent, pid: u32, user: &str, capabilities: &str) -> Result<String> {
    let status = agent.text(&format!("/proc/{pid}/status"))?;
    for (field, wanted) in [
        ("Uid:", user),
        ("CapPrm:", capabilities),
        ("CapEff:", capabilities),
    ] {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let mut said = line.unwrap_or_default().split_whitespace();
        ensure!(said.clone().next().is_some(), "no {field} in {status}");
        ensure!(said.all(|word| word == wanted), "process {pid}: {status}");
    }
    Ok(status)
}

fn ensure_shut_in(status: &str) -> Result<()> {
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
        ensure!(status.contains(line), "{line} is not in {status}");
    }
    Ok(())
}

fn rights(attached: &Attached) -> Result<String> {
    let Attached { pair, lending, .. } = attached;
    let hosts = [(&pair.a, &lending.a), (&pair.b, &lending.b)];
    for ((host, daemon), keeper) in hosts.into_iter().zip(&lending.keepers) {
        let agent = &host.agent;
        let port = daemon.port_pid().context("no port")?;
        ensure_shut_in(&ensure_process(agent, daemon.pid(), USER, NO_CAPABILITY)?)?;
        daemon.ensure_shut_in()?;
        ensure_shut_in(&ensure_process(agent, port, USER, NO_CAPABILITY)?)?;
        let descriptors = |pid: u32| agent.sh(&format!("ls -l /proc/{pid}/fd"));
        let held = descriptors(port)?;
        ensure!(held.contains("/dev/vfio/"), "the port holds {held}");
        let held = descriptors(daemon.pid())?;
        ensure!(!held.contains("vfio"), "the daemon holds {held}");
        ensure_shut_in(&ensure_process(agent, keeper.pid(), "0", NO_CAPABILITY)?)?;
        let held = descriptors(keeper.pid())?;
        ensure!(!held.contains("vfio"), "the keeper holds {held}");
        let own = keeper.pid();
        let checks = agent.text(&format!("/proc/{own}/task/{own}/children"))?;
        let checks = checks
            .parse()
            .with_context(|| format!("no one process: {checks}"))?;
        ensure_shut_in(&ensure_process(agent, checks, "0", SYS_PTRACE)?)?;
        let root = agent.sh(&format!("cd /proc/{checks}/root; ls -d self bin || true"))?;
        ensure!(root.trim() == "self", "keeper-checks sees {root}");
    }
    bound(attached, true)?;
    let worker = lending.b.status()?["borrowed"][0]["worker"]["pid"].as_u64();
    let worker = worker.context("no worker")? as u32;
    ensure_shut_in(&ensure_process(&pair.b.agent, worker, USER, NO_CAPABILITY)?)?;
    Ok(format!("user {USER}: daemons, ports and the worker"))
}

/// Whether the keepers have written down that the function is bound.
fn bound(attached: &Attached, wanted: bool) -> Result<String> {
    let found = attached.pair.a.agent.sh("ls /run/sublet-keeper/bound")?;
    ensure!(found.contains(VF_BDF) == wanted, "written down: {found}");
    Ok(found.replace('\n', " "))
}

fn killed_under_io(attached: &Attached) -> Result<String> {
    let Attached { lending, guest, .. } = attached;
    let before = trapped_accesses(&lending.b.status()?)?;
    std::thread::scope(|scope| {
        let io = scope.spawn(|| steps::write_and_read_back(&guest.agent, BYTES));
        let begun = lending.b.wait_status("I/O", BEGIN_TIMEOUT, |status| {
            trapped_accesses(status).is_ok_and(|now| now >= before + UNDER_WAY)
        });
        let killed = begun.and_then(|_| {
            let mut keepers = lending.keepers.iter();
            keepers.try_for_each(|keeper| keeper.kill())
        });
        let still = !io.is_finished();
        let written = io.join().map_err(|_| anyhow::anyhow!("the I/O's thread"))?;
        killed?;
        ensure!(still, "the I/O was over before the keepers were killed");
        ensure_no_lost_interrupt(&guest.dmesg("polled|timeout")?)?;
        Ok(format!("{} of {BYTES} bytes", written?))
    })
}
