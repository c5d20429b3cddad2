//! `ntb-model`: serves the NTB between two hosts, or talks to one that runs.

use clap::Parser;
use ntb_model::options::{CtlOptions, ServeOptions};
use ntb_model::{control, event_loop};

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args_os();
    if std::env::args_os().nth(1).is_some_and(|word| word == "ctl") {
        let options = CtlOptions::parse_from(words.by_ref().skip(1));
        print!("{}", control::ask(&options.control, &options.operation)?);
        return Ok(());
    }
    event_loop::serve(&ServeOptions::parse_from(words))
}
