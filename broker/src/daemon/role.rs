//! What the daemon is left with: its limits, its files, and the system calls that it makes once it is sealed.

use super::control::CLIENTS_MAX;
use crate::config::{Config, PORTS_MAX};
use crate::jail::{Call, Kept, Limits, Only, Reach, Role, any, when};
use std::path::Path;

/// Each client's connection twice, and one to each port for its verb; the lines to the ports; the
/// listener, the store, signals, and those who are sent away.
const DESCRIPTORS_MAX: u64 = (CLIENTS_MAX * (2 + PORTS_MAX) + 4 * PORTS_MAX + 64) as u64;
/// Private memory: of each thread (those that ask ports included) a stack, and the store's pages.
const DATA_BYTES_MAX: u64 = 2 << 30;

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
const UNIX: u64 = libc::AF_UNIX as u64;

/// The daemon whose ports are processes of their own.
pub static ROLE: Role = Role {
    name: "daemon",
    limits: Limits {
        descriptors: DESCRIPTORS_MAX,
        data_bytes: DATA_BYTES_MAX,
        locks_memory: false,
    },
    calls: CALLS,
};

/// The store's folder; and where its socket lies, which goes with it, with the folder that was
/// `made` for it. Ports' sockets need none: Landlock keeps nobody from connecting by a path.
pub fn kept(config: &Config, made: Option<&Path>) -> Kept {
    let run = config.control.parent().unwrap_or(Path::new("/"));
    let mut reach = vec![
        Reach::Own(config.state.clone()),
        Reach::Remove(run.to_owned()),
    ];
    if let Some(above) = made.and_then(Path::parent) {
        reach.push(Reach::RemoveEmpty(above.to_owned()));
    }
    Kept {
        reach,
        ..Kept::default()
    }
}

/// Each entry is needed: `broker/tests/daemon.rs` takes one after the other away.
#[rustfmt::skip]
const CALLS: &[Call] = &[
    any("ppoll", libc::SYS_ppoll, "waits for clients, ports and signals"),
    any("restart_syscall", libc::SYS_restart_syscall, "a wait with an end, after it was frozen"),
    any("accept4", libc::SYS_accept4, "the next client"),
    when("socket, of Unix", libc::SYS_socket, Only::Is(0, UNIX), "the ports"),
    any("connect", libc::SYS_connect, "the ports"),
    any("recvfrom", libc::SYS_recvfrom, "clients, ports and their lines"),
    any("sendto", libc::SYS_sendto, "the same, and tells its own loop of a signal"),
    any("setsockopt", libc::SYS_setsockopt, "how long a client or a port may take"),
    any("getsockopt", libc::SYS_getsockopt, "which process a port is, as which user"),
    any("shutdown", libc::SYS_shutdown, "a client that is not heard any more, a line that ends"),
    when("ioctl(FIONBIO)", libc::SYS_ioctl, Only::Is(1, libc::FIONBIO), "a port that is asked is waited for"),
    any("write", libc::SYS_write, "the log, and the end of a line's thread"),
    any("close", libc::SYS_close, "clients and ports that have gone"),
    any("openat", libc::SYS_openat, "the store, as far as Landlock lets it"),
    any("fchmod", libc::SYS_fchmod, "the store's file is its owner's alone"),
    any("statx", libc::SYS_statx, "how long the store's file is, and whose the socket is"),
    any("flock", libc::SYS_flock, "the store's file is its own"),
    any("pread64", libc::SYS_pread64, "the store's pages"),
    any("pwrite64", libc::SYS_pwrite64, "the store's pages"),
    any("fsync", libc::SYS_fsync, "the name of the store's file outlives a power cut"),
    any("fdatasync", libc::SYS_fdatasync, "and so does what was written"),
    any("ftruncate", libc::SYS_ftruncate, "the store's file grows"),
    any("unlink", libc::SYS_unlink, "its socket, at its end"),
    any("rmdir", libc::SYS_rmdir, "the folder that was made for it"),
    any("getcwd", libc::SYS_getcwd, "a panic that tells where it was"),
    any("readlink", libc::SYS_readlink, "the same"),
    any("futex", libc::SYS_futex, "locks and answers between its threads"),
    any("sched_yield", libc::SYS_sched_yield, "the same, within a step"),
    any("clock_gettime", libc::SYS_clock_gettime, "the time, where only the kernel can read it"),
    any("getrandom", libc::SYS_getrandom, "seeds of tables"),
    any("geteuid", libc::SYS_geteuid, "whether a port is of its own user"),
    any("eventfd2", libc::SYS_eventfd2, "to end a line's thread by"),
    any("getpid", libc::SYS_getpid, "what `status` tells"),
    any("clone3", libc::SYS_clone3, "a thread for each client"),
    any("set_robust_list", libc::SYS_set_robust_list, "a thread's start"),
    any("rseq", libc::SYS_rseq, "a thread's start"),
    any("rt_sigprocmask", libc::SYS_rt_sigprocmask, "a thread's start and end"),
    any("sigaltstack", libc::SYS_sigaltstack, "a thread's start and end"),
    any("gettid", libc::SYS_gettid, "a thread's start"),
    any("sched_getaffinity", libc::SYS_sched_getaffinity, "a thread's stack"),
    when("mprotect, nothing that runs", libc::SYS_mprotect, Only::Without(2, PROT_EXEC), "the guard page of a thread's stack, and the allocator"),
    any("madvise", libc::SYS_madvise, "a thread's stack, after its end, and the allocator"),
    any("prctl", libc::SYS_prctl, "a thread's name"),
    any("exit", libc::SYS_exit, "a thread's end"),
    any("exit_group", libc::SYS_exit_group, "its end"),
    any("rt_sigreturn", libc::SYS_rt_sigreturn, "a signal has been taken"),
    any("brk", libc::SYS_brk, "the allocator"),
    any("munmap", libc::SYS_munmap, "the allocator, and a thread's stack"),
    any("mremap", libc::SYS_mremap, "the allocator, where something large grows"),
    when("mmap, nothing that runs", libc::SYS_mmap, Only::Without(2, PROT_EXEC), "the allocator, and stacks"),
    // The standard library looks before it closes, in builds that check themselves.
    #[cfg(debug_assertions)]
    when("fcntl(F_GETFD)", libc::SYS_fcntl, Only::Is(1, libc::F_GETFD as u64), "whether what is closed is open"),
    when("fcntl(F_OFD_GETLK)", libc::SYS_fcntl, Only::Is(1, libc::F_OFD_GETLK as u64), "whether another has the store's file"),
    when("fcntl(F_OFD_SETLK)", libc::SYS_fcntl, Only::Is(1, libc::F_OFD_SETLK as u64), "the store's file is its own"),
    when("fcntl(F_DUPFD_CLOEXEC)", libc::SYS_fcntl, Only::Is(1, libc::F_DUPFD_CLOEXEC as u64), "a client's connection, to end it by"),
];
