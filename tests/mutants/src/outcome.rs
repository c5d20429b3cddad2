//! What became of one run of one test: green, red, not built, not there, or without an end.

use crate::table::Mutant;
use anyhow::{Context, Result};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a build may take on a slow machine.
const BUILD: Duration = Duration::from_secs(900);
/// How long a single test may take; one that hangs has found its fault.
const TEST: Duration = Duration::from_secs(120);

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The test passed.
    Green,
    /// The test failed.
    Red,
    /// The test did not come to an end.
    Hung,
    /// It does not compile.
    NotBuilt,
    /// There is no such test.
    NoTest,
}

/// Builds and runs the test that has to find the mutant, in the tree as it is now.
pub fn run(mutant: &Mutant, tree: &Path, target: &Path, log: &Path) -> Result<Outcome> {
    let build = cargo(mutant, tree, target, &["--no-run"], &[]);
    let built = within(build, BUILD, log)?;
    if !built.is_some_and(|status| status.success()) {
        return Ok(Outcome::NotBuilt);
    }
    let test = cargo(mutant, tree, target, &[], &[&mutant.test, "--exact"]);
    let ended = within(test, TEST, log)?;
    let text = std::fs::read_to_string(log).context("the log")?;
    let tests = text
        .lines()
        .filter(|line| line.starts_with("running 1 test"));
    Ok(match (tests.count(), ended) {
        (0, _) => Outcome::NoTest,
        (_, None) => Outcome::Hung,
        (_, Some(status)) if status.success() => Outcome::Green,
        _ => Outcome::Red,
    })
}

fn cargo(mutant: &Mutant, tree: &Path, target: &Path, flags: &[&str], words: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(["test", "--quiet", "--package", &mutant.package]);
    match mutant.target.as_str() {
        "lib" => command.arg("--lib"),
        name => command.args(["--test", name]),
    };
    command.args(flags).arg("--").args(words);
    command.current_dir(tree).env("CARGO_TARGET_DIR", target);
    command
}

/// Runs a command to its end, or ends it and all that it started; `None` = it had to be ended.
fn within(mut command: Command, time: Duration, log: &Path) -> Result<Option<ExitStatus>> {
    let file = File::create(log).with_context(|| format!("{}", log.display()))?;
    command.stdin(Stdio::null());
    command.stdout(file.try_clone()?).stderr(file);
    let mut child = command.process_group(0).spawn().context("cargo")?;
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    end(&mut child)?;
    Ok(None)
}

fn end(child: &mut Child) -> Result<()> {
    if let Some(group) = rustix::process::Pid::from_raw(child.id() as i32) {
        // It may have ended by itself meanwhile.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    child.wait()?;
    Ok(())
}
