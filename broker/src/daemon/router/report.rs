//! What `list` and `status` tell of all ports together.

use super::leases::Line;
use super::link::PortLink;
use super::{LIST_DEADLINE, Router, refuse, strange};
use crate::config::PortConfig;
use crate::daemon::quarantine;
use crate::daemon::vocabulary::{
    Availability, BdfText, DoorbellCounters, ErrorCode, HostStatus, LentStatus, LinkState,
    ListEntry, MailboxCounters, NodeStatus, Outcome, PartOfList, PortProcess, PortQuarantine,
    PortStatus, QuarantineList, QuarantinedPort, SessionStatus, StoreStatus, Verb, VerbError,
    WindowStatus,
};
use crate::pool::{FunctionKey, LeaseState, PoolStatus};
use std::collections::BTreeMap;
use vfio_shim::model::Fdid;

/// Of what two ports say of one function, the one that matters.
fn weight(available: Availability) -> u8 {
    match available {
        Availability::Unavailable => 0,
        Availability::Available => 1,
        Availability::InUse => 2,
        Availability::Quarantine => 3,
    }
}

impl Router {
    /// The pool: of a function that several ports know, the one line that matters.
    pub(super) fn list(&self) -> Outcome {
        let mut entries: BTreeMap<Fdid, ListEntry> = BTreeMap::new();
        let mut missing = Vec::new();
        let answers = self.ask_all(&Verb::List, LIST_DEADLINE).into_iter();
        for (answer, link) in answers.zip(&self.links) {
            let told = match answer {
                Ok(Outcome::List(told)) => told,
                Ok(_) => {
                    missing.push(strange(link).text);
                    continue;
                }
                Err(error) => {
                    missing.push(error.text);
                    continue;
                }
            };
            for entry in told {
                let known = entries.get(&entry.fdid.0);
                let known = known.map(|known| weight(known.available));
                if known.is_none_or(|known| known < weight(entry.available)) {
                    entries.insert(entry.fdid.0, entry);
                }
            }
        }
        let mut entries: Vec<ListEntry> = entries.into_values().collect();
        let pool = self.pool.status().unwrap_or_default();
        quarantine::mark(&mut entries, self.config.node_id, &pool);
        match missing.is_empty() {
            true => Outcome::List(entries),
            false => Outcome::PartOfList(PartOfList { entries, missing }),
        }
    }

    /// What nobody gets, of the ports that answer.
    pub(super) fn quarantined(&self) -> Outcome {
        let report = self.report();
        let answers = |port: &PortStatus| port.process.as_ref().is_some_and(|one| one.answers);
        let ports = report.ports.into_iter().filter(answers);
        let ports = ports.map(|port| QuarantinedPort {
            port: port.name,
            held: port.quarantine,
        });
        Outcome::Quarantine(QuarantineList {
            functions: report.quarantine.functions,
            ports: ports.collect(),
        })
    }

    /// Everything.
    pub(super) fn report(&self) -> HostStatus {
        let told = self.statuses();
        // A line that is there by now has told the pool what its port holds.
        let lines: Vec<Line> = self.links.iter().map(PortLink::line).collect();
        let pool = self.pool.status().unwrap_or_default();
        let mut report = HostStatus {
            node: NodeStatus {
                id: self.config.node_id,
                name: self.config.node_name.clone(),
                version: crate::BUILD.to_owned(),
                pid: std::process::id(),
                uptime_ms: self.started.elapsed().as_millis() as u64,
                sandbox: Some(self.sandbox.clone()),
            },
            store: StoreStatus {
                folder: self.config.state.clone(),
                last_error: pool.store_error.clone(),
            },
            ..HostStatus::default()
        };
        for ((status, line), config) in told.into_iter().zip(lines).zip(&self.config.ports) {
            match status {
                Ok(status) => add(&mut report, status, line, &pool),
                Err(error) => report.ports.push(away(config, line, error, &pool)),
            }
        }
        quarantine::add_unoffered(&mut report, &pool);
        report
    }
}

/// What one port says of itself, and what is written of its leases.
fn add(report: &mut HostStatus, mut told: HostStatus, line: Line, pool: &PoolStatus) {
    let apart = match line {
        Line::There { .. } => None,
        Line::Missing => Some("its line is not there yet".to_owned()),
        Line::Broken(why) => Some(why),
    };
    for port in &mut told.ports {
        port.process = Some(PortProcess {
            pid: Some(told.node.pid),
            version: Some(told.node.version.clone()),
            answers: true,
            sandbox: told.node.sandbox.clone(),
        });
        if let Some(why) = &apart {
            let text = format!("its leases cannot be written down, so nothing is lent: {why}");
            port.last_error.get_or_insert(text);
        }
    }
    for lent in &mut told.lent {
        write_lease(lent, pool);
    }
    report.ports.append(&mut told.ports);
    report.lent.append(&mut told.lent);
    report.borrowed.append(&mut told.borrowed);
    let held = &mut told.quarantine.functions;
    report.quarantine.functions.append(held);
}

fn write_lease(lent: &mut LentStatus, pool: &PoolStatus) {
    let function = FunctionKey::from(lent.fdid.0.bdf);
    let lease = pool.leases.iter().find(|lease| lease.function == function);
    let Some(lease) = lease else { return };
    lent.epoch = Some(lease.epoch);
    lent.age_ms = lease.age_ms;
    lent.ttl_ms = lease.ttl_ms;
    let stored = || Some(lease.last_end.as_ref()?.cause.to_string());
    lent.last_end = lent.last_end.take().or_else(stored);
}

/// A port that does not say how it stands.
fn away(config: &PortConfig, line: Line, error: VerbError, pool: &PoolStatus) -> PortStatus {
    let unknown = pool.leases.iter().filter(|lease| {
        let here = lease.holder.as_ref().is_some_and(|h| h.port == config.name);
        here && lease.state != LeaseState::Ending
    });
    let text = match unknown.count() {
        0 => error.text,
        1 => format!("{}; a lease of it is written down", error.text),
        leases => format!("{}; {leases} leases of it are written down", error.text),
    };
    let (pid, version) = match line {
        Line::There { pid, build } => (pid.and_then(|pid| u32::try_from(pid).ok()), Some(build)),
        _ => (None, None),
    };
    PortStatus {
        name: config.name.clone(),
        bdf: BdfText::from(config.bdf),
        chip: None,
        link: LinkState::Down,
        session: SessionStatus {
            state: "not known".to_owned(),
            ..SessionStatus::default()
        },
        window: WindowStatus::default(),
        mailbox: MailboxCounters::default(),
        doorbells: DoorbellCounters::default(),
        quarantine: PortQuarantine::default(),
        process: Some(PortProcess {
            pid,
            version,
            answers: false,
            sandbox: None,
        }),
        last_error: Some(text),
    }
}

/// No port leads to a function's node: what each says of its far end.
pub(super) fn no_way(
    fdid: Fdid,
    links: &[PortLink],
    statuses: &[Result<HostStatus, VerbError>],
) -> VerbError {
    let mut code = ErrorCode::NoSession;
    let mut known = Vec::new();
    for (status, link) in statuses.iter().zip(links) {
        let name = &link.name;
        let port = match status {
            Ok(status) => status.ports.first(),
            Err(error) => {
                known.push(error.text.clone());
                continue;
            }
        };
        let session = port.map(|port| &port.session);
        let peer = session.and_then(|session| session.peer_node);
        let why = port.and_then(|port| port.last_error.as_ref());
        known.push(match (peer, why) {
            (Some(peer), _) => format!("{name} leads to node {peer:x}"),
            (None, Some(why)) => format!("{name}: {why}"),
            (None, None) => {
                let state = session.map_or("stopped", |session| &session.state);
                format!("{name} has no open session: {state}")
            }
        });
        let apart =
            session.and_then(|session| Some((session.own_versions?, session.peer_versions?)));
        if apart.is_some_and(|(own, peer)| own[1] < peer[0] || peer[1] < own[0]) {
            code = ErrorCode::Version;
        }
    }
    let text = format!(
        "no port leads to node {:x} ({}): check the fdid with `sublet list`, and the link with \
         `sublet status`",
        fdid.node,
        known.join(", ")
    );
    refuse(code, text)
}
