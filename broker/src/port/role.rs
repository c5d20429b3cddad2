//! What a port is left with: its limits, its files, and the system calls that it makes once it is sealed.

use crate::jail::{Call, Kept, Limits, Only, Reach, Role, any, when};
use std::path::{Path, PathBuf};

/// Triggers of all vectors of all functions, groups, containers, memory files of guests, channels.
const DESCRIPTORS_MAX: u64 = 65_536;
/// Private memory, stacks of the threads of all functions and clients included.
const DATA_BYTES_MAX: u64 = 4 << 30;

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
const UNIX: u64 = libc::AF_UNIX as u64;

/// A port. Its limit of locked memory is its supervisor's to set: guests' memory is locked on its
/// behalf.
pub static ROLE: Role = Role {
    name: "port",
    limits: Limits {
        descriptors: DESCRIPTORS_MAX,
        data_bytes: DATA_BYTES_MAX,
        locks_memory: true,
    },
    calls: CALLS,
};

/// What sysfs tells, its own sockets to remove them with the folders that were `made` for them,
/// and where no keeper opens its devices what a keeper has.
pub fn kept(folder: &Path, made: &[PathBuf], by_keeper: bool) -> Kept {
    let mut reach = vec![Reach::Read("/sys".into())];
    if !by_keeper {
        reach.push(Reach::Write("/sys/bus/pci".into()));
        reach.push(Reach::Write("/sys/devices".into()));
        reach.push(Reach::Device("/dev/vfio".into()));
    }
    reach.retain(|reach| reach.path().exists());
    reach.push(Reach::Remove(folder.to_owned()));
    let above = made.iter().filter_map(|made| made.parent());
    reach.extend(above.map(|above| Reach::RemoveEmpty(above.to_owned())));
    Kept {
        reach,
        ..Kept::default()
    }
}

/// VFIO's request of this number (vfio.h: `_IO(';', 100 + number)`).
const fn vfio(number: u64) -> Only {
    Only::Is(1, 0x3b64 + number)
}

/// Each entry is needed: `broker/tests/port_sandbox.rs` takes one after the other away. VFIO's
/// requests are those that vfio-shim makes, and no other.
#[rustfmt::skip]
const CALLS: &[Call] = &[
    any("ppoll", libc::SYS_ppoll, "waits for clients, workers, doorbells and interrupts"),
    any("epoll_create1", libc::SYS_epoll_create1, "what a thread waits for, where that is much"),
    any("epoll_ctl", libc::SYS_epoll_ctl, "the same"),
    any("epoll_pwait", libc::SYS_epoll_pwait, "the same"),
    any("restart_syscall", libc::SYS_restart_syscall, "a wait with an end, after it was frozen"),
    any("accept4", libc::SYS_accept4, "its daemon"),
    when("socket, of Unix", libc::SYS_socket, Only::Is(0, UNIX), "the keeper"),
    any("connect", libc::SYS_connect, "the keeper"),
    any("socketpair", libc::SYS_socketpair, "a worker's channel, and the warden's answers"),
    any("recvmsg", libc::SYS_recvmsg, "workers, the warden, the keeper"),
    any("sendmsg", libc::SYS_sendmsg, "the same"),
    any("recvfrom", libc::SYS_recvfrom, "its daemon"),
    any("sendto", libc::SYS_sendto, "the same, and tells its own loop of a signal"),
    any("setsockopt", libc::SYS_setsockopt, "how long a client may take"),
    any("getsockopt", libc::SYS_getsockopt, "which process its daemon is, as which user"),
    any("shutdown", libc::SYS_shutdown, "a client that is not heard any more, a worker that ends"),
    when("ioctl(VFIO_GET_API_VERSION)", libc::SYS_ioctl, vfio(0), "whether the kernel's VFIO is known"),
    when("ioctl(VFIO_CHECK_EXTENSION)", libc::SYS_ioctl, vfio(1), "which IOMMUs it has"),
    when("ioctl(VFIO_SET_IOMMU)", libc::SYS_ioctl, vfio(2), "a container"),
    when("ioctl(VFIO_GROUP_GET_STATUS)", libc::SYS_ioctl, vfio(3), "whether a group may be used"),
    when("ioctl(VFIO_GROUP_SET_CONTAINER)", libc::SYS_ioctl, vfio(4), "a container's group"),
    when("ioctl(VFIO_GROUP_GET_DEVICE_FD)", libc::SYS_ioctl, vfio(6), "a function"),
    when("ioctl(VFIO_DEVICE_GET_INFO)", libc::SYS_ioctl, vfio(7), "what it has"),
    when("ioctl(VFIO_DEVICE_GET_REGION_INFO)", libc::SYS_ioctl, vfio(8), "its regions"),
    when("ioctl(VFIO_DEVICE_GET_IRQ_INFO)", libc::SYS_ioctl, vfio(9), "its interrupts"),
    when("ioctl(VFIO_DEVICE_SET_IRQS)", libc::SYS_ioctl, vfio(10), "its triggers"),
    when("ioctl(VFIO_DEVICE_RESET)", libc::SYS_ioctl, vfio(11), "its reset"),
    when("ioctl(VFIO_IOMMU_GET_INFO)", libc::SYS_ioctl, vfio(12), "which addresses a container takes"),
    when("ioctl(VFIO_IOMMU_MAP_DMA)", libc::SYS_ioctl, vfio(13), "maps"),
    when("ioctl(VFIO_IOMMU_UNMAP_DMA)", libc::SYS_ioctl, vfio(14), "takes maps away"),
    any("read", libc::SYS_read, "doorbells and interrupts, sysfs, the kernel's log"),
    any("write", libc::SYS_write, "the log, and its threads' eventfds"),
    any("pread64", libc::SYS_pread64, "config space and regions of a function"),
    any("pwrite64", libc::SYS_pwrite64, "the same"),
    any("close", libc::SYS_close, "what it has opened"),
    any("openat", libc::SYS_openat, "sysfs, as far as Landlock lets it"),
    any("readlink", libc::SYS_readlink, "which driver and which group a function has"),
    any("getdents64", libc::SYS_getdents64, "who else is in a group"),
    any("statx", libc::SYS_statx, "whether a function is there, and whose a socket is"),
    any("fstat", libc::SYS_fstat, "how long a memory file is"),
    any("newfstatat", libc::SYS_newfstatat, "a folder that is read"),
    any("lseek", libc::SYS_lseek, "how much of a file is left, and the end of the kernel's log"),
    any("fstatfs", libc::SYS_fstatfs, "the pages of a guest's memory file"),
    any("unlink", libc::SYS_unlink, "its sockets, at its end"),
    any("rmdir", libc::SYS_rmdir, "the folders that were made for them"),
    any("memfd_create", libc::SYS_memfd_create, "a worker's table of interrupts"),
    any("ftruncate", libc::SYS_ftruncate, "the same"),
    any("pipe2", libc::SYS_pipe2, "a worker's grip"),
    any("eventfd2", libc::SYS_eventfd2, "triggers, and to wake its own threads"),
    any("getcwd", libc::SYS_getcwd, "a panic that tells where it was"),
    any("futex", libc::SYS_futex, "locks and answers between its threads"),
    any("sched_yield", libc::SYS_sched_yield, "the same, within a step"),
    any("clock_gettime", libc::SYS_clock_gettime, "the time, where only the kernel can read it"),
    any("clock_nanosleep", libc::SYS_clock_nanosleep, "between two tries of a reset"),
    any("getrandom", libc::SYS_getrandom, "nonces, and seeds of tables"),
    any("geteuid", libc::SYS_geteuid, "whether its daemon is of its own user"),
    any("getpid", libc::SYS_getpid, "what `status` tells"),
    any("clone3", libc::SYS_clone3, "threads of functions, workers and clients"),
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
    any("wait4", libc::SYS_wait4, "its warden's end"),
    any("brk", libc::SYS_brk, "the allocator"),
    any("munmap", libc::SYS_munmap, "guests' memory, the allocator, and a thread's stack"),
    any("mremap", libc::SYS_mremap, "the allocator, where something large grows"),
    when("mmap, nothing that runs", libc::SYS_mmap, Only::Without(2, PROT_EXEC), "guests' memory, BARs, the allocator, and stacks"),
    // The standard library looks before it closes, in builds that check themselves.
    #[cfg(debug_assertions)]
    when("fcntl(F_GETFD)", libc::SYS_fcntl, Only::Is(1, libc::F_GETFD as u64), "whether what is closed is open"),
    when("fcntl(F_ADD_SEALS)", libc::SYS_fcntl, Only::Is(1, libc::F_ADD_SEALS as u64), "a worker's table cannot be cut off"),
    when("fcntl(F_GET_SEALS)", libc::SYS_fcntl, Only::Is(1, libc::F_GET_SEALS as u64), "whether what a worker hands on is memory"),
    when("fcntl(F_DUPFD_CLOEXEC)", libc::SYS_fcntl, Only::Is(1, libc::F_DUPFD_CLOEXEC as u64), "what is handed to a worker"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_vfio_are_those_that_are_made_and_no_other() {
        let listed = CALLS
            .iter()
            .filter(|call| call.name.starts_with("ioctl(VFIO"));
        let mut listed: Vec<(&str, u64)> = listed
            .map(|call| match call.only {
                Only::Is(1, request) => (&call.name["ioctl(".len()..call.name.len() - 1], request),
                other => panic!("{other:?}"),
            })
            .collect();
        let mut made = vfio_shim::vfio::requests().to_vec();
        listed.sort_unstable();
        made.sort_unstable();
        assert_eq!(listed, made);
    }
}
