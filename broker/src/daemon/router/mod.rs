//! The host as its daemon sees it: each verb goes to the ports that it concerns, and leases are written down here.
//!
//! The daemon holds no function, no NTB and no path; it knows nothing that a port has not told it
//! but the store of leases. What is in the pool and not offered is kept by every port that was
//! there when it was added. So a daemon may be killed and come back at any time. A port that is not
//! there, or does not answer, costs its own lines and no more.

mod leases;
mod lend;
mod link;
mod report;
mod tenants;

pub use leases::{LeaseLine, Line, LinePort};

use super::Host;
use super::host::{HostError, check_ways};
use super::vocabulary::{ErrorCode, HostStatus, Outcome, Verb, VerbError};
use crate::config::{Config, FarEnd};
use crate::jail::Report;
use crate::pool::{LeaseStore, PoolService, RedbStore, StoreError};
use link::PortLink;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tenants::Tenants;
use vfio_shim::model::{Bdf, Fdid};
use vfio_shim::path::LeasePool;
use vfio_shim::path::grant::ToPool;

/// How long a port may take to say how it stands.
const STATUS_DEADLINE: Duration = Duration::from_millis(1000);
/// How long it may take to ask its peer what that offers.
const LIST_DEADLINE: Duration = Duration::from_secs(5);
/// How long any other verb may take: a little less than the client waits.
const VERB_DEADLINE: Duration = Duration::from_secs(115);

/// The daemon's host. Fields drop in order: the lines to the ports, then the pool.
pub struct Router {
    config: Config,
    sandbox: Report,
    started: Instant,
    /// Functions that a lender's verb is at work on.
    busy: Mutex<BTreeSet<Bdf>>,
    tenants: Tenants,
    links: Vec<PortLink>,
    pool: PoolService,
}

/// Opens the store of leases, and looks for the ports from now on. `file` is where the
/// configuration was read from, for the words of mends, and `sandbox` what this process has been
/// left with.
pub fn start(config: &Config, file: &Path, sandbox: Report) -> Result<Arc<dyn Host>, HostError> {
    let store = RedbStore::open(&config.state)?;
    Ok(Arc::new(Router::new(config, file, store, sandbox)?))
}

/// A function that one verb of the lender has for itself.
struct Claim<'a> {
    router: &'a Router,
    bdf: Bdf,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let busy = &self.router.busy;
        let mut busy = busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.remove(&self.bdf);
    }
}

fn refuse(code: ErrorCode, text: impl Into<String>) -> VerbError {
    VerbError::new(code, text)
}

impl Router {
    fn new(
        config: &Config,
        file: &Path,
        store: impl LeaseStore + 'static,
        sandbox: Report,
    ) -> Result<Self, StoreError> {
        let pool = PoolService::start(store, config.limits.lease_ttl.as_millis() as u64)?;
        forget_old_ports(config, &pool);
        let link = |name: &String| {
            let start = format!("sublet port {name} --config {}", file.display());
            let link = PortLink::start(config, start, name, pool.port(name));
            link.map_err(|error| StoreError::failed("served", error))
        };
        let names: Vec<String> = config.ports.iter().map(|port| port.name.clone()).collect();
        Ok(Self {
            config: config.clone(),
            sandbox,
            started: Instant::now(),
            busy: Mutex::default(),
            tenants: Tenants::new(config.limits, names.len()),
            links: names.iter().map(link).collect::<Result<_, _>>()?,
            pool,
        })
    }

    fn claim(&self, bdf: Bdf) -> Result<Claim<'_>, VerbError> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        match busy.insert(bdf) {
            true => Ok(Claim { router: self, bdf }),
            false => {
                let text = format!("another verb is at work on {bdf}: try again in a moment");
                Err(refuse(ErrorCode::Busy, text))
            }
        }
    }

    /// Has all ports do one verb, at the same time.
    fn ask_all(&self, verb: &Verb, deadline: Duration) -> Vec<Result<Outcome, VerbError>> {
        std::thread::scope(|scope| {
            let asked: Vec<_> = self
                .links
                .iter()
                .map(|link| scope.spawn(move || link.ask(verb, deadline)))
                .collect();
            let panicked = |_| {
                Err(refuse(
                    ErrorCode::Internal,
                    "a thread of the daemon panicked",
                ))
            };
            asked
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(panicked))
                .collect()
        })
    }

    /// How each port says that it stands.
    fn statuses(&self) -> Vec<Result<HostStatus, VerbError>> {
        let round = self.tenants.round();
        let statuses = self.ask_statuses();
        let answers = statuses.iter().zip(&self.links);
        let told = answers.map(|(status, link)| match status {
            Ok(status) => Some(&status.borrowed[..]),
            Err(_) if link.is_there() => None,
            Err(_) => Some(&[][..]),
        });
        self.tenants.heard(round, &told.collect::<Vec<_>>());
        statuses
    }

    fn ask_statuses(&self) -> Vec<Result<HostStatus, VerbError>> {
        let answers = self.ask_all(&Verb::Status, STATUS_DEADLINE).into_iter();
        let status = |(answer, link): (Result<Outcome, VerbError>, &PortLink)| match answer? {
            Outcome::Status(status) => Ok(*status),
            _ => Err(strange(link)),
        };
        answers.zip(&self.links).map(status).collect()
    }

    /// Borrows through the port that leads to the function's node.
    fn borrow(&self, fdid: Fdid, verb: &Verb) -> Result<Outcome, VerbError> {
        let statuses = self.statuses();
        let far: Vec<FarEnd> = (0..self.links.len())
            .map(|at| self.config.far_end(at))
            .collect();
        let leads = |at: usize, status: &Result<HostStatus, VerbError>| {
            let port = status.as_ref().ok().and_then(|status| status.ports.first());
            let says = port.and_then(|port| port.session.peer_node);
            // Once more: a port that was taken over tells what it likes.
            says == Some(fdid.node) && far[at].check(fdid.node).is_ok()
        };
        // A port says best why its own host's functions are not borrowed.
        let own = fdid.node == self.config.node_id;
        let leading = |(at, status)| (leads(at, status) || own && status.is_ok()).then_some(at);
        let leading: Vec<usize> = statuses.iter().enumerate().filter_map(leading).collect();
        if !own {
            let ways = leading
                .iter()
                .map(|at| (&self.links[*at].name[..], &far[*at]));
            check_ways(fdid.node, ways)?;
        }
        let at = match leading[..] {
            [] => return Err(report::no_way(fdid, &self.links, &statuses)),
            [at] => at,
            // Several cables to one host: a function is offered through one of them.
            [first, ..] => {
                let offers = |at: &&usize| self.links[**at].offers(fdid, LIST_DEADLINE);
                leading.iter().find(offers).copied().unwrap_or(first)
            }
        };
        self.borrow_at(at, fdid, verb)
    }

    /// Refused, if its trust domain has as many functions as it may, over all ports.
    fn borrow_at(&self, at: usize, fdid: Fdid, verb: &Verb) -> Result<Outcome, VerbError> {
        let domain = match verb {
            Verb::Borrow { trust_domain, .. } => trust_domain.as_ref(),
            _ => None,
        };
        let domain = domain.unwrap_or(&self.config.ports[at].trust_domain);
        let names = self.links.iter().map(|link| link.name.as_str());
        let wish = self.tenants.wish(fdid, domain, names)?;
        let answer = self.links[at].ask(verb, VERB_DEADLINE);
        wish.answered(at, &answer);
        answer
    }

    /// What ports of which each says that a verb is about what it has say to it: done, if it is at
    /// all of them, as one that was taken over may say that it has another's.
    fn ask_each(&self, ports: &[usize], verb: &Verb) -> Result<Outcome, VerbError> {
        let ask = |at: &usize| self.links[*at].ask(verb, VERB_DEADLINE);
        // Each is asked, whatever another says.
        let answers: Vec<_> = ports.iter().map(ask).collect();
        let (done, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        let first = refused.into_iter().chain(done).next();
        first.unwrap_or_else(|| Err(refuse(ErrorCode::Internal, "no port was named")))
    }

    /// Gives back at the port that has it.
    fn give_back(&self, fdid: Fdid, verb: &Verb) -> Result<Outcome, VerbError> {
        let statuses = self.statuses();
        let has = |status: &Result<HostStatus, VerbError>| {
            let borrowed = status.as_ref().map(|status| &status.borrowed[..]);
            let mut borrowed = borrowed.unwrap_or_default().iter();
            borrowed.any(|borrowed| borrowed.fdid.0 == fdid)
        };
        let there = claimed(&statuses, has);
        if !there.is_empty() {
            return self.ask_each(&there, verb);
        }
        let text = format!("{fdid} is not borrowed here: see `sublet status`");
        Err(or_away(refuse(ErrorCode::NoLease, text), &statuses))
    }
}

/// Which ports say so of themselves.
fn claimed(
    statuses: &[Result<HostStatus, VerbError>],
    says: impl Fn(&Result<HostStatus, VerbError>) -> bool,
) -> Vec<usize> {
    let all = statuses.iter().enumerate();
    all.filter_map(|(at, status)| says(status).then_some(at))
        .collect()
}

/// The refusal, or that of the first port that did not answer: what is not found may be there.
fn or_away<T>(refusal: VerbError, answers: &[Result<T, VerbError>]) -> VerbError {
    let away = answers.iter().filter_map(|answer| answer.as_ref().err());
    let mut away = away.filter(|error| error.code == ErrorCode::PortAway);
    match away.next() {
        Some(away) => refuse(
            away.code,
            format!("no port that answers has it, and {}", away.text),
        ),
        None => refusal,
    }
}

fn strange(link: &PortLink) -> VerbError {
    let text = format!(
        "port `{}` answers something else than it was asked: run daemon and port of one build",
        link.name
    );
    refuse(ErrorCode::Internal, text)
}

/// Leases of ports that are in the configuration no more: nobody will ever say what they hold.
fn forget_old_ports(config: &Config, pool: &PoolService) {
    let leases = pool.status().unwrap_or_default().leases;
    let holders = leases.into_iter().filter_map(|lease| lease.holder);
    let ports: BTreeSet<String> = holders.map(|holder| holder.port).collect();
    let known = |name: &String| config.ports.iter().any(|port| port.name == *name);
    for old in ports.iter().filter(|name| !known(name)) {
        pool.port(old).tell(ToPool::Gone);
    }
}

impl Host for Router {
    fn handle(&self, verb: Verb) -> Result<Outcome, VerbError> {
        match &verb {
            Verb::Add { bdf } => self.add(bdf.0, &verb),
            Verb::Available { bdf, port } => self.available(bdf.0, port.as_deref()),
            Verb::Remove { bdf } | Verb::Unavailable { bdf } => self.wherever(bdf.0, &verb),
            Verb::List => Ok(self.list()),
            Verb::Borrow { fdid, .. } => self.borrow(fdid.0, &verb),
            Verb::Return { fdid } => self.give_back(fdid.0, &verb),
            Verb::Revoke { bdf, .. } => self.wherever(bdf.0, &verb),
            Verb::QuarantineRetry { bdf, .. } => self.retry(bdf.0),
            Verb::QuarantineClear { bdf, i_know, by } => {
                self.clear(bdf.0, *i_know, by.as_deref().unwrap_or_default(), &verb)
            }
            Verb::Quarantine => Ok(self.quarantined()),
            Verb::Status => Ok(Outcome::Status(Box::new(self.report()))),
        }
    }

    /// Ports, paths and leases go on.
    fn stop(&self) {}
}
