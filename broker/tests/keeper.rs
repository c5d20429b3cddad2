//! The keeper as processes: what it is left with, what it says, and that a killed one is not missed.

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    process::{Pid, Signal, geteuid, kill_process},
};
use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use sublet::{daemon::vocabulary::ErrorCode, jail::keep_from_children, keeper::Keeper};
use vfio_shim::{model::Span, vfio::MappedAperture};
use vmm_glue::vfio_user::memory_check::{Inode, MemoryMaps, check_fd};

/// Longer than anything here takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const BYTES: u64 = 1 << 20;

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A keeper in its sandbox; killed when it goes.
struct Running {
    child: Child,
    folder: PathBuf,
}

impl Running {
    fn start(dir: &Path) -> Self {
        let folder = dir.join("keeper");
        let user = geteuid().as_raw();
        let text = format!(
            "[node]\nid = 4\nname = \"a\"\n[keeper]\nfolder = {folder:?}\nuser = \"{user}\"\n\
             [[port]]\nname = \"n\"\nbdf = \"ffff:ff:1f.7\"\npeers = \"cable\"\n\
             trust_domain = \"t\"\n"
        );
        let config = dir.join("sublet.toml");
        fs::write(&config, text).unwrap();
        keep_from_children();
        let mut log = fs::File::options();
        let log = log.create(true).append(true).open(dir.join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_sublet"))
            .args(["keeper", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let this = Self { child, folder };
        until("the keeper shuts itself in", || {
            status(this.pid()).contains("Seccomp:\t2").then_some(())
        });
        until("and so does the process beside it", || {
            status(this.checks()?).contains("Seccomp:\t2").then_some(())
        });
        this
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process beside it.
    fn checks(&self) -> Option<u32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        children.ok()?.trim().parse().ok()
    }

    fn keeper(&self) -> Keeper {
        Keeper::at(&self.folder)
    }

    fn end_by(mut self, signal: Signal) -> std::process::ExitStatus {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn status(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default()
}

fn capabilities(pid: u32) -> String {
    let status = status(pid);
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.unwrap_or_default().trim().to_owned()
}

/// Memory of this process, shared or not mapped at all.
fn memory() -> (OwnedFd, Inode) {
    let fd = memfd_create("keeper-test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, BYTES).unwrap();
    let range = Span::new(0, BYTES).unwrap();
    let inode = check_fd(fd.as_fd(), range, vfio_shim::model::Access::READ).unwrap();
    (fd, inode)
}

#[test]
fn keeper_in_its_sandbox_answers_and_has_no_more_than_it_needs() {
    let dir = tempfile::tempdir().unwrap();
    let running = Running::start(dir.path());
    let keeper = running.keeper();
    let refused = keeper.open("0000:00:00.0".parse().unwrap()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotAllowed, "{refused}");
    let absent = keeper.open("ffff:ff:1f.7".parse().unwrap()).unwrap_err();
    assert_eq!(absent.code, ErrorCode::UnknownFunction, "{absent}");

    let (fd, inode) = memory();
    let own = std::process::id() as i32;
    let ranges = [(inode, Span::new(0, BYTES).unwrap())];
    let private = keeper.check_shared(own, &ranges).unwrap_err().to_string();
    assert!(private.contains("share=on"), "{private}");
    let mapped = MappedAperture::memory(fd.as_fd(), 0, BYTES).unwrap();
    keeper.check_shared(own, &ranges).unwrap();
    drop(mapped);
    // So many threads later both are still there: none of them was shut in too far.
    for _ in 0..100 {
        keeper.check_shared(own, &ranges).unwrap_err();
    }

    let checks = running.checks().unwrap();
    assert_eq!(capabilities(running.pid()), "0000000000000000");
    let looks = if geteuid().is_root() {
        "0000000000080000"
    } else {
        "0000000000000000"
    };
    assert_eq!(capabilities(checks), looks);
    for pid in [running.pid(), checks] {
        assert!(status(pid).contains("NoNewPrivs:\t1"), "{}", status(pid));
    }
    if geteuid().is_root() {
        let top = PathBuf::from(format!("/proc/{checks}")).join("root");
        assert!(top.join("self").exists() && !top.join("bin").exists());
    }
    let ended = running.end_by(Signal::TERM);
    assert!(ended.success(), "{ended}");
}

#[test]
fn killed_keeper_takes_its_second_process_along_and_the_next_one_serves() {
    let dir = tempfile::tempdir().unwrap();
    let first = Running::start(dir.path());
    let (keeper, checks) = (first.keeper(), first.checks().unwrap());
    first.end_by(Signal::KILL);
    until("the process beside it dies", || {
        let status = status(checks);
        (status.is_empty() || status.contains("State:\tZ")).then_some(())
    });
    let lost = keeper.open("0000:00:00.0".parse().unwrap()).unwrap_err();
    assert!(lost.text.contains("start `sublet keeper"), "{lost}");
    let second = Running::start(dir.path());
    let refused = keeper.open("0000:00:00.0".parse().unwrap()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotAllowed, "{refused}");
    // The other way round: without its second process the keeper ends, for its supervisor to see.
    let beside = Pid::from_raw(second.checks().unwrap() as i32).unwrap();
    kill_process(beside, Signal::KILL).unwrap();
    let mut second = second;
    let ended = second.child.wait().unwrap();
    assert!(!ended.success(), "{ended}");
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(log.contains("`sublet keeper-checks` has ended"), "{log}");
}
