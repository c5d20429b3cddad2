//! `ntb-model`: serves the NTB between two hosts, or talks to one that runs.

use anyhow::Context;
use clap::Parser;
use ntb_model::options::{Command, Options};
use ntb_model::{control, event_loop};

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if let Some(Command::Ctl { control, operation }) = &options.command {
        print!("{}", control::ask(control, operation)?);
        return Ok(());
    }
    event_loop::serve(
        options
            .serve
            .as_ref()
            .context("--socket-a and --socket-b are needed")?,
    )
}
