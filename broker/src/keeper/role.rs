//! What the keeper's two processes are left with: limits, and the system calls that they make once they are sealed.

use super::serve::CONNECTIONS_MAX;
use crate::jail::{Call, Limits, Only, Role, any, when};

/// A connection's own descriptor, a function's two on their way, and a file of sysfs or `/proc`.
const DESCRIPTORS_MAX: u64 = 4 * CONNECTIONS_MAX as u64 + 64;
/// Private memory, stacks of a thread for each connection included.
const DATA_BYTES_MAX: u64 = 512 << 20;

const LIMITS: Limits = Limits {
    descriptors: DESCRIPTORS_MAX,
    data_bytes: DATA_BYTES_MAX,
    locks_memory: false,
};

/// The keeper: opens, binds, hands over.
pub static ROLE: Role = Role {
    name: "keeper",
    limits: LIMITS,
    calls: KEEPER,
};

/// The process beside it: reads memory maps.
pub static CHECKS: Role = Role {
    name: "keeper-checks",
    limits: LIMITS,
    calls: CHECKS_CALLS,
};

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
/// What may be said of an open file that is only read.
const NOT_TO_WRITE: u64 =
    (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND) as u64;

/// What both make. Each entry of either list is needed: `broker/tests/keeper.rs` takes one after the
/// other away.
macro_rules! both {
    ($($more:expr),* $(,)?) => {&[
        any("ppoll", libc::SYS_ppoll, "waits for connections"),
        any("accept4", libc::SYS_accept4, "the next connection"),
        any("getsockopt", libc::SYS_getsockopt, "which process connected, as which user"),
        any("recvmsg", libc::SYS_recvmsg, "questions"),
        any("sendmsg", libc::SYS_sendmsg, "answers"),
        any("shutdown", libc::SYS_shutdown, "a connection that ends"),
        any("read", libc::SYS_read, "files"),
        any("write", libc::SYS_write, "the log, and files of sysfs"),
        any("close", libc::SYS_close, "what it has opened"),
        any("futex", libc::SYS_futex, "locks between its threads"),
        any("clock_gettime", libc::SYS_clock_gettime, "the time, where only the kernel can read it"),
        any("clone3", libc::SYS_clone3, "a thread for each connection"),
        any("set_robust_list", libc::SYS_set_robust_list, "a thread's start"),
        any("rseq", libc::SYS_rseq, "a thread's start"),
        any("rt_sigprocmask", libc::SYS_rt_sigprocmask, "a thread's start and end"),
        any("sigaltstack", libc::SYS_sigaltstack, "a thread's start and end"),
        any("gettid", libc::SYS_gettid, "a thread's start"),
        any("sched_getaffinity", libc::SYS_sched_getaffinity, "a thread's stack"),
        when("mprotect, nothing that runs", libc::SYS_mprotect, Only::Without(2, PROT_EXEC), "the guard page of a thread's stack"),
        any("madvise", libc::SYS_madvise, "a thread's stack, after its end"),
        any("prctl", libc::SYS_prctl, "a thread's name"),
        any("brk", libc::SYS_brk, "the allocator"),
        any("munmap", libc::SYS_munmap, "the allocator, and a thread's stack"),
        any("mremap", libc::SYS_mremap, "the allocator, where something large grows"),
        any("exit", libc::SYS_exit, "a thread's end"),
        any("exit_group", libc::SYS_exit_group, "its end"),
        when("mmap, nothing that runs", libc::SYS_mmap, Only::Without(2, PROT_EXEC), "the allocator, and stacks"),
        // The standard library looks before it closes, in builds that check themselves.
        #[cfg(debug_assertions)]
        when("fcntl(F_GETFD)", libc::SYS_fcntl, Only::Is(1, libc::F_GETFD as u64), "whether what is closed is open"),
        $($more),*
    ]};
}

#[rustfmt::skip]
const KEEPER: &[Call] = both![
    any("restart_syscall", libc::SYS_restart_syscall, "a wait with an end, after it was frozen"),
    any("openat", libc::SYS_openat, "sysfs, VFIO and its journal, as far as Landlock lets it"),
    any("statx", libc::SYS_statx, "whether a file is there, and its size"),
    any("readlink", libc::SYS_readlink, "which driver and which group a function has"),
    any("getdents64", libc::SYS_getdents64, "who else is in the group"),
    any("newfstatat", libc::SYS_newfstatat, "a folder that is read"),
    any("rename", libc::SYS_rename, "a record of the journal, whole at once"),
    any("unlink", libc::SYS_unlink, "a record of the journal, and its sockets"),
    any("clock_nanosleep", libc::SYS_clock_nanosleep, "between two looks whether a group is free"),
    any("sendto", libc::SYS_sendto, "tells its own loop of a signal"),
    any("rt_sigreturn", libc::SYS_rt_sigreturn, "a signal has been taken"),
];

#[rustfmt::skip]
const CHECKS_CALLS: &[Call] = both![
    when("openat, to read", libc::SYS_openat, Only::Without(2, NOT_TO_WRITE), "memory maps"),
];
