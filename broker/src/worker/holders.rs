//! The VMMs that hold a port's window (`mapped` BARs), by lease: known from before they have it, and gone before it is somebody else's.
//!
//! A mapping outlives the socket, the lease, the worker and the port. So each VMM is known by its
//! pidfd from before it is given the window. What is done to its process is the task of whoever
//! may ([`Vmms`]).

use crate::warden::{OwnVmms, is_over};
use rustix::event::Timespec;
use std::{
    fmt, io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use vfio_shim::path::LeaseId;
use vmm_glue::vfio_user::Vmm;

/// Why a VMM may not have the window, or a port not open it.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// Nobody could end it.
    #[error(
        "the VMM is in a PID namespace that this port does not see, so it could not be ended with its lease: start it in this one, or borrow with --bars trapped"
    )]
    Unseen,
    /// Nor here.
    #[error(
        "this port may not end process {0}, and mapped BARs outlive a lease: start the VMM as the port's user, or borrow with --bars trapped"
    )]
    NotOurs(i32),
    /// It connected, and is not there any more.
    #[error("the VMM (process {0}) has ended meanwhile")]
    Gone(i32),
    /// It cannot be written down.
    #[error("the VMM (process {pid}) cannot be written down in {}", folder.display())]
    Record {
        /// The process.
        pid: i32,
        /// Where.
        folder: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// Whoever may do that has found it so.
    #[error("{0}")]
    Told(String),
    /// One of an earlier port lives.
    #[error(
        "process {pid}, a VMM of an earlier port, still has the NTB's window and does not end ({why}): end it, then start the port"
    )]
    StillThere {
        /// The process.
        pid: i32,
        /// What stands against it.
        why: String,
    },
}

/// What is done to the processes of VMMs, by whoever may.
pub trait Vmms: fmt::Debug + Send + Sync {
    /// Writes it down for the port that comes after a killed one. Refused where it could not be
    /// ended.
    fn begin(&self, pid: i32, process: &OwnedFd) -> Result<(), HolderError>;
    /// Ends it, unless it has let go of every device; whether it is to be waited for.
    fn end(&self, pid: i32, process: &OwnedFd) -> bool;
    /// Its record goes.
    fn forget(&self, pid: i32);
}

#[derive(Debug)]
struct Holder {
    lease: LeaseId,
    pid: i32,
    process: OwnedFd,
}

/// Those of one port, by lease.
#[derive(Debug)]
pub struct Holders {
    held: Mutex<Vec<Holder>>,
    vmms: Arc<dyn Vmms>,
}

impl Default for Holders {
    /// Of a port that nothing outlives.
    fn default() -> Self {
        Self::of(Arc::new(OwnVmms::new(None)))
    }
}

impl Holders {
    /// Nobody yet.
    pub fn of(vmms: Arc<dyn Vmms>) -> Self {
        let held = Mutex::default();
        Self { held, vmms }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Holder>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VMM is about to have the window. Refused where it could not be ended.
    pub fn begins(&self, lease: LeaseId, vmm: Vmm) -> Result<(), HolderError> {
        let Vmm { pid, process } = vmm;
        if pid <= 0 {
            return Err(HolderError::Unseen);
        }
        self.vmms.begin(pid, &process)?;
        // Behind all that went by its number, which is not another's as long as it lives.
        if is_over(&process, Some(&Timespec::default())) {
            self.vmms.forget(pid);
            return Err(HolderError::Gone(pid));
        }
        let mut held = self.held();
        held.retain(|holder| {
            let there = !is_over(&holder.process, Some(&Timespec::default()));
            if !there && holder.pid != pid {
                self.vmms.forget(holder.pid);
            }
            there
        });
        held.push(Holder {
            lease,
            pid,
            process,
        });
        Ok(())
    }

    /// Returns when no VMM of this lease has the window any more: one that let go of it goes on,
    /// one that did not is ended.
    pub fn end(&self, lease: LeaseId) {
        let of_lease: Vec<Holder> = self.held().extract_if(.., |h| h.lease == lease).collect();
        for Holder { pid, process, .. } in of_lease {
            let lives = !is_over(&process, Some(&Timespec::default()));
            if lives && self.vmms.end(pid, &process) {
                // That it may be ended was seen when it began; where that is no more so, it is
                // waited for.
                is_over(&process, None);
            }
            if !self.held().iter().any(|other| other.pid == pid) {
                self.vmms.forget(pid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::warden::holders_folder as folder;
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    use std::{
        fs,
        path::Path,
        process::{Child, Command},
    };

    struct Process(Child);

    impl Process {
        fn start() -> Self {
            Self(Command::new("sleep").arg("600").spawn().unwrap())
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }

        fn vmm(&self) -> Vmm {
            let named = Pid::from_raw(self.pid()).unwrap();
            Vmm {
                pid: self.pid(),
                process: pidfd_open(named, PidfdFlags::empty()).unwrap(),
            }
        }

        fn lives(&mut self) -> bool {
            self.0.try_wait().unwrap().is_none()
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn vmms(dir: &Path, holds: fn(i32) -> bool) -> OwnVmms {
        OwnVmms {
            holds,
            ..OwnVmms::new(Some(folder(dir)))
        }
    }

    fn holders(dir: &Path, holds: fn(i32) -> bool) -> Holders {
        Holders::of(Arc::new(vmms(dir, holds)))
    }

    #[test]
    fn vmm_that_has_the_window_is_ended_with_its_lease_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let holders = holders(dir.path(), |_| true);
        let (mut one, mut other) = (Process::start(), Process::start());
        holders.begins(LeaseId(1), one.vmm()).unwrap();
        holders.begins(LeaseId(2), other.vmm()).unwrap();
        let records = || fs::read_dir(folder(dir.path())).map_or(0, Iterator::count);
        assert_eq!(records(), 2);
        holders.end(LeaseId(1));
        assert!(!one.lives() && other.lives());
        assert_eq!(records(), 1);
        holders.end(LeaseId(2));
        assert!(!other.lives() && !folder(dir.path()).exists());
    }

    #[test]
    fn vmm_that_let_go_lives_on() {
        let dir = tempfile::tempdir().unwrap();
        let holders = holders(dir.path(), |_| false);
        let mut vmm = Process::start();
        holders.begins(LeaseId(1), vmm.vmm()).unwrap();
        holders.end(LeaseId(1));
        assert!(vmm.lives() && !folder(dir.path()).exists());
        assert!(!(OwnVmms::new(None).holds)(vmm.pid()));
    }

    #[test]
    fn next_port_ends_what_a_killed_one_left_and_spares_whoever_has_its_number_now() {
        let dir = tempfile::tempdir().unwrap();
        let mut vmm = Process::start();
        holders(dir.path(), |_| true)
            .begins(LeaseId(1), vmm.vmm())
            .unwrap();
        let mut stranger = Process::start();
        let at = folder(dir.path()).join(stranger.pid().to_string());
        fs::write(&at, "1").unwrap();
        // Torn, of a port that was killed while it wrote.
        fs::write(folder(dir.path()).join("77.new"), "").unwrap();
        vmms(dir.path(), |_| true).end_left_behind().unwrap();
        assert!(!vmm.lives() && stranger.lives());
        assert!(!folder(dir.path()).exists());
        vmms(dir.path(), |_| true).end_left_behind().unwrap();
    }

    #[test]
    fn next_port_spares_what_was_written_down_and_has_no_device() {
        let dir = tempfile::tempdir().unwrap();
        let mut written = Process::start();
        holders(dir.path(), |_| false)
            .begins(LeaseId(1), written.vmm())
            .unwrap();
        // As a port that starts looks.
        let next = OwnVmms::new(Some(folder(dir.path())));
        next.end_left_behind().unwrap();
        assert!(written.lives() && !folder(dir.path()).exists());
    }

    #[test]
    fn process_is_not_ended_for_what_another_one_has() {
        let (mut holder, mut other) = (Process::start(), Process::start());
        let dir = tempfile::tempdir().unwrap();
        let vmms = vmms(dir.path(), |_| true);
        assert!(!vmms.end(holder.pid(), &other.vmm().process));
        let begun = vmms.begin(holder.pid(), &other.vmm().process);
        assert!(matches!(begun, Err(HolderError::Gone(_))), "{begun:?}");
        assert!(holder.lives() && other.lives() && !folder(dir.path()).exists());
        assert!(vmms.end(holder.pid(), &holder.vmm().process));
        assert!(is_over(&holder.vmm().process, None) && other.lives());
    }

    #[test]
    fn vmm_that_could_not_be_ended_does_not_get_the_window() {
        let dir = tempfile::tempdir().unwrap();
        let holders = holders(dir.path(), |_| true);
        let vmm = Process::start();
        let unseen = Vmm {
            pid: 0,
            ..vmm.vmm()
        };
        let refused = holders.begins(LeaseId(1), unseen);
        assert!(matches!(refused, Err(HolderError::Unseen)));
        // Its number could be another's by the time that it is written down.
        let mut ended = Process::start();
        let of_ended = ended.vmm();
        ended.0.kill().unwrap();
        let mut stranger = Process::start();
        assert!(is_over(&of_ended.process, None));
        let as_stranger = Vmm {
            pid: stranger.pid(),
            ..of_ended
        };
        let refused = holders.begins(LeaseId(1), as_stranger);
        assert!(matches!(refused, Err(HolderError::Gone(_))));
        assert!(stranger.lives() && !folder(dir.path()).exists());
        let nowhere = OwnVmms::new(Some(dir.path().join("no").join("such")));
        let nowhere = Holders::of(Arc::new(nowhere));
        let refused = nowhere.begins(LeaseId(1), vmm.vmm());
        assert!(matches!(refused, Err(HolderError::Record { .. })));
    }
}
