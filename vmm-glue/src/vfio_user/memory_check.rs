//! Whether a DMA map may stand on a memory fd: memfd or hugetlbfs, long enough, of the right access, shared with the guest.
//!
//! An fd that a VMM maps private reads fine, but DMA then reaches pages that the guest never sees.

use rustix::{
    fs::{OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fstat, major, minor},
    io::Errno,
};
use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read},
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};
use vfio_shim::model::{Access, Span};

/// The most bytes of a memory map that are read; a process can have 65,530 lines of it.
const MEMORY_MAP_BYTES_MAX: u64 = 32 << 20;

/// Why an fd is not taken as guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No memfd, no file on tmpfs or hugetlbfs.
    #[error(
        "the memory's fd is no memfd or hugetlbfs file; give the guest memory by memory-backend-memfd with share=on (QEMU) or shared=on (cloud-hypervisor)"
    )]
    Kind,
    /// The file ends before the map does.
    #[error(
        "the memory's fd has {file_bytes:#x} bytes, and the map needs them up to {needed_bytes:#x}"
    )]
    TooShort {
        /// Size of the file.
        file_bytes: u64,
        /// End of the map in the file.
        needed_bytes: u64,
    },
    /// Opened or sealed against what the device shall do.
    #[error("the memory's fd cannot be {0}, and the map lets the device do that")]
    Access(&'static str),
    /// The VMM's own mapping is private, or there is none.
    #[error(
        "process {pid} does not map bytes {range} of that memory shared, so DMA would reach pages that the guest never sees; start the VMM with share=on (QEMU) or shared=on (cloud-hypervisor)"
    )]
    Private {
        /// The VMM.
        pid: i32,
        /// Part of the file.
        range: Span,
    },
    /// The VMM is in a PID namespace that this process does not see.
    #[error(
        "the VMM runs in a PID namespace that this process does not see, so nothing tells whether the guest's memory is shared; run the VMM where `ps` here shows it, or set memory_check = \"off\""
    )]
    Unseen,
    /// The VMM's memory map cannot be read.
    #[error(
        "cannot read {path} to see whether the guest's memory is shared; let this process read it, or set memory_check = \"off\""
    )]
    Unreadable {
        /// The memory map.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Whoever looks for this process has not answered in time, and may be at it still.
    #[error("{0}")]
    Unanswered(String),
    /// Whoever looks for this process found it so.
    #[error("{0}")]
    Told(String),
    /// The kernel does not tell what the fd is.
    #[error("cannot look at the memory's fd")]
    Stat(#[source] io::Error),
}

/// What a file is known by, whatever fd it is reached through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Inode {
    /// Device number, `major << 32 | minor`.
    pub device: u64,
    /// Inode number.
    pub number: u64,
}

/// Checks all that the fd itself tells; returns what it is known by.
pub fn check_fd(fd: BorrowedFd<'_>, range: Span, access: Access) -> Result<Inode, MemoryError> {
    let stat = |errno: Errno| MemoryError::Stat(errno.into());
    // tmpfs and hugetlbfs have seals, by memfd_create or by a mount, and nothing else has.
    let seals = fcntl_get_seals(fd).map_err(|_| MemoryError::Kind)?;
    let file = fstat(fd).map_err(stat)?;
    let file_bytes = file.st_size as u64;
    if range.end() > file_bytes {
        return Err(MemoryError::TooShort {
            file_bytes,
            needed_bytes: range.end(),
        });
    }
    let mode = fcntl_getfl(fd).map_err(stat)? & OFlags::RWMODE;
    // Pinned through a mapping of this process, which needs the read access even to write.
    if mode == OFlags::WRONLY {
        return Err(MemoryError::Access("read"));
    }
    let read_only = SealFlags::WRITE | SealFlags::FUTURE_WRITE;
    if access.write && (mode != OFlags::RDWR || seals.intersects(read_only)) {
        return Err(MemoryError::Access("written"));
    }
    Ok(Inode {
        device: u64::from(major(file.st_dev)) << 32 | u64::from(minor(file.st_dev)),
        number: file.st_ino,
    })
}

/// Tells whether memory is shared with a process. A process that is shut off from `/proc` has
/// another look there for it.
pub trait MemoryMaps: fmt::Debug + Send + Sync {
    /// Whether the process maps every byte of these ranges of files shared.
    fn check_shared(&self, pid: i32, ranges: &[(Inode, Span)]) -> Result<(), MemoryError>;
}

/// Where the kernel shows processes.
impl MemoryMaps for PathBuf {
    fn check_shared(&self, pid: i32, ranges: &[(Inode, Span)]) -> Result<(), MemoryError> {
        let map = MemoryMap::read(self, pid)?;
        let mut ranges = ranges.iter();
        ranges.try_for_each(|(inode, range)| map.check_shared(*inode, *range))
    }
}

/// What a process maps shared, as `/proc/PID/maps` tells it: parts of files, merged, sorted.
#[derive(Debug)]
pub struct MemoryMap {
    pid: i32,
    shared: BTreeMap<(Inode, u64), u64>,
}

impl MemoryMap {
    /// Reads it below `proc_root`.
    pub fn read(proc_root: &Path, pid: i32) -> Result<Self, MemoryError> {
        if pid <= 0 {
            return Err(MemoryError::Unseen);
        }
        let path = proc_root.join(pid.to_string()).join("maps");
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|file| {
            file.take(MEMORY_MAP_BYTES_MAX).read_to_end(&mut text)?;
            // An empty one is what the kernel shows of a process that is gone.
            match text.len() as u64 {
                0 => Err(io::ErrorKind::NotFound.into()),
                MEMORY_MAP_BYTES_MAX.. => Err(io::ErrorKind::FileTooLarge.into()),
                _ => Ok(()),
            }
        });
        match read {
            Ok(()) => Ok(Self::parse(pid, &text)),
            Err(source) => Err(MemoryError::Unreadable { path, source }),
        }
    }

    fn parse(pid: i32, text: &[u8]) -> Self {
        let lines = text.split(|byte| *byte == b'\n');
        let mut parts: Vec<(Inode, Span)> = lines.filter_map(shared_part).collect();
        parts.sort_unstable();
        let mut shared = BTreeMap::new();
        let mut last: Option<(Inode, Span)> = None;
        for (inode, part) in parts {
            // Sorted: what touches the part before it only makes that one longer.
            let before = last.filter(|(file, span)| *file == inode && part.start() <= span.end());
            let start = before.map_or(part.start(), |(_, span)| span.start());
            let end = before.map_or(part.end(), |(_, span)| span.end().max(part.end()));
            shared.insert((inode, start), end);
            last = Span::new(start, end - start).map(|span| (inode, span));
        }
        Self { pid, shared }
    }

    /// Whether every byte of the file's `range` is mapped shared.
    pub fn check_shared(&self, inode: Inode, range: Span) -> Result<(), MemoryError> {
        let mut before = self.shared.range((inode, 0)..=(inode, range.start()));
        let reached = before.next_back().map_or(0, |(_, end)| *end);
        if reached < range.end() {
            return Err(MemoryError::Private {
                pid: self.pid,
                range,
            });
        }
        Ok(())
    }
}

/// The part of a file that a line of `/proc/PID/maps` maps, if it is shared:
/// `7f00-7f10 rw-s 00000000 00:01 1026 /memfd:ram (deleted)`.
fn shared_part(line: &[u8]) -> Option<(Inode, Span)> {
    let line = std::str::from_utf8(line.get(..line.len().min(128))?)
        .or_else(|error| std::str::from_utf8(&line[..error.valid_up_to()]))
        .ok()?;
    let mut fields = line.split_ascii_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    let shared = fields.next()?.as_bytes().get(3) == Some(&b's');
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let offset = hex(fields.next()?)?;
    let (device_major, device_minor) = fields.next()?.split_once(':')?;
    let device = hex(device_major)? << 32 | hex(device_minor)?;
    let number = fields.next()?.parse().ok()?;
    let part = Span::new(offset, hex(to)?.checked_sub(hex(from)?)?)?;
    shared.then_some((Inode { device, number }, part))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};
    use std::{fs, os::fd::AsFd};

    fn span(start: u64, len: u64) -> Span {
        Span::new(start, len).unwrap()
    }

    fn map(text: &str) -> MemoryMap {
        MemoryMap::parse(77, text.as_bytes())
    }

    const INODE: Inode = Inode {
        device: 1,
        number: 1026,
    };

    #[test]
    fn shared_pieces_that_touch_cover_a_range_and_gaps_do_not() {
        let map = map("\
7f0000002000-7f0000004000 rw-s 00002000 00:01 1026                       /memfd:ram (deleted)
7f0000000000-7f0000002000 rw-s 00000000 00:01 1026                       /memfd:ram (deleted)
7f1000000000-7f1000001000 rw-s 00005000 00:01 1026                       /memfd:ram (deleted)
7f2000000000-7f2000100000 rw-s 00000000 00:02 1026                       /memfd:other (deleted)
55d0c0de0000-55d0c0df0000 r-xp 00000000 fd:00 1311                       /usr/bin/vmm
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
");
        map.check_shared(INODE, span(0x1000, 0x3000)).unwrap();
        assert!(map.check_shared(INODE, span(0x1000, 0x4000)).is_err());
        assert!(map.check_shared(INODE, span(0x4000, 0x1000)).is_err());
        map.check_shared(INODE, span(0x5000, 0x1000)).unwrap();
    }

    #[test]
    fn a_part_within_another_and_one_that_hangs_over_are_one() {
        let map = map("\
7f00000-7f05000 rw-s 00001000 00:01 1026 /memfd:ram (deleted)
7f10000-7f11000 rw-s 00002000 00:01 1026 /memfd:ram (deleted)
7f20000-7f23000 rw-s 00004000 00:01 1026 /memfd:ram (deleted)
7f30000-7f31000 rw-s 00000000 00:01 1027 /memfd:other (deleted)
");
        map.check_shared(INODE, span(0x1000, 0x6000)).unwrap();
        map.check_shared(INODE, span(0x5000, 0x2000)).unwrap();
        assert!(map.check_shared(INODE, span(0, 0x2000)).is_err());
        assert!(map.check_shared(INODE, span(0x1000, 0x6001)).is_err());
        assert_eq!(map.shared.len(), 2);
    }

    #[test]
    fn a_private_mapping_is_refused_in_words() {
        let map = map("7f00-ff00 rw-p 00000000 00:01 1026 /memfd:ram (deleted)\n");
        let words = map
            .check_shared(INODE, span(0, 0x1000))
            .unwrap_err()
            .to_string();
        assert_eq!(
            words,
            "process 77 does not map bytes 0x0+0x1000 of that memory shared, so DMA would reach pages that the guest never sees; start the VMM with share=on (QEMU) or shared=on (cloud-hypervisor)"
        );
    }

    #[test]
    fn malformed_lines_are_passed_over() {
        for text in [
            "",
            "\n\n",
            "zz",
            "1-2",
            "1-2 rw-s",
            "1-2 rw-s x 00:01 1026",
            "2-1 rw-s 0 00:01 1026",
            "1-2 rw-s 0 1 1026",
            "\u{e9}-2 rw-s 0 00:01 1026 \u{e9}",
        ] {
            assert!(map(text).check_shared(INODE, span(0, 1)).is_err(), "{text}");
        }
    }

    #[test]
    fn the_peers_own_memory_map_tells_shared_from_private() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("5")).unwrap();
        let maps = dir.path().join("5/maps");
        fs::write(&maps, "0-2000 rw-s 0 00:01 1026 /memfd:ram\n").unwrap();
        let map = MemoryMap::read(dir.path(), 5).unwrap();
        map.check_shared(INODE, span(0, 0x2000)).unwrap();
        fs::write(&maps, "").unwrap();
        assert!(matches!(
            MemoryMap::read(dir.path(), 5),
            Err(MemoryError::Unreadable { .. })
        ));
        let words = MemoryMap::read(Path::new("/proc-is-elsewhere"), 6)
            .unwrap_err()
            .to_string();
        assert_eq!(
            words,
            "cannot read /proc-is-elsewhere/6/maps to see whether the guest's memory is shared; let this process read it, or set memory_check = \"off\""
        );
    }

    #[test]
    fn a_vmm_of_a_foreign_pid_namespace_is_refused_in_words() {
        // Even where something answers to its number, which is then not the VMM.
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("0")).unwrap();
        fs::write(dir.path().join("0/maps"), "0-2000 rw-s 0 00:01 1026 /x\n").unwrap();
        let words = MemoryMap::read(dir.path(), 0).unwrap_err().to_string();
        assert_eq!(
            words,
            "the VMM runs in a PID namespace that this process does not see, so nothing tells whether the guest's memory is shared; run the VMM where `ps` here shows it, or set memory_check = \"off\""
        );
    }

    #[test]
    fn fds_that_are_no_sealed_memory_are_refused_in_words() {
        let null = File::open("/dev/null").unwrap();
        let words = |fd: BorrowedFd<'_>, access| {
            check_fd(fd, span(0, 0x1000), access)
                .unwrap_err()
                .to_string()
        };
        let kind = "the memory's fd is no memfd or hugetlbfs file; give the guest memory by memory-backend-memfd with share=on (QEMU) or shared=on (cloud-hypervisor)";
        assert_eq!(words(null.as_fd(), Access::READ_WRITE), kind);
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(words(reader.as_fd(), Access::READ_WRITE), kind);

        let memory = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&memory, 0xfff).unwrap();
        assert_eq!(
            words(memory.as_fd(), Access::READ_WRITE),
            "the memory's fd has 0xfff bytes, and the map needs them up to 0x1000"
        );
        ftruncate(&memory, 0x1000).unwrap();
        check_fd(memory.as_fd(), span(0, 0x1000), Access::READ_WRITE).unwrap();

        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
        let read_only = File::open(&path).unwrap();
        let refused = "the memory's fd cannot be written, and the map lets the device do that";
        assert_eq!(words(read_only.as_fd(), Access::READ_WRITE), refused);
        check_fd(read_only.as_fd(), span(0, 0x1000), Access::READ).unwrap();
        let write_only = File::options().write(true).open(&path).unwrap();
        assert_eq!(
            words(write_only.as_fd(), Access::READ),
            "the memory's fd cannot be read, and the map lets the device do that"
        );

        fcntl_add_seals(&memory, SealFlags::FUTURE_WRITE).unwrap();
        assert_eq!(words(memory.as_fd(), Access::READ_WRITE), refused);
    }
}
