//! The configuration of one host: identity, ports, limits and policy. What is lent is not in it.
//!
//! Two steps: `file` is what the file says (unknown keys refused), `validate` makes of it the
//! objects below, which the rest of the program takes as true.

mod error;
mod far_end;
mod file;
mod pattern;
mod size;
mod validate;

pub use error::ConfigError;
pub use far_end::{FarEnd, NotBelieved};
pub use pattern::BdfPattern;
pub use size::{SizeError, parse_size};

use crate::daemon::vocabulary::BarMode;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use vfio_shim::model::Bdf;
use vfio_shim::path::borrower::LEASES_MAX;
use vfio_shim::path::lender::OFFERS_MAX;

/// Most ports of one host.
pub const PORTS_MAX: usize = 16;
/// Most functions lent through one port, and most that are borrowed through it: what its engine
/// takes.
pub const FUNCTIONS_PER_PORT_MAX: u32 = 64;
const _: () = assert!(
    FUNCTIONS_PER_PORT_MAX as usize <= OFFERS_MAX && FUNCTIONS_PER_PORT_MAX as usize <= LEASES_MAX
);
/// Most DMA maps of one guest: what a VFIO container takes by default.
pub const GUEST_MAPS_MAX: u32 = 65_535;
/// The default. All guests of a port share its container, and sixteen have room in it: a guest
/// whose memory is in one piece takes some tens, one that grows by blocks of 2 MiB one for each.
pub const GUEST_MAPS_DEFAULT: u32 = 4_000;
const _: () = assert!(16 * GUEST_MAPS_DEFAULT < GUEST_MAPS_MAX);
/// Most functions borrowed for one trust domain.
pub const FUNCTIONS_PER_DOMAIN_MAX: u32 = FUNCTIONS_PER_PORT_MAX * PORTS_MAX as u32;
/// The highest rate of a worker's messages, per second.
pub const WORKER_MESSAGES_PER_SECOND_MAX: u32 = 1_000_000;
/// Most users, and most groups, whose VMMs may attach: root and the daemon's own go along.
pub const VMM_PEERS_MAX: usize = vmm_glue::vfio_user::PEERS_MAX - 2;
/// Longest path of a Unix socket: `sun_path` without its NUL and room for a temporary suffix.
pub const SOCKET_PATH_MAX: usize = 90;
/// Longest path of the state folder.
pub const STATE_PATH_MAX: usize = 1024;
/// Longest configuration file in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Everything the file of one host says, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This host's id in the fabric: the first digits of its functions' fabric device ids.
    pub node_id: u16,
    /// Its name, for people.
    pub node_name: String,
    /// The control socket that the verbs go through.
    pub control: PathBuf,
    /// Where `borrow --socket NAME` puts a socket that is named without a directory.
    pub sockets: PathBuf,
    /// The folder in which the daemon keeps what has to outlive it.
    pub state: PathBuf,
    /// The process that has root's rights, and for whom.
    pub keeper: KeeperConfig,
    /// This host's NTB functions.
    pub ports: Vec<PortConfig>,
    /// Limits.
    pub limits: Limits,
    /// Policy.
    pub policy: Policy,
}

/// Where the keeper is, and whom it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeeperConfig {
    /// The folder of its sockets and of its journal, root's own.
    pub folder: PathBuf,
    /// The user whose processes may ask, by name or number.
    pub user: String,
}

/// One NTB function of this host, and what is at its far end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Its name, for people and logs.
    pub name: String,
    /// Its PCI address.
    pub bdf: Bdf,
    /// How the two ends find each other.
    pub peers: Peers,
    /// The node at its far end, where that is not for the peer to say.
    pub peer_node: Option<u16>,
    /// The one trust domain of all leases through this port.
    pub trust_domain: String,
    /// How often it tells the peer that it is alive.
    pub heartbeat: Duration,
    /// How long the peer's heartbeat may stand still before the link session is over.
    pub lost_after: Duration,
    /// How much of the window is used, where that is not all of it.
    pub window_limit_bytes: Option<u64>,
    /// Whether a lease through this port may say `trust_vmm`.
    pub trust_vmm: bool,
}

/// How two ports find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    /// Over the cable only, by the mailbox: the far end is whoever is plugged in there.
    Cable,
}

/// Limits of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most functions lent through one port, and most borrowed through it.
    pub functions_per_port: u32,
    /// Most bytes of memory that one guest may have mapped; `None` = what its window holds.
    pub guest_mapped_bytes: Option<u64>,
    /// Most functions borrowed for one trust domain, over all ports.
    pub functions_per_domain: u32,
    /// Most DMA maps of one guest.
    pub guest_maps: u32,
    /// Most messages in a second that a port takes from one worker: one that sends more waits.
    pub worker_messages_per_second: u32,
    /// Most interrupts in a second that are relayed of one vector of a lent function.
    pub interrupts_per_second: u32,
    /// How long a lease lives without an open path.
    pub lease_ttl: Duration,
}

impl Limits {
    /// What a port holds each of its tenants to.
    pub fn of_a_port(&self) -> vfio_shim::path::Limits {
        vfio_shim::path::Limits {
            guest_maps: self.guest_maps,
            guest_mapped_bytes: self.guest_mapped_bytes.unwrap_or(u64::MAX),
            interrupts_per_second: self.interrupts_per_second,
        }
    }
}

/// What this host lets happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Functions that may be lent.
    pub allow: Vec<BdfPattern>,
    /// Whether guest memory is checked to be shared with the VMM (it must be readable there).
    pub memory_check: bool,
    /// How BARs reach a guest when `borrow` does not say.
    pub bars: BarMode,
    /// Users whose VMMs may attach, besides root and this daemon's own.
    pub vmm_uids: Vec<u32>,
    /// Groups whose VMMs may attach.
    pub vmm_gids: Vec<u32>,
}

impl Policy {
    /// All users whose VMMs may attach.
    pub fn vmm_uids(&self) -> Vec<u32> {
        let mut uids = vec![0, rustix::process::geteuid().as_raw()];
        uids.extend(&self.vmm_uids);
        uids
    }
}

impl Config {
    /// Reads and validates the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
                bytes,
            });
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        Self::parse(path, &text)
    }

    /// Validates the text of a file; `path` is only for the words of errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let at = error::Places { path, text };
        let file = toml::from_str(text).map_err(|e| at.toml_error(&e))?;
        validate::config(&at, file)
    }

    /// Whether policy lets this function be lent. The ports themselves never are.
    pub fn may_lend(&self, bdf: Bdf) -> bool {
        self.policy.allow.iter().any(|p| p.matches(bdf)) && self.ports.iter().all(|p| p.bdf != bdf)
    }

    /// Where a port's own sockets lie.
    pub fn port_folder(&self, name: &str) -> PathBuf {
        let run = self.control.parent().unwrap_or(Path::new("/"));
        run.join("ports").join(name)
    }

    /// Where the socket of `borrow --socket` lies: a bare name is put into `sockets`.
    pub fn socket_path(&self, socket: &Path) -> PathBuf {
        self.sockets.join(socket)
    }
}

#[cfg(test)]
mod tests;
