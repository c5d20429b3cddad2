//! Scenario `kill-matrix`: everybody on a function's way is killed or stands still at every stage of a lease, and whoever comes next gets a clean function.

mod cell;
mod client;
mod guest;
mod rig;
mod table;

use super::{Scenario, When};
use crate::check::Checks;
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::snapshot::Snapshot;
use crate::sublet::{Lending, Workers};
use anyhow::{Context, Result, ensure};
use cell::{Cell, DEEDS, Plan, STAGES, Stage, VICTIMS};
use client::Client;
use rig::Rig;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use table::Table;

/// Both hosts are booted once.
pub const SCENARIO: Scenario = Scenario {
    name: "kill-matrix",
    checks: 4 + Cell::struck() + 3,
    when: When::Full,
    own_model: Some("it has our model take the link down for a moment"),
    deadline: Duration::from_secs(2400),
    run,
};

const SEED: &str = "SUBLET_LAB_SEED";
/// Words of which a cell's line must have one, to look at some only: the table is not full then.
const CELLS: &str = "SUBLET_LAB_CELLS";
/// A strike on a guest's I/O comes within so long.
const IO_WITHIN: Duration = Duration::from_secs(3);
/// From a VMM's end until its function is reset.
const UNDOING: Duration = Duration::from_millis(400);
/// The VF after the tenant's, and where its pieces lie in the namespace of both.
const WITNESS_BDF: &str = "0000:01:00.2";
const WITNESS_CONTROLLER: u32 = 2;
const WITNESS_SOCKET: &str = "/run/sublet/witness.sock";
const WITNESS_LBA: u64 = 48 << 11;

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let seed = match std::env::var(SEED) {
        Ok(text) => text.parse().with_context(|| format!("{SEED}={text}"))?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos(),
    };
    println!("seed {seed}: {SEED}={seed} strikes at the same moments");
    let (mut rig, before) = set_up(lab, checks, seed.into())?;
    checks.must("a witness works behind the same port", || rig.witness())?;
    checks.must("each stage's usual length is known", || rig.measure())?;
    let mut table = Table::default();
    let wanted = std::env::var(CELLS).unwrap_or_default();
    let outcome = (|| {
        strike_all(checks, &mut rig, &mut table, &wanted, true)?;
        checks.must("every byte of the witness was right", || rig.no_witness())?;
        strike_all(checks, &mut rig, &mut table, &wanted, false)
    })();
    println!("{}", table.text());
    checks.check("no cell of the table is empty", || table.ensure_full());
    outcome?;
    checks.check("both hosts are as before", || {
        let Rig { lending, pair, .. } = rig;
        pci::nvme_offline(&pair.a.agent, WITNESS_CONTROLLER)?;
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

/// Two hosts with all their processes, a function that is offered, and nobody that uses it.
fn set_up<'a>(
    lab: &'a Lab,
    checks: &mut Checks,
    seed: u64,
) -> Result<(Rig<'a>, (Snapshot, Snapshot))> {
    let ntb = lab.ntb(&[])?;
    let mut pair: Option<Pair> = None;
    checks.must("both hosts boot", || {
        pair = Some(lab.boot_pair(Some(ntb))?);
        Ok("")
    })?;
    let pair = pair.context("no hosts")?;
    pci::wait_namespace(&pair.a.agent)?;
    let before = pair.snapshot()?;
    let mut lending = None;
    checks.must("both daemons agree on a session", || {
        let how = (1, Workers::Kept);
        let started = Lending::start_with(lab, &pair, (2, 1), how, str::to_owned)?;
        let session = started.wait_link()?;
        lending = Some(started);
        Ok(session)
    })?;
    let rig = Rig {
        lab,
        pair,
        lending: lending.context("no daemons")?,
        program: lab.share_binary("sublet")?,
        fdid: String::new(),
        seed,
        usual: Vec::new(),
        witness: None,
        client: None,
        guest: None,
        guests: 0,
        idle: None,
    };
    Ok((rig, before))
}

/// The cells with the witness at work, or those that cost all tenants of a port. One that fails
/// ends no other, as long as the function can be had back.
fn strike_all(
    checks: &mut Checks,
    rig: &mut Rig<'_>,
    table: &mut Table,
    wanted: &str,
    private: bool,
) -> Result<()> {
    rig.idle = Some(rig.snapshot()?);
    for cell in in_order().filter(|cell| cell.is_private() == private) {
        let Cell {
            victim,
            stage,
            deed,
        } = cell;
        let name = format!("{victim:?} {deed:?} at {stage:?}").to_lowercase();
        let skipped = !wanted.is_empty() && !wanted.split(',').any(|word| name.contains(word));
        if cell.plan() != Plan::Strike || skipped {
            continue;
        }
        let index = VICTIMS.iter().position(|one| *one == victim).unwrap_or(0) * STAGES.len()
            + STAGES.iter().position(|one| *one == stage).unwrap_or(0);
        let index = 2 * index + usize::from(deed == DEEDS[0]);
        let passed = checks.check(&name, || rig.strike(cell, index as u64));
        table.enter(cell, passed.is_some());
        if passed.is_none() {
            rig.recover(cell)?;
        }
    }
    rig.no_guest()
}

/// Stage by stage; of a guest at work first what it lives through, as each boot takes long.
fn in_order() -> impl Iterator<Item = Cell> {
    STAGES.into_iter().flat_map(|stage| {
        let of_stage = Cell::all().filter(move |cell| cell.stage == stage);
        let (survived, ended): (Vec<_>, Vec<_>) = of_stage.partition(|cell| cell.is_survived());
        survived.into_iter().chain(ended)
    })
}

impl Rig<'_> {
    /// A second tenant through both ports, which works all the time.
    fn witness(&mut self) -> Result<String> {
        let (a, b) = (&self.pair.a.agent, &self.pair.b.agent);
        pci::nvme_online(a, WITNESS_CONTROLLER, 2, 1)?;
        let fdid = self.lending.offer_function(WITNESS_BDF)?;
        self.lending.borrow(&fdid, WITNESS_SOCKET, &[])?;
        let client = Client::start(b, "witness", WITNESS_SOCKET, WITNESS_LBA)?;
        client.order("open")?;
        client.order("map")?;
        client.tell("go")?;
        client.goes_on(2)?;
        self.witness = Some((fdid.clone(), client));
        Ok(fdid)
    }

    /// It moves out, and its function out of the pool.
    fn no_witness(&mut self) -> Result<String> {
        let (fdid, client) = self.witness.take().context("no witness")?;
        let pieces = client.pieces()?;
        client.end()?;
        self.lending.b.verb(&["return", &fdid])?;
        self.lending.a.verb(&["unavailable", WITNESS_BDF])?;
        self.lending.a.verb(&["remove", WITNESS_BDF])?;
        Ok(format!("{pieces} pieces"))
    }

    /// Two whole leases without a strike: the shorter of each stage counts.
    fn measure(&mut self) -> Result<String> {
        self.fdid = self.lending.offer()?;
        self.usual = vec![(Stage::Run, IO_WITHIN), (Stage::Detach, UNDOING)];
        for _ in 0..2 {
            for stage in [Stage::Lend, Stage::Borrow, Stage::Open, Stage::Map] {
                let took = self.unstruck(stage)?;
                self.note(stage, took);
            }
            self.client.take().context("no client")?.end()?;
            self.wait_free()?;
            let took = self.unstruck(Stage::Return)?;
            self.note(Stage::Return, took);
        }
        Ok(format!("{:.0?}", self.usual))
    }

    fn note(&mut self, stage: Stage, took: Duration) {
        match self.usual.iter_mut().find(|(one, _)| *one == stage) {
            Some((_, usual)) => *usual = took.min(*usual),
            None => self.usual.push((stage, took)),
        }
    }

    /// A stage's operation as it is when nobody is struck.
    fn unstruck(&mut self, stage: Stage) -> Result<Duration> {
        match stage {
            Stage::Lend => self.prepare(stage)?,
            Stage::Open => self.client = Some(self.start_client()?),
            _ => {}
        }
        let since = Instant::now();
        let op = self.begin(stage)?;
        let cell = Cell {
            victim: VICTIMS[0],
            stage,
            deed: DEEDS[0],
        };
        let came = self.end(op, cell)?;
        ensure!(came.starts_with("done"), "{stage:?}: {came}");
        Ok(since.elapsed())
    }

    /// The last guest shuts down, and its lease is given back.
    pub fn no_guest(&mut self) -> Result<()> {
        if let Some(guest) = self.guest.take() {
            guest.shut_down()?;
            self.reclaim()?;
        }
        Ok(())
    }
}
