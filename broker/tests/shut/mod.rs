//! What the tests of a list of system calls share: a role without one of its entries, what libraries do at times, a child that is run to its end.

use super::soft::{signal, until};
use rustix::process::Signal;
use std::{
    env, fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    panic::catch_unwind,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc,
    time::Duration,
};
use sublet::jail::{Call, Role, keep_from_children};

/// What ends a process for a call that is not on its list.
pub const SIGSYS: i32 = 31;
/// One arena for all threads: the first thread's, which is the program's own.
pub const ALLOCATOR: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1");

/// This role but for one entry.
pub fn without(role: &Role, name: &str) -> &'static Role {
    let calls = role.calls.iter().copied();
    let calls: Vec<Call> = calls.filter(|call| call.name != name).collect();
    Box::leak(Box::new(Role {
        name: role.name,
        limits: role.limits,
        calls: Box::leak(calls.into_boxed_slice()),
    }))
}

/// What makes this test program `the_process_of_the_other_tests`. The harness waits for one thread
/// without an end: it needs none of the calls that the tests are about.
pub const THIS_PROGRAM: [&str; 4] = [
    "--exact",
    "the_process_of_the_other_tests",
    "--nocapture",
    "--test-threads=1",
];

/// This test program again, as `the_process_of_the_other_tests`.
pub fn this_program() -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(THIS_PROGRAM);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// A program that is this one, with this variable so set; `$PARENT` in it is the process that
/// starts it, as its second argument tells.
pub fn program(dir: &Path, variable: &str, set: &str) -> PathBuf {
    let path = dir.join("program.sh");
    let me = env::current_exe().unwrap();
    let set = set.replace("$PARENT", "$(echo $2 | cut -d= -f2)");
    let arguments = THIS_PROGRAM.join(" ");
    let me = me.display();
    let text = format!("#!/bin/sh\n{variable}=\"{set}\" exec {me} {arguments}\n");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Runs a part that ends by itself.
pub fn ended(mut command: Command) -> ExitStatus {
    keep_from_children();
    command.env(ALLOCATOR.0, ALLOCATOR.1);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    until("its end", || {
        // Frozen in whatever it waits for.
        signal(child.id(), Signal::STOP);
        signal(child.id(), Signal::CONT);
        child.try_wait().unwrap()
    })
}

/// What the allocator does under load; a clock that only the kernel can read.
pub fn allocates() {
    let small: Vec<Vec<u8>> = (0..20_000).map(|_| vec![1; 200]).collect();
    let mut large = vec![1u8; 1 << 20];
    for _ in 0..4 {
        large.reserve_exact(large.capacity() + (1 << 20));
    }
    drop((small, large));
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
}

/// The same, and a wait that only yields.
pub fn one_thread() {
    allocates();
    std::thread::yield_now();
}

/// This in several threads; a panic that is caught, and tells where it was if it is told to.
pub fn several_threads(each: fn()) {
    each();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(each);
        }
    });
    let _ = catch_unwind(|| panic!("on purpose"));
}

/// A lock that others hold, for a while.
pub fn waits() {
    let (_alive, never) = mpsc::channel::<()>();
    let _ = never.recv_timeout(Duration::from_millis(100));
}

/// What a role does at times that answers other processes in threads.
pub fn threads() {
    several_threads(one_thread);
    waits();
    let _ = rustix::process::geteuid();
}

/// Becomes this program, on a kernel without Landlock.
pub fn on_an_old_kernel(mut program: Command) -> ! {
    let none = (libc::SYS_landlock_create_ruleset, vec![]);
    let filter = seccompiler::SeccompFilter::new(
        [none].into(),
        seccompiler::SeccompAction::Allow,
        seccompiler::SeccompAction::Errno(libc::EOPNOTSUPP as u32),
        env::consts::ARCH.try_into().unwrap(),
    );
    let filter: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&filter).unwrap();
    panic!("{}", program.exec());
}

/// As the kernel says it: no capability, no way to more, and a list of system calls.
/// What it says is `/proc/PID/status`, or a thread's.
pub fn assert_shut_in(status: &str) {
    for line in [
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
}
