//! Scenario `kill-matrix`: each process of a path stands still or is killed under a guest's I/O, and whoever comes next gets a clean function.

use super::steps::{self, ATTACH_CHECKS, Attached, SOCKET, Setup, dio};
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec};
use crate::host::VF_BDF;
use crate::lab::{Lab, Pair};
use crate::sublet::{Lending, Workers};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// At the stage of a guest at work; both hosts are booted once.
pub const SCENARIO: Scenario = Scenario {
    name: "kill-matrix",
    checks: ATTACH_CHECKS + FROZEN.len() + KILLED.len() + 1,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1800),
    run,
};

/// Who is struck. Daemons are the victims of `daemon-replaced`, the link of `flap`, a host's kernel
/// of `heartbeat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    GuestKernel,
    Vmm,
    Worker,
    BorrowerPort,
    LenderPort,
}

const FROZEN: [Victim; 4] = [
    Victim::Vmm,
    Victim::Worker,
    Victim::BorrowerPort,
    Victim::LenderPort,
];
const KILLED: [Victim; 5] = [
    Victim::GuestKernel,
    Victim::Vmm,
    Victim::Worker,
    Victim::BorrowerPort,
    Victim::LenderPort,
];

const SEED: &str = "SUBLET_LAB_SEED";
const SIGSTOP: i32 = 19;
const SIGCONT: i32 = 18;
const SIGKILL: i32 = 9;
/// How long a frozen process stands still. The lab's ports miss a peer after 10 s.
const FREEZE: Duration = Duration::from_secs(5);
/// A strike comes at a moment of its own, within so long.
const WITHIN_MS: u64 = 3000;
const BYTES: u64 = 64 << 10;
const IO_TIMEOUT: Duration = Duration::from_secs(60);
/// From the death of a port until both hosts have undone its paths: the heartbeat's own time, and
/// that of a loaded machine.
const UNDONE_TIMEOUT: Duration = Duration::from_secs(40);
const IO_LOG: &str = "/tmp/io";

/// What the cells have in common.
struct Rig<'a> {
    lab: &'a Lab,
    pair: Pair,
    lending: Lending,
    fdid: String,
    guest: Guest,
    guests: usize,
    random: u64,
}

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let setup = Setup {
        workers: Workers::Processes,
        ..Setup::default()
    };
    let attached = steps::attach(lab, checks, &setup, GuestSpec::stock("g", &lab.vmm()?))?;
    let seed = match std::env::var(SEED) {
        Ok(text) => text.parse().with_context(|| format!("{SEED}={text}"))?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos(),
    };
    println!("seed {seed}: {SEED}={seed} strikes at the same moments");
    let Attached {
        guest,
        lending,
        fdid,
        before,
        idle: _,
        pair,
    } = attached;
    let mut rig = Rig {
        lab,
        pair,
        lending,
        fdid,
        guest,
        guests: 1,
        random: seed.into(),
    };
    for victim in FROZEN {
        let name = format!("{victim:?} frozen for 5 s: the guest's I/O goes on");
        checks.must(&name, || rig.freeze(victim))?;
    }
    for victim in KILLED {
        let name = format!("{victim:?} killed: undone on both hosts, and the next guest works");
        checks.must(&name, || rig.kill(victim))?;
    }
    checks.check("both hosts are as before", || {
        let Rig {
            guest,
            lending,
            pair,
            fdid,
            ..
        } = rig;
        guest.shut_down()?;
        lending.b.verb(&["return", &fdid])?;
        lending.end(&pair)?;
        for host in [&pair.a, &pair.b] {
            host.agent.sh(steps::FOLDERS_GO)?;
        }
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

impl Rig<'_> {
    fn spec(&mut self) -> Result<GuestSpec> {
        self.guests += 1;
        let name = format!("g{}", self.guests);
        Ok(GuestSpec::stock(&name, &self.lab.vmm()?))
    }

    /// Starts the guest's endless writes, and lets them run for a moment that the seed decides.
    fn at_work(&mut self) -> Result<(u32, u64)> {
        let io = self
            .guest
            .agent
            .spawn(&["sh", "-c", steps::ENDLESS_IO], IO_LOG)?;
        let worked = format!("test -s {IO_LOG}");
        self.guest.agent.wait_until(&worked, IO_TIMEOUT)?;
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let ms = (self.random >> 33) % WITHIN_MS;
        // Not a wait for a condition: the moment of the strike.
        std::thread::sleep(Duration::from_millis(ms));
        Ok((io, ms))
    }

    fn worker(&self) -> Result<u32> {
        let status = self.lending.b.status()?;
        let pid = status["borrowed"][0]["worker"]["pid"].as_u64();
        Ok(pid.with_context(|| format!("no worker: {status}"))? as u32)
    }

    /// Its process, and whether that is on host A.
    fn process(&self, victim: Victim) -> Result<(u32, bool)> {
        Ok(match victim {
            Victim::GuestKernel | Victim::Vmm => (self.guest.pid, false),
            Victim::Worker => (self.worker()?, false),
            Victim::BorrowerPort => (self.lending.b.port_pid().context("no port")?, false),
            Victim::LenderPort => (self.lending.a.port_pid().context("no port")?, true),
        })
    }

    fn freeze(&mut self, victim: Victim) -> Result<String> {
        let (pid, on_a) = self.process(victim)?;
        let lease = self.lease()?;
        let (io, ms) = self.at_work()?;
        let host = match on_a {
            true => &self.pair.a.agent,
            false => &self.pair.b.agent,
        };
        host.kill(pid, SIGSTOP)?;
        host.wait_until(&format!("grep -q '^State:.T' /proc/{pid}/status"), FREEZE)?;
        std::thread::sleep(FREEZE);
        host.kill(pid, SIGCONT)?;
        let agent = &self.guest.agent;
        let lines = format!("wc -l < {IO_LOG}");
        let before: u64 = agent.sh(&lines)?.trim().parse()?;
        let more = format!("test $({lines}) -gt {}", before + 1);
        agent.wait_until(&more, IO_TIMEOUT)?;
        agent.kill(io, SIGKILL)?;
        agent.wait(io, IO_TIMEOUT)?;
        ensure!(self.lease()? == lease, "another lease");
        self.whole()?;
        Ok(format!("after {ms} ms of I/O"))
    }

    fn lease(&self) -> Result<Value> {
        let status = self.lending.a.status()?;
        let lease = status["lent"][0]["lease"].clone();
        ensure!(lease.is_string(), "nothing is lent: {status}");
        Ok(lease)
    }

    /// What the guest writes comes back to it, and lies in host A's blocks.
    fn whole(&self) -> Result<()> {
        let written = steps::write_and_read_back(&self.guest.agent, BYTES)?;
        let read = dio(&self.pair.a.agent, "read", BYTES, None)?;
        ensure!(
            written == read,
            "the guest wrote {written}, host a has {read}"
        );
        Ok(())
    }

    fn kill(&mut self, victim: Victim) -> Result<String> {
        let worker = self.worker()?;
        let lease = self.lease()?;
        let (pid, _) = self.process(victim)?;
        let (_, ms) = self.at_work()?;
        let since = Instant::now();
        match victim {
            Victim::GuestKernel => {
                let crash = ["sh", "-c", "echo c > /proc/sysrq-trigger"];
                // The guest is gone before it can answer.
                let _ = self.guest.agent.spawn(&crash, "/dev/null");
                self.pair.b.agent.wait(pid, IO_TIMEOUT)?;
            }
            Victim::Vmm | Victim::Worker => self.pair.b.agent.kill(pid, SIGKILL)?,
            Victim::BorrowerPort => self.lending.b.kill_port()?,
            Victim::LenderPort => self.lending.a.kill_port()?,
        }
        match victim {
            Victim::GuestKernel | Victim::Vmm => self.same_lease(&lease)?,
            Victim::Worker => self.lease_ended()?,
            Victim::BorrowerPort => {
                let gone = format!("! kill -0 {worker}");
                self.pair.b.agent.wait_until(&gone, UNDONE_TIMEOUT)?;
                self.port_is_away(false)?;
                self.lease_ended()?;
            }
            Victim::LenderPort => {
                self.port_is_away(true)?;
                self.lost_at_borrower()?;
            }
        }
        let undone = since.elapsed();
        self.next(victim)?;
        self.whole()?;
        Ok(format!("after {ms} ms of I/O; undone after {undone:.1?}"))
    }

    /// The guest session is over, and the lease is not.
    fn same_lease(&self, lease: &Value) -> Result<()> {
        let listens = |status: &Value| status["borrowed"][0]["vmm_pid"].is_null();
        let b = &self.lending.b;
        b.wait_status("socket without a VMM", UNDONE_TIMEOUT, listens)?;
        ensure!(&self.lease()? == lease, "another lease");
        Ok(())
    }

    /// The lender has its function back, reset and for anybody.
    fn lease_ended(&self) -> Result<()> {
        let free = |status: &Value| {
            let lent = &status["lent"][0];
            lent["lease"].is_null() && lent["state"] == "available"
        };
        let a = &self.lending.a;
        a.wait_status("free function", UNDONE_TIMEOUT, free)
            .map(drop)
    }

    fn port_is_away(&self, on_a: bool) -> Result<()> {
        let daemon = match on_a {
            true => &self.lending.a,
            false => &self.lending.b,
        };
        let told = |status: &Value| {
            let error = status["ports"][0]["last_error"].as_str();
            error.is_some_and(|error| error.contains("sublet port"))
        };
        daemon
            .wait_status("word of the port that is away", UNDONE_TIMEOUT, told)
            .map(drop)
    }

    fn lost_at_borrower(&self) -> Result<()> {
        let lost = |status: &Value| status["borrowed"][0]["state"] == "lost";
        let b = &self.lending.b;
        b.wait_status("lost lease", UNDONE_TIMEOUT, lost).map(drop)
    }

    /// What an operator does then, and a guest that finds its namespace.
    fn next(&mut self, victim: Victim) -> Result<()> {
        self.clear_away()?;
        match victim {
            Victim::GuestKernel | Victim::Vmm => {}
            Victim::Worker => {
                self.lending.b.verb(&["return", &self.fdid])?;
            }
            Victim::BorrowerPort => {
                self.lending.b.start_port()?;
                self.lending.wait_link()?;
            }
            Victim::LenderPort => {
                self.lending.a.start_port()?;
                self.lending.wait_link()?;
                self.lending.a.verb(&["add", VF_BDF])?;
                self.lending.a.verb(&["available", VF_BDF])?;
                self.lending.b.verb(&["return", &self.fdid])?;
            }
        }
        if !matches!(victim, Victim::GuestKernel | Victim::Vmm) {
            self.lending.borrow(&self.fdid, SOCKET, &[])?;
        }
        let spec = self.spec()?;
        self.guest = steps::boot(self.lab, &self.pair, spec)?;
        Ok(())
    }

    /// Whatever is left of the old VMM goes; a dead one is no error.
    fn clear_away(&self) -> Result<()> {
        let host = &self.pair.b.agent;
        let old = self.guest.pid;
        if host.sh(&format!("kill -0 {old}")).is_ok() {
            host.kill(old, SIGKILL)?;
            host.wait(old, IO_TIMEOUT)?;
        }
        host.sh("rm -f /run/guest-*").map(drop)
    }
}
