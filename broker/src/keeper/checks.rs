//! The keeper's second process: it may look at other processes' memory maps, and at nothing else.
//!
//! Landlock would keep it from looking at processes outside, and the keeper must have Landlock: so
//! there are two. This one has `/proc` for a file system, and of root's rights the one to look: by
//! that it could read the memory of any process, and files of root's. It changes nothing.

use super::{
    KeeperError, kernel,
    serve::{self, Service},
    socket,
};
use crate::jail::{Kept, Role, Sandbox, confine_but, keep_from_children};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, getppid, pidfd_open},
    thread::{CapabilitySet, capabilities},
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};
use vfio_shim::model::{OsRuntime, Runtime};

/// The process, as its keeper has it. It watches the keeper, and ends after it.
pub(super) struct Checks {
    process: OwnedFd,
    _child: Child,
}

impl Checks {
    /// Listens at `path` for processes of user `uid`, and has `program` serve it.
    pub(super) fn start(
        program: &Path,
        sandbox: Sandbox,
        path: &Path,
        uid: u32,
    ) -> Result<Self, KeeperError> {
        let listener = socket::listen_at(path, uid)?;
        keep_from_children();
        let mut command = Command::new(program);
        command
            .arg("keeper-checks")
            .arg(format!("--parent={}", std::process::id()))
            .arg(format!("--user={uid}"))
            .arg(format!("--sandbox={}", sandbox.word()))
            .env_clear()
            .stdin(Stdio::from(listener))
            .stdout(Stdio::null());
        if let Some(filter) = std::env::var_os("SUBLET_LOG") {
            command.env("SUBLET_LOG", filter);
        }
        let child = command.spawn();
        let child = child.map_err(kernel("start `sublet keeper-checks`"))?;
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        Ok(Self {
            process: process.map_err(kernel("watch `sublet keeper-checks`"))?,
            _child: child,
        })
    }

    /// Readable when it has ended.
    pub(super) fn process(&self) -> &OwnedFd {
        &self.process
    }

    pub(super) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(
            self.process.as_fd(),
            PollFlags::IN,
        )];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(ready) if ready > 0)
    }
}

/// Runs the process; its socket is its standard input.
pub fn run(
    parent: i32,
    uid: u32,
    sandbox: Sandbox,
    role: &'static Role,
) -> Result<(), KeeperError> {
    // Not by a signal at its death: Landlock would keep the keeper from sending one.
    let keeper = Pid::from_raw(parent).filter(|parent| getppid() == Some(*parent));
    let keeper = keeper.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let keeper = keeper.filter(|_| getppid().map(|pid| pid.as_raw_nonzero().get()) == Some(parent));
    let keeper = keeper.ok_or_else(|| {
        let source = io::Error::other("its keeper has ended");
        kernel("begin")(source)
    })?;
    let held = capabilities(None).map_err(kernel("look at its capabilities"))?;
    // Without the right to (tests without root) it sees what its user sees.
    let shut_in = sandbox == Sandbox::On && held.effective.contains(CapabilitySet::SYS_CHROOT);
    let kept = Kept {
        capabilities: held.permitted & CapabilitySet::SYS_PTRACE,
        sees_processes: true,
        root: shut_in.then_some("/proc"),
        ..Kept::default()
    };
    let confined = confine_but(role, sandbox, &[0, 1, 2, keeper.as_raw_fd()], &kept)?;
    let report = confined.seal_before_threads()?;
    tracing::info!(?report, "looking at memory");
    let maps = PathBuf::from(if shut_in { "/" } else { "/proc" });
    let maps = Service::Checks(Arc::new(maps));
    let stdin = io::stdin();
    let runtime: Arc<dyn Runtime> = Arc::new(OsRuntime);
    serve::serve(stdin.as_fd(), uid, &maps, &[keeper.as_fd()], &runtime)
        .map_err(kernel("serve its socket"))
}
