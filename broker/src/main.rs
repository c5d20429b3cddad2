//! The `sublet` binary: reads the command line, does the verb, exits with its code.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    sublet::cli::run(std::env::args_os().collect())
}
