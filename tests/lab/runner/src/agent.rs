//! The runner's side of the agent protocol: requests to a host's agent, and through it to a guest's.

use anyhow::{Context, Result, anyhow, bail, ensure};
use lab_agent::wire::{Frame, Head, Message, Reply, Request, read_frame, write_frame};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Signals by their numbers, as every Linux has them.
pub const SIGKILL: i32 = 9;
pub const SIGTERM: i32 = 15;
pub const SIGCONT: i32 = 18;
pub const SIGSTOP: i32 = 19;
/// What a reply may take beyond the time that the request itself is given.
const REPLY_GRACE: Duration = Duration::from_secs(15);
/// A request that does no work.
const SHORT: Duration = Duration::from_secs(5);
/// A ping into a port that nobody reads yet is lost: it is sent again after this time.
const PING_AGAIN: Duration = Duration::from_millis(500);
/// The time for a program, unless the caller says another.
pub const RUN_TIMEOUT: Duration = Duration::from_secs(30);

struct Line {
    stream: Mutex<UnixStream>,
    waiting: Mutex<HashMap<u64, Sender<Frame>>>,
    next: AtomicU64,
}

/// An agent, to which any number of threads may talk.
#[derive(Clone)]
pub struct Agent {
    line: Arc<Line>,
    via: Vec<String>,
}

/// How a program ended and what it wrote.
#[derive(Clone, Debug)]
pub struct Output {
    /// None when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote, and was kept.
    pub stdout: String,
    /// The same of its errors.
    pub stderr: String,
}

impl Agent {
    /// Connects to the socket of a host's virtio-serial port.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        let mut reader = stream.try_clone()?;
        let line = Arc::new(Line {
            stream: Mutex::new(stream),
            waiting: Mutex::default(),
            next: AtomicU64::new(1),
        });
        let shared = line.clone();
        thread::spawn(move || {
            while let Ok(frame) = read_frame(&mut reader) {
                let waiting = lock(&shared.waiting).remove(&frame.head.id);
                if let Some(sender) = waiting {
                    let _ = sender.send(frame);
                }
            }
            // Who still waits learns at once that nothing will come.
            lock(&shared.waiting).clear();
        });
        Ok(Agent {
            line,
            via: Vec::new(),
        })
    }

    /// The agent behind a Unix socket of this agent's machine.
    pub fn beyond(&self, socket: &str) -> Agent {
        let mut via = self.via.clone();
        via.push(socket.to_owned());
        let line = self.line.clone();
        Agent { line, via }
    }

    fn request(
        &self,
        request: Request,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Result<(Reply, Vec<u8>)> {
        let id = self.line.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        lock(&self.line.waiting).insert(id, sender);
        let head = Head {
            id,
            via: self.via.clone(),
            message: Message::Request(request),
        };
        let sent = write_frame(&mut *lock(&self.line.stream), &Frame { head, body });
        let reply = match sent {
            Ok(()) => receiver.recv_timeout(timeout),
            Err(_) => Err(RecvTimeoutError::Disconnected),
        };
        lock(&self.line.waiting).remove(&id);
        let frame = reply.map_err(|error| match error {
            RecvTimeoutError::Timeout => anyhow!("the agent did not answer within {timeout:?}"),
            RecvTimeoutError::Disconnected => anyhow!("the agent's machine is gone"),
        })?;
        match frame.head.message {
            Message::Reply(Reply::Failed { why }) => bail!("{why}"),
            Message::Reply(reply) => Ok((reply, frame.body)),
            Message::Request(_) => bail!("the agent sent a request"),
        }
    }

    /// Pings until an answer comes.
    pub fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let since = Instant::now();
            let error = match self.request(Request::Ping, Vec::new(), PING_AGAIN) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            ensure!(
                Instant::now() < deadline,
                "no agent within {timeout:?}: {error:#}"
            );
            // A guest's socket that does not exist yet is refused at once.
            thread::sleep(PING_AGAIN.saturating_sub(since.elapsed()));
        }
    }

    /// Runs a program and gives its outcome back, whatever it is.
    pub fn try_run(&self, argv: &[&str], stdin: &[u8], timeout: Duration) -> Result<Output> {
        let request = Request::Run {
            argv: owned(argv),
            timeout_ms: timeout.as_millis() as u64,
        };
        let (reply, body) = self
            .request(request, stdin.to_vec(), timeout + REPLY_GRACE)
            .with_context(|| format!("`{}`", argv.join(" ")))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        let split = |at: usize| {
            (
                text(&body[..at.min(body.len())]),
                text(&body[at.min(body.len())..]),
            )
        };
        match reply {
            Reply::Exited {
                code, stdout_bytes, ..
            } => {
                let (stdout, stderr) = split(stdout_bytes);
                Ok(Output {
                    code,
                    stdout,
                    stderr,
                })
            }
            Reply::TimedOut { stdout_bytes } => {
                let (stdout, stderr) = split(stdout_bytes);
                bail!(
                    "`{}` did not end within {timeout:?}; it said: {stdout} {stderr}",
                    argv.join(" ")
                )
            }
            other => bail!("unexpected reply {other:?}"),
        }
    }

    /// Runs a program that must succeed and gives its stdout back.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        self.run_within(argv, RUN_TIMEOUT)
    }

    /// The same with a time of its own.
    pub fn run_within(&self, argv: &[&str], timeout: Duration) -> Result<String> {
        let output = self.try_run(argv, &[], timeout)?;
        let Output {
            code,
            stdout,
            stderr,
        } = output;
        ensure!(
            code == Some(0),
            "`{}` ended with {code:?}: {stdout} {stderr}",
            argv.join(" ")
        );
        Ok(stdout)
    }

    /// Runs shell lines, ended by the first that fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(&["sh", "-euc", script])
    }

    /// Starts a program in the background, its outputs appended to a file.
    pub fn spawn(&self, argv: &[&str], output: &str) -> Result<u32> {
        let request = Request::Spawn {
            argv: owned(argv),
            output: output.to_owned(),
        };
        match self.request(request, Vec::new(), SHORT)? {
            (Reply::Spawned { pid }, _) => Ok(pid),
            (other, _) => bail!("unexpected reply {other:?}"),
        }
    }

    /// Waits for the end of such a program; its exit code, or none after a signal.
    pub fn wait(&self, pid: u32, timeout: Duration) -> Result<Option<i32>> {
        let timeout_ms = timeout.as_millis() as u64;
        match self.request(
            Request::Wait { pid, timeout_ms },
            Vec::new(),
            timeout + REPLY_GRACE,
        )? {
            (Reply::Exited { code, .. }, _) => Ok(code),
            _ => bail!("process {pid} did not end within {timeout:?}"),
        }
    }

    /// Sends a signal.
    pub fn kill(&self, pid: u32, signal: i32) -> Result<()> {
        self.request(Request::Kill { pid, signal }, Vec::new(), SHORT)
            .map(drop)
    }

    /// Does something while a process stands still: TCG's nested SVM does not stand a guest that
    /// boots beside somebody at work (`NESTED_FAULTS` in `log`).
    pub fn while_still<T>(&self, pid: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
        self.kill(pid, SIGSTOP)?;
        let done = act();
        self.kill(pid, SIGCONT)?;
        done
    }

    /// Writes a file.
    pub fn put(&self, path: &str, content: &[u8]) -> Result<()> {
        let request = Request::Put {
            path: path.to_owned(),
            mode: 0o755,
        };
        self.request(request, content.to_vec(), RUN_TIMEOUT)
            .map(drop)
    }

    /// Reads a file from its start.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let request = Request::Get {
            path: path.to_owned(),
            offset: 0,
            bytes_max: lab_agent::wire::BODY_BYTES_MAX,
        };
        Ok(self.request(request, Vec::new(), RUN_TIMEOUT)?.1)
    }

    /// Reads a text file.
    pub fn text(&self, path: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.get(path)?)
            .trim_end()
            .to_owned())
    }

    /// Waits until shell lines succeed, tried again and again.
    pub fn wait_until(&self, script: &str, timeout: Duration) -> Result<String> {
        // The polling is on the far side: one request, and no wait longer than needed.
        let polled = format!("while ! ( {script} ) 2>/dev/null; do usleep 50000; done");
        self.run_within(&["sh", "-c", &polled], timeout)
    }
}

fn owned(argv: &[&str]) -> Vec<String> {
    argv.iter().map(|word| word.to_string()).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
