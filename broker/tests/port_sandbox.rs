//! The port as a process: what it is left with, that `status` tells it, and that it needs each system call of its list.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod apart;
#[allow(dead_code, reason = "each test program uses a part of it")]
mod shut;
#[allow(dead_code, reason = "each test program uses a part of it")]
mod soft;

use apart::{Rig, bdf, fabric, machine};
use rustix::{
    fs::{MemfdFlags, fstatfs, memfd_create},
    io::{FdFlags, fcntl_setfd},
    process::{Pid, Signal, kill_process},
};
use soft::{Vmm, lives, signal, try_freeze, until};
use std::{
    env,
    fs::{self, File},
    os::{
        fd::AsFd,
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio, exit},
    sync::Arc,
    time::Duration,
};
use sublet::{
    config::Config,
    daemon::{
        host::{Workers, start_port},
        vocabulary::*,
    },
    jail::{Reach, Report, Role, Sandbox, confine_but, keep_from_children},
    port::{Claimed, ROLE, kept},
    warden::{Programs, Warden},
};
use vfio_shim::sysfs::KernelLog;

/// What a child of this program is to be, and in which folder.
const PART: &str = "SUBLET_PORT_TEST_PART";
const DIR: &str = "SUBLET_PORT_TEST_DIR";
const PORT: &str = "ntb0";
const SUBLET: &str = env!("CARGO_BIN_EXE_sublet");

/// What the tests below start as a process of its own; not a test by itself.
#[test]
fn the_process_of_the_other_tests() {
    let Ok(part) = env::var(PART) else { return };
    let (part, without) = part.split_once(' ').unwrap_or((&part, ""));
    let dir = PathBuf::from(env::var_os(DIR).unwrap());
    match part {
        "ports" => ports(&dir, shut::without(&ROLE, without), Sandbox::On),
        "open-ports" => ports(&dir, &ROLE, Sandbox::Off),
        "exercise" => exercise(&dir, shut::without(&ROLE, without)),
        "old-kernel" => shut::on_an_old_kernel(port(&dir, "on")),
        other => panic!("{other}"),
    }
    exit(0);
}

/// This program in a part.
fn part(part: &str, dir: &Path) -> Command {
    let mut command = shut::this_program();
    command.env(PART, part).env(DIR, dir);
    command.env(shut::ALLOCATOR.0, shut::ALLOCATOR.1);
    command.env("RUST_BACKTRACE", "1");
    command
}

/// The real port, of node 4, whose NTB is none of this machine.
fn port(dir: &Path, sandbox: &str) -> Command {
    let mut command = Command::new(SUBLET);
    let sandbox = format!("--sandbox={sandbox}");
    command.args(["port", PORT, &sandbox, "--config"]);
    command.arg(dir.join("n4/control.toml"));
    command
}

/// The ports of both hosts, joined by a soft NTB, in this one process with the rights of one port.
fn ports(dir: &Path, role: &'static Role, sandbox: Sandbox) {
    let (link, functions) = fabric(1);
    let config = |node| Config::load(&dir.join(format!("n{node}/control.toml"))).unwrap();
    let configs = [config(4), config(8)];
    let (stop, told) = UnixStream::pair().unwrap();
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, told).unwrap();
    let claimed = configs
        .each_ref()
        .map(|config| Claimed::by(config, PORT).unwrap());
    let programs = Programs {
        warden: Path::new(SUBLET),
        worker: Path::new(SUBLET),
        sandbox,
    };
    let warden = Warden::start(&programs, None).unwrap();
    let mut may = claimed[0].kept();
    may.reach.extend(claimed[1].kept().reach);
    let confined = confine_but(role, sandbox, &all_open(), &may).unwrap();
    let left = confined.seal_before_threads().unwrap();
    std::thread::scope(|scope| {
        for (claimed, node) in claimed.into_iter().zip([4, 8]) {
            let machine = machine(&link, node, &functions);
            let process = (Workers::Processes(warden.clone()), Some(left.clone()));
            let stop = stop.as_fd();
            scope.spawn(move || {
                let served = claimed.serve(stop, |config, at, leases| {
                    start_port(config, at, machine, process, leases)
                });
                served.unwrap();
            });
        }
    });
    // A thread that lets a worker go may have it a little longer than its port.
    until("nobody has the warden but this", || {
        (Arc::strong_count(&warden) == 1).then_some(())
    });
    drop(warden);
}

/// Numbers of all that this process has open: the fabric's own are none of a port's.
fn all_open() -> Vec<i32> {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let number = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
    open.map(|entry| number(entry).unwrap().parse().unwrap())
        .collect()
}

/// The folder that stands for sysfs in [`exercise`].
fn sysfs(dir: &Path) -> PathBuf {
    let sysfs = dir.join("sysfs");
    fs::create_dir_all(&sysfs).unwrap();
    fs::write(sysfs.join("vendor"), "0x8086").unwrap();
    let _ = std::os::unix::fs::symlink("vfio-pci", sysfs.join("driver"));
    sysfs
}

/// What a port does where there are real devices, and what its libraries do at times that no test
/// can bring about from outside.
fn exercise(dir: &Path, role: &'static Role) {
    let sysfs = dir.join("sysfs");
    let mut may = kept(dir, &[], true);
    may.reach.push(Reach::Read(sysfs.clone()));
    let confined = confine_but(role, Sandbox::On, &[0, 1, 2], &may).unwrap();
    confined.seal_before_threads().unwrap();
    shut::threads();
    std::thread::sleep(Duration::from_millis(1));
    // sysfs, and the kernel's log.
    assert_eq!(fs::read(sysfs.join("vendor")).unwrap(), b"0x8086");
    assert_eq!(fs::read_dir(&sysfs).unwrap().count(), 2);
    fs::read_link(sysfs.join("driver")).unwrap();
    KernelLog::of(File::open(sysfs.join("vendor")).unwrap()).unwrap();
    // Config space and memory files.
    let memory = memfd_create("exercise", MemfdFlags::CLOEXEC).unwrap();
    rustix::io::pwrite(&memory, &[1; 8], 0).unwrap();
    rustix::io::pread(&memory, &mut [0; 8], 0).unwrap();
    fstatfs(&memory).unwrap();
    // What it is shut off from.
    assert!(File::open("/proc/self/status").is_err(), "a file");
    assert!(File::open("/dev/null").is_err(), "a device");
    assert!(File::create(dir.join("file")).is_err(), "a new file");
    assert!(fs::read_dir(dir).is_err(), "what lies beside its sockets");
    assert!(
        fs::write(sysfs.join("vendor"), "0").is_err(),
        "sysfs, to be written"
    );
    // A keeper that is not there.
    UnixStream::connect(dir.join("functions.sock")).unwrap_err();
}

#[test]
fn confined_port_reads_sysfs_and_reaches_no_other_file() {
    let rig = alone();
    sysfs(rig.dir());
    let status = shut::ended(part("exercise none of them", rig.dir()));
    assert!(status.success(), "{status}");
}

/// Both hosts' daemons.
fn alone() -> Rig {
    Rig::without_ports(&[PORT], 0, Workers::Threads, 50)
}

/// The process of both ports; killed when it goes.
struct Ports {
    child: Child,
}

impl Drop for Ports {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ports {
    /// Once both daemons see a session.
    fn start(rig: &Rig, without: &str) -> Result<Self, String> {
        let mut command = part(&format!("ports {without}"), rig.dir());
        if without != NONE {
            command.stderr(Stdio::null());
        }
        Self::by(rig, command)
    }

    fn by(rig: &Rig, mut command: Command) -> Result<Self, String> {
        keep_from_children();
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let mut this = Self { child };
        let open = |daemon: &apart::Daemon| {
            let status = daemon.status();
            let port = &status.ports[0];
            port.session.peer_node.is_some() && port.last_error.is_none()
        };
        until("sessions", || {
            if let Some(status) = this.child.try_wait().unwrap() {
                return Some(Err(format!("it does not begin: {status}")));
            }
            (open(&rig.lender) && open(&rig.borrower)).then_some(Ok(()))
        })?;
        Ok(this)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn stop(mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        self.child.wait().unwrap()
    }
}

const NONE: &str = "none of them";

fn words(refusal: VerbError) -> String {
    refusal.text
}

/// Two ports' life: a function is lent to a tenant and comes back, and they end as they are told.
fn life(rig: &Rig, without: &str) -> Result<(), String> {
    // What one that died has left is not made by the next, which leaves it.
    let folders = [4, 8].map(|node| rig.dir().join(format!("n{node}/ports")));
    for left in folders.iter().filter(|folder| folder.exists()) {
        fs::remove_dir_all(left).unwrap();
    }
    let ports = Ports::start(rig, without)?;
    let lender = |verb| rig.lender.verb(verb).map_err(words);
    lender(Verb::Add { bdf: bdf(0) })?;
    let port = Some(PORT.to_owned());
    lender(Verb::Available { bdf: bdf(0), port })?;
    rig.borrow(0).map_err(words)?;
    let mut vmm = Vmm::at(&rig.guest_socket(0))?;
    vmm.work()?;
    try_freeze(ports.pid())?;
    signal(ports.pid(), Signal::CONT);
    vmm.copy(3)?;
    drop(vmm);
    rig.give_back(0).map_err(words)?;
    lender(Verb::Unavailable { bdf: bdf(0) })?;
    lender(Verb::Remove { bdf: bdf(0) })?;
    let ended = ports.stop();
    match ended.success() && folders.iter().all(|folder| !folder.exists()) {
        true => Ok(()),
        false => Err(format!("they end with {ended}, or leave their folders")),
    }
}

#[test]
fn port_serves_a_tenant_from_a_sandbox_and_holds_nothing_but_its_own() {
    let rig = alone();
    let ports = Ports::start(&rig, NONE).unwrap();
    rig.offer(0, PORT);
    rig.borrow(0).unwrap();
    let mut vmm = Vmm::at(&rig.guest_socket(0)).unwrap();
    vmm.work().unwrap();
    for daemon in [&rig.lender, &rig.borrower] {
        let process = daemon.status().ports[0].process.clone().unwrap();
        assert!(process.sandbox.unwrap().is_closed());
    }
    // The harness's own thread was there before.
    let tasks = fs::read_dir(format!("/proc/{}/task", ports.pid())).unwrap();
    let statuses = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")));
    let statuses: Vec<String> = statuses.map(Result::unwrap).collect();
    let of_ports = statuses
        .iter()
        .filter(|status| status.starts_with("Name:\tleases\n"));
    assert_eq!(of_ports.clone().count(), 2);
    of_ports.for_each(|status| shut::assert_shut_in(status));
    let worker = rig.borrower.status().borrowed[0].worker.clone().unwrap();
    assert!(worker.landlock && worker.seccomp);
    // The process beside them is the workers' parent, and goes with them.
    let parent = fs::read_to_string(format!("/proc/{}/status", worker.pid)).unwrap();
    assert!(
        !parent.contains(&format!("PPid:\t{}\n", ports.pid())),
        "{parent}"
    );
    drop(ports);
    until("no worker without its port", || {
        (!lives(worker.pid)).then_some(())
    });
}

#[test]
fn each_system_call_of_the_port_is_needed() {
    let rig = alone();
    sysfs(rig.dir());
    let whole = shut::ended(part(&format!("exercise {NONE}"), rig.dir()));
    assert_eq!(whole.code(), Some(0), "{whole}");
    life(&rig, NONE).expect("the whole list is enough");
    let mut idle = Vec::new();
    // VFIO's requests take devices: the lab makes them, and the list is held to vfio-shim's own.
    let calls = ROLE.calls.iter().map(|call| call.name);
    for name in calls.filter(|name| !name.starts_with("ioctl(VFIO")) {
        let part = part(&format!("exercise {name}"), rig.dir());
        if shut::ended(part).signal() != Some(shut::SIGSYS) && life(&rig, name).is_ok() {
            idle.push(name);
        }
    }
    assert!(idle.is_empty(), "nothing needs {idle:?}");
}

#[test]
fn sandbox_that_is_off_is_told() {
    let rig = alone();
    let ports = Ports::by(&rig, part("open-ports", rig.dir())).unwrap();
    let process = rig.lender.status().ports[0].process.clone().unwrap();
    assert_eq!(process.sandbox, Some(Report::default()));
    let page = |control: &str| {
        let mut command = Command::new(SUBLET);
        let output = command
            .arg("--control")
            .arg(rig.dir().join(control))
            .arg("status");
        String::from_utf8(output.output().unwrap().stdout).unwrap()
    };
    let words = format!(
        "port ntb0: its process ({}) runs without a sandbox",
        ports.pid()
    );
    let told = page("n4/control.sock");
    assert!(told.contains(&words), "{told}");
    let told = page("n4/ports/ntb0/control.sock");
    assert!(told.contains(", without a sandbox"), "{told}");
    assert!(ports.stop().success());
}

/// What the real port says as it ends.
fn refused(mut command: Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn kernel_without_landlock_is_refused_unless_told_so_and_no_socket_is_left() {
    let rig = alone();
    keep_from_children();
    let words = refused(part("old-kernel", rig.dir()));
    assert!(words.contains("port cannot be shut off"), "{words}");
    assert!(words.contains("--sandbox=off"), "{words}");
    assert!(!rig.dir().join("n4/ports").exists());
}

#[test]
fn descriptor_that_is_not_its_own_is_refused_and_named() {
    let rig = alone();
    keep_from_children();
    let strange = File::open("/dev/zero").unwrap();
    fcntl_setfd(&strange, FdFlags::empty()).unwrap();
    let words = refused(port(rig.dir(), "on"));
    assert!(
        words.contains("port was started with descriptors"),
        "{words}"
    );
    assert!(words.contains("/dev/zero"), "{words}");
    assert!(!rig.dir().join("n4/ports").exists());
}
