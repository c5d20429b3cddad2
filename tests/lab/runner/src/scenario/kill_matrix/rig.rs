//! What the cells of the kill matrix have in common, and one cell from its first step to its last.

use super::cell::{Cell, Stage, Victim, Work};
use super::strikes::WHOLE_PIECES;
use super::witness::Witness;
use crate::guest::Guest;
use crate::host::HostSpec;
use crate::lab::{Lab, Pair};
use crate::ntb::Ntb;
use crate::scenario::client::Client;
use crate::snapshot::Both;
use crate::sublet::Lending;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// What is asked so long after a host has noticed a strike, and again after all is back, is answered
/// with the truth.
pub const TRUTH_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an operation that was over is begun again, to be struck sooner.
const SOONER_MAX: u32 = 2;

/// What the cells have in common. A host without its cable hangs at its end: those go last.
pub struct Rig<'a> {
    pub lab: &'a Lab,
    pub lending: Lending,
    pub program: String,
    pub fdid: String,
    pub seed: u64,
    /// How long each takes, as measured.
    pub usual: Vec<(Work, Duration)>,
    pub witness: Option<Witness>,
    /// On each host one.
    pub bystanders: [Client; 2],
    /// How often they were looked at.
    pub looks: u64,
    pub client: Option<Client>,
    pub guest: Option<Guest>,
    pub guests: usize,
    /// With the function offered, and nobody's.
    pub idle: Option<Both>,
    pub specs: [HostSpec; 2],
    pub pair: Pair,
    /// From each host to the third.
    pub cables: [Ntb; 2],
}

impl Rig<'_> {
    /// Everything that one cell is. A victim that had ended by itself was not struck: it is tried
    /// again, sooner, until it is. So is an operation that was over, a few times: then it is told
    /// that the strike came behind it.
    pub fn strike(&mut self, cell: Cell) -> Result<String> {
        let mut within = self.usual_of(cell.work())?.as_micros() as u64;
        let mut tries = 0;
        loop {
            if let Some(told) = self.strike_within(cell, within, tries < SOONER_MAX)? {
                return Ok(told);
            }
            ensure!(within > 0, "it ends before it can be struck");
            within /= 2;
            tries += 1;
        }
    }

    /// How long it takes when nobody is struck. Of a shutdown that is not known before it is asked
    /// for, as a guest has to boot for it.
    fn usual_of(&mut self, work: Work) -> Result<Duration> {
        match self.usual.iter().find(|(one, _)| *one == work) {
            Some((_, usual)) => Ok(*usual),
            None => self.measure_shut_down(),
        }
    }

    fn strike_within(&mut self, cell: Cell, within: u64, in_time: bool) -> Result<Option<String>> {
        let work = cell.work();
        if !matches!(work, Work::Run | Work::ShutDown) {
            self.no_guest()?;
        }
        self.prepare(work)?;
        let usual = Duration::from_micros(within);
        let delay = Duration::from_micros(moment(self.seed, cell.index(), within));
        let workers = self.workers()?;
        // One that ends by itself is known before; others are not there before.
        let known = match cell.stage {
            Stage::Borrow | Stage::Run => None,
            _ => self.process(cell.victim)?,
        };
        let session = self.session()?;
        let op = self.begin(work, delay)?;
        let process = match (known, cell.victim, cell.stage) {
            (None, Victim::Worker, Stage::Borrow) => Some(self.new_worker(&workers)?),
            (None, ..) => self.process(cell.victim)?,
            (known, ..) => known,
        };
        if work != Work::ShutDown {
            // Not a wait for a condition: the moment of the strike.
            std::thread::sleep(delay);
        }
        let over = self.is_over(&op)?;
        if over && in_time {
            self.end(op, Cell::UNDISTURBED)?;
            self.reclaim()?;
            return Ok(None);
        }
        let when = if over { ", when it was over" } else { "" };
        let died = self.do_deed(cell, process)?;
        // Who was gone already was not struck: nobody has anything to tell.
        let told = match died {
            Some(_) => self.survivors_tell(cell, &session),
            None => Ok(String::new()),
        };
        let came = self.end(op, cell)?;
        let truth = told.and_then(|told| Ok(told + &self.aftermath(cell, &session, &came)?))?;
        Ok(died
            .map(|died| format!("after {delay:.0?} of {usual:.0?}{when}{died}: {came}; {truth}")))
    }

    /// All are brought back, tell the truth, and have nothing left of it.
    fn aftermath(&mut self, cell: Cell, session: &Value, came: &str) -> Result<String> {
        self.bring_back(cell)?;
        if cell.ends_session() {
            self.wait_next_session(session)?;
        }
        let truth = self.truth(cell.may_end_in(came.starts_with("done")))?;
        self.witness()?
            .goes_on(WHOLE_PIECES)
            .context("the witness")?;
        self.look_at_bystanders()?;
        if self.guest.is_none() {
            self.reclaim()?;
            self.ensure_stopped()?;
            self.use_it()?;
            self.ensure_nothing_left()?;
        }
        Ok(truth)
    }
}

/// A moment within so many microseconds that follows from the seed and the cell (SplitMix64).
fn moment(seed: u64, index: u64, within: u64) -> u64 {
    let mut mixed = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ mixed >> 31) % within.max(1)
}
