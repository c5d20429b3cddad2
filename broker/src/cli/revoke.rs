//! `sublet revoke`: ends the lease of a function of this host, whoever has it.

use super::bdf::Shorthand;
use crate::daemon::vocabulary::{UndoneFunction, Verb, VerbError};

/// End the lease of a function of this host at once; its guest sees the device go.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The function, as lspci writes it; `4a:` will do where it is unique.
    bdf: Shorthand,
    /// Wait at most this long until the path is undone and the function reset; the undoing goes on
    /// past it, and the verb is refused with `timeout`.
    #[arg(long, value_name = "SECONDS")]
    deadline: Option<u32>,
}

impl Args {
    pub fn verb(&self) -> Result<Verb, VerbError> {
        let bdf = self.bdf.resolve()?.into();
        Ok(Verb::Revoke {
            bdf,
            deadline_s: self.deadline,
        })
    }
}

/// Where the function stands afterwards, in a line.
pub(super) fn line(undone: &UndoneFunction) -> String {
    let word = super::list::word(undone.available);
    match &undone.reason {
        None => format!("{}: {word}", undone.fdid),
        Some(reason) => format!("{}: {word}: {reason}", undone.fdid),
    }
}
