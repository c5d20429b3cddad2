//! The borrower's verbs: a function of another host, served to one VMM by a worker thread.

use super::lend::from_refusal;
use super::{LocalHost, State, refuse};
use crate::daemon::vocabulary::{
    Availability, BarMode, BdfText, BorrowedFunction as Told, ErrorCode, FdidText,
    FunctionDescription, Hex64, Location, Outcome, VerbError,
};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use vfio_shim::model::{Fdid, Function};
use vfio_shim::path::{BorrowedFunction, CallError, Engine, LeaseId, PoolEntry};
use vmm_glue::vfio_user::{self, Endpoint, MemoryCheck, Options, SessionShared, SessionState};

/// What the operator wishes.
pub(super) struct Wish {
    pub(super) socket: PathBuf,
    pub(super) ram: Option<u64>,
    pub(super) bars: Option<BarMode>,
    pub(super) trust_vmm: bool,
}

/// A borrowed function and its worker.
pub(super) struct Borrowed {
    pub(super) lease: LeaseId,
    pub(super) entry: PoolEntry,
    pub(super) socket: PathBuf,
    pub(super) bars: BarMode,
    pub(super) ram: Option<u64>,
    pub(super) adapter: usize,
    pub(super) shared: Arc<SessionShared>,
    pub(super) lost: Option<String>,
    pub(super) worker: Option<Worker>,
    engine: Arc<Engine>,
}

/// The worker thread of one borrowed function.
pub(super) struct Worker {
    pub(super) function: Arc<BorrowedFunction>,
    stop: OwnedFd,
    handle: JoinHandle<()>,
}

impl Worker {
    /// Ends the guest session, undoing it, and the endpoint.
    fn end(self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        let _ = self.handle.join();
    }
}

impl Borrowed {
    /// Ends the guest session and gives the lease back.
    pub(super) fn end(mut self) -> Option<CallError> {
        let worker = self.worker.take()?;
        let lost = worker.function.lost().is_some();
        worker.end();
        if lost {
            return None;
        }
        self.engine.give_back(self.lease).err()
    }

    /// Why the lease is lost, if it is.
    pub(super) fn lost(&self) -> Option<String> {
        let now = self
            .worker
            .as_ref()
            .and_then(|worker| worker.function.lost());
        now.or_else(|| self.lost.clone())
    }
}

/// Ends the workers of lost leases whose VMM has gone; the leases stay in `status` as lost until
/// they are returned or borrowed again.
pub(super) fn reap(borrowed: &mut BTreeMap<Fdid, Borrowed>) {
    for held in borrowed.values_mut() {
        let connected = matches!(
            held.shared.state(),
            SessionState::Connected { .. } | SessionState::Undoing { .. }
        );
        let lost = held
            .worker
            .as_ref()
            .and_then(|worker| worker.function.lost());
        if let (Some(why), false) = (lost, connected) {
            held.lost = Some(why);
            if let Some(worker) = held.worker.take() {
                worker.end();
            }
        }
    }
}

fn from_call(error: &CallError) -> VerbError {
    match error {
        CallError::Refused(refusal) => from_refusal(refusal),
        CallError::Timeout(_) => refuse(ErrorCode::Timeout, error.to_string()),
        CallError::Gone(_) => refuse(ErrorCode::NoSession, error.to_string()),
        other => refuse(ErrorCode::Internal, other.to_string()),
    }
}

impl LocalHost {
    pub(super) fn borrow(
        &self,
        state: &mut State,
        fdid: Fdid,
        wish: Wish,
    ) -> Result<Outcome, VerbError> {
        if let Some(held) = state.borrowed.get(&fdid) {
            if held.lost().is_none() || held.worker.is_some() {
                let text = format!(
                    "{fdid} is borrowed here already, at {}: `sublet return {fdid}` first",
                    held.socket.display()
                );
                return Err(refuse(ErrorCode::Taken, text));
            }
            state.borrowed.remove(&fdid);
        }
        if fdid.node == self.config.node_id {
            let text = format!("{fdid} is a function of this very host: give it to a VM by VFIO");
            return Err(refuse(ErrorCode::NotAllowed, text));
        }
        let (adapter, port) = self.port_to(fdid.node)?;
        let bars = wish.bars.unwrap_or(self.config.policy.bars);
        check_trust(bars, wish.trust_vmm, port.trust_vmm, &port.name)?;
        let path = self.config.socket_path(&wish.socket);
        let endpoint = Endpoint::bind(&path)
            .map_err(|error| refuse(ErrorCode::Socket, vfio_shim::path::words(&error)))?;
        let (lease, entry, function) = port
            .engine
            .borrow(fdid.bdf, wish.ram)
            .map_err(|error| from_call(&error))?;
        let shared = Arc::new(SessionShared::default());
        let worker = self.serve(endpoint, &function, bars, &shared);
        let worker = worker.inspect_err(|_| {
            let _ = port.engine.give_back(lease);
        })?;
        let held = Borrowed {
            lease,
            entry,
            socket: path,
            bars,
            ram: wish.ram,
            adapter,
            shared,
            lost: None,
            worker: Some(worker),
            engine: Arc::clone(&port.engine),
        };
        let told = told(fdid, &held);
        state.borrowed.insert(fdid, held);
        Ok(Outcome::Borrowed(Box::new(told)))
    }

    fn serve(
        &self,
        endpoint: Endpoint,
        function: &Arc<BorrowedFunction>,
        bars: BarMode,
        shared: &Arc<SessionShared>,
    ) -> Result<Worker, VerbError> {
        let failed = |error: std::io::Error| refuse(ErrorCode::Kernel, error.to_string());
        let options = Options {
            bars: match bars {
                BarMode::Trapped => vfio_user::BarMode::Trapped,
                BarMode::Mapped => vfio_user::BarMode::Mapped,
            },
            memory_check: match self.config.policy.memory_check {
                true => MemoryCheck::On,
                false => MemoryCheck::Off,
            },
            maps_max: self.config.limits.guest_maps,
            bytes_max: self.config.limits.guest_mapped_bytes.unwrap_or(u64::MAX),
            ..Options::default()
        };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = eventfd(0, flags).map_err(|error| failed(error.into()))?;
        let stopped = stop.try_clone().map_err(failed)?;
        let served: Arc<dyn Function> = function.clone();
        let shared = Arc::clone(shared);
        let builder = std::thread::Builder::new().name(format!("vmm-lease-{}", function.lease()));
        let handle = builder.spawn(move || {
            if let Err(error) = endpoint.serve(&served, &options, stopped.as_fd(), &shared) {
                tracing::error!("a worker has ended: {}", vfio_shim::path::words(&error));
            }
        });
        Ok(Worker {
            function: Arc::clone(function),
            stop,
            handle: handle.map_err(failed)?,
        })
    }

    pub(super) fn give_back(&self, state: &mut State, fdid: Fdid) -> Result<Outcome, VerbError> {
        let Some(held) = state.borrowed.get(&fdid) else {
            let text = format!("{fdid} is not borrowed here: see `sublet status`");
            return Err(refuse(ErrorCode::NoLease, text));
        };
        if let (BarMode::Mapped, SessionState::Connected { pid }) = (held.bars, held.shared.state())
        {
            let text = format!(
                "the VMM (process {pid}) has the NTB's window mapped: end it first, or its stores \
                 could reach the next tenant"
            );
            return Err(refuse(ErrorCode::Busy, text));
        }
        match state.borrowed.remove(&fdid).and_then(Borrowed::end) {
            None => Ok(Outcome::Done),
            Some(error) => Err(from_call(&error)),
        }
    }
}

fn check_trust(
    bars: BarMode,
    trust_vmm: bool,
    port_is_one_domain: bool,
    port: &str,
) -> Result<(), VerbError> {
    if bars == BarMode::Trapped || (trust_vmm && port_is_one_domain) {
        return Ok(());
    }
    let text = if trust_vmm {
        format!(
            "mapped BARs make the VMM as powerful as port `{port}`, and the configuration does not \
             say that all its leases are of one trust domain: set trust_vmm = true on the port, or \
             use --bars trapped"
        )
    } else {
        format!(
            "mapped BARs make the VMM as powerful as port `{port}`: say --trust-vmm if it is, or \
             use --bars trapped"
        )
    };
    Err(refuse(ErrorCode::Trust, text))
}

fn told(fdid: Fdid, held: &Borrowed) -> Told {
    Told {
        fdid: FdidText::from(fdid),
        function: FunctionDescription::from(&held.entry.ids),
        available: Availability::InUse,
        location: Location::Remote,
        adapter: held.adapter as u32,
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
