//! `sublet list`: the functions of the pool, one line each.

use crate::daemon::vocabulary::{Availability, ListEntry, Verb};

/// List the functions of the pool, of this host and of those it is connected to.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

impl Args {
    pub fn verb(&self) -> Verb {
        Verb::List
    }
}

/// `44a01: VGA compatible controller Intel Corporation Device e212 [available]`
pub(crate) fn line(entry: &ListEntry) -> String {
    format!(
        "{}: {} [{}]",
        entry.fdid,
        entry.function.name,
        word(entry.available)
    )
}

pub(super) fn lines(entries: &[ListEntry]) -> String {
    let lines: Vec<String> = entries.iter().map(line).collect();
    lines.join("\n")
}

/// The state in smartio_tool's words.
pub(super) const fn word(available: Availability) -> &'static str {
    match available {
        Availability::Unavailable => "unavailable",
        Availability::Available => "available",
        Availability::InUse => "in use",
        Availability::Quarantine => "quarantine",
    }
}
