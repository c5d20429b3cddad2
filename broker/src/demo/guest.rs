//! The demonstration's side of its VMM: starts the process, hears its events, kills it.

use super::claim::{Claim, DemoError};
use super::linux::Qemu;
use super::program::Phase;
use super::stop::Stop;
use super::vmm::{Event, GuestKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long the VMM may be silent after it was asked for something: more than its own limits.
const SILENT: Duration = Duration::from_secs(120);
/// The longest line that it tells.
const LINE_MAX: usize = 64 << 10;
/// How often a signal to this process is looked for meanwhile.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// A running VMM. It is killed when this is dropped.
pub(super) struct Guest {
    child: Child,
    heard: Vec<u8>,
    pub(super) kind: GuestKind,
    pub(super) why: Option<String>,
    /// Where the console of a Linux guest is written to.
    console: Option<PathBuf>,
}

/// What a phase brought.
pub(super) struct Done {
    pub(super) interrupts: u64,
    pub(super) checksums: [u32; 2],
}

impl Guest {
    /// Starts QEMU with the function behind `socket`, and Linux in it.
    pub(super) fn boot(
        qemu: &Qemu,
        socket: &Path,
        folder: &Path,
        stop: &Stop,
    ) -> Result<Self, DemoError> {
        let command = qemu.command(socket, folder).map_err(no_vmm)?;
        Self::start(command, Some(folder.to_owned()), stop)
    }

    /// Starts a VMM with the function behind `socket`.
    pub(super) fn launch(socket: &Path, stop: &Stop) -> Result<Self, DemoError> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("demo-vmm")
            .arg("--socket")
            .arg(socket)
            .arg("--parent")
            .arg(std::process::id().to_string());
        Self::start(command, None, stop)
    }

    fn start(
        mut command: Command,
        console: Option<PathBuf>,
        stop: &Stop,
    ) -> Result<Self, DemoError> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut this = Self {
            child: command.spawn().map_err(no_vmm)?,
            heard: Vec::new(),
            kind: GuestKind::StandIn,
            why: None,
            console,
        };
        match this.hear(Claim::Registers, stop)? {
            Event::Ready { guest, why } => (this.kind, this.why) = (guest, why),
            Event::Failed { cause } => return Err(Claim::Registers.broken(cause)),
            other => return Err(Claim::Registers.broken(format!("the VMM told {other:?}"))),
        }
        Ok(this)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Opens the guest's next gate and hears what comes of it. `claims` are what breaks when the
    /// guest waits for ever, and when it sees something wrong.
    pub(super) fn go(
        &mut self,
        phase: Phase,
        claims: [Claim; 2],
        stop: &Stop,
    ) -> Result<Done, DemoError> {
        self.say("go\n").map_err(|error| {
            let cause = format!("the VMM does not listen: {error}");
            claims[1].broken(cause)
        })?;
        match self.hear(claims[1], stop)? {
            Event::Done {
                phase: done,
                interrupts,
                checksums,
            } if done == phase => Ok(Done {
                interrupts,
                checksums,
            }),
            Event::Broken { waits, cause, .. } => {
                let claim = if waits { claims[0] } else { claims[1] };
                Err(claim.broken(cause))
            }
            other => Err(claims[1].broken(format!("the VMM told {other:?}"))),
        }
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        let stdin = self.child.stdin.as_mut();
        let stdin = stdin.ok_or(io::ErrorKind::BrokenPipe)?;
        stdin.write_all(line.as_bytes())
    }

    /// The VMM's next line.
    fn hear(&mut self, claim: Claim, stop: &Stop) -> Result<Event, DemoError> {
        let deadline = Instant::now() + SILENT;
        let console = self.console.clone();
        let broken = |cause: String| match &console {
            None => claim.broken(cause),
            Some(folder) => {
                let console = Qemu::console(folder);
                claim.broken(format!(
                    "{cause} (where QEMU tells of a KVM error, use --accel tcg); the guest's \
                     console: {console}"
                ))
            }
        };
        loop {
            if let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.heard.drain(..=end).collect();
                // A serial port echoes what it is told.
                if console.is_some() && !line.starts_with(b"{") {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map_err(|error| broken(format!("the VMM told no event: {error}")));
            }
            stop.check()?;
            if Instant::now() >= deadline || self.heard.len() > LINE_MAX {
                return Err(broken("the VMM does not answer".to_owned()));
            }
            let read = self.read().map_err(|error| broken(error.to_string()))?;
            if read == Some(0) {
                let ended = self.child.wait();
                let ended = ended.map_or_else(|error| error.to_string(), |how| how.to_string());
                return Err(broken(format!("the VMM has ended: {ended}")));
            }
        }
    }

    /// Reads once; `None` where there was nothing for a while.
    fn read(&mut self) -> io::Result<Option<usize>> {
        let Some(stdout) = self.child.stdout.as_mut() else {
            return Ok(Some(0));
        };
        let mut fds = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&LOOK)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut chunk = [0; 4096];
        let count = stdout.read(&mut chunk)?;
        self.heard.extend_from_slice(&chunk[..count]);
        Ok(Some(count))
    }

    /// Kills it by SIGKILL; the signal that it died of, if it was one.
    pub(super) fn kill(mut self) -> io::Result<Option<i32>> {
        self.child.kill()?;
        self.child.wait().map(|how: ExitStatus| how.signal())
    }

    /// Asks it to leave instead.
    pub(super) fn leave(mut self) -> io::Result<Option<i32>> {
        match self.console {
            None => self.say("leave\n")?,
            // Linux is busy, and QEMU leaves for it.
            Some(_) => kill_process(Pid::from_child(&self.child), Signal::TERM)?,
        }
        self.child.wait().map(|how: ExitStatus| how.signal())
    }
}

fn no_vmm(error: io::Error) -> DemoError {
    Claim::Registers.broken(format!("no VMM: {error}"))
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Fine where it has ended: it was waited for then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
