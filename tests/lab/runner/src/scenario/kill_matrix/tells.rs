//! Who is left of a strike: each host says what is true soon after it has noticed, before anybody is brought back.

use super::after::of_function;
use super::cell::{Cell, Truth, Victim};
use super::rig::{Rig, TRUTH_TIMEOUT};
use super::stages::END_TIMEOUT;
use crate::sublet::Daemon;
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use std::thread;
use std::time::{Duration, Instant};

/// What a daemon says of a port that is away, as long as the pool has a lease of it.
const LEASE_LEFT: &str = "lease of it is written down";

/// What a host's daemon has to say, and from when on that counts.
enum Tells<'r> {
    /// That its port does not answer, and no lease of it: from that process's end on.
    NoPort,
    /// What it lends or has borrowed: from the end of its link session on, as the host itself tells
    /// that, which is when it has noticed.
    Function {
        last: &'r Value,
        side: &'static str,
        may_be: &'r [Truth],
    },
}

impl Rig<'_> {
    /// Called when the victim is gone, and has no process any more if it was one. What is asked
    /// within 2 s of a host's notice is answered with the truth: a death is noticed at once, as
    /// there is a pidfd or a connection that tells, another host's or a cable's by the link.
    pub fn survivors_tell(&self, cell: Cell, last: &Value) -> Result<String> {
        use Victim::*;
        if cell.is_survived() {
            return Ok(String::new());
        }
        let may_be = cell.may_be_told();
        let function = |side| Tells::Function { last, side, may_be };
        let (lent, borrowed) = (|| function("lent"), || function("borrowed"));
        let (of_a, of_b) = match cell.victim {
            LenderPort => (Some(Tells::NoPort), Some(borrowed())),
            BorrowerPort => (Some(lent()), Some(Tells::NoPort)),
            Link => (Some(lent()), Some(borrowed())),
            LenderHost => (None, Some(borrowed())),
            BorrowerHost => (Some(lent()), None),
            // Both hosts' ports go on, and their session: the one that notices tells the other.
            _ => {
                let told = self.truth(may_be).context("before anybody is back")?;
                return Ok(format!("at once {told}; "));
            }
        };
        let lender_tells = matches!(of_a, Some(Tells::Function { .. }));
        // Both at once: what one is asked takes nothing of the other's time.
        let (a, b, fdid) = (&self.lending.a, &self.lending.b, self.fdid.as_str());
        let told = thread::scope(|scope| {
            let host_a =
                scope.spawn(|| of_a.map_or(Ok(None), |tells| tells.within(a, fdid).map(Some)));
            let host_b = of_b.map_or(Ok(None), |tells| tells.within(b, fdid).map(Some));
            let host_a = host_a.join().map_err(|_| anyhow!("a thread panicked"));
            Ok::<_, anyhow::Error>([
                ("a", host_a?.context("host a")?),
                ("b", host_b.context("host b")?),
            ])
        })?;
        if lender_tells {
            self.ensure_stopped()?;
        }
        if matches!(cell.victim, LenderHost | BorrowerHost) {
            self.witness()?.goes_on(2).context("without that host")?;
        }
        let mut line = String::new();
        for (host, asked) in told {
            if let Some(asked) = asked {
                line += &format!("{host} told, asked after {} ms; ", asked.as_millis());
            }
        }
        Ok(line)
    }
}

impl Tells<'_> {
    /// Waits until it has noticed, and then until it says so; how long after it was asked.
    fn within(&self, daemon: &Daemon, fdid: &str) -> Result<Duration> {
        if let Tells::Function { last, .. } = self {
            daemon.wait_status("end of the session", END_TIMEOUT, |status| {
                let session = &status["ports"][0]["session"];
                session["state"] != "open" || session["id"] != **last
            })?;
        }
        let noticed = Instant::now();
        loop {
            let asked = noticed.elapsed();
            let status = daemon.status()?;
            ensure!(
                asked < TRUTH_TIMEOUT,
                "asked {asked:.1?} after it has noticed: {}, {}, {}",
                status["ports"][0],
                of_function(&status, "lent", fdid),
                of_function(&status, "borrowed", fdid)
            );
            if self.is_told(&status, fdid) {
                return Ok(asked);
            }
        }
    }

    fn is_told(&self, status: &Value, fdid: &str) -> bool {
        let (lent, borrowed) = (
            of_function(status, "lent", fdid),
            of_function(status, "borrowed", fdid),
        );
        match self {
            Tells::NoPort => {
                let port = &status["ports"][0];
                let why = port["last_error"].as_str().unwrap_or(LEASE_LEFT);
                let nobodys = lent.is_null() && borrowed.is_null() && !why.contains(LEASE_LEFT);
                port["process"]["answers"] == false && nobodys
            }
            Tells::Function { side: "lent", .. } => {
                lent.is_null() || lent["lease"].is_null() && lent["state"] == "available"
            }
            Tells::Function { may_be, .. } => {
                let told = match borrowed["state"].as_str() {
                    None => Truth::Nobodys,
                    Some("lost") => Truth::Lost,
                    Some(_) => return false,
                };
                may_be.contains(&told)
            }
        }
    }
}
