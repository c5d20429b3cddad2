//! Programs that the runner starts: to their end within a deadline, or in the background.

use anyhow::{Context, Result, anyhow, bail};
use lab_agent::wire::{OUTPUT_BYTES_MAX, Reply};
use rustix::process::{Pid, Signal};
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How long the outputs of a killed program may stay open: a child of its own may hold them.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

fn command(argv: &[String]) -> Result<Command> {
    let (program, args) = argv.split_first().context("no program named")?;
    let mut command = Command::new(program);
    command.args(args).process_group(0);
    Ok(command)
}

/// Runs a program with these bytes as its stdin and gives both outputs back, one after the other.
pub fn run(argv: &[String], stdin: Vec<u8>, timeout: Duration) -> Result<(Reply, Vec<u8>)> {
    let deadline = Instant::now() + timeout;
    let mut child = command(argv)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", argv[0]))?;
    let mut input = child.stdin.take().context("no stdin")?;
    thread::spawn(move || {
        // A program that reads no input is not at fault: its own exit code tells.
        let _ = input.write_all(&stdin);
    });
    let stdout = collect(child.stdout.take().context("no stdout")?);
    let stderr = collect(child.stderr.take().context("no stderr")?);
    let pid = child.id();
    let ended = reaper(child);
    let status = ended.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    if status.is_err() {
        // The whole group: a shell's children hold its outputs open.
        let _ = rustix::process::kill_process_group(process_id(pid)?, Signal::KILL);
    }
    let out = stdout.recv_timeout(DRAIN_TIMEOUT).unwrap_or_default();
    let err = stderr.recv_timeout(DRAIN_TIMEOUT).unwrap_or_default();
    let stdout_bytes = out.0.len();
    let truncated = out.1 || err.1;
    let body = [out.0, err.0].concat();
    match status {
        Ok(status) => Ok((exited(status?, stdout_bytes, truncated), body)),
        Err(_) => Ok((Reply::TimedOut { stdout_bytes }, body)),
    }
}

fn exited(status: ExitStatus, stdout_bytes: usize, truncated: bool) -> Reply {
    Reply::Exited {
        code: status.code(),
        signal: status.signal(),
        stdout_bytes,
        truncated,
    }
}

/// Reads to the end, keeps the first part.
fn collect(mut from: impl Read + Send + 'static) -> mpsc::Receiver<(Vec<u8>, bool)> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut kept = Vec::new();
        let _ = (&mut from)
            .take(OUTPUT_BYTES_MAX as u64)
            .read_to_end(&mut kept);
        let dropped = std::io::copy(&mut from, &mut std::io::sink()).unwrap_or(0);
        let _ = sender.send((kept, dropped > 0));
    });
    receiver
}

fn reaper(mut child: Child) -> mpsc::Receiver<std::io::Result<ExitStatus>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let _ = sender.send(child.wait());
    });
    receiver
}

/// The background programs, and how those that ended did.
#[derive(Clone, Default)]
pub struct Children(Arc<(Mutex<Ends>, Condvar)>);

/// By process id; none while it runs.
type Ends = HashMap<u32, Option<ExitStatus>>;

impl Children {
    /// Starts a program whose two outputs are appended to a file.
    pub fn spawn(&self, argv: &[String], output: &str) -> Result<u32> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(output)
            .with_context(|| format!("cannot open {output}"))?;
        let child = command(argv)?
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {}", argv[0]))?;
        let pid = child.id();
        let shared = self.0.clone();
        shared
            .0
            .lock()
            .map_err(|_| anyhow!("poisoned"))?
            .insert(pid, None);
        let ended = reaper(child);
        thread::spawn(move || {
            let Ok(Ok(status)) = ended.recv() else { return };
            if let Ok(mut children) = shared.0.lock() {
                children.insert(pid, Some(status));
                shared.1.notify_all();
            }
        });
        Ok(pid)
    }

    /// Waits for the end of one of them.
    pub fn wait(&self, pid: u32, timeout: Duration) -> Result<Reply> {
        let children = self.0.0.lock().map_err(|_| anyhow!("poisoned"))?;
        let (children, _) = self
            .0
            .1
            .wait_timeout_while(children, timeout, |children| {
                matches!(children.get(&pid), Some(None))
            })
            .map_err(|_| anyhow!("poisoned"))?;
        match children.get(&pid) {
            None => bail!("{pid} was not started here"),
            Some(None) => Ok(Reply::TimedOut { stdout_bytes: 0 }),
            Some(Some(status)) => Ok(exited(*status, 0, false)),
        }
    }
}

fn process_id(pid: u32) -> Result<Pid> {
    Pid::from_raw(pid as i32).with_context(|| format!("no process id: {pid}"))
}

/// Sends a signal.
pub fn kill(pid: u32, signal: i32) -> Result<()> {
    let signal = Signal::from_named_raw(signal).with_context(|| format!("no signal: {signal}"))?;
    rustix::process::kill_process(process_id(pid)?, signal)
        .with_context(|| format!("cannot signal {pid}"))
}
