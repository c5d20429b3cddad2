//! A worker's process as the operating system runs it: started in its sandbox, killed, waited for, looked at in `/proc`.

use crate::{
    ipc::Channel,
    jail::{Sandbox, keep_from_children},
    worker::{
        ALLOCATOR,
        server::{Launch, Process, StartError, kernel},
    },
};
use rustix::{
    event::{PollFd, PollFlags},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
};
use vfio_shim::model::{OsRuntime, Runtime};

/// How the kernel names a mapping of a VFIO device in `/proc/PID/maps`.
const VFIO_MAPPING: &str = "[vfio-device]";

/// What workers are started with.
pub(super) struct Program {
    /// The `sublet` program.
    pub(super) path: PathBuf,
    pub(super) sandbox: Sandbox,
}

impl Launch for Program {
    fn launch(&self, theirs: Channel) -> Result<Arc<dyn Process>, StartError> {
        // Before the fork: what any library has opened for children by mistake is none of theirs.
        keep_from_children();
        let mut command = Command::new(&self.path);
        command
            .arg("worker")
            .arg(format!("--parent={}", std::process::id()))
            .arg(format!("--sandbox={}", self.sandbox.word()))
            .env_clear()
            .env(ALLOCATOR.0, ALLOCATOR.1)
            .stdin(Stdio::from(theirs.into_fd()))
            .stdout(Stdio::null());
        if let Some(filter) = std::env::var_os("SUBLET_LOG") {
            command.env("SUBLET_LOG", filter);
        }
        let mut child = command.spawn().map_err(kernel("start a process"))?;
        // The command holds a copy of the worker's end of the channel: with it, no end would come.
        drop(command);
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Arc::new(WorkerProcess {
                pid: child.id(),
                pidfd,
                child: Mutex::new(child),
            })),
            Err(errno) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(kernel("watch a process")(errno))
            }
        }
    }
}

/// A child of this process.
struct WorkerProcess {
    pid: u32,
    pidfd: OwnedFd,
    /// Waited for by the thread that started it.
    child: Mutex<Child>,
}

impl Process for WorkerProcess {
    fn id(&self) -> u32 {
        self.pid
    }

    fn kill(&self) {
        // Fails where it has ended by itself.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    fn gone(&self, wait_ms: Option<u64>) -> bool {
        let runtime: &dyn Runtime = &OsRuntime;
        let until_ms = wait_ms.map(|ms| runtime.now_ms() + ms);
        let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        match runtime.poll_until(&mut fds, until_ms) {
            Ok(gone) => gone,
            Err(error) => {
                tracing::error!(%error, "cannot wait for a worker");
                false
            }
        }
    }

    fn maps_a_device(&self) -> bool {
        let maps = Path::new("/proc").join(self.pid.to_string()).join("maps");
        match std::fs::read_to_string(maps) {
            Ok(maps) => maps.contains(VFIO_MAPPING),
            // Gone, and with it all that it had mapped.
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    fn status(&self) -> String {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let status = child.wait();
        status.map_or_else(|e| e.to_string(), |status| status.to_string())
    }
}
