//! What the store of leases holds: one record for each function, and the journal of moves.

use serde::{Deserialize, Serialize};
use std::fmt;
use vfio_shim::model::Bdf;
use vfio_shim::path::grant::{EndCause, LeaseEnd, Scrub, Undone};

/// Longest name of a function in the store, in bytes.
pub const KEY_BYTES_MAX: usize = 128;

/// What the store calls a function. Whoever makes it decides what a function is: an address today,
/// a PF's identity and a VF's index where another device may come to the same address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct FunctionKey(String);

/// A name that is empty or too long.
#[derive(Debug, thiserror::Error)]
#[error("a function's name in the store has {0} bytes: 1 to {KEY_BYTES_MAX} are right")]
pub struct KeyError(usize);

impl TryFrom<String> for FunctionKey {
    type Error = KeyError;

    fn try_from(name: String) -> Result<Self, KeyError> {
        match name.len() {
            1..=KEY_BYTES_MAX => Ok(Self(name)),
            len => Err(KeyError(len)),
        }
    }
}

impl From<Bdf> for FunctionKey {
    fn from(bdf: Bdf) -> Self {
        Self(bdf.to_string())
    }
}

impl fmt::Display for FunctionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for FunctionKey {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// What the store knows of one function. There is no secret in it: what `open` must show is known
/// to the port and the borrower, and ends with either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseRecord {
    /// Which function.
    pub function: FunctionKey,
    /// The newest lease's epoch; it only grows, over all functions of the store.
    pub epoch: u64,
    /// Who has it; `None` = nobody.
    pub holder: Option<Holder>,
    /// How the last lease ended.
    pub last_end: Option<End>,
}

/// What a compare-and-set compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The newest lease's.
    pub epoch: u64,
    /// Whether it is in force.
    pub held: bool,
}

impl LeaseRecord {
    /// What a compare-and-set compares.
    pub fn version(&self) -> Version {
        Version {
            epoch: self.epoch,
            held: self.holder.is_some(),
        }
    }
}

/// Who has a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    /// Through which port of this host.
    pub port: String,
    /// The borrower's node, where it has said who it is.
    pub borrower: Option<u16>,
    /// Since when, in milliseconds of Unix time.
    pub since_unix_ms: u64,
}

/// How a lease ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Why.
    pub cause: Cause,
    /// What became of the function.
    pub scrubbed: Scrubbed,
}

/// Why a lease ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The borrower gave it back.
    Returned,
    /// Nobody holds it any more: a session, a port or a daemon ended.
    Reclaimed,
    /// No path was opened in time.
    Expired,
    /// The lender took it back.
    Revoked(String),
    /// The store failed at the grant, and the borrower was refused.
    NotGranted,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Returned => f.write_str("returned"),
            Self::Reclaimed => f.write_str("reclaimed"),
            Self::Expired => f.write_str("expired"),
            Self::Revoked(why) => f.write_str(why),
            Self::NotGranted => f.write_str("not granted: the store failed"),
        }
    }
}

/// What was done so that the function keeps nothing of its tenant. Never proved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scrubbed {
    /// No path was open, or its end is not known: the next lease begins with a reset all the same.
    NoPath,
    /// Reset, and nothing else.
    Reset,
    /// Reset, and its driver has told that its memory is cleared.
    Waited,
    /// Reset, and its memory should be cleared by now.
    Assumed,
    /// A step failed: the function is in quarantine.
    Failed(String),
    /// A step had failed, and this operator gave the function out as it was.
    Cleared(String),
}

impl From<Undone> for Scrubbed {
    fn from(undone: Undone) -> Self {
        match undone {
            Undone::NoPath => Self::NoPath,
            Undone::Reset(Scrub::No) => Self::Reset,
            Undone::Reset(Scrub::Waited) => Self::Waited,
            Undone::Reset(Scrub::Assumed) => Self::Assumed,
            Undone::Failed(why) => Self::Failed(why),
            Undone::Cleared(by) => Self::Cleared(by),
        }
    }
}

impl From<LeaseEnd> for End {
    fn from(end: LeaseEnd) -> Self {
        Self {
            cause: match end.cause {
                EndCause::Returned => Cause::Returned,
                EndCause::Reclaimed => Cause::Reclaimed,
                EndCause::Expired => Cause::Expired,
                EndCause::Revoked(why) => Cause::Revoked(why),
            },
            scrubbed: end.undone.into(),
        }
    }
}

/// One move of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JournalEntry {
    /// When, in milliseconds of Unix time.
    pub unix_ms: u64,
    /// Of which function.
    pub function: FunctionKey,
    /// Of which lease.
    pub epoch: u64,
    /// Which.
    pub moved: Move,
}

/// A move of a lease, with its cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Move {
    /// It was granted.
    Granted(Holder),
    /// Its path was opened.
    Opened,
    /// It ended.
    Ended(End),
    /// Its function was in quarantine since, and this is what became of it.
    Mended(Scrubbed),
}
