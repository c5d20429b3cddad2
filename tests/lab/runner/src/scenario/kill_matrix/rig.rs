//! Both hosts of the kill matrix: the stages' operations, the strikes, and what must be true after them.

use super::cell::{Cell, Deed, Stage, Victim};
use super::client::Client;
use super::guest::AtWork;
use crate::agent::Agent;
use crate::guest::Guest;
use crate::host::VF_BDF;
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::snapshot::Snapshot;
use crate::sublet::Lending;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

pub const SOCKET: &str = "/run/sublet/vf.sock";
const VERB_LOG: &str = "/run/verb.log";
/// Where the tenant's pieces lie, in blocks of 512 bytes.
const LBA: u64 = 40 << 11;
pub const SIGSTOP: i32 = 19;
pub const SIGCONT: i32 = 18;
pub const SIGKILL: i32 = 9;
/// How long a frozen process stands still. The lab's ports miss a peer after 10 s.
pub const FREEZE: Duration = Duration::from_secs(5);
/// A link that is killed is down for so long: only its own interrupt tells.
const FLAP_MS: u64 = 20;
/// What is asked so long after all is back is answered with the truth.
const TRUTH_TIMEOUT: Duration = Duration::from_secs(2);
/// No operation takes longer, whoever is struck meanwhile.
const END_TIMEOUT: Duration = Duration::from_secs(40);

/// What the cells have in common.
pub struct Rig<'a> {
    pub lab: &'a Lab,
    pub pair: Pair,
    pub lending: Lending,
    pub program: String,
    pub fdid: String,
    pub seed: u64,
    /// By stage, as measured.
    pub usual: Vec<(Stage, Duration)>,
    pub witness: Option<(String, Client)>,
    pub client: Option<Client>,
    pub guest: Option<Guest>,
    pub guests: usize,
    /// With the function offered, and nobody's.
    pub idle: Option<(Snapshot, Snapshot)>,
}

/// A stage's operation under way.
pub enum Op {
    Verb(Agent, u32),
    Order(&'static str),
    Detach(Client),
    Io(AtWork),
}

impl Rig<'_> {
    /// Everything that one cell is. A victim that had ended by itself was not struck: it is tried
    /// again, sooner, until it is.
    pub fn strike(&mut self, cell: Cell, index: u64) -> Result<String> {
        let usual = self.usual.iter().find(|(stage, _)| *stage == cell.stage);
        let mut within = usual.map_or(1, |(_, usual)| usual.as_micros() as u64);
        loop {
            if let Some(told) = self.strike_within(cell, index, within)? {
                return Ok(told);
            }
            ensure!(within > 0, "it ends before it can be struck");
            within /= 2;
        }
    }

    fn strike_within(&mut self, cell: Cell, index: u64, within: u64) -> Result<Option<String>> {
        if cell.stage != Stage::Run {
            self.no_guest()?;
        }
        self.prepare(cell.stage)?;
        let delay = Duration::from_micros(moment(self.seed, index, within));
        let before = self.pieces()?;
        let workers = self.workers()?;
        // One that ends by itself is known before; others are not there before.
        let known = match cell.stage {
            Stage::Borrow | Stage::Run => None,
            _ => self.process(cell.victim)?,
        };
        let session = self.session()?;
        let op = self.begin(cell.stage)?;
        let process = match (known, cell.victim, cell.stage) {
            (None, Victim::Worker, Stage::Borrow) => Some(self.new_worker(&workers)?),
            (None, ..) => self.process(cell.victim)?,
            (known, ..) => known,
        };
        // Not a wait for a condition: the moment of the strike.
        std::thread::sleep(delay);
        let died = self.do_deed(cell, process, before)?;
        let came = self.end(op, cell)?;
        self.bring_back(cell)?;
        if cell.ends_session() {
            self.wait_next_session(&session)?;
        }
        let truth = self.truth()?;
        if cell.is_private() {
            self.witness_goes_on()?;
        }
        if self.guest.is_none() {
            self.reclaim()?;
            self.ensure_stopped()?;
            self.use_it()?;
            self.ensure_nothing_left()?;
        }
        Ok(died.map(|died| format!("after {delay:.0?}{died}: {came}; {truth}")))
    }

    /// A tenant that does nothing yet.
    pub fn start_client(&self) -> Result<Client> {
        Client::start(&self.pair.b.agent, "tenant", SOCKET, LBA)
    }

    pub fn prepare(&mut self, stage: Stage) -> Result<()> {
        let a = &self.lending.a;
        match stage {
            Stage::Lend => {
                a.verb(&["unavailable", VF_BDF])?;
                a.verb(&["remove", VF_BDF])?;
            }
            Stage::Borrow | Stage::Run => {}
            Stage::Open | Stage::Map | Stage::Detach | Stage::Return => {
                self.lending.borrow(&self.fdid, SOCKET, &[])?;
                let client = self.start_client()?;
                if stage != Stage::Open {
                    client.order("open")?;
                }
                if matches!(stage, Stage::Detach | Stage::Return) {
                    client.order("map")?;
                    client.order("work")?;
                }
                if stage == Stage::Return {
                    client.end()?;
                    self.wait_free()?;
                } else {
                    self.client = Some(client);
                }
            }
        }
        Ok(())
    }

    /// Starts the stage's operation.
    pub fn begin(&mut self, stage: Stage) -> Result<Op> {
        let (a, b) = (&self.pair.a.agent, &self.pair.b.agent);
        let verb = format!("{} --json", self.program);
        let script = match stage {
            Stage::Lend => format!("{verb} add {VF_BDF} && {verb} available {VF_BDF}"),
            Stage::Borrow => format!("{verb} borrow {} --socket {SOCKET}", self.fdid),
            Stage::Return => format!("{verb} return {}", self.fdid),
            _ => String::new(),
        };
        let client = || self.client.as_ref().context("no client");
        Ok(match stage {
            Stage::Lend | Stage::Borrow | Stage::Return => {
                let host = if stage == Stage::Lend { a } else { b };
                let pid = host.spawn(&["sh", "-c", &script], VERB_LOG)?;
                Op::Verb(host.clone(), pid)
            }
            Stage::Open => {
                client()?.tell("open")?;
                Op::Order("open")
            }
            Stage::Map => {
                client()?.tell("map")?;
                Op::Order("map")
            }
            Stage::Detach => {
                client()?.tell("end")?;
                Op::Detach(self.client.take().context("no client")?)
            }
            Stage::Run => Op::Io(self.guest_at_work()?),
        })
    }

    /// The operation's end, which comes in time, and is a success or says why it is none.
    pub fn end(&mut self, op: Op, cell: Cell) -> Result<String> {
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
                // Ports are asked with a limit of 4 s, as QEMU waits for 5.
                let ports = [Victim::LenderPort, Victim::BorrowerPort];
                let well = said.starts_with("done") || ports.contains(&cell.victim);
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
            Victim::Worker => match self.borrowed(&b.status()?)["worker"]["pid"].as_u64() {
                Some(pid) => (on_b, pid as u32),
                None => return Ok(None),
            },
            Victim::Vmm | Victim::GuestKernel => match (&self.client, &self.guest) {
                (Some(client), _) => (on_b, client.pid),
                (_, Some(guest)) => (on_b, guest.pid),
                _ => return Ok(None),
            },
            Victim::Link | Victim::LenderHost | Victim::BorrowerHost => return Ok(None),
        };
        Ok(Some((agent.clone(), pid)))
    }

    /// The borrower's warden, and its children.
    fn workers(&self) -> Result<Vec<u32>> {
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
    fn new_worker(&self, before: &[u32]) -> Result<(Agent, u32)> {
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
    fn do_deed(
        &mut self,
        cell: Cell,
        process: Option<(Agent, u32)>,
        before: u64,
    ) -> Result<Option<&'static str>> {
        if cell.victim == Victim::Link {
            let ms = match cell.deed {
                Deed::Killed => FLAP_MS,
                Deed::Frozen => FREEZE.as_millis() as u64,
            };
            self.pair.ntb.as_ref().context("no cable")?.flap(ms)?;
            return Ok(Some(""));
        }
        if cell.victim == Victim::GuestKernel {
            self.crash_guest()?;
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
                std::thread::sleep(FREEZE);
                let after = self.pieces();
                // A worker whose port has given it up is gone.
                let died = host.kill(pid, SIGCONT).is_err();
                ensure!(
                    !cell.is_private() || self.witness.is_none() || after? > before,
                    "the witness stood still as well"
                );
                Ok(Some(if died { ", ended meanwhile" } else { "" }))
            }
        }
    }

    /// As a supervisor does it: who is dead is started again.
    pub fn bring_back(&mut self, cell: Cell) -> Result<()> {
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

    /// The link session that host B knows.
    fn session(&self) -> Result<Value> {
        let mut status = self.lending.b.status()?;
        Ok(status["ports"][0]["session"]["id"].take())
    }

    /// Both hosts have noticed that the last one is over, and agree on another.
    fn wait_next_session(&self, last: &Value) -> Result<()> {
        for daemon in [&self.lending.a, &self.lending.b] {
            daemon.wait_status("new session", END_TIMEOUT, |status| {
                let session = &status["ports"][0]["session"];
                session["state"] == "open" && session["id"] != *last
            })?;
        }
        Ok(())
    }

    /// What a host says of the function that it has borrowed.
    pub fn borrowed<'v>(&self, status: &'v Value) -> &'v Value {
        let all = status["borrowed"].as_array();
        let one = all.and_then(|all| all.iter().find(|one| one["fdid"] == self.fdid.as_str()));
        one.unwrap_or(&Value::Null)
    }

    /// What it says of the function that it lends.
    pub fn lent<'v>(&self, status: &'v Value) -> &'v Value {
        let all = status["lent"].as_array();
        let one = all.and_then(|all| all.iter().find(|one| one["fdid"] == self.fdid.as_str()));
        one.unwrap_or(&Value::Null)
    }

    /// Waits until both hosts say the same of the function, and it is no passing state.
    fn truth(&self) -> Result<String> {
        let since = Instant::now();
        loop {
            let asked = since.elapsed();
            let (a, b) = (self.lending.a.status()?, self.lending.b.status()?);
            ensure!(
                asked < TRUTH_TIMEOUT,
                "asked after {asked:.1?} the hosts do not agree: {}, {}, {}, {}",
                self.lent(&a),
                a["ports"][0],
                self.borrowed(&b),
                b["ports"][0]
            );
            if let Some(told) = self.agreed(&a, &b) {
                return Ok(format!("{told}, asked after {} ms", asked.as_millis()));
            }
        }
    }

    fn agreed(&self, a: &Value, b: &Value) -> Option<&'static str> {
        for status in [a, b] {
            let port = &status["ports"][0];
            if port["session"]["state"] != "open" || port["process"]["answers"] != true {
                return None;
            }
        }
        let (lent, borrowed) = (self.lent(a), self.borrowed(b));
        let nobody = lent["lease"].is_null();
        match (lent["state"].as_str(), borrowed["state"].as_str()) {
            (Some("quarantine"), _) => None,
            (_, None) if nobody => Some("nobody's"),
            (_, Some("lost")) if nobody => Some("lost"),
            (_, Some("waiting" | "connected")) if borrowed["lease"] == lent["lease"] => {
                Some("lent")
            }
            _ => None,
        }
    }

    pub fn wait_free(&self) -> Result<()> {
        let free = |status: &Value| {
            let one = self.borrowed(status);
            one["state"] == "waiting" || one["state"] == "lost" || one.is_null()
        };
        let b = &self.lending.b;
        b.wait_status("socket without a VMM", END_TIMEOUT, free)
            .map(drop)
    }

    /// After a cell that failed, so that the next can be struck.
    pub fn recover(&mut self, cell: Cell) -> Result<()> {
        self.clear_guest_away()?;
        self.bring_back(cell)?;
        self.reclaim()?;
        for host in [&self.pair.a, &self.pair.b] {
            host.agent.sh(&format!("rm -f {VERB_LOG}"))?;
        }
        Ok(())
    }

    /// Back to a function that is offered and nobody's, as an operator does it.
    pub fn reclaim(&mut self) -> Result<()> {
        if let Some(client) = self.client.take() {
            client.clear_away()?;
        }
        self.wait_free()?;
        if !self.borrowed(&self.lending.b.status()?).is_null() {
            self.lending.b.verb(&["return", &self.fdid])?;
        }
        let a = &self.lending.a;
        let free = |status: &Value| self.lent(status)["lease"].is_null();
        let status = a.wait_status("function that is nobody's", TRUTH_TIMEOUT, free)?;
        if self.lent(&status).is_null() {
            a.verb(&["add", VF_BDF])?;
        }
        if self.lent(&status)["state"] != "available" {
            a.verb(&["available", VF_BDF])?;
        }
        Ok(())
    }

    /// Nobody's function does nothing. What the kernel's own reset leaves in it is cleared when
    /// somebody opens it next, who looks at all of it.
    fn ensure_stopped(&self) -> Result<()> {
        let seen = pci::nvme_registers(&self.pair.a.agent, VF_BDF)?;
        let stopped = (seen.cc, seen.csts, seen.intms) == (0, 0, 0);
        ensure!(stopped, "nobody's function runs: {seen:x?}");
        Ok(())
    }

    /// The next tenant: finds nothing in the function, uses it, and gives it back running.
    pub fn use_it(&mut self) -> Result<()> {
        self.lending.borrow(&self.fdid, SOCKET, &[])?;
        let client = self.start_client()?;
        let orders = ["open", "map", "work"];
        let done = orders
            .into_iter()
            .try_for_each(|order| client.order(order).map(drop));
        match done {
            Ok(()) => client.end()?,
            Err(error) => {
                client.clear_away()?;
                return Err(error.context("the next tenant"));
            }
        }
        self.wait_free()?;
        self.lending.b.verb(&["return", &self.fdid])?;
        pci::nvme_registers(&self.pair.a.agent, VF_BDF)?.ensure_reset()
    }

    /// Both hosts are as before the first cell.
    pub fn ensure_nothing_left(&self) -> Result<()> {
        let idle = self.idle.as_ref().context("no snapshot")?;
        let now = self.snapshot()?;
        idle.0.ensure_equal(&now.0).context("host a")?;
        idle.1.ensure_equal(&now.1).context("host b")
    }

    /// A keeper that was started anew has no connections of old.
    pub fn snapshot(&self) -> Result<(Snapshot, Snapshot)> {
        let mut now = self.pair.snapshot()?;
        now.0.forget_programs(" keeper");
        now.1.forget_programs(" keeper");
        Ok(now)
    }

    fn pieces(&self) -> Result<u64> {
        let witness = self.witness.as_ref();
        witness.map_or(Ok(0), |(_, client)| client.pieces())
    }

    fn witness_goes_on(&self) -> Result<()> {
        let witness = self.witness.as_ref();
        witness.map_or(Ok(()), |(_, client)| client.goes_on(1))
    }
}

/// A moment within so many microseconds that follows from the seed and the cell (SplitMix64).
fn moment(seed: u64, index: u64, within: u64) -> u64 {
    let mut mixed = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ mixed >> 31) % within.max(1)
}
