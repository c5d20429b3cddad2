//! The command line: one file per verb, what was typed kept apart from what it means.

mod add;
mod available;
mod bdf;
mod borrow;
mod client;
mod daemon;
mod exit;
mod list;
mod remove;
mod return_;
mod status;
mod table;
mod unavailable;

use crate::daemon::vocabulary::{ErrorCode, Outcome, Verb, VerbError};
use clap::{Parser, Subcommand, error::ErrorKind};
use std::{ffi::OsString, path::PathBuf, process::ExitCode};

/// Lends PCIe virtual functions to virtual machines on other hosts, over an NTB.
#[derive(Debug, Parser)]
#[command(name = "sublet", version, after_help = exit::TABLE)]
struct Cli {
    /// Print JSON; a refusal is an object {"error": {"code", "text"}}.
    #[arg(long, global = true)]
    json: bool,
    /// The daemon's control socket.
    #[arg(long, global = true, value_name = "PATH", default_value = client::CONTROL_DEFAULT)]
    control: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Daemon(daemon::Args),
    Add(add::Args),
    Remove(remove::Args),
    Available(available::Args),
    Unavailable(unavailable::Args),
    List(list::Args),
    Borrow(borrow::Args),
    Return(return_::Args),
    Status(status::Args),
}

impl Command {
    /// What was typed, as a verb; `None` for the daemon itself, which is none.
    fn verb(&self) -> Option<Result<Verb, VerbError>> {
        Some(match self {
            Self::Daemon(_) => return None,
            Self::Add(args) => args.verb(),
            Self::Remove(args) => args.verb(),
            Self::Available(args) => args.verb(),
            Self::Unavailable(args) => args.verb(),
            Self::List(args) => Ok(args.verb()),
            Self::Borrow(args) => args.verb(),
            Self::Return(args) => Ok(args.verb()),
            Self::Status(args) => Ok(args.verb()),
        })
    }
}

/// Does what the arguments (the program's name first) say, and tells the exit code.
pub fn run(args: Vec<OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return unparsable(&error, &args),
    };
    let done = match (cli.command.verb(), &cli.command) {
        (Some(verb), _) => verb.and_then(|verb| client::request(&cli.control, &verb)),
        (None, Command::Daemon(args)) => args.run().map(|()| Outcome::Done),
        (None, _) => unreachable!("only `daemon` is no verb"),
    };
    match done {
        Ok(outcome) => exit::print(&outcome, cli.json),
        Err(refusal) => exit::refuse(&refusal, cli.json),
    }
}

/// Help and version are no errors; all else is told in clap's words.
fn unparsable(error: &clap::Error, args: &[OsString]) -> ExitCode {
    let help = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    if help || !args.iter().any(|arg| arg == "--json") {
        // To a closed pipe there is nobody to tell.
        let _ = error.print();
        return exit::code(help.then_some(()).ok_or(ErrorCode::Usage).err());
    }
    let text = error.render().to_string();
    let text = text.trim().trim_start_matches("error: ");
    exit::refuse(&VerbError::new(ErrorCode::Usage, text), true)
}
