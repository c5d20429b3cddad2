//! What a worker is left with: its limits, and the system calls that it makes once it is sealed.

use crate::jail::{Call, Limits, Only, Role, any, when};

/// As many descriptors as a VMM may make it hold: eventfds of all vectors, memory files, and its own.
const DESCRIPTORS_MAX: u64 = 4096 + 512;
/// Private memory of its own, stacks of its two threads included.
const DATA_BYTES_MAX: u64 = 128 << 20;

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// A worker.
pub static ROLE: Role = Role {
    name: "worker",
    limits: Limits {
        descriptors: DESCRIPTORS_MAX,
        data_bytes: DATA_BYTES_MAX,
        locks_memory: false,
    },
    calls: CALLS,
};

/// What the C library's allocator is told by the environment: one arena for both threads. Those of
/// further threads would open a file in `/proc` when they first give memory back, and change what
/// their pages may be.
pub const ALLOCATOR: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1");

/// Each entry is needed: `broker/tests/worker.rs` takes one after the other away.
#[rustfmt::skip]
const CALLS: &[Call] = &[
    any("ppoll", libc::SYS_ppoll, "waits for VMM, port and interrupts"),
    any("restart_syscall", libc::SYS_restart_syscall, "a wait with an end, after it was frozen"),
    any("recvmsg", libc::SYS_recvmsg, "messages of VMM and port"),
    any("sendmsg", libc::SYS_sendmsg, "answers and requests"),
    any("accept4", libc::SYS_accept4, "the next VMM"),
    any("shutdown", libc::SYS_shutdown, "a VMM whose session is over"),
    any("getsockopt", libc::SYS_getsockopt, "which process the VMM is"),
    any("read", libc::SYS_read, "takes its own eventfd back"),
    any("write", libc::SYS_write, "the VMM's eventfds, and the log"),
    any("pread64", libc::SYS_pread64, "the table of interrupts"),
    any("close", libc::SYS_close, "what the VMM sent, when it is done with"),
    any("fstat", libc::SYS_fstat, "size and inode of the VMM's memory files"),
    any("readlink", libc::SYS_readlink, "whether what the VMM calls an eventfd is one"),
    any("futex", libc::SYS_futex, "locks and answers between its threads"),
    any("sched_yield", libc::SYS_sched_yield, "waits for the other thread within a step"),
    any("clock_gettime", libc::SYS_clock_gettime, "the time, where only the kernel can read it"),
    any("brk", libc::SYS_brk, "the allocator"),
    any("munmap", libc::SYS_munmap, "the allocator, and letting go of the window"),
    any("mremap", libc::SYS_mremap, "the allocator, where something large grows"),
    any("sigaltstack", libc::SYS_sigaltstack, "on its way out"),
    any("exit_group", libc::SYS_exit_group, "its end, when the daemon has gone"),
    when("mmap, nothing that runs", libc::SYS_mmap, Only::Without(2, PROT_EXEC), "the allocator"),
    // The standard library looks before it closes, in builds that check themselves.
    #[cfg(debug_assertions)]
    when("fcntl(F_GETFD)", libc::SYS_fcntl, Only::Is(1, libc::F_GETFD as u64), "whether what is closed is open"),
    when("fcntl(F_DUPFD_CLOEXEC)", libc::SYS_fcntl, Only::Is(1, libc::F_DUPFD_CLOEXEC as u64), "memory files on their way to the port"),
    when("fcntl(F_GET_SEALS)", libc::SYS_fcntl, Only::Is(1, libc::F_GET_SEALS as u64), "whether the VMM's memory is memory"),
    when("fcntl(F_GETFL)", libc::SYS_fcntl, Only::Is(1, libc::F_GETFL as u64), "whether it may be written"),
];
