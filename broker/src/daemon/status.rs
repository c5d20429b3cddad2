//! What `status` tells: ports, link sessions, leases, counters, quarantine.

use super::{
    text::{BdfText, FdidText, Hex64},
    vocabulary::{Availability, BarMode},
};
use crate::jail::Report;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use vfio_shim::path::refused::Refused;

/// Everything about one host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// Who this is.
    pub node: NodeStatus,
    /// Its ports.
    pub ports: Vec<PortStatus>,
    /// What it lends.
    pub lent: Vec<LentStatus>,
    /// What it borrows.
    pub borrowed: Vec<BorrowedStatus>,
    /// What is held back until it is proved that nothing maps it.
    pub quarantine: QuarantineStatus,
    /// Where its leases are written down.
    pub store: StoreStatus,
}

/// The store of leases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Its folder.
    pub folder: PathBuf,
    /// What went wrong at its last use; until it is mended nothing is lent.
    pub last_error: Option<String>,
}

/// Who a host is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its id in the fabric.
    pub id: u16,
    /// Its name.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// How long it has been running.
    pub uptime_ms: u64,
    /// What this process has been left with; `None` = everything, as it is daemon and ports at once.
    #[serde(default)]
    pub sandbox: Option<Report>,
}

/// One port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortStatus {
    /// Its name in the configuration.
    pub name: String,
    /// Its PCI address.
    pub bdf: BdfText,
    /// The chip, as far as known.
    pub chip: Option<String>,
    /// The NTB's link.
    pub link: LinkState,
    /// The session with the peer.
    pub session: SessionStatus,
    /// The inbound window.
    pub window: WindowStatus,
    /// The mailbox.
    pub mailbox: MailboxCounters,
    /// The doorbells.
    pub doorbells: DoorbellCounters,
    /// What of the window and of the interrupt table waits for the peer's confirmation.
    pub quarantine: PortQuarantine,
    /// The process that serves it; `None` = the daemon does.
    #[serde(default)]
    pub process: Option<PortProcess>,
    /// The last error.
    pub last_error: Option<String>,
}

/// The process that serves a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortProcess {
    /// Its process id, as far as known.
    pub pid: Option<u32>,
    /// Version of its program.
    pub version: Option<String>,
    /// Whether it is there and has answered.
    pub answers: bool,
    /// What it has been left with, as far as known.
    #[serde(default)]
    pub sandbox: Option<Report>,
}

/// The NTB's link state, nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// Trained.
    Up,
    /// Not trained.
    Down,
}

/// The session of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Where it stands, in a word: `open`, or what it waits for.
    pub state: String,
    /// Its id.
    pub id: Option<Hex64>,
    /// The version that the two agreed on.
    pub version: Option<u16>,
    /// Lowest and highest version of this side.
    pub own_versions: Option<[u16; 2]>,
    /// Lowest and highest version of the peer.
    pub peer_versions: Option<[u16; 2]>,
    /// The peer's node id.
    pub peer_node: Option<u16>,
    /// How long it has been in this state.
    pub since_ms: Option<u64>,
    /// Why the last one ended.
    pub over_reason: Option<String>,
}

/// The inbound window of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowStatus {
    /// Its size.
    pub bytes: u64,
    /// What both sides can use.
    pub usable: Option<u64>,
    /// What is not given out.
    pub free: Option<u64>,
}

/// What a port gives to nobody before the peer has confirmed that nothing maps it any more, or a new
/// link session has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortQuarantine {
    /// Slices of the inbound window.
    pub slices: u64,
    /// Bytes of them, and of reservations that are over.
    pub bytes: u64,
    /// Interrupt vectors: words of the interrupt table.
    pub vectors: u32,
}

/// Counters of the mailbox, since the daemon's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxCounters {
    /// Messages sent.
    pub sent: u64,
    /// Messages taken.
    pub received: u64,
    /// Sent again for want of an ack.
    pub resent: u64,
    /// Came again, not executed again.
    pub replays: u64,
    /// Torn: ignored.
    pub torn: u64,
    /// Of another session: ignored.
    pub foreign: u64,
    /// Violations of the protocol; each ended a session.
    pub violations: u64,
    /// Requests refused that named neither a lease nor a function of this host's.
    #[serde(default)]
    pub refused: u64,
    /// Age of the peer's last heartbeat.
    pub heartbeat_age_ms: Option<u64>,
}

/// Counters of the doorbells, since the daemon's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoorbellCounters {
    /// Doorbells rung at the peer.
    pub rung: u64,
    /// Doorbell interrupts taken.
    pub taken: u64,
}

/// One function of this host's pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LentStatus {
    /// Its name in the fabric.
    pub fdid: FdidText,
    /// Where it stands.
    pub state: Availability,
    /// The lease, if somebody has it.
    pub lease: Option<Hex64>,
    /// The newest lease's epoch: grows with every lease, and is the number of the one in force.
    pub epoch: Option<u64>,
    /// For how long the lease has been in force.
    pub age_ms: Option<u64>,
    /// How long it still lives if no path is opened; none, while one is open.
    pub ttl_ms: Option<u64>,
    /// Whose lease.
    pub borrower_node: Option<u16>,
    /// Its interrupts.
    pub vectors: Vec<LentVector>,
    /// DMA maps in its container.
    pub maps: u32,
    /// Bytes of them.
    pub mapped_bytes: u64,
    /// What the peer said of the lease in force, or else of the last one, and was not done.
    #[serde(default)]
    pub refused: RefusedCounters,
    /// DMA of it that this host's IOMMU has refused, as far as the kernel's log tells, since the
    /// newest lease's path was opened; none, where no path was or the log cannot be read.
    #[serde(default)]
    pub dma_faults_seen: Option<u64>,
    /// How the last lease of it ended.
    pub last_end: Option<String>,
    /// The last error.
    pub last_error: Option<String>,
}

/// What the peer said of one lease in the mailbox, and was not done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedCounters {
    /// Looks at damaged messages that name it.
    pub torn: u64,
    /// Looks at messages of another session that name it.
    pub foreign: u64,
    /// Requests about it that were refused.
    pub requests: u64,
}

impl From<Refused> for RefusedCounters {
    fn from(refused: Refused) -> Self {
        Self {
            torn: refused.torn,
            foreign: refused.foreign,
            requests: refused.requests,
        }
    }
}

/// One interrupt vector, on the lender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentVector {
    /// The vector.
    pub index: u32,
    /// Sum of the eventfd values read: how often the function raised it.
    pub raised: u64,
    /// Fences done: reads across the NTB that push the function's DMA ahead.
    pub fences: u64,
    /// Doorbells rung for it.
    pub bells: u64,
    /// Whether it is masked.
    pub masked: bool,
    /// Whether a fence of it read something else than the session's nonce: what the function wrote
    /// before may not have arrived, so it is silent until the function's next reset.
    pub suspect: bool,
    /// Whether it is masked because it is over its rate, now: its interrupts come late.
    pub rate_limited: bool,
    /// How often it was.
    pub rate_limits: u64,
}

/// One function that this host has borrowed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BorrowedStatus {
    /// Its name in the fabric.
    pub fdid: FdidText,
    /// The lease.
    pub lease: Hex64,
    /// Whose it is; empty, where a port of an older build tells.
    #[serde(default)]
    pub trust_domain: String,
    /// Where a VMM finds it.
    pub socket: PathBuf,
    /// Where the guest session stands, in a word.
    pub state: String,
    /// The VMM's process.
    pub vmm_pid: Option<u32>,
    /// How its BARs reach the guest.
    pub bars: BarMode,
    /// Window reserved for guest memory.
    pub ram_bytes: Option<u64>,
    /// Counters of the guest session.
    pub counters: GuestCounters,
    /// Its interrupts.
    pub vectors: Vec<BorrowedVector>,
    /// What the peer said of the lease, and was not done.
    #[serde(default)]
    pub refused: RefusedCounters,
    /// The process that serves it; `None` = a thread of the daemon does, or nobody any more.
    #[serde(default)]
    pub worker: Option<WorkerStatus>,
    /// The way that its interrupts take.
    pub way: String,
    /// The last error.
    pub last_error: Option<String>,
}

/// The process that serves a borrowed function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its process id.
    pub pid: u32,
    /// Whether it has answered when it was asked.
    pub answers: bool,
    /// Messages that its port has taken from it.
    pub messages: u64,
    /// How often its port let it wait, as it sent more than it may in a second.
    pub slowed: u64,
    /// Whether Landlock shuts it off from files and network.
    pub landlock: bool,
    /// Whether seccomp holds it to its list of system calls.
    pub seccomp: bool,
    /// The namespaces of its own; where not permitted, none.
    pub namespaces: Vec<String>,
}

/// Counters of one guest session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCounters {
    /// BAR reads that went through the worker.
    pub trapped_reads: u64,
    /// BAR writes that went through the worker.
    pub trapped_writes: u64,
    /// Reads of config space.
    pub config_reads: u64,
    /// DMA maps at this moment.
    pub dma_maps: u64,
    /// Bytes of them.
    pub mapped_bytes: u64,
    /// Messages of the VMM.
    pub messages: u64,
}

/// One interrupt vector, on the borrower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BorrowedVector {
    /// The vector.
    pub index: u32,
    /// Raises found in the interrupt table.
    pub scanned: u64,
    /// Signals given to the guest.
    pub signals: u64,
}

/// Functions that nobody gets until their undoing is proved. What of a window waits for the peer is
/// told at its port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineStatus {
    /// Functions, with the reason.
    pub functions: Vec<QuarantinedFunction>,
}

/// A function in quarantine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantinedFunction {
    /// Which.
    pub fdid: FdidText,
    /// Why, and what would free it.
    pub reason: String,
    /// For how long.
    #[serde(default)]
    pub for_ms: Option<u64>,
}
