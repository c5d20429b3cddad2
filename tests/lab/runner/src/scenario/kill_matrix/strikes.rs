//! The strikes: who the victims are, what is done to them, and how a supervisor brings them back.

use super::cell::{Cell, Deed, Victim, Work};
use super::rig::Rig;
use super::stages::END_TIMEOUT;
use crate::agent::{Agent, SIGCONT, SIGKILL, SIGSTOP};
use crate::scenario::client::Client;
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};

/// How long a frozen process stands still. The lab's ports miss a peer after 10 s.
const FREEZE: Duration = Duration::from_secs(5);
/// The witness's pieces of which one at least was begun after they were counted: it has one under way
/// at a time.
pub const WHOLE_PIECES: u64 = 2;
/// A link that is killed is down for so long: only its own interrupt tells.
const FLAP_MS: u64 = 20;

impl Rig<'_> {
    /// Its process, if it is one, where it runs.
    pub fn process(&self, victim: Victim) -> Result<Option<(Agent, u32)>> {
        let (a, b) = (&self.lending.a, &self.lending.b);
        let (on_a, on_b) = (&self.pair.a.agent, &self.pair.b.agent);
        let (agent, pid) = match victim {
            Victim::LenderDaemon => (on_a, a.pid()),
            Victim::BorrowerDaemon => (on_b, b.pid()),
            Victim::LenderKeeper => (on_a, self.lending.keepers[0].pid()),
            Victim::BorrowerKeeper => (on_b, self.lending.keepers[1].pid()),
            Victim::LenderPort => (on_a, a.port_pid().context("no port")?),
            Victim::BorrowerPort => (on_b, b.port_pid().context("no port")?),
            Victim::BorrowerWarden => (on_b, *self.workers()?.first().context("no warden")?),
            Victim::Worker => match self.borrowed(&b.status()?)["worker"]["pid"].as_u64() {
                Some(pid) => (on_b, pid as u32),
                None => return Ok(None),
            },
            Victim::Vmm | Victim::GuestKernel => match (&self.client, &self.guest) {
                (Some(client), _) => (on_b, client.pid),
                (_, Some(guest)) => (on_b, guest.pid),
                _ => return Ok(None),
            },
            Victim::LenderWarden | Victim::Link => return Ok(None),
            Victim::LenderHost | Victim::BorrowerHost => return Ok(None),
        };
        Ok(Some((agent.clone(), pid)))
    }

    /// The borrower's warden, and its children.
    pub fn workers(&self) -> Result<Vec<u32>> {
        let port = self.lending.b.port_pid().context("no port")?;
        // A thread that ends meanwhile is no error.
        let children = format!(
            "for w in $(cat /proc/{port}/task/*/children); do \
             echo $w; cat /proc/$w/task/*/children; done 2>/dev/null || :"
        );
        let found = self.pair.b.agent.sh(&children)?;
        let pids = found.split_whitespace().map(str::parse);
        pids.collect::<Result<_, _>>().context("no process ids")
    }

    /// The worker that a borrow under way starts.
    pub fn new_worker(&self, before: &[u32]) -> Result<(Agent, u32)> {
        let since = Instant::now();
        loop {
            let now = self.workers()?;
            if let Some(pid) = now.iter().find(|pid| !before.contains(pid)) {
                return Ok((self.pair.b.agent.clone(), *pid));
            }
            ensure!(since.elapsed() < END_TIMEOUT, "borrow starts no worker");
        }
    }

    /// None where the victim was gone already.
    pub fn do_deed(
        &mut self,
        cell: Cell,
        process: Option<(Agent, u32)>,
    ) -> Result<Option<&'static str>> {
        if cell.victim == Victim::Link {
            let ms = match cell.deed {
                Deed::Killed => FLAP_MS,
                Deed::Frozen => FREEZE.as_millis() as u64,
            };
            self.pair.ntb.as_ref().context("no cable")?.flap(ms)?;
            return Ok(Some(""));
        }
        if cell.work() == Work::ShutDown {
            return Ok(self.has_crashed()?.then_some(""));
        }
        if cell.victim == Victim::GuestKernel {
            self.crash_guest()?;
            return Ok(Some(""));
        }
        if self.power_off(cell.victim)? {
            return Ok(Some(""));
        }
        let (host, pid) = process.with_context(|| format!("no process of {:?}", cell.victim))?;
        match cell.deed {
            Deed::Killed => {
                match cell.victim {
                    Victim::LenderDaemon => self.lending.a.kill()?,
                    Victim::BorrowerDaemon => self.lending.b.kill()?,
                    Victim::LenderKeeper => self.lending.keepers[0].kill()?,
                    Victim::BorrowerKeeper => self.lending.keepers[1].kill()?,
                    Victim::LenderPort => self.lending.a.kill_port()?,
                    Victim::BorrowerPort => self.lending.b.kill_port()?,
                    _ if host.kill(pid, SIGKILL).is_err() => return Ok(None),
                    // It takes a while to give its memory back.
                    Victim::Vmm => host.wait(pid, END_TIMEOUT).map(drop)?,
                    _ => {}
                }
                Ok(Some(""))
            }
            Deed::Frozen => {
                if host.kill(pid, SIGSTOP).is_err() {
                    return Ok(None);
                }
                let still = format!("grep -q '^State:.T' /proc/{pid}/status || ! kill -0 {pid}");
                host.wait_until(&still, FREEZE)?;
                let before = self.witness().and_then(Client::pieces);
                std::thread::sleep(FREEZE);
                let after = self.witness().and_then(Client::pieces);
                // A worker whose port has given it up is gone.
                let died = host.kill(pid, SIGCONT).is_err();
                let (before, after) = (before?, after?);
                ensure!(
                    after >= before + WHOLE_PIECES,
                    "the witness stood still as well, from {before} pieces to {after}"
                );
                Ok(Some(if died { ", ended meanwhile" } else { "" }))
            }
        }
    }

    /// As a supervisor does it: who is dead is started again; without its warden a port is.
    pub fn bring_back(&mut self, cell: Cell) -> Result<()> {
        self.power_on(cell.victim)?;
        if (cell.victim, cell.deed) == (Victim::BorrowerWarden, Deed::Killed) {
            self.lending.b.restart_port()?;
        }
        let dead = match cell.is_supervised() {
            true => self.process(cell.victim)?.is_some_and(|(host, pid)| {
                let lives = host.sh(&format!("kill -0 {pid}"));
                lives.is_err()
            }),
            false => false,
        };
        if dead {
            let program = self.program.clone();
            match cell.victim {
                Victim::LenderDaemon => self.lending.a.start_again(&program)?,
                Victim::BorrowerDaemon => self.lending.b.start_again(&program)?,
                Victim::LenderKeeper => self.lending.keepers[0].begin()?,
                Victim::BorrowerKeeper => self.lending.keepers[1].begin()?,
                Victim::LenderPort => self.lending.a.start_port()?,
                Victim::BorrowerPort => self.lending.b.start_port()?,
                _ => {}
            }
        }
        self.lending.wait_link().map(drop)
    }
}
