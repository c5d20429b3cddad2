//! The catalogue of refusals: one stable code for each, and the exit code that goes with it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A refusal: a stable code for programs, a cause and its mend for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct VerbError {
    /// The code.
    pub code: ErrorCode,
    /// Cause and mend.
    pub text: String,
}

impl VerbError {
    /// A refusal.
    pub fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { code, text }
    }
}

/// What a program finds out from the exit code alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitKind {
    /// Done.
    Done = 0,
    /// The command line is wrong.
    Usage = 2,
    /// Refused: by policy, by a limit, or because of the state that things are in.
    Refused = 3,
    /// The daemon or a port's process is not there, or does not answer.
    NoDaemon = 4,
    /// A fault of Sublet or of the kernel.
    Internal = 5,
    /// The configuration is wrong.
    Config = 6,
    /// The other host is not there, refused, or does not answer.
    Peer = 7,
    /// Nothing is wrong for good: try again.
    Again = 8,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident $word:literal $kind:ident),* $(,)?) => {
        /// Why something was refused. The words are stable: programs may rely on them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $word)] $code,)*
        }

        impl ErrorCode {
            /// All codes.
            pub const ALL: &[Self] = &[$(Self::$code,)*];

            /// The stable word.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$code => $word,)* }
            }

            /// The exit code's meaning.
            pub const fn exit(self) -> ExitKind {
                match self { $(Self::$code => ExitKind::$kind,)* }
            }
        }
    };
}

codes! {
    /// The command line is wrong.
    Usage "usage" Usage,
    /// The configuration is wrong.
    Config "config" Config,
    /// No daemon answers at the control socket.
    NoDaemon "no_daemon" NoDaemon,
    /// The daemon went away or took too long.
    DaemonLost "daemon_lost" NoDaemon,
    /// Another daemon has the control socket.
    DaemonRunning "daemon_running" Refused,
    /// The request is malformed.
    BadRequest "bad_request" Internal,
    /// The request is over the bound.
    RequestTooLarge "request_too_large" Internal,
    /// All client slots of the daemon are taken.
    TooManyClients "too_many_clients" Again,
    /// The daemon is going down.
    Stopping "stopping" Again,
    /// No such function: not in sysfs, not in the pool, or nobody's fdid.
    UnknownFunction "unknown_function" Refused,
    /// More than one function goes by that shorthand.
    Ambiguous "ambiguous" Usage,
    /// Policy does not allow it.
    NotAllowed "not_allowed" Refused,
    /// Somebody has it borrowed.
    Taken "taken" Refused,
    /// Not in the state that the verb needs.
    WrongState "wrong_state" Refused,
    /// No such lease.
    NoLease "no_lease" Refused,
    /// A PF whose SR-IOV is on.
    SriovOn "sriov_on" Refused,
    /// A driver of this host has the function.
    DriverBound "driver_bound" Refused,
    /// Other devices of its IOMMU group are in use.
    GroupInUse "group_in_use" Refused,
    /// No reset method.
    NoReset "no_reset" Refused,
    /// Its last reset or undoing is not proved done.
    Quarantine "quarantine" Refused,
    /// A limit of the configuration or of the hardware.
    Limit "limit" Refused,
    /// The window does not hold it.
    WindowFull "window_full" Refused,
    /// Mapped BARs without trust in the VMM, or across trust domains.
    Trust "trust" Refused,
    /// The vfio-user socket cannot be made there.
    Socket "socket" Refused,
    /// The link to the other host is down.
    LinkDown "link_down" Peer,
    /// No link session is open with the other host.
    NoSession "no_session" Peer,
    /// The other host speaks no version that this one speaks.
    Version "version" Peer,
    /// The other host refused.
    PeerRefused "peer_refused" Peer,
    /// The other host did not answer in time.
    Timeout "timeout" Peer,
    /// Something is under way; try again.
    Busy "busy" Again,
    /// The kernel refused.
    Kernel "kernel" Internal,
    /// A port could not be opened.
    Port "port" Internal,
    /// No process serves a port, or it does not answer.
    PortAway "port_away" NoDaemon,
    /// A claim of the demonstration does not hold.
    Demo "demo" Internal,
    /// The store of leases cannot be had.
    Store "store" Internal,
    /// A fault of Sublet.
    Internal "internal" Internal,
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn codes_are_distinct_snake_case_and_travel_as_their_word() {
        let words: HashSet<_> = ErrorCode::ALL.iter().map(|code| code.word()).collect();
        assert_eq!(words.len(), ErrorCode::ALL.len());
        for code in ErrorCode::ALL {
            assert!(
                code.word()
                    .bytes()
                    .all(|b| b == b'_' || b.is_ascii_lowercase())
            );
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{}\"", code.word()));
            assert_eq!(serde_json::from_str::<ErrorCode>(&json).unwrap(), *code);
            assert_ne!(code.exit(), ExitKind::Done);
        }
    }
}
