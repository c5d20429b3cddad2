//! The keeper as processes: what it is left with, what it says, that a killed one is not missed, and that each system call of both lists is needed.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod shut;
#[allow(dead_code, reason = "each test program uses a part of it")]
mod soft;
#[allow(dead_code, reason = "each test program uses a part of it")]
mod tree;

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    process::{Pid, Signal, geteuid, kill_process},
};
use soft::{lives, signal, try_freeze, until};
use std::{
    env, fs,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio, exit},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};
use sublet::{
    daemon::vocabulary::ErrorCode,
    jail::{Role, Sandbox, confine, keep_from_children},
    keeper::{self, CHECKS, Ground, Keeper, ROLE},
};
use tree::{FORBIDDEN, OTHER, Tree, VF, put};
use vfio_shim::{
    model::{Bdf, Span},
    sysfs::Sysfs,
    vfio::{Door, MappedAperture, OpenError, OpenGroup},
};
use vmm_glue::vfio_user::memory_check::{Inode, MemoryMaps, check_fd};

/// What a child of this program is to be, of which tree, with which program beside it.
const PART: &str = "SUBLET_KEEPER_TEST_PART";
const TREE: &str = "SUBLET_KEEPER_TEST_TREE";
const BESIDE: &str = "SUBLET_KEEPER_TEST_BESIDE";
const SUBLET: &str = env!("CARGO_BIN_EXE_sublet");
const BYTES: u64 = 1 << 20;

/// What the tests below start as a process of its own; not a test by itself.
#[test]
fn the_process_of_the_other_tests() {
    let Ok(part) = env::var(PART) else { return };
    let (part, without) = part.split_once(' ').unwrap();
    match part {
        "keeper" => {
            let tree = Tree::at(Path::new(&env::var_os(TREE).unwrap()));
            keeper_of(&tree, shut::without(&ROLE, without));
        }
        "keeper-checks" => {
            let (parent, without) = without.split_once(' ').expect("a parent and a name");
            let (parent, uid) = (parent.parse().unwrap(), geteuid().as_raw());
            let role = shut::without(&CHECKS, without);
            let ended = keeper::run_checks(parent, uid, Sandbox::On, role);
            exit(i32::from(ended.is_err()));
        }
        "exercise-keeper" => exercise(shut::without(&ROLE, without), shut::waits),
        "exercise-keeper-checks" => exercise(shut::without(&CHECKS, without), || ()),
        other => panic!("{other}"),
    }
}

/// What its libraries do at times that no test can bring about from outside.
fn exercise(role: &'static Role, waits: fn()) -> ! {
    let confined = confine(role, Sandbox::On, &[0, 1, 2]).unwrap();
    confined.seal_before_threads().unwrap();
    shut::several_threads(shut::allocates);
    waits();
    exit(0);
}

/// The keeper of a tree, in its sandbox.
fn keeper_of(tree: &Tree, role: &'static Role) -> ! {
    let door = Door::new(tree.top().join("dev/vfio"));
    let strange = tree.top().join("not-a-keepers");
    let opened = AtomicBool::new(false);
    let open = move |bdf: Bdf, sysfs: &Sysfs| {
        fs::File::create(&strange).unwrap_err();
        // A look whether it is free, and the client has just closed it.
        let group = sysfs.iommu_group(bdf).unwrap();
        if bdf == self::bdf(VF) && opened.fetch_xor(true, Ordering::SeqCst) {
            return Err(OpenError::Busy { bdf, group });
        }
        door.open(bdf, sysfs)
    };
    let driver = |bdf: &str| tree.driver(bdf);
    let [vf, other] = [VF, OTHER].map(driver);
    let kernel = move |file: &Path, text: &str| {
        let binds = file.ends_with("drivers_probe");
        let driver = if text == VF { &vf } else { &other };
        if binds || file.ends_with("unbind") {
            // Nothing is made or removed here: whoever plays the kernel does that.
            while fs::read_link(driver).is_ok() != binds {}
        }
    };
    let ground = Ground {
        top: tree.top().to_owned(),
        sysfs: Sysfs::stand_in(tree.sys(""), Arc::new(kernel)),
        open: Box::new(open),
    };
    let program = PathBuf::from(env::var_os(BESIDE).unwrap());
    let ended = keeper::run(&config(tree.top()), ground, &program, Sandbox::On, role);
    // Until its test has seen that no thread of it dies of its last call.
    let _ = std::io::stdin().read(&mut [0]);
    exit(i32::from(ended.is_err()));
}

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn config(dir: &Path) -> PathBuf {
    dir.join("sublet.toml")
}

/// A keeper in its sandbox; killed when it goes.
struct Running {
    child: Child,
    folder: PathBuf,
}

impl Running {
    /// The real program.
    fn start(dir: &Path) -> Self {
        let folder = dir.join("keeper");
        let user = geteuid().as_raw();
        let text = format!(
            "[node]\nid = 4\nname = \"a\"\n[keeper]\nfolder = {folder:?}\nuser = \"{user}\"\n\
             [[port]]\nname = \"n\"\nbdf = \"ffff:ff:1f.7\"\npeers = \"cable\"\n\
             trust_domain = \"t\"\n"
        );
        fs::write(config(dir), text).unwrap();
        let mut log = fs::File::options();
        let log = log.create(true).append(true).open(dir.join("log")).unwrap();
        let mut command = Command::new(SUBLET);
        command.args(["keeper", "--config"]).arg(config(dir));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(log);
        Self::by(command, folder).unwrap()
    }

    fn by(mut command: Command, folder: PathBuf) -> Result<Self, String> {
        keep_from_children();
        let child = command.spawn().unwrap();
        let mut this = Self { child, folder };
        let shut_in = |pid| status(pid).contains("Seccomp:\t2").then_some(());
        this.until("the keeper shuts itself in", |this| shut_in(this.pid()))?;
        this.until("and so does the process beside it", |this| {
            shut_in(this.checks()?)
        })?;
        Ok(this)
    }

    /// Looks for something that a keeper which has ended will not bring about.
    fn until<T>(&mut self, what: &str, look: impl Fn(&Self) -> Option<T>) -> Result<T, String> {
        until(what, || {
            let ended = self.child.try_wait().unwrap();
            match (look(self), ended) {
                (Some(seen), _) => Some(Ok(seen)),
                (None, Some(status)) => Some(Err(format!("{what}: it has ended, {status}"))),
                (None, None) => None,
            }
        })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process beside it.
    fn checks(&self) -> Option<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).ok()?;
        let children =
            tasks.map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
        let children: Vec<String> = children.flatten().collect();
        children.concat().trim().parse().ok()
    }

    fn keeper(&self) -> Keeper {
        Keeper::at(&self.folder)
    }

    fn end_by(mut self, signal: Signal) -> ExitStatus {
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

const NONE: &str = "none of them";

/// A life on a machine of its own, with this program beside the keeper, which is without one entry.
fn life(beside: &Path, without: &str) -> Result<(), String> {
    let tree = Tree::new();
    tree.xe_vfs(&[VF, OTHER]);
    tree.orphan(OTHER);
    for name in ["vfio", "1", "2"] {
        put(&tree.top().join("dev/vfio").join(name), "");
    }
    let text = tree.config_text(geteuid().as_raw());
    fs::write(config(tree.top()), text).unwrap();
    let (alive, over) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let _alive = alive;
        let tree = &tree;
        scope.spawn(move || {
            let step = Duration::from_millis(1);
            while over.recv_timeout(step) == Err(RecvTimeoutError::Timeout) {
                play_kernel(tree);
            }
        });
        life_on(tree, beside, without)
    })
}

/// Binds and unbinds as the files of sysfs ask for it.
fn play_kernel(tree: &Tree) {
    let taken = |file: &str| {
        let file = tree.sys(file);
        let text = fs::read_to_string(&file).unwrap();
        let bdf = [VF, OTHER].into_iter().find(|bdf| *bdf == text)?;
        fs::write(&file, "").unwrap();
        Some(bdf)
    };
    if let Some(bdf) = taken("bus/pci/drivers_probe") {
        tree.bind_to(bdf, "vfio-pci");
    }
    if let Some(bdf) = taken("bus/pci/drivers/vfio-pci/unbind") {
        fs::remove_file(tree.driver(bdf)).unwrap();
    }
}

/// A keeper's life: it gives back what the last one had bound; a function is bound, opened, stopped,
/// closed and given back; memory is looked at; both processes are frozen for a while, and end.
fn life_on(tree: &Tree, beside: &Path, without: &str) -> Result<(), String> {
    let mut command = shut::this_program();
    command.env(PART, format!("keeper {without}"));
    command.env(TREE, tree.top()).env(BESIDE, beside);
    command.stdin(Stdio::piped()).stderr(Stdio::null());
    let mut running = Running::by(command, tree.folder())?;
    running.until("what the last one had bound is free", |_| {
        tree.is_as_before(OTHER).then_some(())
    })?;
    let keeper = running.keeper();
    let opened = keeper.open_to_lend(bdf(VF));
    let (opened, stopper) = opened.map_err(|refusal| refusal.text)?;
    stopper.stop().map_err(|refusal| refusal.text)?;
    let stopped = [1, 2].map(|vf| fs::read_to_string(tree.xe_stop(vf)).unwrap());
    assert!(tree.is_bound(VF) && stopped == ["1", ""], "{stopped:?}");
    let OpenGroup { group, kept, .. } = opened;
    drop(group);
    drop(kept);
    running.until("it is given back", |_| tree.is_as_before(VF).then_some(()))?;
    looks(&keeper)?;
    let checks = running.checks().ok_or("nothing is beside it")?;
    for pid in [running.pid(), checks] {
        try_freeze(pid)?;
        signal(pid, Signal::CONT);
    }
    let refused = keeper.open(bdf(FORBIDDEN)).unwrap_err();
    if refused.code != ErrorCode::NotAllowed {
        return Err(refused.text);
    }
    looks(&keeper)?;
    signal(running.pid(), Signal::TERM);
    let left = ["functions.sock", "checks.sock"].map(|name| tree.folder().join(name));
    running.until("its sockets go", |_| {
        left.iter().all(|path| !path.exists()).then_some(())
    })?;
    // One of its threads has taken the signal, and goes on from there.
    running.until("nothing is left to do", |this| threads_wait(this.pid()))?;
    drop(running.child.stdin.take());
    let ended = running.child.wait().unwrap();
    until("the process beside it ends", || {
        (!lives(checks)).then_some(())
    });
    match ended.success() {
        true => Ok(()),
        false => Err(format!("it ends with {ended}")),
    }
}

fn threads_wait(pid: u32) -> Option<()> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let waits = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat"));
        stat.is_ok_and(|stat| stat.contains(") S "))
    };
    let mut tasks = tasks.map(|task| task.is_ok_and(waits));
    tasks.all(|waits| waits).then_some(())
}

/// Has it look at memory that this process does not map, and then does.
fn looks(keeper: &Keeper) -> Result<(), String> {
    let (fd, inode) = memory();
    let own = std::process::id() as i32;
    let ranges = [(inode, Span::new(0, BYTES).unwrap())];
    let private = keeper.check_shared(own, &ranges).unwrap_err().to_string();
    if !private.contains("share=on") {
        return Err(private);
    }
    let _mapped = MappedAperture::memory(fd.as_fd(), 0, BYTES).unwrap();
    let shared = keeper.check_shared(own, &ranges);
    shared.map_err(|error| error.to_string())
}

/// Which entries of a role's list neither its libraries nor its life need.
fn idle(role: &Role, life: impl Fn(&str) -> Result<(), String>) -> Vec<&'static str> {
    let exercised = |without: &str| {
        let mut command = shut::this_program();
        command.env(PART, format!("exercise-{} {without}", role.name));
        // A panic tells what was wrong, and looks for nothing to tell where.
        command.env_remove("RUST_BACKTRACE");
        shut::ended(command)
    };
    let whole = exercised(NONE);
    assert_eq!(whole.code(), Some(0), "{whole}");
    life(NONE).expect("the whole list is enough");
    let calls = role.calls.iter().map(|call| call.name);
    let lived = calls.filter(|name| exercised(name).signal() != Some(shut::SIGSYS));
    lived.filter(|name| life(name).is_ok()).collect()
}

#[test]
fn each_system_call_of_the_keeper_is_needed() {
    let idle = idle(&ROLE, |without| life(Path::new(SUBLET), without));
    assert!(idle.is_empty(), "nothing needs {idle:?}");
}

#[test]
fn each_system_call_of_the_process_beside_it_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let idle = idle(&CHECKS, |without| {
        let part = format!("keeper-checks $PARENT {without}");
        life(&shut::program(dir.path(), PART, &part), NONE)
    });
    assert!(idle.is_empty(), "nothing needs {idle:?}");
}
