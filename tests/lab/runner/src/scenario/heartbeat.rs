//! Scenario `heartbeat`: a lender that stands still is told of in time, and what it lent is lost.

use super::steps::SOCKET;
use super::{Scenario, When};
use crate::agent::{SIGCONT, SIGSTOP};
use crate::check::Checks;
use crate::lab::Lab;
use crate::pci;
use crate::sublet::{Lending, Workers};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// The lender's daemon is stopped by a signal; its link stays up all the time.
pub const SCENARIO: Scenario = Scenario {
    name: "heartbeat",
    checks: 8,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// The only line that the lab's configuration says otherwise than the default.
const LOST_AFTER: &str = "lost_after_ms = ";
const LOST_AFTER_DEFAULT_MS: u64 = 1500;
/// Two beats of 250 ms, and what a thread of an emulated host waits for its turn.
const LATE_MS_MAX: u64 = 2500;
const LOST_TIMEOUT: Duration = Duration::from_secs(20);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let ntb = lab.ntb(&[])?;
    let mut pair = None;
    checks.must("both hosts boot", || {
        pair = Some(lab.boot_pair(Some(ntb))?);
        Ok("")
    })?;
    let pair = pair.context("no hosts")?;
    pci::wait_namespace(&pair.a.agent)?;
    let before = pair.snapshot()?;
    let mut lending = None;
    checks.must("both daemons agree on a session", || {
        let started = Lending::start_with(lab, &pair, (2, 1), (0, Workers::Threads), by_default)?;
        let session = started.wait_link()?;
        lending = Some(started);
        Ok(session)
    })?;
    let lending = lending.context("no daemons")?;
    let fdid = lending.offer()?;
    let idle = pair.snapshot()?;
    checks.must("host b borrows", || lending.borrow(&fdid, SOCKET, &[]))?;
    let host_a = &pair.a.agent;
    host_a.kill(lending.a.pid(), SIGSTOP)?;
    let lost = checks.check("host b tells in time that host a stands still", || {
        told_in_time(&lending)
    });
    // Whatever came of it, nothing goes on without the lender.
    host_a.kill(lending.a.pid(), SIGCONT)?;
    lost.context("not told")?;
    checks.check("host a takes its function back when it goes on", || {
        let free = |status: &serde_json::Value| {
            status["lent"][0]["lease"].is_null() && status["lent"][0]["state"] == "available"
        };
        let status = lending.a.wait_status("free function", LOST_TIMEOUT, free)?;
        ensure!(status["lent"][0]["last_end"] == "reclaimed", "{status}");
        Ok("reclaimed")
    });
    checks.check("nothing of the lost lease is left", || {
        lending.b.verb(&["return", &fdid])?;
        lending.wait_link()?;
        pair.ensure_unchanged(&idle)
    });
    checks.check("the function is borrowed again and given back", || {
        lending.borrow(&fdid, SOCKET, &[])?;
        lending.b.verb(&["return", &fdid])
    });
    checks.check("both hosts are as before", || {
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

/// The lab's own hosts sometimes stand still for seconds and say so; here the default counts.
fn by_default(config: &str) -> String {
    let lines = config.lines().filter(|line| !line.starts_with(LOST_AFTER));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Not before the time that the configuration gives, and not long after it.
fn told_in_time(lending: &Lending) -> Result<String> {
    let status = lending
        .b
        .wait_status("lost lease", LOST_TIMEOUT, |status| {
            status["borrowed"][0]["state"] == "lost"
        })?;
    let port = &status["ports"][0];
    ensure!(port["link"] == "up", "the link is not up: {port}");
    let reason = port["session"]["over_reason"].as_str();
    let reason = reason.with_context(|| format!("no reason in {port}"))?;
    let ms = reason.split(' ').find_map(|word| word.parse::<u64>().ok());
    let ms = ms.with_context(|| format!("no time in `{reason}`"))?;
    ensure!(
        (LOST_AFTER_DEFAULT_MS..LOST_AFTER_DEFAULT_MS + LATE_MS_MAX).contains(&ms),
        "{reason}"
    );
    Ok(reason.to_owned())
}
