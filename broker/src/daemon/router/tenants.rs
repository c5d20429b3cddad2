//! How many functions each trust domain has borrowed, over all ports of this host: what ports say, and what verbs are about to add.
//!
//! A function is counted from before its port is asked for it (`Wish`) until that port says, in a
//! round of questions that began after its answer, what it has. So of two verbs at once the second
//! sees the first, and a function is counted whose borrowing nobody saw the end of. A port that is
//! silent is counted as it last said; one that has said nothing since this daemon began, with the
//! most that it may have. Who is not there has nothing.

use crate::config::Limits;
use crate::daemon::host::no_room_for;
use crate::daemon::vocabulary::{BorrowedStatus, ErrorCode, Outcome, VerbError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vfio_shim::model::Fdid;

/// A function that a port has.
struct Held {
    domain: String,
    /// When it was told.
    since: u64,
}

/// What is known of one port.
#[derive(Default)]
struct Port {
    /// The newest round that it answered.
    heard: Option<u64>,
    held: BTreeMap<Fdid, Held>,
}

impl Port {
    /// No more is believed than a port may have.
    fn hear(&mut self, round: u64, told: &[BorrowedStatus], port_max: usize) {
        self.heard = Some(round);
        self.held.retain(|_, held| held.since > round);
        // A lost lease takes no room.
        let told = told.iter().filter(|one| one.state != "lost");
        for one in told.take(port_max) {
            self.held.entry(one.fdid.0).or_insert(Held {
                domain: one.trust_domain.clone(),
                since: round,
            });
        }
    }
}

#[derive(Default)]
struct Counts {
    /// Grows with each round, verb and answer: their order in time.
    clock: u64,
    /// The newest round that has been put down.
    newest: u64,
    ports: Vec<Port>,
    /// What verbs are about to borrow, and for whom.
    wished: BTreeMap<u64, (Fdid, String)>,
}

impl Counts {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// How many functions but this one a trust domain has, or is about to have.
    fn others(&self, fdid: Fdid, domain: &str, port_max: usize) -> usize {
        let held = self.ports.iter().flat_map(|port| &port.held);
        let held = held.filter(|(_, held)| held.domain == domain || held.domain.is_empty());
        let wished = self.wished.values().filter(|(_, of)| of == domain);
        let all = held.map(|(fdid, _)| fdid);
        let all = all.chain(wished.map(|(fdid, _)| fdid));
        let others: BTreeSet<&Fdid> = all.filter(|other| **other != fdid).collect();
        let unheard = self.ports.iter().filter(|port| port.heard.is_none());
        others.len() + unheard.count() * port_max
    }
}

/// The counts of a host.
pub(super) struct Tenants {
    limits: Limits,
    counts: Mutex<Counts>,
}

/// A function that a verb is about to borrow; counted until drop.
pub(super) struct Wish<'a> {
    tenants: &'a Tenants,
    number: u64,
}

impl Drop for Wish<'_> {
    fn drop(&mut self) {
        self.tenants.counts().wished.remove(&self.number);
    }
}

impl Wish<'_> {
    /// What the port has said, if anything: a verb without an answer may have been done.
    pub(super) fn answered(self, at: usize, answer: &Result<Outcome, VerbError>) {
        let refused = answer.as_ref().err();
        if refused.is_some_and(|refusal| refusal.code != ErrorCode::PortAway) {
            return;
        }
        let mut counts = self.tenants.counts();
        let since = counts.tick();
        if let Some((fdid, domain)) = counts.wished.get(&self.number).cloned() {
            counts.ports[at].held.insert(fdid, Held { domain, since });
        }
    }
}

impl Tenants {
    pub(super) fn new(limits: Limits, ports: usize) -> Self {
        let counts = Counts {
            ports: (0..ports).map(|_| Port::default()).collect(),
            ..Counts::default()
        };
        Self {
            limits,
            counts: Mutex::new(counts),
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ports are about to be asked what they have.
    pub(super) fn round(&self) -> u64 {
        self.counts().tick()
    }

    /// What each port said in that round; `None` = it was silent.
    pub(super) fn heard(&self, round: u64, told: &[Option<&[BorrowedStatus]>]) {
        let port_max = self.limits.functions_per_port as usize;
        let mut counts = self.counts();
        counts.newest = counts.newest.max(round);
        for (port, told) in counts.ports.iter_mut().zip(told) {
            if let Some(told) = told.filter(|_| port.heard.is_none_or(|newest| newest < round)) {
                port.hear(round, told, port_max);
            }
        }
    }

    /// Refused, if this trust domain has as many functions as it may. `names` are the ports'.
    pub(super) fn wish<'a>(
        &self,
        fdid: Fdid,
        domain: &str,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<Wish<'_>, VerbError> {
        let mut counts = self.counts();
        let limit = self.limits.functions_per_domain;
        let port_max = self.limits.functions_per_port as usize;
        if counts.others(fdid, domain, port_max) >= limit as usize {
            return Err(refusal(&counts, names, no_room_for(domain, limit)));
        }
        let number = counts.tick();
        counts.wished.insert(number, (fdid, domain.to_owned()));
        Ok(Wish {
            tenants: self,
            number,
        })
    }
}

/// The refusal, and of which ports it is not known what they have now.
fn refusal<'a>(
    counts: &Counts,
    names: impl Iterator<Item = &'a str>,
    full: VerbError,
) -> VerbError {
    let silent = names.zip(&counts.ports);
    let silent = silent.filter(|(_, port)| port.heard.is_none_or(|round| round < counts.newest));
    let silent: Vec<String> = silent.map(|(name, _)| format!("`{name}`")).collect();
    match silent.is_empty() {
        true => full,
        false => VerbError::new(
            full.code,
            format!(
                "{}. Counted is what port {} last said, or the most that it may have, as it does \
                 not answer: see `sublet status`",
                full.text,
                silent.join(", ")
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::daemon::vocabulary::{BarMode, FdidText, GuestCounters, Hex64, RefusedCounters};
    use std::path::Path;

    const NAMES: [&str; 2] = ["ntb0", "ntb1"];
    const FULL: &str = "2 functions are borrowed for trust domain `a`, its limit: return one \
                        first, or raise limits.functions_per_domain";
    const DONE: Result<Outcome, VerbError> = Ok(Outcome::Done);

    fn tenants() -> Tenants {
        let text = "[node]\nid = 4\nname = \"a\"\n[limits]\nfunctions_per_domain = 2\n\
                    functions_per_port = 1\n[[port]]\nname = \"ntb0\"\nbdf = \"01:00.0\"\n\
                    peers = \"cable\"\ntrust_domain = \"a\"\n[daemon]\nstate = \"/tmp/none\"\n";
        let config = Config::parse(Path::new("test.toml"), text).unwrap();
        Tenants::new(config.limits, NAMES.len())
    }

    fn fdid(text: &str) -> Fdid {
        text.parse().unwrap()
    }

    fn borrowed(text: &str, state: &str) -> BorrowedStatus {
        BorrowedStatus {
            fdid: FdidText::from(fdid(text)),
            lease: Hex64(1),
            trust_domain: "a".to_owned(),
            socket: "x.vf".into(),
            state: state.to_owned(),
            vmm_pid: None,
            bars: BarMode::Trapped,
            ram_bytes: None,
            counters: GuestCounters::default(),
            vectors: Vec::new(),
            refused: RefusedCounters::default(),
            worker: None,
            way: "doorbell".to_owned(),
            last_error: None,
        }
    }

    impl Tenants {
        fn wish_of(&self, fdid_: &str) -> Result<Wish<'_>, VerbError> {
            self.wish(fdid(fdid_), "a", NAMES.into_iter())
        }

        fn refused(&self, fdid: &str) -> String {
            let refused = self.wish_of(fdid).map(drop).unwrap_err();
            assert_eq!(refused.code, ErrorCode::Limit);
            refused.text
        }
    }

    #[test]
    fn functions_of_all_ports_and_of_verbs_under_way_count_for_a_domain_and_lost_ones_do_not() {
        let all = tenants();
        let [one, lost] = [("80101", "connected"), ("80102", "lost")]
            .map(|(fdid, state)| [borrowed(fdid, state)]);
        all.heard(all.round(), &[Some(&one), Some(&lost)]);
        let wish = all.wish_of("80103").unwrap();
        assert_eq!(all.refused("80104"), FULL);
        assert!(all.wish(fdid("80104"), "b", NAMES.into_iter()).is_ok());
        // Its port knows better why it is not borrowed twice.
        assert!(all.wish_of("80101").is_ok());
        drop(wish);
        assert!(all.wish_of("80104").is_ok());
    }

    #[test]
    fn answer_that_came_after_a_round_began_outlasts_what_was_said_in_it() {
        let all = tenants();
        all.heard(all.round(), &[Some(&[]), Some(&[])]);
        let wish = all.wish_of("80101").unwrap();
        let early = all.round();
        wish.answered(0, &DONE);
        all.heard(early, &[Some(&[]), Some(&[])]);
        let other = all.wish_of("80102").unwrap();
        assert_eq!(all.refused("80103"), FULL);
        // A refusal leaves nothing, a verb that nobody answered does.
        other.answered(1, &Err(VerbError::new(ErrorCode::NotAllowed, "no")));
        let silent = Err(VerbError::new(ErrorCode::PortAway, "silent"));
        all.wish_of("80102").unwrap().answered(1, &silent);
        assert_eq!(all.refused("80103"), FULL);
        let late = all.round();
        all.heard(late, &[Some(&[]), Some(&[])]);
        all.heard(early, &[Some(&[borrowed("80101", "connected")]), None]);
        let _two = [all.wish_of("80104").unwrap(), all.wish_of("80105").unwrap()];
    }

    #[test]
    fn silent_port_counts_as_it_last_said_or_with_the_most_that_it_may_have() {
        let all = tenants();
        all.heard(all.round(), &[Some(&[]), None]);
        let wish = all.wish_of("80101").unwrap();
        let words = all.refused("80102");
        assert_eq!(
            words,
            format!(
                "{FULL}. Counted is what port `ntb1` last said, or the most that it may have, as \
                 it does not answer: see `sublet status`"
            )
        );
        drop(wish);
        // More than it may have is not believed.
        let told = ["80101", "80102"].map(|fdid| borrowed(fdid, "waiting"));
        all.heard(all.round(), &[Some(&[]), Some(&told)]);
        all.heard(all.round(), &[Some(&[]), None]);
        let _wish = all.wish_of("80103").unwrap();
        assert_eq!(all.refused("80104"), words);
    }
}
