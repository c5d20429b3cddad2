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
/// How long a single test may take in the clean tree.
pub const TEST: Duration = Duration::from_secs(120);
/// The least that it may take with a fault, and how much more of what it takes without: one that
/// hangs has found its fault, and most would wait a minute for what does not come.
const FAULTY_LEAST: Duration = Duration::from_secs(20);
const FAULTY_TIMES: u32 = 10;

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

/// How long a test may take with a fault that takes so long without.
pub fn limit(clean: Duration) -> Duration {
    (clean * FAULTY_TIMES).max(FAULTY_LEAST).min(TEST)
}

/// Builds and runs the test that has to find the mutant, in the tree as it is now; how long the test
/// itself took.
pub fn run(
    mutant: &Mutant,
    (tree, target, log): (&Path, &Path, &Path),
    limit: Duration,
) -> Result<(Outcome, Duration)> {
    let build = cargo(mutant, tree, target, &["--no-run"], &[]);
    let built = within(build, BUILD, log)?;
    if !built.is_some_and(|status| status.success()) {
        return Ok((Outcome::NotBuilt, Duration::ZERO));
    }
    let since = Instant::now();
    let test = cargo(mutant, tree, target, &[], &[&mutant.test, "--exact"]);
    let ended = within(test, limit, log)?;
    let took = since.elapsed();
    let text = std::fs::read_to_string(log).context("the log")?;
    let tests = text
        .lines()
        .filter(|line| line.starts_with("running 1 test"));
    let outcome = match (tests.count(), ended) {
        (0, _) => Outcome::NoTest,
        (_, None) => Outcome::Hung,
        (_, Some(status)) if status.success() => Outcome::Green,
        _ => Outcome::Red,
    };
    Ok((outcome, took))
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

#[cfg(test)]
mod tests {
    use super::{FAULTY_LEAST, TEST, limit};
    use std::time::Duration;

    #[test]
    fn faulty_tests_have_ten_times_what_the_clean_ones_take_within_bounds() {
        assert_eq!(limit(Duration::from_millis(300)), FAULTY_LEAST);
        assert_eq!(limit(Duration::from_secs(4)), Duration::from_secs(40));
        assert_eq!(limit(Duration::from_secs(60)), TEST);
    }
}
