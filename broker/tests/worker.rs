//! The worker as a process: what it holds, what it may do, and what its life and death do to a lease.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod shut;
#[allow(dead_code, reason = "each test program uses a part of it")]
mod soft;

use rustix::process::{Signal, set_parent_process_death_signal};
use soft::{Rig, Vmm, descriptors, freeze, lives, signal, status, try_freeze, until};
use std::{
    env, fs,
    io::{BufRead, BufReader},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio, exit},
};
use sublet::{
    daemon::vocabulary::ErrorCode,
    ipc::{Channel, ToPort, Token},
    jail::{Sandbox, confine},
    worker::{self, ROLE},
};

/// What a child of this program is to be.
const PART: &str = "SUBLET_WORKER_TEST_PART";

/// What the tests below start as a process of its own; not a test by itself.
#[test]
fn the_process_of_the_other_tests() {
    let Ok(part) = env::var(PART) else { return };
    let (part, argument) = part.split_once(' ').unwrap_or((&part, ""));
    // A test that fails leaves nobody behind who floods for ever.
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    until("a harness that waits", || harness_waits().then_some(()));
    match part {
        "worker-without" => {
            let parent = argument.split_once(' ').expect("a parent and a name");
            let role = shut::without(&ROLE, parent.1);
            let ended = worker::run(parent.0.parse().unwrap(), Sandbox::On, role);
            exit(i32::from(ended.is_err()));
        }
        "exercise-without" => {
            let confined =
                confine(shut::without(&ROLE, argument), Sandbox::On, &[0, 1, 2]).unwrap();
            worker::look_up();
            confined.seal().unwrap();
            // What its libraries do at times that no test can bring about from outside.
            shut::one_thread();
            // As for the port's answer.
            shut::waits();
            exit(0);
        }
        "hostile" => hostile(argument),
        "daemon" => daemon(),
        other => panic!("{other}"),
    }
}

/// Whether the test harness's own thread has nothing more to do than wait for this one: the
/// sandbox is put on it as well.
fn harness_waits() -> bool {
    let me = rustix::thread::gettid().as_raw_nonzero().to_string();
    fs::read_dir("/proc/self/task").unwrap().all(|task| {
        let task = task.unwrap();
        let stat = fs::read_to_string(task.path().join("stat")).unwrap();
        task.file_name() == *me || stat.contains(") S ")
    })
}

/// A program that is this one in a part.
fn program(dir: &Path, part: &str) -> PathBuf {
    shut::program(dir, PART, part)
}

#[test]
fn worker_serves_a_vmm_from_a_sandbox_and_holds_nothing_but_its_own() {
    let rig = Rig::new();
    rig.borrow().unwrap();
    let worker = rig.worker();
    assert!(
        worker.answers && worker.landlock && worker.seccomp,
        "{worker:?}"
    );
    // Before the VMM's first byte: stdin, which is its channel, and the channel; stdout; the log,
    // which is this test's; the listening socket; the table of interrupts; its grip; and eventfds of
    // its own. No descriptor of VFIO, and none that it has no use for.
    let log = fs::read_link("/proc/self/fd/2").unwrap();
    let mut held = descriptors(worker.pid);
    let at = held.iter().position(|target| log.as_os_str() == &**target);
    held.swap_remove(at.unwrap_or_else(|| panic!("no {} in {held:?}", log.display())));
    let kind = |target: &String| match target.split_once(":[") {
        Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
        _ => target.clone(),
    };
    let mut kinds: Vec<String> = held.iter().map(kind).collect();
    kinds.sort();
    let eventfd = "anon_inode:[eventfd]";
    let own = [
        "/dev/null",
        "/memfd:sublet-interrupts (deleted)",
        eventfd,
        eventfd,
        eventfd,
        "pipe",
        "socket",
        "socket",
        "socket",
    ];
    assert_eq!(kinds, own, "{held:?}");
    let status = fs::read_to_string(format!("/proc/{}/status", worker.pid)).unwrap();
    shut::assert_shut_in(&status);
    assert!(status.contains("Threads:\t2"), "{status}");

    let mut vmm = Vmm::start(&rig).unwrap();
    vmm.work().unwrap();
    let told = rig.borrowed();
    assert_eq!(
        (told.state.as_str(), told.counters.dma_maps),
        ("connected", 1)
    );
    assert_eq!(told.vmm_pid, Some(std::process::id()));
    assert!(told.vectors[0].scanned >= 2 && told.vectors[0].signals >= 2);
    drop(vmm);
    until("an idle worker", || {
        let idle = rig.borrowed().state == "waiting";
        (idle && rig.function.space().maps().is_empty()).then_some(())
    });
    let again = Vmm::start(&rig).unwrap().work();
    again.unwrap();
    rig.give_back().unwrap();
    assert!(!lives(worker.pid), "gone before the lease is another's");
    assert!(!rig.socket().exists());
    rig.wait_clean();
    rig.end();
}

#[test]
fn killed_worker_costs_its_lease_and_the_function_is_reset_by_the_port() {
    let rig = Rig::new();
    rig.borrow().unwrap();
    let mut vmm = Vmm::start(&rig).unwrap();
    vmm.work().unwrap();
    let resets = rig.function.resets();
    let pid = rig.worker().pid;
    signal(pid, Signal::KILL);
    rig.wait_clean();
    assert!(
        rig.function.resets() > resets,
        "no reset after a dead worker"
    );
    let told = until("a lost lease", || {
        Some(rig.borrowed()).filter(|b| b.state == "lost")
    });
    let why = told.last_error.unwrap();
    assert_eq!(
        why,
        format!("its worker (process {pid}) has ended: signal: 9 (SIGKILL)")
    );
    assert!(vmm.ident().is_err(), "the VMM is told by its socket's end");
    // The next one needs no return.
    rig.borrow().unwrap();
    Vmm::start(&rig).unwrap().work().unwrap();
    rig.give_back().unwrap();
    rig.end();
}

#[test]
fn frozen_worker_goes_on_where_it_stood() {
    let rig = Rig::new();
    rig.borrow().unwrap();
    let mut vmm = Vmm::start(&rig).unwrap();
    vmm.copy(1).unwrap();
    let pid = rig.worker().pid;
    freeze(pid);
    let silent = until("a silent worker", || {
        Some(rig.borrowed()).filter(|b| b.state == "silent")
    });
    assert!(!silent.worker.unwrap().answers);
    signal(pid, Signal::CONT);
    vmm.copy(2).unwrap();
    rig.give_back().unwrap();
    rig.end();
}

#[test]
fn frozen_worker_of_a_lost_lease_is_ended_before_anything_goes_on() {
    let rig = Rig::new();
    rig.borrow().unwrap();
    let mut vmm = Vmm::start(&rig).unwrap();
    vmm.copy(1).unwrap();
    let pid = rig.worker().pid;
    freeze(pid);
    rig.link.cut();
    until("an ended worker", || (!lives(pid)).then_some(()));
    rig.link.plug();
    rig.wait_clean();
    until("the next lease", || rig.borrow().ok());
    Vmm::start(&rig).unwrap().work().unwrap();
    rig.end();
}

#[test]
fn vmm_of_a_lost_lease_stays_connected_and_reads_ones() {
    let rig = Rig::new();
    rig.borrow().unwrap();
    let mut vmm = Vmm::start(&rig).unwrap();
    vmm.work().unwrap();
    let pid = rig.worker().pid;
    rig.link.cut();
    until("ones", || (vmm.ident().unwrap() == u32::MAX).then_some(()));
    assert!(lives(pid));
    let told = until("a lost lease", || {
        Some(rig.borrowed()).filter(|b| b.state == "lost")
    });
    assert_eq!(told.vmm_pid, Some(std::process::id()));
    drop(vmm);
    until("no worker", || {
        (status(rig.borrower()).borrowed[0].worker.is_none()).then_some(())
    });
    assert!(!lives(pid));
    rig.end();
}

#[test]
fn worker_dies_with_its_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let program = program(dir.path(), "daemon");
    let mut child = Command::new(program)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let pid: u32 = until("the worker's process", || {
        let line = lines.next().expect("a line").unwrap();
        line.strip_prefix("worker ")?.parse().ok()
    });
    assert!(lives(pid));
    child.kill().unwrap();
    child.wait().unwrap();
    until("no worker without its daemon", || {
        (!lives(pid)).then_some(())
    });
}

/// A daemon that is killed while its worker has nobody else to end it.
fn daemon() -> ! {
    let rig = Rig::new();
    rig.borrow().unwrap();
    println!("\nworker {}", rig.worker().pid);
    loop {
        std::thread::park();
    }
}

#[test]
fn worker_that_a_stranger_starts_serves_nobody() {
    for (argument, words) in [
        ("--parent=1", "is not its parent"),
        (&*format!("--parent={}", std::process::id()), "the channel"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sublet"));
        let output = command
            .args(["worker", argument])
            .stdin(Stdio::null())
            .output();
        let output = output.unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(words), "{text}");
    }
}

/// A worker that was taken over, and says what none says.
fn hostile(what: &str) -> ! {
    use std::os::fd::AsFd;
    let channel = Channel::of(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let impossible = ToPort::Load(Token(1), 5, 0, 4);
    if what == "flood" {
        flood(&channel);
    } else if what == "a BAR" {
        channel.send_to_port(&impossible).unwrap();
    } else {
        rustix::net::send(
            channel.as_fd(),
            &[0xff; 64],
            rustix::net::SendFlags::empty(),
        )
        .unwrap();
    }
    loop {
        std::thread::park();
    }
}

/// It begins as any worker does, and then sends without end.
fn flood(channel: &Channel) -> ! {
    loop {
        match channel.receive_from_port().unwrap() {
            Some(sublet::ipc::ToWorker::Start(..)) => break,
            Some(_) => {}
            None => exit(1),
        }
    }
    let ready = ToPort::Ready(sublet::jail::Report::default());
    channel.send_to_port(&ready).unwrap();
    let store = ToPort::Store(0, 0x40, vec![0; 4]);
    while channel.send_to_port(&store).is_ok() {}
    exit(0);
}

#[test]
fn worker_that_floods_its_port_is_slowed_and_told_and_ended_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let program = program(dir.path(), "hostile flood");
    let limits = "[limits]\nworker_messages_per_second = 200\n";
    let rig = Rig::limited(&program, Sandbox::On, limits);
    rig.borrow().unwrap();
    let began = std::time::Instant::now();
    let first = rig.worker();
    let slowed = until("it is slowed", || {
        let worker = rig.worker();
        (worker.slowed > first.slowed + 3).then_some(worker)
    });
    // A bucket holds a tenth of a second's worth.
    let most = 20 + 200 * (began.elapsed().as_millis() as u64 / 1000 + 1);
    let taken = slowed.messages - first.messages;
    assert!(taken <= most, "{taken} of {most}");
    let pid = slowed.pid;
    rig.give_back().unwrap();
    assert!(!lives(pid));
    rig.wait_clean();
    rig.end();
}

#[test]
fn worker_that_says_what_cannot_be_is_ended_and_its_lease_given_back() {
    for (what, words) in [
        ("a BAR", "it asked for what no worker asks for: a BAR"),
        ("bytes", "a message that cannot be"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let program = program(dir.path(), &format!("hostile {what}"));
        let rig = Rig::with(&program, Sandbox::On);
        let refused = rig.borrow().unwrap_err();
        assert_eq!(refused.code, ErrorCode::Kernel);
        assert!(refused.text.contains(words), "{refused}");
        rig.wait_clean();
        assert!(status(rig.borrower()).borrowed.is_empty());
        assert_eq!(status(rig.lender()).lent[0].lease, None);
        rig.end();
    }
}

#[test]
fn sandbox_that_is_off_is_told() {
    let rig = Rig::with(Path::new(env!("CARGO_BIN_EXE_sublet")), Sandbox::Off);
    rig.borrow().unwrap();
    let worker = rig.worker();
    assert!(!worker.landlock && !worker.seccomp && worker.answers);
    Vmm::start(&rig).unwrap().work().unwrap();
    rig.end();
}

#[test]
fn each_system_call_of_a_worker_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let whole = exercised("none of them");
    assert_eq!(whole.code(), Some(0), "{whole}");
    let mut idle = Vec::new();
    let rig = Rig::with(
        &program(dir.path(), "worker-without $PARENT none of them"),
        Sandbox::On,
    );
    life(&rig).expect("the whole list is enough");
    rig.end();
    for call in ROLE.calls {
        if exercised(call.name).signal() == Some(shut::SIGSYS) {
            continue;
        }
        let part = format!("worker-without $PARENT {}", call.name);
        let rig = Rig::with(&program(dir.path(), &part), Sandbox::On);
        if life(&rig).is_ok() {
            idle.push(call.name);
        }
        rig.end();
    }
    assert!(idle.is_empty(), "nothing needs {idle:?}");
}

fn exercised(without: &str) -> std::process::ExitStatus {
    let mut command = shut::this_program();
    command.env(PART, format!("exercise-without {without}"));
    shut::ended(command)
}

/// A worker's whole life; an error where the worker does not live through it.
fn life(rig: &Rig) -> Result<(), String> {
    rig.borrow().map_err(|error| error.to_string())?;
    let worker = rig.borrowed().worker.ok_or("the worker has died")?;
    let pid = worker.pid;
    let mut vmm = Vmm::start(rig)?;
    vmm.work()?;
    try_freeze(pid)?;
    until("a silent worker, or a dead one", || {
        matches!(rig.borrowed().state.as_str(), "silent" | "lost").then_some(())
    });
    signal(pid, Signal::CONT);
    vmm.copy(3)?;
    drop(vmm);
    Vmm::start(rig)?.work()?;
    match rig.borrowed().state.as_str() {
        "lost" => Err("the worker has died".into()),
        _ => rig.give_back().map_err(|error| error.to_string()),
    }
}
