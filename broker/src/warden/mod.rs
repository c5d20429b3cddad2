//! The warden: a port's second process, of the port's own user. It does what the port, shut in, cannot: starts workers, looks at VMMs, makes their sockets.
//!
//! ```text
//! sublet port (sandbox) --channel: questions, each with the socket of its answer--> sublet warden
//!                                                                                    \- workers
//! ```
//! It faces the port alone, by fixed messages. The first thread starts and ends workers, whose lives
//! the kernel ties to it; whatever could stand still, such as a look at a process, has a thread of
//! its own. It ends with its channel, so with its port, and its workers end with it.

mod client;
mod message;
#[cfg(test)]
mod message_tests;
mod role;
mod vmms;

pub use client::{Programs, Starter, Warden};
pub use message::{Answer, Asked, Question};
pub use role::ROLE;
pub(crate) use vmms::is_over;
pub use vmms::{OwnVmms, holders_folder};

use crate::{
    daemon::{
        host,
        vocabulary::{ErrorCode, VerbError},
    },
    ipc::{Channel, ChannelError, Check, Sent},
    jail::{JailError, Kept, Sandbox, confine_but, keep_from_children},
    worker::{ALLOCATOR, holders::Vmms},
};
use rustix::{
    process::{Pid, PidfdFlags, pidfd_open},
    thread::capabilities,
};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use vfio_shim::{model::Span, path::words, sysfs::KernelLog};
use vmm_glue::vfio_user::{
    Endpoint,
    memory_check::{Inode, MemoryMaps},
};

/// The most questions that have a thread of their own at once.
const LOOKS_MAX: usize = 64;
/// The most of these that are about guests' memory: a VMM can make such a look stand still, and
/// must not hold up what is done for others.
const CHECKS_MAX: usize = 48;
/// A look's stack.
const STACK_BYTES: usize = 256 << 10;

/// Why a warden cannot run.
#[derive(Debug, thiserror::Error)]
pub enum WardenError {
    /// It cannot give its rights up.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The channel.
    #[error("the channel to its port: a warden is started by `sublet port` alone")]
    Channel(#[from] ChannelError),
    /// The kernel refused.
    #[error("cannot {act}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

fn kernel<E: Into<io::Error>>(act: &'static str) -> impl Fn(E) -> WardenError {
    move |error| WardenError::Kernel {
        act,
        source: error.into(),
    }
}

fn refuse(code: ErrorCode, text: impl Into<String>) -> Answer {
    Answer::Refused(VerbError::new(code, text))
}

/// Runs a warden, whose channel is stdin, until its port has ended.
pub fn run(worker: &Path, holders: Option<PathBuf>, sandbox: Sandbox) -> Result<(), WardenError> {
    let channel = io::stdin().as_fd().try_clone_to_owned();
    let channel = Channel::of(channel.map_err(kernel("take its channel"))?);
    // Whoever tells all processes of a port to end tells the port, and it ends with that.
    let ignored = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        let registered = flag::register(signal, Arc::clone(&ignored));
        registered.map_err(kernel("pass over signals"))?;
    }
    let held = capabilities(None).map_err(kernel("look at its capabilities"))?;
    let kept = Kept {
        capabilities: held.permitted & role::CAPABILITIES,
        sees_processes: true,
        ..Kept::default()
    };
    let own = [0, 1, 2, channel.as_fd().as_raw_fd()];
    let confined = confine_but(&ROLE, sandbox, &own, &kept)?;
    tracing::debug!(?confined, "it has no list of system calls");
    let mut workers = Workers {
        program: worker.to_owned(),
        sandbox,
        running: BTreeMap::new(),
    };
    let looks = Arc::new(Looks {
        vmms: OwnVmms::new(holders),
        sockets: Mutex::default(),
        under_way: Arc::default(),
    });
    while let Some(Asked { reply, question }) = channel.hear()? {
        let reply = Channel::of(reply);
        match question {
            Question::Hello => drop(say(&reply, &Answer::Done)),
            Question::Start(theirs) => workers.start(&reply, theirs),
            Question::Kill(pid) => drop(say(&reply, &workers.kill(pid))),
            Question::Ended(pid) => drop(say(&reply, &workers.ended(pid))),
            other => looks.have_one(reply, other),
        }
    }
    Ok(())
}

/// Whether it is told: whoever asked may have stopped waiting.
fn say(reply: &Channel, answer: &Answer) -> bool {
    match reply.say(answer, false) {
        Ok(sent) => sent == Sent::Sent,
        Err(error) => {
            tracing::error!("an answer: {}", words(&error));
            false
        }
    }
}

/// The workers of a port.
struct Workers {
    program: PathBuf,
    sandbox: Sandbox,
    running: BTreeMap<i32, Child>,
}

impl Workers {
    fn start(&mut self, reply: &Channel, theirs: OwnedFd) {
        match self.spawn(theirs) {
            Ok((mut child, process)) => {
                let pid = child.id() as i32;
                if say(reply, &Answer::Started(pid, process)) {
                    self.running.insert(pid, child);
                } else {
                    // Nobody would ask for its end.
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
            Err(error) => {
                let words = format!("a worker cannot be started: {error}");
                say(reply, &refuse(ErrorCode::Kernel, words));
            }
        }
    }

    fn spawn(&self, theirs: OwnedFd) -> io::Result<(Child, OwnedFd)> {
        // Before the fork: what any library has opened for children by mistake is none of theirs.
        keep_from_children();
        let mut command = Command::new(&self.program);
        command
            .arg("worker")
            .arg(format!("--parent={}", std::process::id()))
            .arg(format!("--sandbox={}", self.sandbox.word()))
            .env_clear()
            .env(ALLOCATOR.0, ALLOCATOR.1)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null());
        if let Some(filter) = std::env::var_os("SUBLET_LOG") {
            command.env("SUBLET_LOG", filter);
        }
        let mut child = command.spawn()?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(process) => Ok((child, process)),
            Err(errno) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(errno.into())
            }
        }
    }

    fn kill(&mut self, pid: i32) -> Answer {
        if let Some(child) = self.running.get_mut(&pid) {
            // Fails where it has ended by itself.
            let _ = child.kill();
        }
        Answer::Done
    }

    fn ended(&mut self, pid: i32) -> Answer {
        let status = self.running.get_mut(&pid).map(Child::try_wait);
        match status {
            Some(Ok(Some(status))) => {
                self.running.remove(&pid);
                Answer::Said(status.to_string())
            }
            Some(Ok(None)) => refuse(ErrorCode::Busy, format!("worker {pid} has not ended")),
            Some(Err(error)) => refuse(ErrorCode::Kernel, error.to_string()),
            None => refuse(ErrorCode::BadRequest, format!("no worker is process {pid}")),
        }
    }
}

/// What is done in threads.
struct Looks {
    vmms: OwnVmms,
    /// Sockets of VMMs, which go when their leases do.
    sockets: Mutex<BTreeMap<PathBuf, Endpoint>>,
    under_way: Arc<AtomicUsize>,
}

/// One question's room among those that are under way; free again when dropped.
struct Room(Arc<AtomicUsize>);

impl Drop for Room {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Room {
    /// By the first thread alone.
    fn take(under_way: &Arc<AtomicUsize>, question: &Question) -> Option<Self> {
        let most = match question {
            Question::CheckShared(_) => CHECKS_MAX,
            _ => LOOKS_MAX,
        };
        let room = under_way.load(Ordering::SeqCst) < most;
        room.then(|| {
            under_way.fetch_add(1, Ordering::SeqCst);
            Self(Arc::clone(under_way))
        })
    }
}

impl Looks {
    fn have_one(self: &Arc<Self>, reply: Channel, question: Question) {
        let Some(room) = Room::take(&self.under_way, &question) else {
            let text = "the warden has as much to do as it takes at once: try again";
            say(&reply, &refuse(ErrorCode::Busy, text));
            return;
        };
        let looks = Arc::clone(self);
        let thread = std::thread::Builder::new().name("look".into());
        let spawned = thread.stack_size(STACK_BYTES).spawn(move || {
            let made = match &question {
                Question::Listen(path, _) => Some(path.clone()),
                _ => None,
            };
            let answer = looks.answer(question);
            drop(room);
            let opened = matches!(answer, Answer::Opened(_));
            if !say(&reply, &answer) && opened {
                // Nobody would ask for its removal.
                let endpoint = made.and_then(|path| looks.sockets().remove(&path));
                drop(endpoint);
            }
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "no thread for a question");
        }
    }

    fn sockets(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Endpoint>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, question: Question) -> Answer {
        match question {
            Question::MapsDevice(pid) => Answer::Is(vmms::maps_a_device(pid)),
            Question::CheckShared(check) => shared(check),
            Question::Begin(pid, process) => match self.vmms.begin(pid, &process) {
                Ok(()) => Answer::Done,
                Err(error) => refuse(ErrorCode::NotAllowed, words(&error)),
            },
            Question::End(pid, process) => Answer::Is(self.vmms.end(pid, &process)),
            Question::Forget(pid) => {
                self.vmms.forget(pid);
                Answer::Done
            }
            Question::Listen(path, own_folder) => self.listen(path, own_folder),
            Question::Release(path) => {
                let endpoint = self.sockets().remove(&path);
                drop(endpoint);
                Answer::Done
            }
            Question::KernelLog => match KernelLog::open_file(Path::new(KernelLog::PATH)) {
                Ok(file) => Answer::Opened(file.into()),
                Err(error) => refuse(ErrorCode::Kernel, format!("{}: {error}", KernelLog::PATH)),
            },
            Question::Hello | Question::Start(_) | Question::Kill(_) | Question::Ended(_) => {
                refuse(ErrorCode::Internal, "that is the first thread's")
            }
        }
    }

    fn listen(&self, path: PathBuf, own_folder: bool) -> Answer {
        let made = host::listen(&path, own_folder).and_then(|endpoint| {
            let listener = endpoint.listener().try_clone_to_owned();
            let listener = listener.map_err(|e| VerbError::new(ErrorCode::Kernel, e.to_string()));
            Ok((listener?, endpoint))
        });
        match made {
            Ok((listener, endpoint)) => {
                self.sockets().insert(path, endpoint);
                Answer::Opened(listener)
            }
            Err(refusal) => Answer::Refused(refusal),
        }
    }
}

fn shared(check: Check) -> Answer {
    let range = |(device, number, range): (u64, u64, Span)| (Inode { device, number }, range);
    let ranges: Vec<_> = check.ranges.into_iter().map(range).collect();
    match PathBuf::from("/proc").check_shared(check.pid, &ranges) {
        Ok(()) => Answer::Done,
        Err(error) => refuse(ErrorCode::NotAllowed, words(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_at_memory_leave_room_for_all_else_and_both_have_an_end() {
        let under_way = Arc::default();
        let check = Question::CheckShared(Check {
            pid: 1,
            ranges: Vec::new(),
        });
        let rooms = |question: &Question| {
            let take = || Room::take(&under_way, question);
            std::iter::from_fn(take).collect::<Vec<_>>()
        };
        let checks = rooms(&check);
        assert_eq!(checks.len(), CHECKS_MAX);
        let others = rooms(&Question::KernelLog);
        assert_eq!(others.len(), LOOKS_MAX - CHECKS_MAX);
        drop((checks, others));
        assert_eq!(rooms(&Question::KernelLog).len(), LOOKS_MAX);
    }
}
