//! The host behind the verbs: ports, leases and guest sessions.

mod borrow;
mod claim;
mod folder;
mod functions;
mod held;
#[cfg(test)]
mod held_tests;
mod lend;
mod port;
#[cfg(test)]
mod ports_tests;
mod report;
mod served;
#[cfg(test)]
mod tests;

use super::Host;
use super::vocabulary::{ErrorCode, Outcome, Verb, VerbError};
use crate::config::{Config, FarEnd, PortConfig};
use crate::jail::Report;
use crate::keeper::Keeper;
use crate::pool::{PoolService, RedbStore, StoreError};
use crate::warden::holders_folder;
use crate::worker::holders::{HolderError, Holders};
use borrow::{Borrowed, Trust};
use claim::Claims;
use functions::KernelFunctions;
use lend::Lent;
use port::OpenPort;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vfio_shim::model::{Bdf, Fdid};
use vfio_shim::ntb::NtbPort;
use vfio_shim::ntb::hw::IntelPort;
use vfio_shim::path::{EngineError, LeasePool, PortStatus};
use vfio_shim::sysfs::Sysfs;

pub(in crate::daemon) use borrow::no_room_for;
pub(crate) use folder::listen;
pub use functions::{Functions, OpenFunction};
pub(in crate::daemon) use lend::way_out;
pub use served::Workers;

/// Why the host could not start.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A port's NTB could not be opened.
    #[error("port `{name}` ({bdf}) cannot be opened")]
    Open {
        /// The port's name.
        name: String,
        /// Its function.
        bdf: Bdf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A port's threads could not be started.
    #[error("port `{name}` cannot start")]
    Start {
        /// The port's name.
        name: String,
        /// Why.
        #[source]
        source: EngineError,
    },
    /// A VMM of an earlier port has the NTB's window.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// The store of leases cannot be had.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Everything that the verbs act on. The lock is held for look-ups and changes only; a verb that
/// waits for a kernel or a peer has a claim instead. Drop order: guest sessions, then lent
/// functions, then ports.
#[derive(Default)]
struct State {
    borrowed: BTreeMap<Fdid, Borrowed>,
    lent: BTreeMap<Bdf, Lent>,
    claims: Claims,
    /// What is being borrowed: trust is judged with it before it is there.
    wished: BTreeMap<Fdid, Trust>,
    /// What is being offered, and through which port.
    offering: BTreeMap<Bdf, usize>,
}

struct LocalHost {
    config: Config,
    functions: Arc<dyn Functions>,
    workers: Workers,
    /// Which VMMs have a port's window.
    holders: Arc<Holders>,
    started: Instant,
    state: Mutex<State>,
    unclaimed: Condvar,
    ports: Vec<OpenPort>,
    /// Which of the configuration's ports the first of them is.
    first: usize,
    /// After the ports: it writes down how their leases ended. None in a port's own process, whose
    /// daemon has it.
    pool: Option<PoolService>,
    /// What a port's own process has been left with.
    sandbox: Option<Report>,
}

/// How a port's process serves VMMs, and what it has been left with; `None` = everything.
pub type Process = (Workers, Option<Report>);

/// How long `stop` lets verbs under way end by themselves.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// What a host is made of: its NTBs, open, in the configuration's order, and its functions.
pub struct Machine {
    /// One for each port of the configuration.
    pub ports: Vec<Arc<dyn NtbPort>>,
    /// What can be lent.
    pub functions: Arc<dyn Functions>,
}

impl Machine {
    /// This machine as this process can have it: by its own rights where it is root, else by the
    /// keeper.
    fn of(config: &Config, ports: &[PortConfig], workers: &Workers) -> Result<Self, HostError> {
        match opens_by_itself() {
            true => Self::of_the_kernel(ports, workers),
            false => Self::by_keeper(ports, &Keeper::at(&config.keeper.folder), workers),
        }
    }

    /// This machine, by sysfs and VFIO.
    fn of_the_kernel(ports: &[PortConfig], workers: &Workers) -> Result<Self, HostError> {
        let sysfs = Sysfs::default();
        let open = |port: &PortConfig| {
            let opened = IntelPort::open(port.bdf, &sysfs);
            opened.map_err(|error| cannot_open(port, error))
        };
        let ports = open_all(ports, open)?;
        let functions = Arc::new(KernelFunctions::new(sysfs, None, workers.warden()));
        Ok(Self { ports, functions })
    }

    /// The same, opened by a keeper: this process needs no right but to be heard there.
    fn by_keeper(
        ports: &[PortConfig],
        keeper: &Keeper,
        workers: &Workers,
    ) -> Result<Self, HostError> {
        let sysfs = Sysfs::default();
        let open = |port: &PortConfig| {
            let opened = keeper.open(port.bdf).map_err(|e| cannot_open(port, e))?;
            let opened = IntelPort::open_with(port.bdf, &sysfs, opened);
            opened.map_err(|error| cannot_open(port, error))
        };
        let ports = open_all(ports, open)?;
        let functions = KernelFunctions::new(sysfs, Some(keeper.clone()), workers.warden());
        let functions = Arc::new(functions);
        Ok(Self { ports, functions })
    }
}

/// Whether this process opens functions by its own rights.
pub(crate) fn opens_by_itself() -> bool {
    rustix::process::geteuid().is_root()
}

fn open_all(
    ports: &[PortConfig],
    open: impl Fn(&PortConfig) -> Result<IntelPort, HostError>,
) -> Result<Vec<Arc<dyn NtbPort>>, HostError> {
    let open = |port| Ok(Arc::new(open(port)?) as Arc<dyn NtbPort>);
    ports.iter().map(open).collect()
}

fn cannot_open(
    port: &PortConfig,
    error: impl std::error::Error + Send + Sync + 'static,
) -> HostError {
    HostError::Open {
        name: port.name.clone(),
        bdf: port.bdf,
        source: Box::new(error),
    }
}

/// Guests' memory is pinned on behalf of this process, and counted. Root takes what it needs, and
/// for any other whoever starts this process sets how much there may be.
pub(crate) fn raise_locked_memory() {
    let raise = |maximum| {
        let (resource, current) = (Resource::Memlock, maximum);
        setrlimit(resource, Rlimit { current, maximum })
    };
    let allowed = getrlimit(Resource::Memlock).maximum;
    if let Err(error) = raise(None).or_else(|_| raise(allowed)) {
        tracing::warn!(%error, "the limit of locked memory cannot be raised");
    }
    if let Some(bytes) = getrlimit(Resource::Memlock).maximum {
        tracing::warn!(
            "this process may lock {bytes} bytes of memory, and no guests with more can borrow \
             through it: start it with LimitMEMLOCK=infinity, or `ulimit -l unlimited`"
        );
    }
}

/// Opens this machine's ports and starts their threads.
pub fn start(config: &Config, workers: Workers) -> Result<Arc<dyn Host>, HostError> {
    raise_locked_memory();
    start_on(
        config,
        Machine::of(config, &config.ports, &workers)?,
        workers,
    )
}

/// The same on another machine, such as one of the soft fabric.
pub fn start_on(
    config: &Config,
    machine: Machine,
    workers: Workers,
) -> Result<Arc<dyn Host>, HostError> {
    Ok(Arc::new(LocalHost::new(config, machine, workers)?))
}

/// A host of one port alone, whose leases another process writes down: the `at`th port of the
/// configuration, with a machine that has this one only.
pub fn start_port(
    config: &Config,
    at: usize,
    machine: Machine,
    process: Process,
    leases: Arc<dyn LeasePool>,
) -> Result<Arc<dyn Host>, HostError> {
    let host = LocalHost::of_one_port(config, at, machine, process, leases)?;
    Ok(Arc::new(host))
}

/// The same with this machine's own NTB and functions.
pub fn start_own_port(
    config: &Config,
    at: usize,
    process: Process,
    leases: Arc<dyn LeasePool>,
) -> Result<Arc<dyn Host>, HostError> {
    let machine = Machine::of(config, &config.ports[at..=at], &process.0)?;
    start_port(config, at, machine, process, leases)
}

fn refuse(code: ErrorCode, text: impl Into<String>) -> VerbError {
    VerbError::new(code, text)
}

impl LocalHost {
    fn new(config: &Config, machine: Machine, workers: Workers) -> Result<Self, HostError> {
        assert_eq!(machine.ports.len(), config.ports.len(), "one NTB each");
        let ports = config.ports.iter().zip(machine.ports).enumerate();
        // No port takes a message before the leases of the last daemon are known.
        let store = RedbStore::open(&config.state)?;
        let pool = PoolService::start(store, config.limits.lease_ttl.as_millis() as u64)?;
        let start = |(at, (port, open)): (usize, (&PortConfig, _))| {
            let told = (config.node_id, config.limits.of_a_port());
            let known = (port, config.far_end(at));
            OpenPort::start(told, known, open, pool.port(&port.name))
        };
        let ports = ports.map(start).collect::<Result<_, HostError>>()?;
        pool.settle();
        let functions = machine.functions;
        Ok(Self::made_of(
            config,
            functions,
            workers,
            ports,
            0,
            Some(pool),
        ))
    }

    fn of_one_port(
        config: &Config,
        at: usize,
        machine: Machine,
        (workers, sandbox): Process,
        leases: Arc<dyn LeasePool>,
    ) -> Result<Self, HostError> {
        assert_eq!(machine.ports.len(), 1, "its own NTB alone");
        let told = (config.node_id, config.limits.of_a_port());
        let start = |open| {
            let known = (&config.ports[at], config.far_end(at));
            OpenPort::start(told, known, open, leases.clone())
        };
        let ports = machine.ports.into_iter().map(start);
        let ports = ports.collect::<Result<_, HostError>>()?;
        let functions = machine.functions;
        let host = Self::made_of(config, functions, workers, ports, at, None);
        Ok(Self { sandbox, ..host })
    }

    fn made_of(
        config: &Config,
        functions: Arc<dyn Functions>,
        workers: Workers,
        ports: Vec<OpenPort>,
        first: usize,
        pool: Option<PoolService>,
    ) -> Self {
        // A port of its own is survived by its VMMs, and so by their records.
        let own = pool.is_none().then(|| config.port_folder(&ports[0].name));
        let vmms = workers.vmms(own.map(|own| holders_folder(&own)));
        Self {
            config: config.clone(),
            functions,
            workers,
            holders: Arc::new(Holders::of(vmms)),
            started: Instant::now(),
            state: Mutex::default(),
            unclaimed: Condvar::new(),
            ports,
            first,
            pool,
            sandbox: None,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Poisoned = a verb panicked; what it had acquired has been undone by its guards.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The port that leads to a node.
    fn port_to(&self, node: u16) -> Result<(usize, &OpenPort), VerbError> {
        let leads = |at: &usize| self.ports[*at].peer_node() == Some(node);
        let leading: Vec<usize> = (0..self.ports.len()).filter(leads).collect();
        let far = |at: usize| (&self.ports[at].name[..], &self.ports[at].far);
        check_ways(node, leading.iter().map(|at| far(*at)))?;
        let found = leading.first().map(|at| (*at, &self.ports[*at]));
        found.ok_or_else(|| {
            let statuses: Vec<_> = self.ports.iter().map(|p| (p, p.engine.status())).collect();
            let known = statuses.iter().map(|(port, status)| far_end(port, status));
            let known: Vec<String> = known.collect();
            let mismatch = |(_, status): &(_, Option<PortStatus>)| {
                status
                    .as_ref()
                    .is_some_and(|status| status.version_mismatch)
            };
            let code = match statuses.iter().any(mismatch) {
                true => ErrorCode::Version,
                false => ErrorCode::NoSession,
            };
            let text = format!(
                "no port leads to node {node:x} ({}): check the fdid with `sublet list`, and \
                 the link with `sublet status`",
                known.join(", ")
            );
            refuse(code, text)
        })
    }
}

/// Refused, where several ports lead to a node by what their peers say alone: one may be another
/// host, and would have the memory of the guest.
pub(super) fn check_ways<'a>(
    node: u16,
    ports: impl Iterator<Item = (&'a str, &'a FarEnd)>,
) -> Result<(), VerbError> {
    let said = ports.filter(|(_, far)| !far.is_declared());
    let names: Vec<&str> = said.map(|(name, _)| name).collect();
    if names.len() < 2 {
        return Ok(());
    }
    let text = format!(
        "the far ends of several ports ({}) say that they are node {node:x}, and one may be another \
         host: write peer_node = {node} under the [[port]] of each cable that leads there",
        names.join(", ")
    );
    Err(refuse(ErrorCode::Config, text))
}

/// Who is at the far end of a port, or why nobody is.
fn far_end(port: &OpenPort, status: &Option<PortStatus>) -> String {
    let name = &port.name;
    let Some(status) = status else {
        return format!("{name} has stopped");
    };
    match port.far_end(Some(status)) {
        Some(Ok(peer)) => format!("{name} leads to node {peer:x}"),
        Some(Err(why)) => format!("{name}: {why}"),
        None => format!("{name} has no open session: {}", status.link),
    }
}

impl Host for LocalHost {
    fn handle(&self, verb: Verb) -> Result<Outcome, VerbError> {
        self.reap();
        match verb {
            Verb::Add { bdf } => self.add(bdf.0),
            Verb::Remove { bdf } => self.remove(bdf.0),
            Verb::Available { bdf, port } => self.available(bdf.0, port.as_deref()),
            Verb::Unavailable { bdf } => self.unavailable(bdf.0),
            Verb::List => self.list(),
            Verb::Borrow {
                fdid,
                socket,
                ram,
                bars,
                trust_vmm,
                trust_domain,
            } => {
                let wish = borrow::Wish {
                    socket,
                    ram,
                    bars,
                    trust_vmm,
                    trust_domain,
                };
                self.borrow(fdid.0, wish)
            }
            Verb::Return { fdid } => self.give_back(fdid.0),
            Verb::Revoke { bdf, deadline_s } => self.revoke(bdf.0, deadline_s),
            Verb::Quarantine => self.quarantined(),
            Verb::QuarantineRetry { bdf, held } => self.retry(bdf.0, held),
            Verb::QuarantineClear { bdf, i_know, by } => {
                self.clear(bdf.0, i_know, by.as_deref().unwrap_or_default())
            }
            Verb::Status => Ok(Outcome::Status(Box::new(self.report()))),
        }
    }

    fn stop(&self) {
        if !self.close_claims(STOP_WAIT) {
            // A verb waits for a peer or a kernel: ending the sessions ends its waiting.
            self.ports.iter().for_each(|port| port.engine.stop());
            self.close_claims(Duration::MAX);
        }
        let borrowed = std::mem::take(&mut self.state().borrowed);
        for held in borrowed.into_values() {
            held.end();
        }
        // The engines first: they close every path before the functions go back.
        self.ports.iter().for_each(|port| port.engine.stop());
        let lent = std::mem::take(&mut self.state().lent);
        drop(lent);
    }
}
