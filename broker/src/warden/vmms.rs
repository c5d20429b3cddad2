//! VMMs with a port's window, as a process of their own user sees them: written down, looked at, ended.
//!
//! They are on disk, in the port's folder, for the port that comes after a killed one: a file named
//! by the process, with the time at which that started.

use crate::worker::holders::{HolderError, Vmms};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, test_kill_process},
};
use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// How the kernel names a VFIO device in `/proc/PID/maps`, and its descriptors.
const DEVICES: [&str; 2] = [MAPPED_DEVICE, "/dev/vfio/devices/"];
const MAPPED_DEVICE: &str = "[vfio-device]";
/// How long a killed process may take to be gone before a port says that it does not start.
const END_WAIT: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

/// Where a port writes them down.
pub fn holders_folder(port: &Path) -> PathBuf {
    port.join("holders")
}

/// By this process's own rights.
#[derive(Debug)]
pub struct OwnVmms {
    /// Where they are written down; none where the port is a thread and ends with its VMMs' leases.
    pub(crate) folder: Option<PathBuf>,
    /// Whether a process has a device's memory; a test has another.
    pub(crate) holds: fn(i32) -> bool,
}

impl OwnVmms {
    /// With this folder for their records.
    pub fn new(folder: Option<PathBuf>) -> Self {
        let holds = holds_a_device;
        Self { folder, holds }
    }

    /// Ends the VMMs of a port that was killed, before its successor opens the NTB.
    pub fn end_left_behind(&self) -> Result<(), HolderError> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let Ok(records) = fs::read_dir(folder) else {
            return Ok(());
        };
        for path in records.flatten().map(|record| record.path()) {
            let pid = path
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            if let Some(pid) = pid {
                self.end_one(pid, &fs::read_to_string(&path).unwrap_or_default())?;
            }
            let _ = fs::remove_file(&path);
        }
        let _ = fs::remove_dir(folder);
        Ok(())
    }

    /// Ends process `pid` if it is the one that started at that time, and has a device.
    fn end_one(&self, pid: i32, began: &str) -> Result<(), HolderError> {
        let still = |why: String| HolderError::StillThere { pid, why };
        let Some(named) = Pid::from_raw(pid) else {
            return Ok(());
        };
        let process = match pidfd_open(named, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(()),
            other => other.map_err(|errno| still(errno.to_string()))?,
        };
        // The number could be another's by now; with the descriptor in hand it cannot become one's.
        // And whoever wrote the record may have been taken over.
        if start_of(pid).is_ok_and(|start| start != began) || !(self.holds)(pid) {
            return Ok(());
        }
        tracing::warn!(
            "process {pid}, a VMM, has the window of a port that is no more: it is ended"
        );
        match pidfd_send_signal(&process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(still(errno.to_string())),
        }
        match is_over(&process, Some(&END_WAIT)) {
            true => Ok(()),
            false => Err(still("it was killed, and is not gone".into())),
        }
    }
}

impl Vmms for OwnVmms {
    fn begin(&self, pid: i32, process: &OwnedFd) -> Result<(), HolderError> {
        let named = Pid::from_raw(pid).ok_or(HolderError::Unseen)?;
        if !is_of(process, pid) {
            return Err(HolderError::Gone(pid));
        }
        if test_kill_process(named) == Err(Errno::PERM) {
            return Err(HolderError::NotOurs(pid));
        }
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        record(folder, pid).map_err(|source| HolderError::Record {
            pid,
            folder: folder.clone(),
            source,
        })
    }

    fn end(&self, pid: i32, process: &OwnedFd) -> bool {
        // What is killed is what was looked at, whatever the two are said to be.
        let holds = is_of(process, pid) && (self.holds)(pid);
        if holds && !is_over(process, Some(&Timespec::default())) {
            tracing::warn!(
                "process {pid}, a VMM, has the NTB's window, and its lease is over: it is ended"
            );
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        holds
    }

    fn forget(&self, pid: i32) {
        if let Some(folder) = &self.folder {
            let _ = fs::remove_file(folder.join(pid.to_string()));
            // Refused while others are in it.
            let _ = fs::remove_dir(folder);
        }
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

/// Whether this is the descriptor of the process that has this number.
fn is_of(process: &OwnedFd, pid: i32) -> bool {
    let known = fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd()));
    let number = |line: &str| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok();
    known.is_ok_and(|known| known.lines().find_map(number) == Some(pid))
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

/// Whether a process has a device mapped; one that cannot be looked at may have, unless it is gone.
pub(super) fn maps_a_device(pid: i32) -> bool {
    task_maps_a_device(&Path::new("/proc").join(pid.to_string()).join("task"))
}

/// By each of its threads: of one that has ended, and be it the first, the kernel shows no memory,
/// though others may still have it.
fn task_maps_a_device(threads: &Path) -> bool {
    let is_gone = |error: &io::Error| {
        let gone = [Errno::NOENT, Errno::SRCH].map(|errno| Some(errno.raw_os_error()));
        gone.contains(&error.raw_os_error())
    };
    let maps = |thread: io::Result<fs::DirEntry>| {
        let maps = thread.and_then(|thread| fs::read_to_string(thread.path().join("maps")));
        maps.map_or_else(
            |error| !is_gone(&error),
            |maps| maps.contains(MAPPED_DEVICE),
        )
    };
    match fs::read_dir(threads) {
        Ok(mut threads) => threads.any(maps),
        Err(error) => !is_gone(&error),
    }
}

/// Whether a process has ended, in so long; without end it is waited for.
pub(crate) fn is_over(process: &OwnedFd, wait: Option<&Timespec>) -> bool {
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

    #[test]
    fn device_is_seen_in_whichever_thread_still_has_the_memory() {
        let dir = tempfile::tempdir().unwrap();
        let threads = dir.path().join("task");
        assert!(!task_maps_a_device(&threads), "a process that is gone");
        let thread = |name: &str, maps: &str| {
            fs::create_dir_all(threads.join(name)).unwrap();
            fs::write(threads.join(name).join("maps"), maps).unwrap();
        };
        // The first has ended.
        thread("1", "");
        assert!(!task_maps_a_device(&threads));
        fs::create_dir(threads.join("3")).unwrap();
        assert!(!task_maps_a_device(&threads), "one that ends meanwhile");
        thread(
            "2",
            "7f0000000000-7f0000001000 rw-s 0 00:10 7 anon_inode:[vfio-device]\n",
        );
        assert!(task_maps_a_device(&threads));
        // What cannot be looked at may have one.
        fs::remove_dir_all(threads.join("2")).unwrap();
        fs::create_dir_all(threads.join("2").join("maps")).unwrap();
        assert!(task_maps_a_device(&threads));
        assert!(!maps_a_device(std::process::id() as i32));
    }
}
