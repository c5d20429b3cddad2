//! A program that the runner itself starts: logged line by line, ended with the runner.

use crate::log::Log;
use anyhow::{Context, Result, bail};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);

/// Arguments, one flag in each line, its value after the first space: it may hold spaces itself.
pub fn arguments(lines: &str) -> Vec<String> {
    let words = lines.lines().flat_map(|line| line.trim().splitn(2, ' '));
    words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// A running program; dropping it ends it.
pub struct Program {
    child: Child,
    /// Both its outputs.
    pub log: Log,
    name: String,
}

impl Program {
    /// Starts it. It dies with the thread that starts it, so that a killed runner leaves nothing
    /// behind: start programs in a thread that lives as long as they.
    pub fn start(name: &str, argv: &[String], log: Log) -> Result<Self> {
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(argv)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        log.follow(child.stdout.take().context("no stdout")?)?;
        log.follow(child.stderr.take().context("no stderr")?)?;
        let name = name.to_owned();
        Ok(Program { child, log, name })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails if it ended.
    pub fn ensure_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}", self.name),
        }
    }

    /// Kills it.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end within {timeout:?}", self.name);
            }
            thread::sleep(POLL);
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::arguments;

    #[test]
    fn value_of_a_flag_may_hold_spaces() {
        assert_eq!(arguments("-a b c\n  -d\n\n"), ["-a", "b c", "-d"]);
    }
}
