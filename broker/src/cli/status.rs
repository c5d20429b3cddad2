//! `sublet status`: what is wrong first, then everything else, readable by a tired person.

use super::{
    list::word,
    table::{ago, bytes, dash, table},
};
use crate::daemon::vocabulary::{
    BarMode, BorrowedStatus, HostStatus, LentStatus, LinkState, PortQuarantine, PortStatus,
    RefusedCounters, Verb,
};
use crate::jail::Report;

/// Tell everything about this host: ports, sessions, leases, counters, quarantine.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

impl Args {
    pub fn verb(&self) -> Verb {
        Verb::Status
    }
}

/// The page.
pub(super) fn page(status: &HostStatus) -> String {
    let node = &status.node;
    let up = ago(node.uptime_ms);
    let shut_in = match node.sandbox.as_ref().map(Report::is_closed) {
        None => "",
        Some(true) => ", in its sandbox",
        Some(false) => ", without a sandbox",
    };
    let mut parts = vec![format!(
        "node {} ({}), sublet {}, process {}, up {up}{shut_in}",
        node.id, node.name, node.version, node.pid
    )];
    parts.push(match attention(status) {
        findings if findings.is_empty() => "Nothing needs attention.".to_owned(),
        findings => format!("NEEDS ATTENTION\n  {}", findings.join("\n  ")),
    });
    parts.extend(status.ports.iter().map(port));
    parts.push(section("lent", lent(&status.lent)));
    parts.push(section("borrowed", borrowed(&status.borrowed)));
    parts.push(format!("quarantine: {}", quarantine(status)));
    parts.join("\n\n")
}

fn section(name: &str, table: String) -> String {
    if table.is_empty() {
        return format!("{name}: nothing");
    }
    format!("{name}:\n{table}")
}

/// What an operator would want to know first.
fn attention(status: &HostStatus) -> Vec<String> {
    let mut findings = Vec::new();
    let node = &status.node;
    if node.sandbox.as_ref().is_some_and(|left| !left.is_closed()) {
        findings.push(format!(
            "process {} runs without a sandbox, as --sandbox=off says: what takes it over has all \
             that its user has",
            node.pid
        ));
    }
    for port in &status.ports {
        let name = &port.name;
        if port.link == LinkState::Down {
            findings.push(format!("port {name}: the link is down"));
        } else if port.session.id.is_none() {
            findings.push(format!("port {name}: no session, {}", port.session.state));
        }
        if let Some(reason) = &port.session.over_reason {
            findings.push(format!("port {name}: the last session ended: {reason}"));
        }
        if port.mailbox.violations != 0 {
            let count = port.mailbox.violations;
            findings.push(format!(
                "port {name}: the peer broke the protocol {count} times"
            ));
        }
        findings.extend(held_back(&port.quarantine).map(|held| {
            format!("port {name}: {held} wait until the other host confirms that nothing maps them")
        }));
        findings.extend(unshut(port));
        findings.extend(port.last_error.iter().map(|e| format!("port {name}: {e}")));
    }
    findings.extend(status.lent.iter().flat_map(of_lent));
    for borrowed in &status.borrowed {
        let error = borrowed.last_error.iter();
        findings.extend(error.map(|e| format!("{}: {e}", borrowed.fdid)));
        findings.extend(worker(borrowed));
    }
    let store = status.store.last_error.iter();
    findings.extend(store.map(|e| format!("store in {}: {e}", status.store.folder.display())));
    let held = status.quarantine.functions.iter();
    findings.extend(held.map(|f| format!("{}: in quarantine: {}", f.fdid, f.reason)));
    findings
}

/// What is wrong with a lent function, in words.
fn of_lent(lent: &LentStatus) -> Vec<String> {
    let mut findings = Vec::new();
    let suspect = lent.vectors.iter().filter(|vector| vector.suspect);
    findings.extend(suspect.map(|vector| {
        format!(
            "{}: interrupt vector {} is suspect, as its fence read wrong: silent until the \
             guest resets the function",
            lent.fdid, vector.index
        )
    }));
    let over_rate = lent.vectors.iter().filter(|vector| vector.rate_limits != 0);
    findings.extend(over_rate.map(|vector| {
        let now = match vector.rate_limited {
            true => ", and is now",
            false => "",
        };
        format!(
            "{}: interrupt vector {} was masked {} times for its rate{now}: a guest that \
             storms, or limits.interrupts_per_second is too low for its driver",
            lent.fdid, vector.index, vector.rate_limits
        )
    }));
    let faults = lent.dma_faults_seen.filter(|faults| *faults != 0);
    findings.extend(faults.map(|faults| {
        format!(
            "{}: the IOMMU refused DMA of it, {faults} times by the kernel's log: its guest \
             aims at memory that is not its own",
            lent.fdid
        )
    }));
    findings.extend(
        lent.last_error
            .iter()
            .map(|e| format!("{}: {e}", lent.fdid)),
    );
    findings
}

/// That a port's process has kept its rights, in words.
fn unshut(port: &PortStatus) -> Option<String> {
    let process = port.process.as_ref()?;
    let open = process.sandbox.as_ref().filter(|left| !left.is_closed());
    open.map(|_| {
        format!(
            "port {}: its process ({}) runs without a sandbox, as --sandbox=off says: what takes \
             it over has all that its user has",
            port.name,
            process.pid.unwrap_or_default()
        )
    })
}

/// What is wrong with a worker process, in words.
fn worker(borrowed: &BorrowedStatus) -> Option<String> {
    let (fdid, worker) = (borrowed.fdid, borrowed.worker.as_ref()?);
    let pid = worker.pid;
    if !(worker.landlock && worker.seccomp) {
        return Some(format!(
            "{fdid}: its worker (process {pid}) runs without a sandbox, as --sandbox=off says: a \
             VMM that takes it over has this host"
        ));
    }
    if worker.slowed != 0 {
        return Some(format!(
            "{fdid}: its worker (process {pid}) was slowed {} times, as it sends its port more than \
             limits.worker_messages_per_second: its VMM floods it, or has taken it over",
            worker.slowed
        ));
    }
    (!worker.answers).then(|| format!("{fdid}: its worker (process {pid}) does not answer"))
}

/// What of a port is in quarantine, in words; `None` = nothing.
pub(super) fn held_back(held: &PortQuarantine) -> Option<String> {
    let slices = (held.slices != 0).then(|| match held.slices {
        1 => "1 slice".to_owned(),
        count => format!("{count} slices"),
    });
    let size = (held.bytes != 0).then(|| format!("{} of the window", bytes(held.bytes)));
    let vectors = (held.vectors != 0).then(|| match held.vectors {
        1 => "1 interrupt vector".to_owned(),
        count => format!("{count} interrupt vectors"),
    });
    let parts: Vec<String> = [slices, size, vectors].into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn port(port: &PortStatus) -> String {
    let link = match port.link {
        LinkState::Up => "up",
        LinkState::Down => "down",
    };
    let (session, window, mailbox) = (&port.session, &port.window, &port.mailbox);
    let versions = |range: Option<[u16; 2]>| range.map(|[low, high]| format!("{low}..{high}"));
    let sizes = |size: Option<u64>| dash(size.map(bytes));
    [
        format!("port {}: {}, {}", port.name, port.bdf, dash(port.chip.as_ref())),
        format!("  link      {link}, peer's heartbeat {} ago", dash(mailbox.heartbeat_age_ms.map(ago))),
        format!(
            "  session   {}, for {}, peer node {}, id {}, version {} (own {}, peer {})",
            session.state,
            dash(session.since_ms.map(ago)),
            dash(session.peer_node),
            dash(session.id),
            dash(session.version),
            dash(versions(session.own_versions)),
            dash(versions(session.peer_versions)),
        ),
        format!(
            "  window    {}, usable {}, free {}",
            bytes(window.bytes),
            sizes(window.usable),
            sizes(window.free)
        ),
        format!(
            "  mailbox   sent {}, received {}, resent {}, replays {}, torn {}, foreign {}, violations {}",
            mailbox.sent,
            mailbox.received,
            mailbox.resent,
            mailbox.replays,
            mailbox.torn,
            mailbox.foreign,
            mailbox.violations
        ),
        format!("  doorbells rung {}, taken {}", port.doorbells.rung, port.doorbells.taken),
    ]
    .join("\n")
}

fn lent(lent: &[LentStatus]) -> String {
    let header = [
        "fdid",
        "state",
        "to node",
        "epoch",
        "for",
        "expires in",
        "last end",
        "maps",
        "mapped",
        "raised",
        "fences",
        "bells",
        "refused",
        "DMA faults",
    ];
    let row = |one: &LentStatus| {
        let sum = |of: fn(&_) -> u64| one.vectors.iter().map(of).sum::<u64>().to_string();
        [
            one.fdid.to_string(),
            word(one.state).to_owned(),
            dash(one.borrower_node),
            dash(one.epoch),
            dash(one.age_ms.map(ago)),
            dash(one.ttl_ms.map(ago)),
            dash(one.last_end.as_ref()),
            one.maps.to_string(),
            bytes(one.mapped_bytes),
            sum(|v| v.raised),
            sum(|v| v.fences),
            sum(|v| v.bells),
            refused(one.refused),
            dash(one.dma_faults_seen),
        ]
    };
    table(header, lent.iter().map(row).collect())
}

/// All that the other host said of a lease and was not done.
fn refused(of: RefusedCounters) -> String {
    let most = of.torn.saturating_add(of.foreign);
    most.saturating_add(of.requests).to_string()
}

fn borrowed(borrowed: &[BorrowedStatus]) -> String {
    let header = [
        "fdid",
        "state",
        "lease",
        "VMM",
        "BARs",
        "BAR accesses",
        "maps",
        "mapped",
        "scanned",
        "signals",
        "refused",
        "socket",
    ];
    let row = |one: &BorrowedStatus| {
        let sum = |of: fn(&_) -> u64| one.vectors.iter().map(of).sum::<u64>().to_string();
        let counters = &one.counters;
        [
            one.fdid.to_string(),
            one.state.clone(),
            one.lease.to_string(),
            dash(one.vmm_pid),
            match one.bars {
                BarMode::Trapped => "trapped".to_owned(),
                BarMode::Mapped => "mapped".to_owned(),
            },
            (counters
                .trapped_reads
                .saturating_add(counters.trapped_writes))
            .to_string(),
            counters.dma_maps.to_string(),
            bytes(counters.mapped_bytes),
            sum(|v| v.scanned),
            sum(|v| v.signals),
            refused(one.refused),
            one.socket.display().to_string(),
        ]
    };
    table(header, borrowed.iter().map(row).collect())
}

fn quarantine(status: &HostStatus) -> String {
    let functions = match status.quarantine.functions.len() {
        0 => None,
        1 => Some("1 function".to_owned()),
        count => Some(format!("{count} functions")),
    };
    let ports = status.ports.iter().filter_map(|port| {
        let held = held_back(&port.quarantine)?;
        Some(format!("at port {} {held}", port.name))
    });
    let parts: Vec<String> = functions.into_iter().chain(ports).collect();
    match parts.is_empty() {
        true => "nothing".to_owned(),
        false => parts.join("; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::vocabulary::{Availability, LentVector};

    #[test]
    fn suspect_vector_and_one_over_its_rate_need_attention_and_others_do_not() {
        let lent = LentStatus {
            fdid: "44a01".parse::<vfio_shim::model::Fdid>().unwrap().into(),
            state: Availability::InUse,
            lease: None,
            epoch: Some(3),
            age_ms: None,
            ttl_ms: None,
            borrower_node: Some(8),
            vectors: [false, true]
                .into_iter()
                .zip(0..)
                .map(|(suspect, index)| LentVector {
                    index,
                    suspect,
                    rate_limits: 3 * u64::from(suspect),
                    rate_limited: suspect,
                    ..LentVector::default()
                })
                .collect(),
            maps: 0,
            mapped_bytes: 0,
            refused: RefusedCounters::default(),
            dma_faults_seen: Some(2),
            last_end: None,
            last_error: None,
        };
        let status = HostStatus {
            lent: vec![lent],
            ..HostStatus::default()
        };
        let text = "44a01: interrupt vector 1 is suspect, as its fence read wrong: silent until \
                    the guest resets the function";
        let over_rate = "44a01: interrupt vector 1 was masked 3 times for its rate, and is now: a \
                         guest that storms, or limits.interrupts_per_second is too low for its \
                         driver";
        let faults = "44a01: the IOMMU refused DMA of it, 2 times by the kernel's log: its guest aims \
                      at memory that is not its own";
        assert_eq!(attention(&status), [text, over_rate, faults]);
    }

    #[test]
    fn only_what_is_held_back_is_told() {
        let held = |slices, bytes, vectors| {
            held_back(&PortQuarantine {
                slices,
                bytes,
                vectors,
            })
        };
        assert_eq!(held(0, 0, 0), None);
        let words = held(1, 4096, 1).unwrap();
        assert_eq!(words, "1 slice, 4 KiB of the window, 1 interrupt vector");
        assert_eq!(held(0, 1 << 21, 0).unwrap(), "2 MiB of the window");
    }
}
