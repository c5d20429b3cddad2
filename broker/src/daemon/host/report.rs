//! What `list` and `status` tell of this host.

use super::borrow::Borrowed;
use super::port::OpenPort;
use super::served::View;
use super::{LocalHost, refuse};
use crate::daemon::quarantine;
use crate::daemon::vocabulary::{
    Availability, BdfText, BorrowedStatus, BorrowedVector, DoorbellCounters, ErrorCode, FdidText,
    FunctionDescription, GuestCounters, Hex64, HostStatus, LentStatus, LentVector, LinkState,
    ListEntry, Location, MailboxCounters, NodeStatus, Outcome, PortQuarantine, PortStatus,
    QuarantineStatus, QuarantinedFunction, SessionStatus, StoreStatus, VerbError, WindowStatus,
};
use crate::pool::{FunctionKey, PoolService, PoolStatus};
use std::collections::BTreeMap;
use std::sync::Arc;
use vfio_shim::model::Fdid;
use vfio_shim::path::refused::Refused;
use vfio_shim::path::{self, OfferState, PoolState};
use vmm_glue::vfio_user::SessionState;

pub(super) fn availability(state: &OfferState) -> Availability {
    match state {
        OfferState::Available => Availability::Available,
        OfferState::Quarantine(_) => Availability::Quarantine,
        OfferState::Gone(_) => Availability::Unavailable,
        _ => Availability::InUse,
    }
}

impl LocalHost {
    /// The pool: this host's own, and what each peer offers.
    pub(super) fn list(&self) -> Result<Outcome, VerbError> {
        let mut entries = self.own_pool()?;
        for port in &self.ports {
            let Some(node) = port.peer_node() else {
                continue;
            };
            let peers = port.engine.list().map_err(|error| {
                refuse(
                    ErrorCode::NoSession,
                    format!("port `{}`: {error}", port.name),
                )
            })?;
            entries.extend(peers.into_iter().map(|entry| ListEntry {
                fdid: FdidText::from(Fdid {
                    node,
                    bdf: entry.bdf,
                }),
                location: Location::Remote,
                available: match entry.state {
                    PoolState::Available => Availability::Available,
                    PoolState::InUse => Availability::InUse,
                    PoolState::Quarantine => Availability::Quarantine,
                },
                function: FunctionDescription::from(&entry.ids),
            }));
        }
        let pool = self.pool.as_ref().and_then(PoolService::status);
        let pool = pool.unwrap_or_default();
        quarantine::mark(&mut entries, self.config.node_id, &pool);
        Ok(Outcome::List(entries))
    }

    fn own_pool(&self) -> Result<Vec<ListEntry>, VerbError> {
        let offers: Vec<_> = self
            .ports
            .iter()
            .filter_map(|port| port.engine.status())
            .flat_map(|s| s.lent)
            .collect();
        let mut entries = Vec::new();
        let local: Vec<_> = self.state().lent.keys().copied().collect();
        for bdf in &local {
            let offered = offers.iter().find(|lent| lent.offer.entry.bdf == *bdf);
            let ids = self.functions.ids(*bdf)?;
            entries.push(ListEntry {
                fdid: FdidText::from(Fdid {
                    node: self.config.node_id,
                    bdf: *bdf,
                }),
                location: Location::Local,
                available: offered.map_or(Availability::Unavailable, |lent| {
                    availability(&lent.offer.state)
                }),
                function: FunctionDescription::from(&ids),
            });
        }
        Ok(entries)
    }

    /// Everything.
    pub(super) fn report(&self) -> HostStatus {
        let ports: Vec<_> = self
            .ports
            .iter()
            .map(|port| (port, port.engine.status()))
            .collect();
        let pool = self.pool.as_ref().and_then(PoolService::status);
        let pool = pool.unwrap_or_default();
        let lent = ports.iter().flat_map(|(port, status)| {
            let peer = port.far_end(status.as_ref()).and_then(Result::ok);
            let lent = status.iter().flat_map(|status| &status.lent);
            lent.map(|lent| self.lent(lent, peer, &pool))
                .collect::<Vec<_>>()
        });
        let lent: Vec<LentStatus> = lent.collect();
        let mut report = HostStatus {
            node: NodeStatus {
                id: self.config.node_id,
                name: self.config.node_name.clone(),
                version: crate::BUILD.to_owned(),
                pid: std::process::id(),
                uptime_ms: self.started.elapsed().as_millis() as u64,
                sandbox: self.sandbox.clone(),
            },
            quarantine: QuarantineStatus {
                functions: self.quarantine(&ports),
            },
            ports: ports
                .iter()
                .map(|(port, status)| port_status(port, status.as_ref()))
                .collect(),
            lent,
            borrowed: self.borrows(&ports),
            store: StoreStatus {
                folder: self.config.state.clone(),
                last_error: pool.store_error.clone(),
            },
        };
        quarantine::add_unoffered(&mut report, &pool);
        report
    }

    fn lent(&self, lent: &path::LentStatus, peer: Option<u16>, pool: &PoolStatus) -> LentStatus {
        let function = FunctionKey::from(lent.offer.entry.bdf);
        let lease = pool.leases.iter().find(|one| one.function == function);
        // What ended before this daemon's time is in the store only.
        let stored_end = || Some(lease?.last_end.as_ref()?.cause.to_string());
        let vectors = lent
            .vectors
            .iter()
            .zip(0..)
            .map(|(vector, index)| LentVector {
                index,
                raised: vector.raised,
                fences: vector.fences,
                bells: vector.bells,
                masked: vector.masked,
                suspect: vector.suspect,
                rate_limited: vector.rate_limited,
                rate_limits: vector.rate_limits,
            });
        LentStatus {
            fdid: FdidText::from(Fdid {
                node: self.config.node_id,
                bdf: lent.offer.entry.bdf,
            }),
            state: availability(&lent.offer.state),
            lease: lent.offer.lease.map(|lease| Hex64(lease.0)),
            epoch: lease.map(|lease| lease.epoch),
            age_ms: lease.and_then(|lease| lease.age_ms),
            ttl_ms: lease.and_then(|lease| lease.ttl_ms),
            borrower_node: lent.offer.lease.and(peer),
            vectors: vectors.collect(),
            maps: lent.maps.0,
            mapped_bytes: lent.maps.1,
            refused: lent.offer.refused.into(),
            dma_faults_seen: self.functions.dma_faults_seen(lent.offer.entry.bdf),
            last_end: lent.offer.last_end.clone().or_else(stored_end),
            last_error: match &lent.offer.state {
                OfferState::Quarantine(why) => Some(why.clone()),
                OfferState::Gone(why) => Some(format!(
                    "taken away: {why}. When it is there again: `sublet available {}`",
                    lent.offer.entry.bdf
                )),
                _ => None,
            },
        }
    }

    fn quarantine(
        &self,
        ports: &[(&OpenPort, Option<path::PortStatus>)],
    ) -> Vec<QuarantinedFunction> {
        let lent = ports.iter().flat_map(|(_, status)| status);
        let lent =
            lent.flat_map(|status| status.lent.iter().map(move |l| (status.now_ms, &l.offer)));
        let held = lent.filter_map(|(now_ms, offer)| match &offer.state {
            OfferState::Quarantine(why) => Some(QuarantinedFunction {
                fdid: FdidText::from(Fdid {
                    node: self.config.node_id,
                    bdf: offer.entry.bdf,
                }),
                reason: why.clone(),
                for_ms: offer.quarantined_ms.map(|since| now_ms - since),
            }),
            _ => None,
        });
        held.collect()
    }

    fn borrows(&self, ports: &[(&OpenPort, Option<path::PortStatus>)]) -> Vec<BorrowedStatus> {
        let known = || ports.iter().filter_map(|(_, status)| status.as_ref());
        let refused = |fdid: &Fdid, lease| {
            let mut leases = known().flat_map(|status| &status.borrowed);
            let found = leases.find(|one| (one.bdf, one.lease) == (fdid.bdf, lease));
            found.map(|one| one.refused).unwrap_or_default()
        };
        let workers = |(fdid, held): (&Fdid, &Borrowed)| Some((*fdid, held.worker.clone()?));
        let workers: Vec<_> = self.state().borrowed.iter().filter_map(workers).collect();
        // Asked without the lock: a worker in another process may take its time.
        let views = workers.into_iter().map(|(fdid, worker)| {
            let view = worker.view();
            (fdid, (worker, view))
        });
        let mut views: BTreeMap<_, _> = views.collect();
        let state = self.state();
        let borrowed = state.borrowed.iter().map(|(fdid, held)| {
            let asked = views.remove(fdid).filter(|(worker, _)| {
                let now = held.worker.as_ref();
                now.is_some_and(|now| Arc::ptr_eq(now, worker))
            });
            let view = asked.map_or_else(View::default, |(_, view)| view);
            borrowed(*fdid, held, view, refused(fdid, held.lease))
        });
        borrowed.collect()
    }
}

fn borrowed(fdid: Fdid, held: &Borrowed, view: View, refused: Refused) -> BorrowedStatus {
    let vectors = view.scanned.iter().enumerate();
    let vectors = vectors.map(|(index, scanned)| BorrowedVector {
        index: index as u32,
        scanned: *scanned,
        signals: view.signals.get(index).copied().unwrap_or_default(),
    });
    let lost = held.lost();
    let [reads, writes, config_reads, maps, bytes, messages] = view.counters;
    BorrowedStatus {
        fdid: FdidText::from(fdid),
        lease: Hex64(held.lease.0),
        trust_domain: held.trust_domain.clone(),
        socket: held.socket.clone(),
        state: match (&lost, view.state) {
            (Some(_), _) => "lost",
            (None, None) => "silent",
            (None, Some(SessionState::Closed)) => "closed",
            (None, Some(SessionState::Waiting)) => "waiting",
            (None, Some(SessionState::Connected { .. })) => "connected",
            (None, Some(SessionState::Undoing { .. })) => "undoing",
        }
        .to_owned(),
        vmm_pid: match view.state {
            Some(SessionState::Connected { pid } | SessionState::Undoing { pid }) => {
                u32::try_from(pid).ok().filter(|pid| *pid != 0)
            }
            _ => None,
        },
        bars: held.bars,
        ram_bytes: held.ram,
        counters: GuestCounters {
            trapped_reads: reads,
            trapped_writes: writes,
            config_reads,
            dma_maps: maps,
            mapped_bytes: bytes,
            messages,
        },
        vectors: vectors.collect(),
        refused: refused.into(),
        worker: view.worker,
        way: "doorbell".to_owned(),
        last_error: lost.or(view.last_error),
    }
}

fn port_status(port: &OpenPort, status: Option<&path::PortStatus>) -> PortStatus {
    let session = status.and_then(|status| status.session.as_ref());
    let far = port.far_end(status);
    let mailbox = status.map(|status| MailboxCounters {
        sent: status.mailbox.sent,
        received: status.mailbox.received,
        resent: status.mailbox.resent,
        replays: status.mailbox.replays,
        torn: status.mailbox.torn,
        foreign: status.mailbox.foreign,
        violations: status.mailbox.violations,
        refused: status.mailbox.refused,
        heartbeat_age_ms: status.heartbeat_age_ms,
    });
    PortStatus {
        name: port.name.clone(),
        bdf: BdfText::from(port.bdf),
        chip: Some(port.port.info().chip.to_owned()),
        link: match status.is_some_and(|status| status.link_up) {
            true => LinkState::Up,
            false => LinkState::Down,
        },
        session: SessionStatus {
            state: match session {
                Some(_) => "open".to_owned(),
                None => status.map_or_else(|| "stopped".to_owned(), |status| status.link.clone()),
            },
            id: session.map(|session| Hex64(session.info.session)),
            version: session.map(|session| session.info.version),
            own_versions: status.map(|status| status.own_versions.into()),
            peer_versions: status.and_then(|status| Some(status.peer_versions?.into())),
            peer_node: far.as_ref().and_then(|far| far.as_ref().ok().copied()),
            since_ms: session.map(|session| session.age_ms),
            over_reason: status.and_then(|status| status.over_reason.clone()),
        },
        window: WindowStatus {
            bytes: port.window_bytes,
            usable: status
                .map(|status| status.window_usable)
                .filter(|bytes| *bytes != 0),
            free: status.map(|status| status.window_free),
        },
        mailbox: mailbox.unwrap_or_default(),
        quarantine: status.map_or_else(PortQuarantine::default, |status| PortQuarantine {
            slices: status.quarantine.slices as u64,
            bytes: status.quarantine.bytes,
            vectors: status.quarantine.words,
        }),
        doorbells: DoorbellCounters {
            rung: status.map_or(0, |status| status.bells.rung),
            taken: status.map_or(0, |status| status.bells.taken),
        },
        process: None,
        last_error: far.and_then(Result::err).map(|why| why.to_string()),
    }
}
