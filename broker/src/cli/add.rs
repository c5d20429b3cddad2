//! `sublet add`: take a function of this host into the pool (no effect on the function).

use super::bdf::Shorthand;
use crate::daemon::vocabulary::{Verb, VerbError};

/// Take a function of this host into the pool (no effect on the function).
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The function, as lspci writes it; `4a:` will do where it is unique.
    bdf: Shorthand,
}

impl Args {
    pub fn verb(&self) -> Result<Verb, VerbError> {
        let bdf = self.bdf.resolve()?.into();
        Ok(Verb::Add { bdf })
    }
}
