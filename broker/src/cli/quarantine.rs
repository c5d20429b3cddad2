//! `sublet quarantine`: what nobody gets until its undoing is proved, tried again or given out as it is.

use super::{
    bdf::Shorthand,
    status::held_back,
    table::{ago, dash, table},
};
use crate::daemon::vocabulary::{QuarantineList, Verb, VerbError};
use clap::Subcommand;

/// What is in quarantine, and the ways out of it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// List the functions in quarantine, and what of each port's window is.
    List,
    /// Try again to undo and reset a function; it goes back into the pool if that works.
    Retry {
        /// The function, as lspci writes it; `4a:` will do where it is unique.
        bdf: Shorthand,
    },
    /// Put a function back into the pool as it is, with what its last tenant may have left in it.
    Clear {
        /// The function, as lspci writes it; `4a:` will do where it is unique.
        bdf: Shorthand,
        /// Yes, the next tenant may see what the last one left.
        #[arg(long)]
        i_know: bool,
    },
}

impl Args {
    pub fn verb(&self) -> Result<Verb, VerbError> {
        Ok(match &self.act {
            Act::List => Verb::Quarantine,
            Act::Retry { bdf } => Verb::QuarantineRetry {
                bdf: bdf.resolve()?.into(),
                held: None,
            },
            Act::Clear { bdf, i_know } => Verb::QuarantineClear {
                bdf: bdf.resolve()?.into(),
                i_know: *i_know,
                by: None,
            },
        })
    }
}

/// The list, for people.
pub(super) fn page(list: &QuarantineList) -> String {
    let rows = list.functions.iter().map(|function| {
        [
            function.fdid.to_string(),
            dash(function.for_ms.map(ago)),
            function.reason.clone(),
        ]
    });
    let functions = table(["fdid", "for", "reason"], rows.collect());
    let ports = list.ports.iter().filter_map(|port| {
        let held = held_back(&port.held)?;
        Some(format!("port {}: {held}", port.port))
    });
    let parts: Vec<String> = [functions]
        .into_iter()
        .filter(|functions| !functions.is_empty())
        .chain(ports)
        .collect();
    match parts.is_empty() {
        true => "nothing".to_owned(),
        false => parts.join("\n"),
    }
}
