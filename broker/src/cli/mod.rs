//! The command line: one file per verb, what was typed kept apart from what it means.

mod add;
mod available;
mod bdf;
mod borrow;
mod client;
mod daemon;
#[cfg(target_arch = "x86_64")]
mod demo;
mod exit;
mod keeper;
mod list;
mod port;
mod quarantine;
mod remove;
mod return_;
mod revoke;
mod status;
mod table;
mod unavailable;
mod warden;
mod worker;

use crate::daemon::vocabulary::{ErrorCode, Outcome, Verb, VerbError};
use clap::{Parser, Subcommand, error::ErrorKind};
use std::{ffi::OsString, path::PathBuf, process::ExitCode};

#[cfg(target_arch = "x86_64")]
pub(crate) use {borrow::block as borrowed_block, client::request_on, list::line as list_line};

/// Lends PCIe virtual functions to virtual machines on other hosts, over an NTB.
#[derive(Debug, Parser)]
#[command(name = "sublet", version = crate::BUILD, after_help = exit::TABLE)]
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
    #[cfg(target_arch = "x86_64")]
    Demo(demo::Args),
    #[cfg(target_arch = "x86_64")]
    #[command(hide = true)]
    DemoVmm(demo::VmmArgs),
    #[cfg(target_arch = "x86_64")]
    #[command(hide = true)]
    DemoQemu(demo::QemuArgs),
    #[cfg(target_arch = "x86_64")]
    #[command(hide = true)]
    DemoInit(demo::InitArgs),
    Daemon(daemon::Args),
    Port(port::Args),
    Keeper(keeper::Args),
    Add(add::Args),
    Remove(remove::Args),
    Available(available::Args),
    Unavailable(unavailable::Args),
    List(list::Args),
    Borrow(borrow::Args),
    Return(return_::Args),
    Revoke(revoke::Args),
    Quarantine(quarantine::Args),
    Status(status::Args),
    #[command(hide = true)]
    Warden(warden::Args),
    #[command(hide = true)]
    Worker(worker::Args),
    #[command(hide = true)]
    KeeperChecks(keeper::ChecksArgs),
}

/// What needs no daemon.
enum NoVerb<'a> {
    Daemon(&'a daemon::Args),
    Port(&'a port::Args),
    Warden(&'a warden::Args),
    Worker(&'a worker::Args),
    Keeper(&'a keeper::Args),
    KeeperChecks(&'a keeper::ChecksArgs),
    #[cfg(target_arch = "x86_64")]
    Demo(&'a demo::Args),
    #[cfg(target_arch = "x86_64")]
    DemoHelper(&'a dyn demo::Helper),
}

impl Command {
    /// What was typed, as a verb, or what is none.
    fn verb(&self) -> Result<Result<Verb, VerbError>, NoVerb<'_>> {
        Ok(match self {
            Self::Daemon(args) => return Err(NoVerb::Daemon(args)),
            Self::Port(args) => return Err(NoVerb::Port(args)),
            Self::Warden(args) => return Err(NoVerb::Warden(args)),
            Self::Worker(args) => return Err(NoVerb::Worker(args)),
            Self::Keeper(args) => return Err(NoVerb::Keeper(args)),
            Self::KeeperChecks(args) => return Err(NoVerb::KeeperChecks(args)),
            #[cfg(target_arch = "x86_64")]
            Self::Demo(args) => return Err(NoVerb::Demo(args)),
            #[cfg(target_arch = "x86_64")]
            Self::DemoVmm(args) => return Err(NoVerb::DemoHelper(args)),
            #[cfg(target_arch = "x86_64")]
            Self::DemoQemu(args) => return Err(NoVerb::DemoHelper(args)),
            #[cfg(target_arch = "x86_64")]
            Self::DemoInit(args) => return Err(NoVerb::DemoHelper(args)),
            Self::Add(args) => args.verb(),
            Self::Remove(args) => args.verb(),
            Self::Available(args) => args.verb(),
            Self::Unavailable(args) => args.verb(),
            Self::List(args) => Ok(args.verb()),
            Self::Borrow(args) => args.verb(),
            Self::Return(args) => Ok(args.verb()),
            Self::Revoke(args) => args.verb(),
            Self::Quarantine(args) => args.verb(),
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
    let done = match cli.command.verb() {
        Ok(verb) => verb.and_then(|verb| client::request(&cli.control, &verb)),
        Err(NoVerb::Daemon(args)) => args.run().map(|()| Outcome::Done),
        Err(NoVerb::Port(args)) => args.run().map(|()| Outcome::Done),
        Err(NoVerb::Warden(args)) => args.run().map(|()| Outcome::Done),
        Err(NoVerb::Worker(args)) => args.run().map(|()| Outcome::Done),
        Err(NoVerb::Keeper(args)) => args.run().map(|()| Outcome::Done),
        Err(NoVerb::KeeperChecks(args)) => args.run().map(|()| Outcome::Done),
        #[cfg(target_arch = "x86_64")]
        Err(NoVerb::Demo(args)) => return args.run(cli.json),
        #[cfg(target_arch = "x86_64")]
        Err(NoVerb::DemoHelper(args)) => args.run().map(|()| Outcome::Done),
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
