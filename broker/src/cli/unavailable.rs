//! `sublet unavailable`: take the offer of a function back.

use super::bdf::Shorthand;
use crate::daemon::vocabulary::{Verb, VerbError};

/// Take the offer of a function back.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The function, as lspci writes it; `4a:` will do where it is unique.
    bdf: Shorthand,
}

impl Args {
    pub fn verb(&self) -> Result<Verb, VerbError> {
        let bdf = self.bdf.resolve()?.into();
        Ok(Verb::Unavailable { bdf })
    }
}
