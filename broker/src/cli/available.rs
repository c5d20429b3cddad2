//! `sublet available`: offer a function of the pool to the other hosts.

use super::bdf::Shorthand;
use crate::daemon::vocabulary::{Verb, VerbError};

/// Offer a function of the pool to the other hosts.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The function, as lspci writes it; `4a:` will do where it is unique.
    bdf: Shorthand,
    /// The port to offer it through, by its name in the configuration; needed where there are
    /// several.
    #[arg(long, value_name = "NAME")]
    port: Option<String>,
}

impl Args {
    pub fn verb(&self) -> Result<Verb, VerbError> {
        let bdf = self.bdf.resolve()?.into();
        let port = self.port.clone();
        Ok(Verb::Available { bdf, port })
    }
}
