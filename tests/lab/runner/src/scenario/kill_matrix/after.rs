//! What must be true after a strike: both hosts tell the truth, nothing is left, and the next tenant gets a clean function.

use super::cell::{Cell, Truth};
use super::rig::{Rig, TRUTH_TIMEOUT};
use super::stages::{END_TIMEOUT, SOCKET, VERB_LOG};
use crate::host::VF_BDF;
use crate::pci;
use crate::snapshot::{self, Both};
use crate::sublet::PORT;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Instant;

/// What a host says of one function on a side, `lent` or `borrowed`.
pub fn of_function<'v>(status: &'v Value, side: &str, fdid: &str) -> &'v Value {
    let all = status[side].as_array();
    let one = all.and_then(|all| all.iter().find(|one| one["fdid"] == fdid));
    one.unwrap_or(&Value::Null)
}

impl Rig<'_> {
    /// The link session that host B knows.
    pub fn session(&self) -> Result<Value> {
        let mut status = self.lending.b.status()?;
        Ok(status["ports"][0]["session"]["id"].take())
    }

    /// Both hosts have noticed that the last one is over, and agree on another.
    pub fn wait_next_session(&self, last: &Value) -> Result<()> {
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
        of_function(status, "borrowed", &self.fdid)
    }

    /// What it says of the function that it lends.
    pub fn lent<'v>(&self, status: &'v Value) -> &'v Value {
        of_function(status, "lent", &self.fdid)
    }

    /// Waits until both hosts say the same of the function, it is no passing state, and one of
    /// those that may be. Asked for within 2 s: how long an answer takes is not its truth's matter.
    pub fn truth(&self, expected: &[Truth]) -> Result<String> {
        let since = Instant::now();
        let mut last = None;
        loop {
            let asked = since.elapsed();
            let (a, b) = (self.lending.a.status()?, self.lending.b.status()?);
            ensure!(
                asked < TRUTH_TIMEOUT,
                "asked after {asked:.1?} the hosts agree on {last:?}, and not on one of \
                 {expected:?}: {}, {}, {}, {}",
                self.lent(&a),
                a["ports"][0],
                self.borrowed(&b),
                b["ports"][0]
            );
            last = self.agreed(&a, &b);
            if let Some(told) = last.filter(|told| expected.contains(told)) {
                return Ok(format!("{told:?}, asked after {} ms", asked.as_millis()).to_lowercase());
            }
        }
    }

    fn agreed(&self, a: &Value, b: &Value) -> Option<Truth> {
        for status in [a, b] {
            let port = &status["ports"][0];
            if port["session"]["state"] != "open" || port["process"]["answers"] != true {
                return None;
            }
        }
        let (lent, borrowed) = (self.lent(a), self.borrowed(b));
        let nobody = lent["lease"].is_null();
        let same = borrowed["lease"] == lent["lease"];
        match (lent["state"].as_str(), borrowed["state"].as_str()) {
            (Some("quarantine"), _) => None,
            (_, None) if nobody => Some(Truth::Nobodys),
            (_, Some("lost")) if nobody => Some(Truth::Lost),
            (_, Some("waiting")) if same => Some(Truth::Waiting),
            (_, Some("connected")) if same => Some(Truth::Connected),
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
            a.verb(&["available", VF_BDF, "--port", PORT])?;
        }
        Ok(())
    }

    /// Nobody's function does nothing. What the kernel's own reset leaves in it is cleared when
    /// somebody opens it next, who looks at all of it.
    pub fn ensure_stopped(&self) -> Result<()> {
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
        snapshot::ensure_both_equal(idle, || self.look())
    }

    /// A keeper that was started anew has no connections of old.
    pub fn look(&self) -> Result<Both> {
        Ok(snapshot::without_programs(self.pair.look()?, " keeper"))
    }
}
