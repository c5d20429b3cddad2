//! Scenario `flap`: a link that goes down for a moment ends every lease; the next one works.

use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, SOCKET, Setup, dio};
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::lab::Lab;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// The model takes its link down under an attached guest.
pub const SCENARIO: Scenario = Scenario {
    name: "flap",
    checks: ATTACH_CHECKS + 6 + DETACH_CHECKS,
    when: When::Asked,
    deadline: Duration::from_secs(420),
    run,
};

/// Shorter than any heartbeat: only the link's own interrupt tells of it.
const DOWN_MS: u64 = 20;
const BYTES: u64 = 64 << 10;
const LOST_TIMEOUT: Duration = Duration::from_secs(20);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let spec = GuestSpec::stock("g", &lab.vmm()?);
    let Attached {
        guest,
        lending,
        fdid,
        before,
        idle,
        pair,
    } = steps::attach(lab, checks, &Setup::default(), spec)?;
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
        Ok(status["lent"][0]["last_end"].to_string())
    });
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
