//! Scenario `daemon-replaced`: daemons are killed and replaced under a guest's I/O, and nobody but `status` notices.

use super::rounds::Rounds;
use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, Setup};
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::lab::Lab;
use crate::sublet::{Daemon, Workers, ensure_no_lost_interrupt, interrupt_count, vector_sum};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

pub const SCENARIO: Scenario = Scenario {
    name: "daemon-replaced",
    checks: ATTACH_CHECKS + CHECKS + DETACH_CHECKS,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

const CHECKS: usize = 5;
/// Small, so that several rounds pass in each state of the daemons.
const BYTES: u64 = 64 << 10;
/// From the start of the second daemon to what both say; asking takes its own time.
const TRUTH_TIMEOUT: Duration = Duration::from_secs(2);
/// For a first answer of both: a port that takes over a second for it is told as one that does not
/// answer, which a busy machine makes of it while the guest begins.
const FIRST_TIMEOUT: Duration = Duration::from_secs(60);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let spec = GuestSpec::stock("g", &lab.vmm()?);
    let setup = Setup {
        borrow: &["--bars", "trapped"],
        workers: Workers::Processes,
        ..Setup::default()
    };
    let mut attached = steps::attach(lab, checks, &setup, spec)?;
    let program = lab.share_binary("sublet")?;
    let other = lab.share_other_build()?;
    let guest = attached.guest.agent.clone();
    let round = |number| steps::round_at(&guest, steps::BLOCKS, (BYTES, number));
    let (done, ended) = Rounds::beside(round, |io| {
        replaced(checks, &mut attached, io, (&program, &other))
    });
    done?;
    checks.check(
        "no byte of the guest's was wrong, no interrupt was lost",
        || {
            let rounds = ended?;
            ensure_no_lost_interrupt(&attached.guest.dmesg("polled|timeout")?)?;
            Ok(format!("{rounds} rounds"))
        },
    );
    steps::detach(checks, attached)
}

fn replaced(
    checks: &mut Checks,
    attached: &mut Attached,
    io: &Rounds,
    (program, other): (&str, &str),
) -> Result<()> {
    let (before, asking) = Truth::at_first(attached)?;
    let limit = TRUTH_TIMEOUT + 2 * asking;
    checks.must("with both daemons killed the guest's I/O goes on", || {
        io.go_on()?;
        let counts = counts(attached)?;
        attached.lending.a.kill()?;
        attached.lending.b.kill()?;
        let rounds = io.go_on()?;
        let later = self::counts(attached)?;
        ensure!(
            counts.iter().zip(&later).all(|(then, now)| now > then),
            "interrupts stand still: {counts:?}, {later:?}"
        );
        Ok(format!("{rounds}, interrupts from {counts:?} to {later:?}"))
    })?;
    checks.must("daemons that come back tell the truth within 2 s", || {
        attached.lending.a.start_again(program)?;
        let since = Instant::now();
        attached.lending.b.start_again(program)?;
        before.ensure_told(attached, limit)?;
        let took = since.elapsed();
        ensure!(took < limit, "{took:?}, and asking takes {asking:?}");
        Ok(format!("after {took:?}; asking alone takes {asking:?}"))
    })?;
    let name = "daemons are replaced by another build, and I/O goes on";
    checks.must(name, || {
        let (mut was, mut is) = (Vec::new(), Vec::new());
        for daemon in [&mut attached.lending.a, &mut attached.lending.b] {
            was.push(build(daemon)?);
            daemon.replace(other)?;
            ensure_runs(daemon, other)?;
            is.push(build(daemon)?);
        }
        ensure!(
            was.iter().zip(&is).all(|(was, is)| was.0 != is.0),
            "not another build: {was:?}, {is:?}"
        );
        ensure!(
            was.iter().zip(&is).all(|(was, is)| was.1 == is.1),
            "the ports were replaced, too: {was:?}, {is:?}"
        );
        let rounds = io.go_on()?;
        before.ensure_told(attached, limit)?;
        Ok(format!("{} for {}, {rounds}", is[0].0, was[0].0))
    })?;
    checks.must("and back again", || {
        for daemon in [&mut attached.lending.a, &mut attached.lending.b] {
            daemon.replace(program)?;
            ensure_runs(daemon, program)?;
        }
        let rounds = io.go_on()?;
        before.ensure_told(attached, limit)?;
        Ok(rounds)
    })?;
    Ok(())
}

fn ensure_runs(daemon: &Daemon, program: &str) -> Result<()> {
    let running = daemon.running()?;
    let name = program.rsplit('/').next().unwrap_or(program);
    ensure!(running.ends_with(&format!("/{name}")), "it runs {running}");
    Ok(())
}

/// Of which build a daemon says to be, and which process its port is.
fn build(daemon: &Daemon) -> Result<(Value, Value)> {
    let mut status = daemon.status()?;
    let build = status["node"]["version"].take();
    ensure!(build.is_string(), "no build: {status}");
    Ok((build, status["ports"][0]["process"]["pid"].take()))
}

/// What both hosts say of the lease.
#[derive(Debug, PartialEq)]
struct Truth {
    lent: [Value; 4],
    borrowed: [Value; 3],
    listed: String,
}

impl Truth {
    /// What they say with the guest at work, and how long asking takes.
    fn at_first(attached: &Attached) -> Result<(Self, Duration)> {
        let since = Instant::now();
        loop {
            let asking = Instant::now();
            match Self::of(attached) {
                Ok(truth) if truth.borrowed[1] == "connected" => {
                    return Ok((truth, asking.elapsed()));
                }
                told => ensure!(since.elapsed() < FIRST_TIMEOUT, "not told: {told:?}"),
            }
        }
    }

    /// That they say this again, at the latest after so long.
    fn ensure_told(&self, attached: &Attached, limit: Duration) -> Result<()> {
        let since = Instant::now();
        loop {
            let told = Self::of(attached);
            if told.as_ref().is_ok_and(|told| told == self) {
                return Ok(());
            }
            ensure!(since.elapsed() < limit, "{self:?} was, {told:?} is");
        }
    }

    fn of(attached: &Attached) -> Result<Self> {
        let lender = attached.lending.a.status()?;
        let borrower = attached.lending.b.status()?;
        for status in [&lender, &borrower] {
            let error = &status["ports"][0]["last_error"];
            ensure!(error.is_null(), "{error}");
        }
        let lent = &lender["lent"][0];
        let borrowed = &borrower["borrowed"][0];
        ensure!(lent["lease"].is_string(), "nothing is lent: {lender}");
        Ok(Self {
            lent: ["lease", "epoch", "ttl_ms", "state"].map(|key| lent[key].clone()),
            borrowed: ["lease", "state", "vmm_pid"].map(|key| borrowed[key].clone()),
            listed: attached.lending.b.verb(&["list"])?,
        })
    }
}

/// Interrupts at the lender's function, at the borrower's worker, and in the guest.
fn counts(attached: &Attached) -> Result<[u64; 3]> {
    let guest = &attached.guest.agent;
    let bdf = guest.sh("basename $(readlink -f /sys/class/nvme/nvme0/device)")?;
    let lending = &attached.lending;
    Ok([
        vector_sum(&lending.a.port_status()?, "lent", "raised")?,
        vector_sum(&lending.b.port_status()?, "borrowed", "signals")?,
        interrupt_count(guest, bdf.trim()).context("the guest's interrupts")?,
    ])
}
