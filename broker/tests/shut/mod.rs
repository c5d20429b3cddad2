//! What the tests of a list of system calls share: a role without one of its entries, what libraries do at times, a child that is run to its end.

use super::soft::{signal, until};
use rustix::process::Signal;
use std::{
    env,
    os::unix::process::CommandExt,
    panic::catch_unwind,
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

/// This test program again, as `the_process_of_the_other_tests`.
pub fn this_program() -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "the_process_of_the_other_tests", "--nocapture"]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
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

/// What the allocator does under load, and a wait that only yields; a clock that only the kernel
/// can read.
pub fn one_thread() {
    let small: Vec<Vec<u8>> = (0..20_000).map(|_| vec![1; 200]).collect();
    let mut large = vec![1u8; 1 << 20];
    for _ in 0..4 {
        large.reserve_exact(large.capacity() + (1 << 20));
    }
    drop((small, large));
    std::thread::yield_now();
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
}

/// The same in several threads; a lock that others hold; a panic that is caught and tells where it
/// was.
pub fn threads() {
    one_thread();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(one_thread);
        }
    });
    let (_alive, never) = mpsc::channel::<()>();
    let _ = never.recv_timeout(Duration::from_millis(100));
    let _ = rustix::process::geteuid();
    let _ = catch_unwind(|| panic!("on purpose"));
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
