//! The stages of a lease as operations: what has to be there before, how each begins, and how it may end.

use super::cell::{Cell, Work};
use super::guest::AtWork;
use super::rig::Rig;
use crate::agent::Agent;
use crate::host::VF_BDF;
use crate::scenario::client::Client;
use crate::sublet::PORT;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// Where the tenant's worker listens.
pub const SOCKET: &str = "/run/sublet/vf.sock";
/// What a verb under way has said.
pub const VERB_LOG: &str = "/run/verb.log";
/// Where the tenant's pieces lie, in blocks of 512 bytes.
const LBA: u64 = 40 << 11;
/// No operation takes longer, whoever is struck meanwhile.
pub const END_TIMEOUT: Duration = Duration::from_secs(40);

/// A stage's operation under way.
pub enum Op {
    Verb(Agent, u32),
    Order(&'static str),
    Detach(Client),
    Io(AtWork),
}

impl Rig<'_> {
    /// A tenant that does nothing yet.
    pub fn start_client(&self) -> Result<Client> {
        Client::start(&self.pair.b.agent, "tenant", SOCKET, LBA)
    }

    pub fn prepare(&mut self, work: Work) -> Result<()> {
        let a = &self.lending.a;
        match work {
            Work::Lend => {
                a.verb(&["unavailable", VF_BDF])?;
                a.verb(&["remove", VF_BDF])?;
            }
            Work::Borrow | Work::Run | Work::ShutDown => {}
            Work::Open | Work::Map | Work::End | Work::Leave | Work::Return => {
                self.lending.borrow(&self.fdid, SOCKET, &[])?;
                let client = self.start_client()?;
                if work != Work::Open {
                    client.order("open")?;
                }
                if matches!(work, Work::End | Work::Leave | Work::Return) {
                    client.order("map")?;
                    client.order("work")?;
                }
                if work == Work::Leave {
                    client.order("more")?;
                }
                if work == Work::Return {
                    client.end()?;
                    self.wait_free()?;
                } else {
                    self.client = Some(client);
                }
            }
        }
        Ok(())
    }

    /// Starts the stage's operation. A guest that shuts down is told before when its kernel will
    /// crash: nobody can reach it then.
    pub fn begin(&mut self, work: Work, crash_after: Duration) -> Result<Op> {
        let (a, b) = (&self.pair.a.agent, &self.pair.b.agent);
        let verb = format!("{} --json", self.program);
        let script = match work {
            Work::Lend => {
                format!("{verb} add {VF_BDF} && {verb} available {VF_BDF} --port {PORT}")
            }
            Work::Borrow => format!("{verb} borrow {} --socket {SOCKET}", self.fdid),
            Work::Return => format!("{verb} return {}", self.fdid),
            _ => String::new(),
        };
        let client = || self.client.as_ref().context("no client");
        Ok(match work {
            Work::Lend | Work::Borrow | Work::Return => {
                let host = if work == Work::Lend { a } else { b };
                let pid = host.spawn(&["sh", "-c", &script], VERB_LOG)?;
                Op::Verb(host.clone(), pid)
            }
            Work::Open => {
                client()?.tell("open")?;
                Op::Order("open")
            }
            Work::Map => {
                client()?.tell("map")?;
                Op::Order("map")
            }
            Work::Leave => {
                client()?.tell("leave")?;
                Op::Order("leave")
            }
            Work::End => {
                client()?.tell("end")?;
                Op::Detach(self.client.take().context("no client")?)
            }
            Work::Run => Op::Io(self.guest_at_work()?),
            Work::ShutDown => {
                let at_work = self.guest_at_work()?;
                self.shut_down_and_crash(crash_after)?;
                Op::Io(at_work)
            }
        })
    }

    /// Whether a strike would come too late for it. A VMM's end is followed by its undoing, and a
    /// guest's I/O goes on.
    pub fn is_over(&self, op: &Op) -> Result<bool> {
        Ok(match op {
            Op::Verb(host, pid) => host.wait(*pid, Duration::ZERO).is_ok(),
            Op::Order(order) => {
                let client = self.client.as_ref().context("no client")?;
                client.has_ended(order)?
            }
            Op::Detach(_) | Op::Io(_) => false,
        })
    }

    /// The operation's end, which comes in time, and is a success or says why it is none.
    pub fn end(&mut self, op: Op, cell: Cell) -> Result<String> {
        if cell.ends_operation() {
            return Ok("gone with its host".to_owned());
        }
        match op {
            Op::Verb(host, pid) => {
                let code = host.wait(pid, END_TIMEOUT).context("the verb hangs")?;
                let said = host.text(VERB_LOG)?;
                host.sh(&format!("rm {VERB_LOG}"))?;
                if code == Some(0) {
                    return Ok("done".to_owned());
                }
                let last = said.lines().last().unwrap_or_default();
                let answer: Value = serde_json::from_str(last)
                    .with_context(|| format!("the verb ended with {code:?}: {said}"))?;
                let error = &answer["error"];
                let text = error["text"].as_str().unwrap_or_default();
                ensure!(!text.is_empty(), "a refusal without words: {said}");
                Ok(format!("{}: {text}", error["code"]))
            }
            Op::Order(order) => {
                let client = self.client.as_ref().context("no client")?;
                let said = client.ended(order)?;
                let well = said.starts_with("done") || cell.asks_too_long();
                ensure!(
                    well || !cell.is_survived(),
                    "its tenant is told, and need not be: {said}"
                );
                Ok(said)
            }
            Op::Detach(client) => {
                client.clear_away()?;
                Ok("gone".to_owned())
            }
            Op::Io(at_work) => self.end_of_io(at_work, cell),
        }
    }
}
