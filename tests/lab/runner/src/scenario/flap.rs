//! Scenario `flap`: a link that goes down for a moment ends every lease; the guest goes on, and the next lease works.

use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, SOCKET, Setup, dio};
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec};
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::sublet::Lending;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// The model takes its link down under an attached guest.
pub const SCENARIO: Scenario = Scenario {
    name: "flap",
    checks: ATTACH_CHECKS + 9 + DETACH_CHECKS,
    when: When::Full,
    own_model: Some("it has our model take the link down for a moment"),
    deadline: Duration::from_secs(1200),
    run,
};

/// Shorter than any heartbeat: only the link's own interrupt tells of it.
const DOWN_MS: u64 = 20;
const BYTES: u64 = 64 << 10;
const LOST_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the guest's driver waits for a command; a healthy one takes a second at most here. With
/// multipath it would queue what fails, and wait for another path for ever.
const IO_TIMEOUT: &str = "nvme_core multipath=0 io_timeout=8 admin_timeout=8";
/// The driver's own time, its reset, and a busy machine.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(60);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let mut spec = GuestSpec::stock("g", &lab.vmm()?);
    spec.modules.insert(0, IO_TIMEOUT.to_owned());
    spec.cmdline = "iomem=relaxed".to_owned();
    let Attached {
        guest,
        lending,
        fdid,
        before,
        idle,
        pair,
    } = steps::attach(lab, checks, &Setup::default(), spec)?;
    lose(checks, &guest, &lending, &pair);
    checks.check("nothing of the lost lease is left", || {
        guest.kill()?;
        lending.b.verb(&["return", &fdid])?;
        lending.wait_link()?;
        pair.ensure_unchanged(&idle)
    });
    checks.must("the function is borrowed again", || {
        lending.borrow(&fdid, SOCKET, &[])
    })?;
    let mut next = None;
    checks.must("a new guest finds its namespace", || {
        next = Some(steps::boot(lab, &pair, GuestSpec::stock("h", &lab.vmm()?))?);
        Ok("")
    })?;
    let guest = next.context("no guest")?;
    checks.check("what it writes lies in host a's blocks", || {
        let written = steps::write_and_read_back(&guest.agent, BYTES)?;
        let read = dio(&pair.a.agent, "read", BYTES, None)?;
        ensure!(
            written == read,
            "the guest wrote {written}, host a has {read}"
        );
        Ok(read)
    });
    let attached = Attached {
        guest,
        lending,
        fdid,
        before,
        idle,
        pair,
    };
    steps::detach(checks, attached)
}

/// The link goes while the guest is at work, and all that have to do with the lease take notice.
fn lose(checks: &mut Checks, guest: &Guest, lending: &Lending, pair: &Pair) {
    let mut io = None;
    checks.check("the guest is at work", || {
        io = Some(steps::at_work(&guest.agent)?);
        Ok("")
    });
    checks.check("the lease is lost on host b", || {
        pair.ntb.as_ref().context("no NTB")?.flap(DOWN_MS)?;
        lending
            .b
            .wait_status("lost lease", LOST_TIMEOUT, |status| {
                status["borrowed"][0]["state"] == "lost"
            })?;
        Ok("")
    });
    checks.check("host a has its function back", || {
        let status = lending
            .a
            .wait_status("free function", LOST_TIMEOUT, |status| {
                status["lent"][0]["lease"].is_null() && status["lent"][0]["state"] == "available"
            })?;
        ensure!(status["lent"][0]["last_end"] == "reclaimed", "{status}");
        Ok("reclaimed")
    });
    checks.check("the guest reads its function as ones", || {
        let bdf = pci::find_nvme(&guest.agent)?;
        let seen = pci::nvme_registers(&guest.agent, &bdf)?;
        ensure!(
            seen.cc == u32::MAX && seen.csts == u32::MAX,
            "it reads {seen:x?}"
        );
        Ok("")
    });
    checks.check("its I/O fails, and nothing hangs", || {
        gone(guest, io.context("no I/O")?)
    });
}

/// The driver gives up on the function; the guest itself does not mind.
fn gone(guest: &Guest, io: u32) -> Result<String> {
    let ended = guest.agent.wait(io, GIVE_UP_TIMEOUT);
    let said = guest.dmesg("nvme|hung|i/o error")?;
    let code = ended.with_context(|| format!("the guest's log: {said}"))?;
    ensure!(code == Some(0), "the loop of writes ended with {code:?}");
    ensure!(said.contains("controller is down"), "its log: {said}");
    Ok(said)
}
