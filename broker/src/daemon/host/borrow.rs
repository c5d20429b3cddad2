//! The borrower's verbs: a function of another host, served to one VMM by a worker.

use super::claim::Named;
use super::folder::own_socket;
use super::lend::from_refusal;
use super::port::OpenPort;
use super::served::Server;
use super::{LocalHost, State, refuse};
use crate::daemon::vocabulary::{
    Availability, BarMode, BdfText, BorrowedFunction as Told, ErrorCode, FdidText,
    FunctionDescription, Hex64, Location, Outcome, VerbError,
};
use std::path::PathBuf;
use std::sync::Arc;
use vfio_shim::model::Fdid;
use vfio_shim::path::{CallError, Engine, LeaseId, PoolEntry};
use vmm_glue::vfio_user::SessionState;

/// What the operator wishes.
pub(super) struct Wish {
    pub(super) socket: PathBuf,
    pub(super) ram: Option<u64>,
    pub(super) bars: Option<BarMode>,
    pub(super) trust_vmm: bool,
    pub(super) trust_domain: Option<String>,
}

/// What trust is judged by.
pub(super) struct Trust {
    adapter: usize,
    bars: BarMode,
    domain: String,
}

/// A lease that is being made; forgotten on drop.
struct Wished<'a> {
    host: &'a LocalHost,
    fdid: Fdid,
}

impl Drop for Wished<'_> {
    fn drop(&mut self) {
        self.host.state().wished.remove(&self.fdid);
    }
}

/// A borrowed function and its worker.
pub(super) struct Borrowed {
    pub(super) lease: LeaseId,
    pub(super) entry: PoolEntry,
    pub(super) socket: PathBuf,
    pub(super) bars: BarMode,
    pub(super) ram: Option<u64>,
    pub(super) adapter: usize,
    pub(super) trust_domain: String,
    pub(super) lost: Option<String>,
    /// It was returned, and is here as long as its worker holds on.
    returned: bool,
    pub(super) worker: Option<Arc<Server>>,
    engine: Arc<Engine>,
}

impl Borrowed {
    /// Ends the guest session and gives the lease back.
    pub(super) fn end(&self) -> Option<CallError> {
        self.worker.as_ref()?.end(&self.engine)
    }

    /// Why what it had stays in quarantine though it is over, if it does.
    fn held(&self) -> Option<String> {
        self.worker.as_ref()?.held()
    }

    /// Why the lease is lost, if it is.
    pub(super) fn lost(&self) -> Option<String> {
        let now = self.worker.as_ref().and_then(|worker| worker.lost());
        self.held().or(now).or_else(|| self.lost.clone())
    }
}

pub(super) fn from_call(error: &CallError) -> VerbError {
    match error {
        CallError::Refused(refusal) => from_refusal(refusal),
        CallError::Held => refuse(ErrorCode::Busy, error.to_string()),
        CallError::Timeout(_) => refuse(ErrorCode::Timeout, error.to_string()),
        CallError::Gone(_) => refuse(ErrorCode::NoSession, error.to_string()),
        other => refuse(ErrorCode::Internal, other.to_string()),
    }
}

impl LocalHost {
    /// Ends the workers of lost leases whose VMM has gone; the leases stay in `status` as lost
    /// until they are returned or borrowed again.
    pub(super) fn reap(&self) {
        let stays = |held: &Borrowed| !held.returned || held.held().is_some();
        self.state().borrowed.retain(|_, held| stays(held));
        let lost = |(fdid, held): (&Fdid, &Borrowed)| {
            let worker = held
                .worker
                .as_ref()
                .filter(|worker| worker.held().is_none());
            let worker = Arc::clone(worker?);
            let why = worker.lost()?;
            Some((*fdid, worker, why))
        };
        // A worker in another process is asked, which takes its time: not under the lock.
        let lost: Vec<_> = self.state().borrowed.iter().filter_map(lost).collect();
        for (fdid, worker, why) in lost {
            if worker.view().is_connected() {
                continue;
            }
            let ended = {
                let mut state = self.state();
                let held = state.borrowed.get_mut(&fdid);
                let same = |held: &Arc<Server>| Arc::ptr_eq(held, &worker);
                let held = held.filter(|held| held.worker.as_ref().is_some_and(same));
                held.map(|held| {
                    held.lost = Some(why);
                    held.worker = None;
                    Arc::clone(&held.engine)
                })
            };
            if let Some(engine) = ended {
                worker.end(&engine);
            }
        }
    }

    pub(super) fn borrow(&self, fdid: Fdid, wish: Wish) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Far(fdid))?;
        self.check_free(fdid)?;
        let (adapter, port) = self.port_to(fdid.node)?;
        let bars = wish.bars.unwrap_or(self.config.policy.bars);
        let domain = wish.trust_domain.clone();
        let domain = domain.unwrap_or_else(|| port.trust_domain.clone());
        let trust = Trust {
            adapter,
            bars,
            domain: domain.clone(),
        };
        let _wished = self.wished(fdid, trust, wish.trust_vmm)?;
        let own_folder = wish.socket.as_os_str().is_empty();
        let path = match own_folder {
            true => own_socket(&self.config.sockets, fdid),
            false => self.config.socket_path(&wish.socket),
        };
        let endpoint = self.workers.listen(&path, own_folder)?;
        let wanted = (fdid.bdf, wish.ram);
        let (lease, entry, server) = self.serve(&port.engine, wanted, endpoint, bars)?;
        let held = Borrowed {
            lease,
            entry,
            socket: path,
            bars,
            ram: wish.ram,
            adapter,
            trust_domain: domain,
            lost: None,
            returned: false,
            worker: Some(Arc::new(server)),
            engine: Arc::clone(&port.engine),
        };
        let told = told(fdid, &held, self.first + adapter);
        self.state().borrowed.insert(fdid, held);
        Ok(Outcome::Borrowed(Box::new(told)))
    }

    /// Refuses what is borrowed already, but for a lost lease whose worker has ended.
    fn check_free(&self, fdid: Fdid) -> Result<(), VerbError> {
        if fdid.node == self.config.node_id {
            let text = format!("{fdid} is a function of this very host: give it to a VM by VFIO");
            return Err(refuse(ErrorCode::NotAllowed, text));
        }
        let mut state = self.state();
        if let Some(held) = state.borrowed.get(&fdid) {
            if held.worker.is_some() || held.lost.is_none() {
                let text = format!(
                    "{fdid} is borrowed here already, at {}: `sublet return {fdid}` first",
                    held.socket.display()
                );
                return Err(refuse(ErrorCode::Taken, text));
            }
            state.borrowed.remove(&fdid);
        }
        Ok(())
    }

    /// Refused where trust domains would meet. What it returns stands for the lease until that is
    /// there: of two verbs at once, the second sees the first.
    fn wished(&self, fdid: Fdid, wish: Trust, trust_vmm: bool) -> Result<Wished<'_>, VerbError> {
        let mut state = self.state();
        let borrowed = state.borrowed.iter();
        let borrowed = borrowed.map(|(fdid, held)| {
            let domain = held.trust_domain.as_str();
            (*fdid, held.adapter, held.bars, domain)
        });
        let wished = state.wished.iter();
        let wished = wished.map(|(fdid, w)| (*fdid, w.adapter, w.bars, w.domain.as_str()));
        let others = borrowed
            .chain(wished)
            .filter(|(_, adapter, ..)| *adapter == wish.adapter)
            .map(|(fdid, _, bars, domain)| (fdid, bars, domain));
        let port = &self.ports[wish.adapter];
        self.check_room_to_borrow(&state, wish.adapter)?;
        self.check_room_of_domain(&state, &wish.domain)?;
        trust(port, others, wish.bars, trust_vmm, &wish.domain)?;
        state.wished.insert(fdid, wish);
        Ok(Wished { host: self, fdid })
    }

    /// Refused when as many as the configuration allows are borrowed for this trust domain, on
    /// whichever ports of this process, those included that other verbs are about to borrow. Of
    /// ports apart, the daemon counts all (`router/tenants.rs`).
    fn check_room_of_domain(&self, state: &State, domain: &str) -> Result<(), VerbError> {
        let limit = self.config.limits.functions_per_domain as usize;
        let held = state.borrowed.values();
        let held = held.filter(|held| held.trust_domain == domain && held.lost().is_none());
        let wished = state.wished.values().filter(|w| w.domain == domain);
        if held.count() + wished.count() < limit {
            return Ok(());
        }
        Err(no_room_for(domain, self.config.limits.functions_per_domain))
    }

    /// Refused when as many as the configuration allows are borrowed through this port, those
    /// included that other verbs are about to borrow. A lost lease takes no room.
    fn check_room_to_borrow(&self, state: &State, adapter: usize) -> Result<(), VerbError> {
        let limit = self.config.limits.functions_per_port as usize;
        let held = state.borrowed.values();
        let held = held.filter(|held| held.adapter == adapter && held.lost().is_none());
        let wished = state.wished.values().filter(|w| w.adapter == adapter);
        if held.count() + wished.count() < limit {
            return Ok(());
        }
        let text = format!(
            "{limit} functions are borrowed through port `{}`, its limit: return one first, or \
             raise limits.functions_per_port",
            self.ports[adapter].name
        );
        Err(refuse(ErrorCode::Limit, text))
    }

    pub(super) fn give_back(&self, fdid: Fdid) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Far(fdid))?;
        let worker = {
            let state = self.state();
            let Some(held) = state.borrowed.get(&fdid) else {
                let text = format!("{fdid} is not borrowed here: see `sublet status`");
                return Err(refuse(ErrorCode::NoLease, text));
            };
            held.worker.clone().filter(|_| held.bars == BarMode::Mapped)
        };
        if let Some(SessionState::Connected { pid }) = worker.and_then(|w| w.view().state) {
            let text = format!(
                "the VMM (process {pid}) has the NTB's window mapped: end it first, or its \
                 stores could reach the next tenant"
            );
            return Err(refuse(ErrorCode::Busy, text));
        }
        let Some(mut held) = self.state().borrowed.remove(&fdid) else {
            return Ok(Outcome::Done);
        };
        match held.end() {
            None => Ok(Outcome::Done),
            Some(CallError::Held) => {
                let why = held.held().unwrap_or_else(|| CallError::Held.to_string());
                held.returned = true;
                self.state().borrowed.insert(fdid, held);
                Err(refuse(ErrorCode::Busy, why))
            }
            Some(error) => Err(from_call(&error)),
        }
    }
}

pub(in crate::daemon) fn no_room_for(domain: &str, limit: u32) -> VerbError {
    let text = format!(
        "{limit} functions are borrowed for trust domain `{domain}`, its limit: return one first, \
         or raise limits.functions_per_domain"
    );
    refuse(ErrorCode::Limit, text)
}

/// A VMM with mapped BARs is as powerful as the port: it must be trusted, and all that goes
/// through the port must be of its domain, as long as it is there.
pub(super) fn trust<'a>(
    port: &OpenPort,
    mut others: impl Iterator<Item = (Fdid, BarMode, &'a str)>,
    bars: BarMode,
    trust_vmm: bool,
    domain: &str,
) -> Result<(), VerbError> {
    let name = &port.name;
    let mapped = bars == BarMode::Mapped;
    if mapped && !trust_vmm {
        let text = format!(
            "mapped BARs make the VMM as powerful as port `{name}`: say --trust-vmm if it is to \
             be, or use --bars trapped"
        );
        return Err(refuse(ErrorCode::Trust, text));
    }
    if mapped && !port.trust_vmm {
        let text = format!(
            "the configuration lets no VMM have port `{name}`'s window: set trust_vmm = true on \
             the port, or use --bars trapped"
        );
        return Err(refuse(ErrorCode::Trust, text));
    }
    if mapped && domain != port.trust_domain {
        let own = &port.trust_domain;
        let text = format!(
            "port `{name}` is of trust domain `{own}`, and a mapped lease of `{domain}` could \
             reach what is of `{own}`: use --bars trapped"
        );
        return Err(refuse(ErrorCode::Trust, text));
    }
    let clash =
        others.find(|(_, held, other)| *other != domain && (mapped || *held == BarMode::Mapped));
    match clash {
        None => Ok(()),
        Some((fdid, _, other)) => {
            let text = format!(
                "{fdid} is borrowed through port `{name}` for trust domain `{other}`, and this \
                 lease is for `{domain}`: with mapped BARs on a port all its leases are of one \
                 domain. Return {fdid} first, or use --bars trapped for both"
            );
            Err(refuse(ErrorCode::Trust, text))
        }
    }
}

fn told(fdid: Fdid, held: &Borrowed, adapter: usize) -> Told {
    Told {
        fdid: FdidText::from(fdid),
        function: FunctionDescription::from(&held.entry.ids),
        available: Availability::InUse,
        location: Location::Remote,
        adapter: adapter as u32,
        node_id: fdid.node,
        remote_bdf: BdfText::from(fdid.bdf),
        physical_slot: None,
        serial: (held.entry.serial != 0).then_some(Hex64(held.entry.serial)),
        uuid: None,
        local_users: 1,
        local_virtual_device: None,
        driver: None,
        lease: Hex64(held.lease.0),
        socket: held.socket.clone(),
        bars: held.bars,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::daemon::host::{KernelFunctions, Machine, Workers};
    use std::path::Path;
    use vfio_shim::ntb::soft::{SoftLink, SoftPortConfig};
    use vfio_shim::sysfs::Sysfs;

    fn host(limits: &str) -> (LocalHost, tempfile::TempDir) {
        let config = SoftPortConfig {
            window_bytes: [64 << 20; 2],
        };
        let machine = Machine {
            ports: vec![SoftLink::new([config; 2]).unwrap().port(0)],
            functions: Arc::new(KernelFunctions::new(Sysfs::new("/sys"), None, None)),
        };
        let text = "[node]\nid = 4\nname = \"a\"\n\n[[port]]\nname = \"soft\"\nbdf = \"01:00.0\"\n\
                    peers = \"cable\"\ntrust_domain = \"a\"\ntrust_vmm = true\n";
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().display();
        let text = format!("{text}{limits}[daemon]\nstate = \"{state}\"\n");
        let config = Config::parse(Path::new("test.toml"), &text).unwrap();
        let host = LocalHost::new(&config, machine, Workers::Threads).unwrap();
        (host, dir)
    }

    #[test]
    fn trust_domain_has_as_many_functions_as_it_may_and_not_one_more() {
        let (host, _dir) = host("[limits]\nfunctions_per_domain = 2\n");
        let wish = |fdid: &str, domain: &str| {
            let trust = Trust {
                adapter: 0,
                bars: BarMode::Trapped,
                domain: domain.into(),
            };
            host.wished(fdid.parse().unwrap(), trust, false)
        };
        let first = wish("80101", "a").unwrap();
        let _second = wish("80102", "a").unwrap();
        let refused = wish("80103", "a").map(drop).unwrap_err();
        let words = "2 functions are borrowed for trust domain `a`, its limit: return one first, \
                     or raise limits.functions_per_domain";
        assert_eq!(
            (refused.code, refused.to_string()),
            (ErrorCode::Limit, words.into())
        );
        let _other = wish("80103", "b").unwrap();
        drop(first);
        wish("80104", "a").map(drop).unwrap();
    }

    #[test]
    fn two_borrows_at_once_do_not_bring_trust_domains_together() {
        let (host, _dir) = host("");
        let fdids = ["80101", "80102"].map(|text| text.parse().unwrap());
        let wish = |bars, domain: &str| Trust {
            adapter: 0,
            bars,
            domain: domain.into(),
        };
        let mapped = host.wished(fdids[0], wish(BarMode::Mapped, "a"), true);
        let other = || host.wished(fdids[1], wish(BarMode::Trapped, "b"), false);
        let refused = other().map(drop).unwrap_err();
        assert!(refused.to_string().contains("trust domain"), "{refused}");
        drop(mapped);
        assert!(other().is_ok());
    }
}
