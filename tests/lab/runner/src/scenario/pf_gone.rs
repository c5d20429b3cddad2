//! Scenario `pf-gone`: the lender's kernel takes a lent function away under its guest's I/O, and nothing hangs.

use super::steps::{self, ATTACH_CHECKS, Attached, SOCKET, Setup, dio};
use super::{Scenario, When};
use crate::agent::Agent;
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec};
use crate::host::{PF_BDF, VF_BDF};
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::sublet::{Daemon, Lending, Workers};
use anyhow::{Context, Result, bail, ensure};
use std::time::{Duration, Instant};

/// The VFs are removed; then, with new ones, the PF's driver is unbound.
pub const SCENARIO: Scenario = Scenario {
    name: "pf-gone",
    checks: ATTACH_CHECKS + 15,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// What an operator's command may take.
const COMMAND_MAX: Duration = Duration::from_secs(10);
/// After this it hangs.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(90);
const BYTES: u64 = 64 << 10;
const LOST_TIMEOUT: Duration = Duration::from_secs(10);
/// As in `flap`: how long the guest's driver waits, and no other path to wait for.
const IO_TIMEOUT: &str = "nvme_core multipath=0 io_timeout=8 admin_timeout=8";
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(60);
/// What Linux says of a controller that does not answer any more: it is gone, or on its way.
const DEAD: &str =
    "! test -e /sys/class/nvme/nvme0 || grep -qE '^(dead|deleting)' /sys/class/nvme/nvme0/state";

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let setup = Setup {
        workers: Workers::Processes,
        ..Setup::default()
    };
    let Attached {
        guest,
        lending,
        fdid,
        before,
        idle: _,
        pair,
    } = steps::attach(lab, checks, &setup, spec(lab, "g")?)?;
    remove_vfs(checks, &guest, (&lending, &pair))?;
    let mut next = None;
    checks.must("VFs are made again, and one is borrowed anew", || {
        guest.kill()?;
        lending.b.verb(&["return", &fdid])?;
        make_vf(&pair.a.agent)?;
        let offered = offer_again(&lending.a)?;
        lending.borrow(&fdid, SOCKET, &[])?;
        next = Some(steps::boot(lab, &pair, spec(lab, "h")?)?);
        Ok(offered)
    })?;
    let guest = next.context("no guest")?;
    checks.check("what its new guest writes lies in host a's blocks", || {
        let written = steps::write_and_read_back(&guest.agent, BYTES)?;
        let read = dio(&pair.a.agent, "read", BYTES, None)?;
        ensure!(
            written == read,
            "the guest wrote {written}, host a has {read}"
        );
        Ok(read)
    });
    unbind_pf(checks, &guest, (&lending, &pair));
    checks.check("both hosts are as before", || {
        guest.kill()?;
        lending.b.verb(&["return", &fdid])?;
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

fn spec(lab: &Lab, name: &str) -> Result<GuestSpec> {
    let mut spec = GuestSpec::stock(name, &lab.vmm()?);
    spec.modules.insert(0, IO_TIMEOUT.to_owned());
    // Its registers are read past its driver.
    spec.cmdline = "iomem=relaxed".to_owned();
    Ok(spec)
}

/// Whoever removes VFs has the lock that a reset takes. If that is refused meanwhile, the function is
/// in quarantine, and stays so when it is made again.
fn offer_again(lender: &Daemon) -> Result<&'static str> {
    let Err(refused) = lender.verb(&["available", VF_BDF]) else {
        return Ok("its reset came before its removal");
    };
    let refused = format!("{refused:#}");
    ensure!(
        refused.contains("is in quarantine: the kernel refused to reset"),
        "{refused}"
    );
    lender.verb(&["quarantine", "retry", VF_BDF])?;
    lender.verb(&["available", VF_BDF])?;
    Ok("its removal came before its reset: out of quarantine by `retry`")
}

fn make_vf(host_a: &Agent) -> Result<()> {
    pci::make_vfs(host_a, 1)?;
    pci::nvme_online(host_a, 1, 2, 1)?;
    pci::bind(host_a, VF_BDF, "vfio-pci")
}

/// Runs an operator's command on host A; how long it took.
fn timed(host_a: &Agent, command: &str) -> Result<String> {
    let start = Instant::now();
    host_a.run_within(&["sh", "-c", command], COMMAND_TIMEOUT)?;
    let took = start.elapsed();
    ensure!(took < COMMAND_MAX, "`{command}` took {took:?}");
    Ok(format!("{took:?}"))
}

/// The lease is lost on host B for this reason, and host A tells the same of it.
fn ensure_lost(lending: &Lending, why: &str) -> Result<()> {
    let is = |text: &serde_json::Value| text.as_str().is_some_and(|text| text.contains(why));
    lending
        .b
        .wait_status("lost lease", LOST_TIMEOUT, |status| {
            let held = &status["borrowed"][0];
            held["state"] == "lost" && is(&held["last_error"])
        })?;
    lending
        .a
        .wait_status("ended lease", LOST_TIMEOUT, |status| {
            let lent = &status["lent"][0];
            lent["lease"].is_null() && is(&lent["last_end"])
        })?;
    Ok(())
}

/// The guest's function answers nothing any more: its registers read as ones. Its VMM lives, as the
/// guest tells this itself.
fn reads_ones(guest: &Guest) -> Result<&'static str> {
    let bdf = pci::find_nvme(&guest.agent)?;
    let since = Instant::now();
    loop {
        let seen = pci::nvme_registers(&guest.agent, &bdf)?;
        if [seen.vs, seen.cc, seen.csts] == [u32::MAX; 3] {
            return Ok("its registers read as ones");
        }
        ensure!(since.elapsed() < LOST_TIMEOUT, "it still reads {seen:x?}");
    }
}

/// The I/O ends, its driver has given the function up, and the guest itself does not mind; what its
/// kernel says.
fn io_ends(guest: &Guest, io: u32) -> Result<String> {
    let ended = guest.agent.wait(io, GIVE_UP_TIMEOUT);
    if ended.is_err() {
        // Who waits in its kernel, and for what.
        guest.agent.sh("echo w > /proc/sysrq-trigger")?;
    }
    let said = guest.dmesg("nvme|hung|i/o error|pcieport|blk|task:|^\\[[ 0-9.]*\\]  [a-z_]*\\+")?;
    let code = ended.with_context(|| format!("the guest's log: {said}"))?;
    ensure!(code == Some(0), "the loop of writes ended with {code:?}");
    let dead = guest.agent.wait_until(DEAD, GIVE_UP_TIMEOUT);
    dead.with_context(|| format!("its driver has not given up: {said}"))?;
    Ok(said)
}

fn remove_vfs(
    checks: &mut Checks,
    guest: &Guest,
    (lending, pair): (&Lending, &Pair),
) -> Result<()> {
    let mut io = None;
    checks.must("the guest is at work", || {
        io = Some(steps::at_work(&guest.agent)?);
        Ok("")
    })?;
    checks.check("`echo 0 > sriov_numvfs` under I/O ends within 10 s", || {
        let file = format!("/sys/bus/pci/devices/{PF_BDF}/sriov_numvfs");
        timed(&pair.a.agent, &format!("echo 0 > {file}"))
    });
    checks.check("the lease is over on both hosts, which tell why", || {
        ensure_lost(lending, "takes the function away")?;
        Ok("")
    });
    checks.check("host a's status tells that the function is gone", || {
        let status = lending.a.status()?;
        let lent = &status["lent"][0];
        let told = lent["last_error"].as_str().unwrap_or_default().to_owned();
        let away = lent["state"] == "unavailable" && told.contains("taken away");
        ensure!(away, "{lent}");
        Ok(told)
    });
    checks.check("the guest sees the device go", || reads_ones(guest));
    checks.check(
        "its I/O fails, its driver gives up, and nothing hangs",
        || io_ends(guest, io.context("no I/O")?),
    );
    Ok(())
}

/// The NVMe driver leaves its PF's VFs where they are, so that the kernel asks nobody for anything:
/// what the guest writes is never done, and host A's port has to see by itself that nobody tends
/// the function any more.
fn unbind_pf(checks: &mut Checks, guest: &Guest, (lending, pair): (&Lending, &Pair)) {
    let mut io = None;
    let host_a = &pair.a.agent;
    checks.check(
        "unbinding the PF's driver under I/O ends within 10 s",
        || {
            io = Some(steps::at_work(&guest.agent)?);
            let unbind = format!("echo {PF_BDF} > /sys/bus/pci/drivers/nvme/unbind");
            timed(host_a, &unbind)
        },
    );
    checks.check("the lease ends on both hosts, which tell why", || {
        ensure_lost(lending, "has lost its driver nvme")?;
        Ok("")
    });
    checks.check("the guest sees the device go then", || reads_ones(guest));
    checks.check(
        "its I/O fails, its driver gives up, and nothing hangs",
        || io_ends(guest, io.context("no I/O")?),
    );
    checks.check(
        "without the PF's driver it is not offered again",
        || match lending.a.verb(&["available", VF_BDF]) {
            Ok(told) => bail!("it is: {told}"),
            Err(error) => {
                let words = format!("{error:#}");
                ensure!(words.contains("which has no driver"), "{words}");
                Ok("")
            }
        },
    );
    checks.check("the PF's driver comes back", || {
        let bind = format!("echo {PF_BDF} > /sys/bus/pci/drivers/nvme/bind");
        let took = timed(host_a, &bind)?;
        pci::wait_namespace(host_a)?;
        Ok(took)
    });
}
