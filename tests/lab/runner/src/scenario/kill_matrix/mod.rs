//! Scenario `kill-matrix`: everybody on a function's way is killed or stands still at every stage of a lease, and whoever comes next gets a clean function.

mod after;
mod cell;
mod guest;
mod hosts;
mod rig;
mod stages;
mod strikes;
mod table;
mod tells;
mod witness;

use super::client::Client;
use super::{Scenario, When};
use crate::check::Checks;
use crate::host::Host;
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::snapshot::{self, Both};
use crate::sublet::{Lending, Workers};
use anyhow::{Context, Result, ensure};
use cell::{Cell, Plan, STAGES, Witnessed, Work};
use hosts::WITNESS_CONTROLLER;
use rig::Rig;
use stages::{END_TIMEOUT, Op};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use table::Table;

/// Both hosts are booted once, but for those whose power goes; the third once for each of its cables.
pub const SCENARIO: Scenario = Scenario {
    name: "kill-matrix",
    checks: 11 + Cell::struck(),
    when: When::Full,
    own_model: Some("it has our model take the link down for a moment"),
    deadline: Duration::from_secs(3600),
    run,
};

/// Where the witness is, and in which words.
const GROUPS: [(Witnessed, &str); 3] = [
    (Witnessed::Beside, "a witness works behind the same port"),
    (
        Witnessed::FromLender,
        "a witness works at a third host behind another port of the lender",
    ),
    (
        Witnessed::FromBorrower,
        "a witness works at a third host behind another port of the borrower",
    ),
];
const SEED: &str = "SUBLET_LAB_SEED";
/// Words of which a cell's line must have one, to look at some only: the table is not full then.
const CELLS: &str = "SUBLET_LAB_CELLS";
/// A strike on a guest's I/O comes within so long.
const IO_WITHIN: Duration = Duration::from_secs(3);
/// The least that any operation takes, as a client's clock counts.
const SHORTEST: Duration = Duration::from_millis(1);
/// From a VMM's end until its function is reset.
const UNDOING: Duration = Duration::from_millis(400);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let seed = match std::env::var(SEED) {
        Ok(text) => text.parse().with_context(|| format!("{SEED}={text}"))?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos(),
    };
    println!("seed {seed}: {SEED}={seed} strikes at the same moments");
    let (mut rig, before) = set_up(lab, checks, seed.into())?;
    let mut table = Table::default();
    let outcome = GROUPS
        .into_iter()
        .try_for_each(|group| strike_all(checks, &mut rig, &mut table, group));
    println!("{}", table.text());
    checks.check("no cell of the table is empty", || table.ensure_full());
    outcome?;
    checks.check("both hosts are as before", || {
        let Rig {
            lending,
            pair,
            bystanders,
            cables: _cables,
            ..
        } = rig;
        for bystander in bystanders {
            bystander.end()?;
        }
        pci::nvme_offline(&pair.a.agent, WITNESS_CONTROLLER)?;
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

/// Two hosts with all their processes, a function that is offered, and nobody that uses it.
fn set_up<'a>(lab: &'a Lab, checks: &mut Checks, seed: u64) -> Result<(Rig<'a>, Both)> {
    let ntb = lab.ntb(&[])?;
    let cables = [lab.cable("ntb-ac", &[])?, lab.cable("ntb-bc", &[])?];
    let specs = hosts::specs(lab, &ntb, &cables)?;
    let mut pair: Option<Pair> = None;
    checks.must("both hosts boot", || {
        pair = Some(lab.boot(&specs[0], &specs[1], Some(ntb))?);
        Ok("")
    })?;
    let pair = pair.context("no hosts")?;
    for host in [&pair.a, &pair.b] {
        pci::wait_namespace(&host.agent)?;
        hosts::keep_store(host)?;
    }
    let before = pair.snapshot()?;
    let bystander = |host: &Host| Client::bystander(&host.agent);
    let bystanders = [bystander(&pair.a)?, bystander(&pair.b)?];
    let mut lending = None;
    checks.must("both daemons agree on a session", || {
        let how = (1, Workers::Kept);
        let started = Lending::start_with(lab, &pair, (2, 1), how, hosts::config)?;
        let session = started.wait_link()?;
        lending = Some(started);
        Ok(session)
    })?;
    pci::nvme_online(&pair.a.agent, WITNESS_CONTROLLER, 2, 1)?;
    let rig = Rig {
        lab,
        lending: lending.context("no daemons")?,
        program: lab.share_binary("sublet")?,
        fdid: String::new(),
        seed,
        usual: Vec::new(),
        witness: None,
        bystanders,
        looks: 0,
        client: None,
        guest: None,
        guests: 0,
        idle: None,
        specs,
        pair,
        cables,
    };
    Ok((rig, before))
}

/// The cells with the witness at one place. One that fails ends no other, as long as the function
/// can be had back.
fn strike_all(
    checks: &mut Checks,
    rig: &mut Rig<'_>,
    table: &mut Table,
    (place, what): (Witnessed, &str),
) -> Result<()> {
    let wanted = std::env::var(CELLS).unwrap_or_default();
    let is_wanted = |cell: &Cell| {
        let name = cell.name();
        wanted.is_empty() || wanted.split(',').any(|word| name.contains(word))
    };
    let cells: Vec<Cell> = in_order()
        .filter(|cell| cell.plan() == Plan::Strike && cell.witnessed() == place)
        .filter(is_wanted)
        .collect();
    if cells.is_empty() {
        return Ok(());
    }
    checks.must(what, || rig.begin_witness(place))?;
    if rig.usual.is_empty() {
        checks.must("each stage's usual length is known", || rig.measure())?;
    }
    rig.idle = Some(snapshot::both_at_rest(|| rig.look())?);
    for cell in cells {
        let passed = checks.check(&cell.name(), || rig.strike(cell));
        table.enter(cell, passed.is_some());
        if passed.is_none() {
            rig.recover(cell)?;
        }
    }
    rig.no_guest()?;
    checks.must("every byte of the witness was right", || rig.end_witness())?;
    Ok(())
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
    /// Two whole leases without a strike: the shorter of each stage counts.
    fn measure(&mut self) -> Result<String> {
        self.fdid = self.lending.offer()?;
        self.usual = vec![(Work::Run, IO_WITHIN), (Work::End, UNDOING)];
        for _ in 0..2 {
            for work in [Work::Lend, Work::Borrow, Work::Open, Work::Map] {
                self.unstruck(work)?;
            }
            let client = self.client.as_ref().context("no client")?;
            client.order("work")?;
            client.order("more")?;
            self.unstruck(Work::Leave)?;
            self.client.take().context("no client")?.end()?;
            self.wait_free()?;
            self.unstruck(Work::Return)?;
        }
        Ok(format!("{:.0?}", self.usual))
    }

    pub fn note(&mut self, work: Work, took: Duration) {
        match self.usual.iter_mut().find(|(one, _)| *one == work) {
            Some((_, usual)) => *usual = took.min(*usual),
            None => self.usual.push((work, took)),
        }
    }

    /// A stage's operation as it is when nobody is struck: how long it goes on from where a strike's
    /// delay begins. What asking for its end takes is no part of that.
    fn unstruck(&mut self, work: Work) -> Result<()> {
        match work {
            Work::Lend => self.prepare(work)?,
            Work::Open => self.client = Some(self.start_client()?),
            _ => {}
        }
        let op = self.begin(work, Duration::ZERO)?;
        let since = Instant::now();
        if let Op::Verb(host, pid) = &op {
            host.wait(*pid, END_TIMEOUT).context("the verb hangs")?;
        }
        let verb = since.elapsed();
        let came = self.end(op, Cell::UNDISTURBED)?;
        ensure!(came.starts_with("done"), "{work:?}: {came}");
        // A client tells it by its own clock.
        let order = came.rsplit_once(' ').and_then(|(_, ms)| ms.parse().ok());
        let took = order.map_or(verb, Duration::from_millis).max(SHORTEST);
        self.note(work, took);
        Ok(())
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
