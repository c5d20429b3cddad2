//! The VMMs that hold a port's window (`mapped` BARs): written down before they have it, and ended before it is somebody else's.
//!
//! A mapping outlives the socket, the lease, the worker and the port. So each VMM is known by its
//! pidfd from before it is given the window, and on disk, in the port's folder, for the port that
//! comes after a killed one: a file named by the process, with the time at which that started.

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, test_kill_process},
};
use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};
use vfio_shim::path::LeaseId;
use vmm_glue::vfio_user::Vmm;

/// How the kernel names a VFIO device in `/proc/PID/maps`, and its descriptors.
const DEVICES: [&str; 2] = ["[vfio-device]", "/dev/vfio/devices/"];
/// How long a killed process may take to be gone before a port says that it does not start.
const END_WAIT: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

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

#[derive(Debug)]
struct Holder {
    lease: LeaseId,
    pid: i32,
    process: OwnedFd,
}

/// Those of one port, by lease.
#[derive(Debug)]
pub struct Holders {
    /// Where they are written down; none where the port is a thread and ends with its VMMs' leases.
    folder: Option<PathBuf>,
    held: Mutex<Vec<Holder>>,
    /// Whether a process has a device's memory; a test has another.
    holds: fn(i32) -> bool,
}

impl Default for Holders {
    /// Of a port that nothing outlives.
    fn default() -> Self {
        Self::new(None)
    }
}

/// Where a port writes them down.
pub fn folder(port: &Path) -> PathBuf {
    port.join("holders")
}

impl Holders {
    /// Nobody yet.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self {
            folder,
            held: Mutex::default(),
            holds: holds_a_device,
        }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Holder>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VMM is about to have the window. Refused where it could not be ended.
    pub fn begins(&self, lease: LeaseId, vmm: Vmm) -> Result<(), HolderError> {
        let Vmm { pid, process } = vmm;
        let named = Pid::from_raw(pid).ok_or(HolderError::Unseen)?;
        if test_kill_process(named) == Err(Errno::PERM) {
            return Err(HolderError::NotOurs(pid));
        }
        if let Some(folder) = &self.folder {
            record(folder, pid).map_err(|source| HolderError::Record {
                pid,
                folder: folder.clone(),
                source,
            })?;
        }
        // Behind all that went by its number, which is not another's as long as it lives.
        if is_over(&process, Some(&Timespec::default())) {
            self.forget(pid);
            return Err(HolderError::Gone(pid));
        }
        let mut held = self.held();
        held.retain(|holder| {
            let there = !is_over(&holder.process, Some(&Timespec::default()));
            if !there && holder.pid != pid {
                self.forget(holder.pid);
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
            if (self.holds)(pid) && !is_over(&process, Some(&Timespec::default())) {
                tracing::warn!(
                    %lease,
                    "process {pid}, the VMM, has the NTB's window, and its lease is over: it is ended"
                );
                // That it may be was seen when it began; where that is no more so, it is waited for.
                let _ = pidfd_send_signal(&process, Signal::KILL);
                is_over(&process, None);
            }
            if !self.held().iter().any(|other| other.pid == pid) {
                self.forget(pid);
            }
        }
    }

    fn forget(&self, pid: i32) {
        if let Some(folder) = &self.folder {
            let _ = fs::remove_file(folder.join(pid.to_string()));
            // Refused while others are in it.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Ends the VMMs of a port that was killed, before its successor opens the NTB.
pub fn end_left_behind(folder: &Path) -> Result<(), HolderError> {
    let Ok(records) = fs::read_dir(folder) else {
        return Ok(());
    };
    for path in records.flatten().map(|record| record.path()) {
        let pid = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        if let Some(pid) = pid {
            end_one(pid, &fs::read_to_string(&path).unwrap_or_default())?;
        }
        let _ = fs::remove_file(&path);
    }
    let _ = fs::remove_dir(folder);
    Ok(())
}

/// Ends process `pid` if it is the one that started at that time.
fn end_one(pid: i32, began: &str) -> Result<(), HolderError> {
    let still = |why: String| HolderError::StillThere { pid, why };
    let Some(named) = Pid::from_raw(pid) else {
        return Ok(());
    };
    let process = match pidfd_open(named, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(()),
        other => other.map_err(|errno| still(errno.to_string()))?,
    };
    // The number could be another's by now; with the descriptor in hand it cannot become one's.
    if start_of(pid).is_ok_and(|start| start != began) {
        return Ok(());
    }
    tracing::warn!("process {pid}, a VMM, has the window of a port that is no more: it is ended");
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(errno) => return Err(still(errno.to_string())),
    }
    match is_over(&process, Some(&END_WAIT)) {
        true => Ok(()),
        false => Err(still("it was killed, and is not gone".into())),
    }
}

/// Whole, or not there: the record is on disk before the window is handed over.
fn record(folder: &Path, pid: i32) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let new = folder.join(format!("{pid}.new"));
    fs::write(&new, start_of(pid)?)?;
    fs::rename(&new, folder.join(pid.to_string()))
}

/// When a process started, as the kernel counts (field 22 of `/proc/PID/stat`).
fn start_of(pid: i32) -> io::Result<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, a name in brackets, can hold anything.
    let behind = stat.rsplit(')').next().unwrap_or_default();
    let start = behind.split_ascii_whitespace().nth(19);
    start
        .map(str::to_owned)
        .ok_or(io::ErrorKind::InvalidData.into())
}

/// Whether a process has a VFIO device open or mapped; one that cannot be looked at may have.
fn holds_a_device(pid: i32) -> bool {
    let is_device = |text: &str| DEVICES.iter().any(|device| text.contains(device));
    let own = Path::new("/proc").join(pid.to_string());
    let (Ok(maps), Ok(fds)) = (
        fs::read_to_string(own.join("maps")),
        fs::read_dir(own.join("fd")),
    ) else {
        return true;
    };
    let links = fds.flatten().map(|fd| fs::read_link(fd.path()));
    is_device(&maps)
        || links
            .flatten()
            .any(|target| is_device(&target.to_string_lossy()))
}

/// Whether a process has ended, in so long; without end it is waited for.
fn is_over(process: &OwnedFd, wait: Option<&Timespec>) -> bool {
    loop {
        match poll(&mut [PollFd::new(process, PollFlags::IN)], wait) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot wait for a VMM");
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

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

    fn holders(dir: &Path, holds: fn(i32) -> bool) -> Holders {
        Holders {
            holds,
            ..Holders::new(Some(folder(dir)))
        }
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
        assert!(!holds_a_device(vmm.pid()));
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
        end_left_behind(&folder(dir.path())).unwrap();
        assert!(!vmm.lives() && stranger.lives());
        assert!(!folder(dir.path()).exists());
        end_left_behind(&folder(dir.path())).unwrap();
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
        let nowhere = Holders::new(Some(dir.path().join("no").join("such")));
        let refused = nowhere.begins(LeaseId(1), vmm.vmm());
        assert!(matches!(refused, Err(HolderError::Record { .. })));
    }
}
