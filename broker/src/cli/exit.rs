//! What a verb leaves behind: its output, its refusal, its exit code.

use super::{borrow, list, quarantine, revoke, status};
use crate::daemon::{
    error::ExitKind,
    vocabulary::{ErrorCode, Outcome, VerbError},
};
use serde_json::json;
use std::{
    io::{self, Write},
    process::ExitCode,
};

/// The exit codes, for `--help`.
pub(super) const TABLE: &str = "\
Exit codes:
  0  done
  2  the command line is wrong
  3  refused: by policy, by a limit, or because of the state that things are in
  4  the daemon or a port is not there, or does not answer
  5  a fault of Sublet or of the kernel
  6  the configuration is wrong
  7  the other host is not there, refused, or does not answer
  8  nothing is wrong for good: try again";

/// The exit code of a refusal, or of none.
pub(super) fn code(refused: Option<ErrorCode>) -> ExitCode {
    ExitCode::from(refused.map_or(ExitKind::Done, ErrorCode::exit) as u8)
}

/// Prints an outcome for people or as JSON.
pub(super) fn print(outcome: &Outcome, as_json: bool) -> ExitCode {
    let text = if as_json {
        match outcome {
            Outcome::Done => json!({"done": true}),
            Outcome::List(entries) => json!(entries),
            Outcome::PartOfList(part) => json!(part.entries),
            Outcome::Borrowed(borrowed) => json!(borrowed),
            Outcome::Quarantine(list) => json!(list),
            Outcome::Undone(undone) => json!(undone),
            Outcome::Status(status) => json!(status),
        }
        .to_string()
    } else {
        match outcome {
            Outcome::Done => return code(None),
            Outcome::List(entries) => list::lines(entries),
            Outcome::PartOfList(part) => list::lines(&part.entries),
            Outcome::Borrowed(borrowed) => borrow::block(borrowed),
            Outcome::Quarantine(list) => quarantine::page(list),
            Outcome::Undone(undone) => revoke::line(undone),
            Outcome::Status(status) => status::page(status),
        }
    };
    if let Outcome::PartOfList(part) = outcome {
        for why in &part.missing {
            // With stderr closed there is nobody to tell.
            let _ = writeln!(io::stderr().lock(), "sublet: {why}");
        }
    }
    let end = if text.is_empty() { "" } else { "\n" };
    code(write(&format!("{text}{end}")).err())
}

/// Writes to stdout.
pub(super) fn write(text: &str) -> Result<(), ErrorCode> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => Ok(()),
        // `sublet list | head -1` is no error.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(_) => Err(ErrorCode::Kernel),
    }
}

/// Tells a refusal: in words on stderr, with `--json` also as an object on stdout.
pub(super) fn refuse(refusal: &VerbError, as_json: bool) -> ExitCode {
    // With stderr or stdout closed the exit code still tells.
    let _ = writeln!(io::stderr().lock(), "sublet: {}", refusal.text);
    if as_json {
        let _ = writeln!(io::stdout().lock(), "{}", json!({"error": refusal}));
    }
    code(Some(refusal.code))
}
