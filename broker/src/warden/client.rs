//! A warden as its port has it: workers started and ended, processes looked at, sockets made.

use super::message::{Answer, Asked, Question};
use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    ipc::{Channel, ChannelError, Check, PIECES_MAX, Sent},
    jail::{Sandbox, keep_from_children},
    worker::{
        holders::{HolderError, Vmms},
        server::{Launch, Process, StartError, kernel},
    },
};
use rustix::event::{PollFd, PollFlags};
use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};
use vfio_shim::{
    model::{OsRuntime, Runtime, Span},
    path::words,
};
use vmm_glue::vfio_user::{
    Endpoint,
    memory_check::{Inode, MemoryError, MemoryMaps},
};

/// How long the start of a process may take.
const BEGIN_WAIT: Duration = Duration::from_secs(20);
/// How long an answer may take.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// What a warden is started as.
#[derive(Debug)]
pub struct Programs<'a> {
    /// The `sublet` program.
    pub warden: &'a Path,
    /// The same, for the workers that it starts.
    pub worker: &'a Path,
    /// Whether it and they give up their rights.
    pub sandbox: Sandbox,
}

/// The process beside a port. It ends when this is dropped, and its workers with it.
#[derive(Debug)]
pub struct Warden {
    channel: Channel,
    /// Not waited for but at its end: it ends with the port.
    child: Child,
}

impl Warden {
    /// Starts it; VMMs with the window are written down in `holders`.
    pub fn start(programs: &Programs<'_>, holders: Option<&Path>) -> io::Result<Arc<Self>> {
        // Before the fork: what any library has opened for children by mistake is none of its own.
        keep_from_children();
        let (ours, theirs) = Channel::pair().map_err(io::Error::other)?;
        let mut command = Command::new(programs.warden);
        command
            .arg("warden")
            .arg("--worker")
            .arg(programs.worker)
            .arg(format!("--sandbox={}", programs.sandbox.word()))
            .env_clear()
            .stdin(Stdio::from(theirs.into_fd()))
            .stdout(Stdio::null());
        if let Some(holders) = holders {
            command.arg("--holders").arg(holders);
        }
        if let Some(filter) = std::env::var_os("SUBLET_LOG") {
            command.env("SUBLET_LOG", filter);
        }
        let child = command.spawn()?;
        // The command holds a copy of the warden's end of the channel: with it, no end would come.
        drop(command);
        let channel = ours;
        let warden = Self { channel, child };
        match warden.ask(Question::Hello, BEGIN_WAIT) {
            Ok(_) => Ok(Arc::new(warden)),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// What of this process's descriptors is its channel.
    pub fn descriptor(&self) -> RawFd {
        self.channel.as_fd().as_raw_fd()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn lost(&self, why: impl std::fmt::Display) -> VerbError {
        let text = format!(
            "the port's warden (process {}) does not answer ({why}): start the port again",
            self.pid()
        );
        VerbError::new(ErrorCode::Kernel, text)
    }

    /// One question, and its answer; a refusal is an error.
    fn ask(&self, question: Question, wait: Duration) -> Result<Answer, VerbError> {
        let failed = |error: ChannelError| self.lost(words(&error));
        let (answered, reply) = Channel::pair().map_err(failed)?;
        let reply = reply.into_fd();
        let asked = Asked { reply, question };
        if self.channel.say(&asked, true).map_err(failed)? != Sent::Sent {
            return Err(self.lost("it has ended"));
        }
        // With this end of it here, no end would come.
        drop(asked);
        if !answered.wait(wait).map_err(failed)? {
            let lost = self.lost(format!("nothing within {wait:?}"));
            return Err(VerbError::new(ErrorCode::Timeout, lost.text));
        }
        match answered.hear().map_err(failed)? {
            Some(Answer::Refused(refusal)) => Err(refusal),
            Some(answer) => Ok(answer),
            None => Err(self.lost("it has ended")),
        }
    }

    fn done(&self, question: Question) -> Result<(), VerbError> {
        match self.ask(question, ANSWER_WAIT)? {
            Answer::Done => Ok(()),
            other => Err(self.lost(format!("it says {other:?}"))),
        }
    }

    fn opened(&self, question: Question) -> Result<OwnedFd, VerbError> {
        match self.ask(question, ANSWER_WAIT)? {
            Answer::Opened(fd) => Ok(fd),
            other => Err(self.lost(format!("it says {other:?}"))),
        }
    }

    /// What cannot be had from it is taken as yes, which is what is dangerous.
    fn may_be(&self, question: Question) -> bool {
        match self.ask(question, ANSWER_WAIT) {
            Ok(Answer::Is(so)) => so,
            other => {
                tracing::error!(?other, "the warden does not tell of a process");
                true
            }
        }
    }

    /// Has it listen at this path, in a folder that is made for the socket, or in one that is
    /// there. What it made goes with the endpoint.
    pub fn listen(self: &Arc<Self>, path: &Path, own_folder: bool) -> Result<Endpoint, VerbError> {
        let listener = self.opened(Question::Listen(path.to_owned(), own_folder))?;
        let bound = Bound {
            warden: Arc::clone(self),
            path: path.to_owned(),
        };
        Ok(Endpoint::adopt(listener, path).keeping(bound))
    }

    /// The kernel's log, to be read.
    pub fn kernel_log(&self) -> Result<File, VerbError> {
        self.opened(Question::KernelLog).map(File::from)
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        self.channel.close();
        // Its end is what it waits for; its workers have ended before.
        let _ = self.child.wait();
    }
}

/// A socket that the warden has made.
struct Bound {
    warden: Arc<Warden>,
    path: PathBuf,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(error) = self.warden.done(Question::Release(self.path.clone())) {
            tracing::warn!(path = %self.path.display(), %error, "a socket stays behind");
        }
    }
}

/// Starts its workers.
pub struct Starter(pub Arc<Warden>);

impl Launch for Starter {
    fn launch(&self, theirs: Channel) -> Result<Arc<dyn Process>, StartError> {
        let failed = |error: VerbError| kernel("start a process")(io::Error::other(error));
        let start = Question::Start(theirs.into_fd());
        match self.0.ask(start, BEGIN_WAIT).map_err(failed)? {
            Answer::Started(pid, process) => Ok(Arc::new(Worker {
                warden: Arc::clone(&self.0),
                pid,
                process,
            })),
            other => Err(failed(self.0.lost(format!("it says {other:?}")))),
        }
    }
}

/// A worker: the warden's child.
struct Worker {
    warden: Arc<Warden>,
    pid: i32,
    process: OwnedFd,
}

impl Process for Worker {
    fn id(&self) -> u32 {
        self.pid as u32
    }

    fn kill(&self) {
        // Without a warden it has ended, too.
        if let Err(error) = self.warden.done(Question::Kill(self.pid)) {
            tracing::error!(pid = self.pid, %error, "a worker that is to end");
        }
    }

    fn gone(&self, wait_ms: Option<u64>) -> bool {
        let runtime: &dyn Runtime = &OsRuntime;
        let until_ms = wait_ms.map(|ms| runtime.now_ms() + ms);
        let mut fds = [PollFd::from_borrowed_fd(
            self.process.as_fd(),
            PollFlags::IN,
        )];
        match runtime.poll_until(&mut fds, until_ms) {
            Ok(gone) => gone,
            Err(error) => {
                tracing::error!(%error, "cannot wait for a worker");
                false
            }
        }
    }

    fn maps_a_device(&self) -> bool {
        !self.gone(Some(0)) && self.warden.may_be(Question::MapsDevice(self.pid))
    }

    fn status(&self) -> String {
        self.gone(None);
        match self.warden.ask(Question::Ended(self.pid), ANSWER_WAIT) {
            Ok(Answer::Said(words)) => words,
            Ok(other) => format!("{other:?}"),
            Err(error) => error.text,
        }
    }
}

impl MemoryMaps for Warden {
    fn check_shared(&self, pid: i32, ranges: &[(Inode, Span)]) -> Result<(), MemoryError> {
        for some in ranges.chunks(PIECES_MAX) {
            let range = |(inode, range): &(Inode, Span)| (inode.device, inode.number, *range);
            let ranges = some.iter().map(range).collect();
            let checked = self.done(Question::CheckShared(Check { pid, ranges }));
            checked.map_err(MemoryError::from)?;
        }
        Ok(())
    }
}

impl Vmms for Warden {
    fn begin(&self, pid: i32, process: &OwnedFd) -> Result<(), HolderError> {
        let process = process.try_clone();
        let process = process.map_err(|error| HolderError::Told(error.to_string()))?;
        let begun = self.done(Question::Begin(pid, process));
        begun.map_err(|error| HolderError::Told(error.text))
    }

    fn end(&self, pid: i32, process: &OwnedFd) -> bool {
        match process.try_clone() {
            Ok(process) => self.may_be(Question::End(pid, process)),
            Err(error) => {
                tracing::error!(%error, "a VMM has to end by itself");
                true
            }
        }
    }

    fn forget(&self, pid: i32) {
        if let Err(error) = self.done(Question::Forget(pid)) {
            tracing::warn!(pid, %error, "a VMM stays written down");
        }
    }
}
