//! The verbs and their outcomes, as they travel over the control socket.

pub use super::{
    error::{ErrorCode, VerbError},
    status::*,
    text::{BdfText, FdidText, Hex64, HexId},
};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How the BARs of a borrowed function reach the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum BarMode {
    /// Every access goes through the worker.
    #[default]
    Trapped,
    /// The VMM maps the NTB's window: fast, and the VMM is as powerful as the port.
    Mapped,
}

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub enum Verb {
    /// Takes a function of this host into the pool; no effect on the function.
    Add {
        /// The function.
        bdf: BdfText,
    },
    /// Takes it out of the pool.
    Remove {
        /// The function.
        bdf: BdfText,
    },
    /// Offers it to the other hosts.
    Available {
        /// The function.
        bdf: BdfText,
        /// Through which port, by its name in the configuration; `None` = the only one.
        #[serde(default)]
        port: Option<String>,
    },
    /// Takes the offer back.
    Unavailable {
        /// The function.
        bdf: BdfText,
    },
    /// The pool, of this host and of those it is connected to.
    List,
    /// Borrows a function and serves it to one VMM.
    Borrow {
        /// The function.
        fdid: FdidText,
        /// Where the vfio-user socket is to be; empty = in a folder of the lease's own.
        #[serde(default)]
        socket: PathBuf,
        /// Guest memory to reserve window for.
        ram: Option<u64>,
        /// How its BARs reach the guest; `None` = as the configuration says.
        bars: Option<BarMode>,
        /// Whether the VMM is trusted as much as the port.
        trust_vmm: bool,
        /// Whose it is; `None` = the port's own domain.
        trust_domain: Option<String>,
    },
    /// Gives a borrowed function back.
    Return {
        /// The function.
        fdid: FdidText,
    },
    /// Ends the lease of a function of this host.
    Revoke {
        /// The function.
        bdf: BdfText,
        /// How long to wait for its undoing, in seconds; `None` = as long as that may take.
        #[serde(default)]
        deadline_s: Option<u32>,
    },
    /// Functions in quarantine, and what of each port's window is.
    Quarantine,
    /// Tries again to put a function in quarantine back to power-on state.
    QuarantineRetry {
        /// The function.
        bdf: BdfText,
        /// What the daemon tells a port of a function that is not offered.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        held: Option<HeldBack>,
    },
    /// Gives a function out of quarantine as it is.
    QuarantineClear {
        /// The function.
        bdf: BdfText,
        /// That its last tenant's state may be in it still.
        i_know: bool,
        /// Who says so; `None` = whoever is at the other end of the socket.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// Everything there is to know about this host.
    Status,
}

/// What the store knows of a function in quarantine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldBack {
    /// Its last lease.
    pub epoch: u64,
    /// Why nobody gets it.
    pub reason: String,
}

/// What came of a verb.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing to tell.
    Done,
    /// Of `list`.
    List(Vec<ListEntry>),
    /// Of `quarantine list`.
    Quarantine(QuarantineList),
    /// Of `revoke` and `quarantine retry`.
    Undone(UndoneFunction),
    /// Of `list`, where a port did not answer.
    PartOfList(PartOfList),
    /// Of `borrow`.
    Borrowed(Box<BorrowedFunction>),
    /// Of `status`.
    Status(Box<HostStatus>),
}

/// What is in quarantine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantineList {
    /// Functions that nobody gets.
    pub functions: Vec<QuarantinedFunction>,
    /// What of the ports' windows nobody gets; every port of the host.
    pub ports: Vec<QuarantinedPort>,
}

/// What of one port nobody gets until the other host has confirmed that nothing maps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantinedPort {
    /// Its name in the configuration.
    pub port: String,
    /// What it is.
    #[serde(flatten)]
    pub held: PortQuarantine,
}

/// A function whose path was undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoneFunction {
    /// Which.
    pub fdid: FdidText,
    /// Where it stands now.
    pub available: Availability,
    /// Why it is where it is, if it is in quarantine or gone.
    pub reason: Option<String>,
}

/// One reply over the control socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The verb was done.
    Ok(Outcome),
    /// It was not.
    Error(VerbError),
}

/// What a function is, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionDescription {
    /// Class, vendor, device, in lspci's words.
    pub name: String,
    /// Vendor id.
    pub vendor: HexId,
    /// Device id.
    pub device: HexId,
    /// Subsystem vendor id.
    pub subsystem_vendor: HexId,
    /// Subsystem device id.
    pub subsystem_device: HexId,
    /// Class code, six hexadecimal digits.
    pub class: String,
    /// Revision id, two hexadecimal digits.
    pub revision: String,
}

/// Where a function of the pool stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Availability {
    /// In the pool, not offered.
    Unavailable,
    /// Offered.
    Available,
    /// Borrowed by somebody.
    InUse,
    /// Held back until its undoing is proved.
    Quarantine,
}

/// Which host a function is in, seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Location {
    /// In this one.
    Local,
    /// In another.
    Remote,
}

/// One function of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListEntry {
    /// Its name in the fabric.
    pub fdid: FdidText,
    /// Whose it is.
    pub location: Location,
    /// Where it stands.
    pub available: Availability,
    /// What it is.
    #[serde(flatten)]
    pub function: FunctionDescription,
}

/// What there is of the pool without some ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartOfList {
    /// The functions.
    pub entries: Vec<ListEntry>,
    /// Which ports did not answer, and what to do about each.
    pub missing: Vec<String>,
}

/// A function that this host has borrowed, as `borrow` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BorrowedFunction {
    /// Its name in the fabric.
    pub fdid: FdidText,
    /// What it is.
    #[serde(flatten)]
    pub function: FunctionDescription,
    /// Where it stands.
    pub available: Availability,
    /// Whose it is.
    pub location: Location,
    /// Which port of this host leads there, counted from 0.
    pub adapter: u32,
    /// The lender.
    pub node_id: u16,
    /// Its address on the lender.
    pub remote_bdf: BdfText,
    /// The slot it is in.
    pub physical_slot: Option<String>,
    /// Its device serial number.
    pub serial: Option<Hex64>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// How many use it here.
    pub local_users: u32,
    /// Its address in a kernel of this host: none, as the guest is whom it is given to.
    pub local_virtual_device: Option<BdfText>,
    /// Its driver here: none, likewise.
    pub driver: Option<String>,
    /// The lease.
    pub lease: Hex64,
    /// Where a VMM finds it.
    pub socket: PathBuf,
    /// How its BARs reach the guest.
    pub bars: BarMode,
}
