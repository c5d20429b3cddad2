//! The daemon: the verbs' vocabulary, the control socket, and the host that they act on.

pub mod ask;
pub mod control;
pub mod error;
pub mod host;
mod quarantine;
pub(crate) mod refusals;
mod role;
pub mod router;
mod run;
pub mod socket;
pub mod status;
pub mod text;
pub mod vocabulary;

pub use role::{ROLE, kept};
pub(crate) use run::Signals;
pub use run::{DaemonError, run, run_in_process, run_with};

use vocabulary::{Outcome, Verb, VerbError};

/// What the verbs act on: all ports, leases and guest sessions of this host.
pub trait Host: Send + Sync {
    /// Does one verb; it may wait for the other host. Called from several threads at once.
    fn handle(&self, verb: Verb) -> Result<Outcome, VerbError>;
    /// Ends every path and gives everything back; verbs that still wait return an error.
    fn stop(&self);
}
