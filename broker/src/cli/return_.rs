//! `sublet return`: gives a borrowed function back.

use crate::daemon::vocabulary::Verb;
use vfio_shim::model::Fdid;

/// Give a borrowed function back.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The function's fabric device id, as `list` prints it.
    fdid: Fdid,
}

impl Args {
    pub fn verb(&self) -> Verb {
        Verb::Return {
            fdid: self.fdid.into(),
        }
    }
}
