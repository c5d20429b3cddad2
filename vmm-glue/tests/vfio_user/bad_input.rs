//! Bad input: each ends the guest session with a clear error, and the next VMM is served.

use crate::{
    fake::VECTORS,
    rig::{Client, Rig, access, dma_map, dma_unmap, words},
};
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{MemfdFlags, ftruncate, memfd_create},
};
use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};
use vmm_glue::vfio_user::{MEMORY_FILES_MAX, MemoryCheck, socket::FDS_MAX, wire::Command};

/// The session ends with these words; then the next VMM is served as if nothing had been.
fn ends(rig: &Rig, client: &mut Client, expected: &str) {
    assert!(
        client.is_ended(),
        "the session goes on; expected: {expected}"
    );
    assert_eq!(rig.last_error(), expected);
    serves(rig);
}

fn serves(rig: &Rig) {
    let mut next = rig.agreed();
    assert_eq!(next.read(7, 0, 2), [0, 1]);
    assert!(rig.function.mapped().is_empty());
}

/// A message of an agreed session that ends it.
fn refused(command: Command, body: &[u8], fds: &[BorrowedFd<'_>], expected: &str) {
    let rig = Rig::new();
    let mut client = rig.agreed();
    client.send(command, body, fds);
    ends(&rig, &mut client, expected);
}

#[test]
fn a_size_that_no_command_allows_is_refused_at_every_command() {
    for command in Command::ALL {
        let (least, most) = command.body_bytes();
        let range = format!(
            "it must have {} to {}, header included",
            16 + least,
            16 + most
        );
        for size in [least + 15, most + 17, 0, 15, usize::MAX >> 32] {
            let rig = Rig::new();
            let mut client = match command {
                Command::Version => rig.connect(),
                _ => rig.agreed(),
            };
            // Nothing behind the header: the size alone is enough to know.
            client.send_raw(command as u16, size as u32, 0, &[], &[]);
            let expected = format!(
                "the VMM sent a malformed message: the {command:?} message has {size} bytes; {range}"
            );
            ends(&rig, &mut client, &expected);
        }
    }
}

#[test]
fn unknown_commands_and_flags_are_refused() {
    for (command, flags, expected) in [
        (0, 0, "command 0 is unknown"),
        (19, 0, "command 19 is unknown"),
        (u16::MAX, 0, "command 65535 is unknown"),
        (13, 1, "the header's flags 0x1 are not those of a command"),
        (
            13,
            0x20,
            "the header's flags 0x20 are not those of a command",
        ),
        (
            13,
            0x8000_0000,
            "the header's flags 0x80000000 are not those of a command",
        ),
    ] {
        let rig = Rig::new();
        let mut client = rig.agreed();
        client.send_raw(command, 16, flags, &[], &[]);
        ends(
            &rig,
            &mut client,
            &format!("the VMM sent a malformed message: {expected}"),
        );
    }
}

#[test]
fn a_message_cut_short_at_every_command_ends_in_words() {
    for command in Command::ALL {
        let (least, _) = command.body_bytes();
        let rig = Rig::new();
        let mut client = match command {
            Command::Version => rig.connect(),
            _ => rig.agreed(),
        };
        let size = 16 + least.max(1) as u32;
        if command == Command::DeviceReset {
            client.send_raw(command as u16, 16, 0, &[], &[]);
            client.answer().unwrap();
            std::io::Write::write_all(&mut client.stream, &[0; 15]).unwrap();
        } else {
            client.send_raw(
                command as u16,
                size,
                0,
                &vec![0; least.saturating_sub(1)],
                &[],
            );
        }
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        let bytes = if command == Command::DeviceReset {
            15
        } else {
            size - 1
        };
        ends(
            &rig,
            &mut client,
            &format!("the VMM closed its socket after {bytes} bytes of an unfinished message"),
        );
    }
}

#[test]
fn too_small_argsz_is_refused_at_every_command_that_has_one() {
    for (command, least) in [
        (Command::DmaMap, 32),
        (Command::DmaUnmap, 24),
        (Command::DeviceGetInfo, 16),
        (Command::DeviceGetRegionInfo, 32),
        (Command::DeviceGetRegionIoFds, 16),
        (Command::DeviceGetIrqInfo, 16),
        (Command::DeviceSetIrqs, 20),
    ] {
        let mut body = vec![0; least];
        body[..4].copy_from_slice(&(least as u32 - 1).to_le_bytes());
        let expected = format!(
            "the VMM sent a malformed message: the {command:?} message has argsz {}, which is under {least}",
            least - 1
        );
        refused(command, &body, &[], &expected);
    }
}

#[test]
fn counts_that_do_not_fit_the_data_are_refused() {
    refused(
        Command::RegionWrite,
        &access(0, 0, 5, &[0; 4]),
        &[],
        "the VMM sent a malformed message: the RegionWrite message counts 5 bytes of data and carries 4",
    );
    refused(
        Command::RegionWrite,
        &access(0, 0, u32::MAX, &[]),
        &[],
        "the VMM sent a malformed message: the RegionWrite message counts 4294967295 bytes of data and carries 0",
    );
    refused(
        Command::RegionRead,
        &access(0, 0, (1 << 20) + 1, &[]),
        &[],
        "the VMM sent a malformed message: the RegionRead message asks for 1048577 bytes; 1048576 are the most",
    );
    refused(
        Command::RegionRead,
        &access(0, 0, u32::MAX, &[]),
        &[],
        "the VMM sent a malformed message: the RegionRead message asks for 4294967295 bytes; 1048576 are the most",
    );
}

#[test]
fn version_comes_first_and_once_and_is_understood() {
    let bad = |body: &[u8], flags: u32, expected: &str| {
        let rig = Rig::new();
        let mut client = rig.connect();
        client.send_raw(1, 16 + body.len() as u32, flags, body, &[]);
        ends(&rig, &mut client, expected);
    };
    bad(
        &words(&[1]),
        0,
        "the VMM speaks vfio-user 1.0; only 0.x is known",
    );
    bad(
        b"\0\0\0\0{}",
        0,
        "the VMM's capabilities do not end in a NUL byte",
    );
    bad(
        b"\0\0\0\0{\0",
        0,
        "the VMM's capabilities are not understood: EOF while parsing an object at line 1 column 1",
    );
    bad(
        b"\0\0\0\x007\0",
        0,
        "the VMM's capabilities are not understood: invalid type: integer `7`, expected a JSON object at line 1 column 1",
    );
    bad(
        b"\0\0\0\0{\"capabilities\": 7}\0",
        0,
        "the VMM's capabilities are not understood: invalid type: integer `7`, expected an object of capabilities at line 1 column 18",
    );
    bad(
        &words(&[0]),
        0x10,
        "the VMM wants no reply to its VERSION message",
    );
    refused(
        Command::Version,
        &words(&[0]),
        &[],
        "the VMM sent Version out of turn: VERSION comes first, and once",
    );
    let rig = Rig::new();
    let mut client = rig.connect();
    client.send(Command::DeviceReset, &[], &[]);
    ends(
        &rig,
        &mut client,
        "the VMM sent DeviceReset out of turn: VERSION comes first, and once",
    );
}

#[test]
fn fds_where_none_belong_are_refused_and_closed() {
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    for command in Command::ALL {
        if matches!(
            command,
            Command::DmaMap | Command::DeviceSetIrqs | Command::Version
        ) {
            continue;
        }
        let (least, _) = command.body_bytes();
        let mut body = vec![0; least];
        if least >= 4 && !matches!(command, Command::RegionRead | Command::RegionWrite) {
            body[0] = 64;
        }
        let fds = [event.as_fd(), event.as_fd()];
        refused(
            command,
            &body,
            &fds,
            &format!("the VMM sent 2 file descriptors with {command:?}, which takes none"),
        );
    }
}

#[test]
fn more_fds_than_a_message_may_bring_are_refused() {
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let rig = Rig::new();
    let mut client = rig.agreed();
    let fds = vec![event.as_fd(); FDS_MAX];
    // The message never ends, so that what came before it stays with it.
    client.send_raw(8, 2000, 0, &[0; 4], &fds);
    let mut more = Client::from(client.stream.try_clone().unwrap());
    more.send_raw(8, 2000, 0, &[0; 4], &[event.as_fd()]);
    ends(
        &rig,
        &mut client,
        "the VMM sent more than 253 file descriptors with one message",
    );
}

#[test]
fn malformed_set_irqs_are_refused() {
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let set = |flags: u32, count: u32, data: &[u8], fds: &[BorrowedFd<'_>], expected: &str| {
        let mut body = words(&[20, flags, 2, 0, count]);
        body.extend(data);
        refused(Command::DeviceSetIrqs, &body, fds, expected);
    };
    for flags in [0, 32, 1, 32 | 8 | 1, 32 | 4 | 2, 64 | 32 | 1, u32::MAX] {
        set(
            flags,
            1,
            &[],
            &[],
            &format!(
                "SET_IRQS has flags {flags:#x}, which are not one action and one kind of data"
            ),
        );
    }
    set(
        34,
        4,
        &[1; 3],
        &[],
        "SET_IRQS names 4 vectors and carries 3 bytes of data",
    );
    set(
        33,
        1,
        &[1; 4],
        &[],
        "SET_IRQS names 1 vectors and carries 4 bytes of data",
    );
    set(
        36,
        2,
        &[],
        &[event.as_fd()],
        "SET_IRQS names 2 vectors and carries 1 file descriptors",
    );
    set(
        33,
        1,
        &[],
        &[event.as_fd()],
        "SET_IRQS names 1 vectors and carries 1 file descriptors",
    );
    let null = File::open("/dev/null").unwrap();
    set(
        36,
        1,
        &[],
        &[null.as_fd()],
        "SET_IRQS carries a file descriptor that is no eventfd but \"/dev/null\"",
    );
    let ram = memfd_create("ram\u{1b}[2J", MemfdFlags::CLOEXEC).unwrap();
    set(
        36,
        1,
        &[],
        &[ram.as_fd()],
        "SET_IRQS carries a file descriptor that is no eventfd but \"/memfd:ram\\u{1b}[2J (deleted)\"",
    );
    // As many as anybody can name, and none of them there.
    let rig = Rig::new();
    assert_eq!(
        rig.agreed().set_irqs(36, 2, 0, u32::MAX, &[], &[]).errno,
        22
    );
    assert_eq!(
        rig.agreed()
            .set_irqs(36, 2, VECTORS, u32::MAX, &[], &[])
            .errno,
        22
    );
}

#[test]
fn a_command_that_is_not_offered_ends_the_session_of_cloud_hypervisor() {
    let rig = Rig::new();
    let mut client = rig.connect();
    client.version(1);
    client.send(Command::DirtyPages, &[0; 8], &[]);
    ends(
        &rig,
        &mut client,
        "the VMM asked for DirtyPages, which is not offered",
    );
}

#[test]
fn maps_that_are_malformed_are_refused() {
    let check = |flags, offset, iova, len, expected: &str| {
        let expected = format!("DMA_MAP of {iova:#x}+{len:#x} is refused: {expected}");
        refused(
            Command::DmaMap,
            &dma_map(flags, offset, iova, len),
            &[],
            &expected,
        );
    };
    check(
        3,
        0,
        0,
        0,
        "it is empty or not aligned to 4 KiB pages (file offset 0x0)",
    );
    check(
        3,
        0,
        0x800,
        0x1000,
        "it is empty or not aligned to 4 KiB pages (file offset 0x0)",
    );
    check(
        3,
        0,
        0x1000,
        0x1001,
        "it is empty or not aligned to 4 KiB pages (file offset 0x0)",
    );
    check(
        3,
        0x10,
        0x1000,
        0x1000,
        "it is empty or not aligned to 4 KiB pages (file offset 0x10)",
    );
    check(
        3,
        0,
        u64::MAX - 0xfff,
        0x1000,
        "it wraps around the end of the address space",
    );
    check(
        3,
        u64::MAX - 0xfff,
        0,
        0x1000,
        "it wraps around the end of the address space",
    );
    check(
        0,
        0,
        0,
        0x1000,
        "its flags 0x0 are not known; read is 1, write is 2, and one is needed",
    );
    check(
        7,
        0,
        0,
        0x1000,
        "its flags 0x7 are not known; read is 1, write is 2, and one is needed",
    );
}

/// A session in which `good` is done before a map that is refused.
fn map_refused(
    rig: &Rig,
    map: Vec<u8>,
    fds: &[BorrowedFd<'_>],
    good: impl FnOnce(&mut Client),
    expected: &str,
) {
    let mut client = rig.agreed();
    good(&mut client);
    client.send(Command::DmaMap, &map, fds);
    ends(rig, &mut client, expected);
}

#[test]
fn a_map_over_another_is_refused() {
    let rig = Rig::new();
    let ram = rig.memory(0x10_0000, 's');
    for (iova, len) in [
        (0x2000, 0x1000),
        (0x1000, 0x2000),
        (0x3000, 0x4000),
        (0, 0x8000),
    ] {
        let good = |client: &mut Client| {
            client.map(0, 0x2000, 0x2000, Some(&ram));
        };
        let expected = format!(
            "DMA_MAP of {iova:#x}+{len:#x} is refused: it overlaps the map at 0x2000+0x2000; unmap that first"
        );
        map_refused(
            &rig,
            dma_map(3, 0, iova, len),
            &[ram.as_fd()],
            good,
            &expected,
        );
    }
}

#[test]
fn a_map_over_the_reserved_range_is_refused() {
    let rig = Rig::new();
    let ram = rig.memory(0x20_0000, 's');
    let usable = "the IOMMU cannot map those addresses; it can map 0x0..=0xfedfffff and 0xfef00000..=0x7fffffffffff: give the guest a memory layout inside them";
    for iova in [0xfee0_0000u64, 0xfedf_f000, 0xfeef_f000, 1 << 47] {
        let expected = format!("DMA_MAP of {iova:#x}+0x2000 is refused: {usable}");
        map_refused(
            &rig,
            dma_map(3, 0, iova, 0x2000),
            &[ram.as_fd()],
            |_| {},
            &expected,
        );
    }
}

#[test]
fn one_map_and_one_byte_over_the_limits_are_refused() {
    let rig = Rig::with(|options| {
        options.maps_max = 3;
        options.bytes_max = 0x5000;
    });
    let ram = rig.memory(0x10_0000, 's');
    let three = |client: &mut Client| {
        for page in 0..3 {
            assert_eq!(client.map(0, page << 12, 0x1000, Some(&ram)).errno, 0);
        }
    };
    map_refused(
        &rig,
        dma_map(3, 0, 0x8000, 0x1000),
        &[ram.as_fd()],
        three,
        "DMA_MAP of 0x8000+0x1000 is refused: the guest has 3 DMA maps already, the most it may have; use larger memory blocks",
    );
    let most = |client: &mut Client| {
        assert_eq!(client.map(0, 0, 0x4000, Some(&ram)).errno, 0);
        assert_eq!(client.map(0, 0x4000, 0x1000, Some(&ram)).errno, 0);
        // Memory that is never programmed does not count.
        assert_eq!(client.map(0, 0x10_0000, 0x10_0000, None).errno, 0);
        client.unmap(0x10_0000, 0x10_0000);
    };
    map_refused(
        &rig,
        dma_map(3, 0, 0x5000, 0x1000),
        &[ram.as_fd()],
        most,
        "DMA_MAP of 0x5000+0x1000 is refused: the guest would have 24576 bytes of memory mapped, and 20480 are the most it may have; give it less memory",
    );
}

#[test]
fn one_memory_file_over_the_limit_is_refused() {
    let rig = Rig::with(|options| options.memory_check = MemoryCheck::Off);
    let file = || {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 0x1000).unwrap();
        fd
    };
    let many = |client: &mut Client| {
        for page in 0..MEMORY_FILES_MAX as u64 {
            assert_eq!(client.map(0, page << 12, 0x1000, Some(&file())).errno, 0);
        }
    };
    map_refused(
        &rig,
        dma_map(3, 0, 1 << 30, 0x1000),
        &[file().as_fd()],
        many,
        "DMA_MAP of 0x40000000+0x1000 is refused: the guest's memory is in more than 256 files; use fewer memory zones",
    );
}

#[test]
fn a_map_with_two_fds_is_refused() {
    let rig = Rig::new();
    let ram = rig.memory(0x1000, 's');
    map_refused(
        &rig,
        dma_map(3, 0, 0, 0x1000),
        &[ram.as_fd(), ram.as_fd()],
        |_| {},
        "DMA_MAP of 0x0+0x1000 is refused: it came with 2 file descriptors; one is the most",
    );
}

#[test]
fn memory_that_is_no_memfd_too_short_or_of_the_wrong_access_is_refused() {
    let rig = Rig::new();
    let refuse = |fd: BorrowedFd<'_>, expected: &str| {
        let expected = format!("DMA_MAP of 0x0+0x2000 is refused: {expected}");
        map_refused(
            &rig,
            dma_map(3, 0x1000, 0, 0x2000),
            &[fd],
            |_| {},
            &expected,
        );
    };
    let file = File::open("/proc/self/exe").unwrap();
    refuse(
        file.as_fd(),
        "the memory's fd is no memfd or hugetlbfs file; give the guest memory by memory-backend-memfd with share=on (QEMU) or shared=on (cloud-hypervisor)",
    );
    let short = rig.memory(0x2fff, 's');
    refuse(
        short.as_fd(),
        "the memory's fd has 0x2fff bytes, and the map needs them up to 0x3000",
    );
    let ram = rig.memory(0x3000, 's');
    let path = format!("/proc/self/fd/{}", ram.as_raw_fd());
    let read_only = OwnedFd::from(File::open(path).unwrap());
    refuse(
        read_only.as_fd(),
        "the memory's fd cannot be written, and the map lets the device do that",
    );
    // What the device only reads may be read-only.
    let mut client = rig.agreed();
    assert_eq!(
        client
            .ask(
                Command::DmaMap,
                &dma_map(1, 0x1000, 0, 0x2000),
                &[read_only.as_fd()]
            )
            .errno,
        0
    );
}

fn private(range: &str) -> String {
    format!(
        "process {} does not map bytes {range} of that memory shared, so DMA would reach pages that the guest never sees; start the VMM with share=on (QEMU) or shared=on (cloud-hypervisor)",
        std::process::id()
    )
}

#[test]
fn private_guest_memory_is_refused_at_the_map() {
    let rig = Rig::new();
    let ram = rig.memory(0x4000, 'p');
    let expected = format!(
        "DMA_MAP of 0x0+0x2000 is refused: {}",
        private("0x1000+0x2000")
    );
    map_refused(
        &rig,
        dma_map(3, 0x1000, 0, 0x2000),
        &[ram.as_fd()],
        |_| {},
        &expected,
    );
    // Shared only in part.
    rig.show(&ram, 0x2000, 's');
    map_refused(
        &rig,
        dma_map(3, 0x1000, 0, 0x2000),
        &[ram.as_fd()],
        |_| {},
        &expected,
    );
}

#[test]
fn memory_that_has_become_private_is_refused_at_bus_master_enable() {
    let rig = Rig::new();
    let ram = rig.memory(0x4000, 's');
    let mut client = rig.agreed();
    assert_eq!(client.map(0, 0, 0x4000, Some(&ram)).errno, 0);
    rig.show(&ram, 0x4000, 'p');
    client.send(Command::RegionWrite, &access(7, 4, 2, &[6, 0]), &[]);
    let expected = format!(
        "guest memory cannot be reached by the device as the guest enables bus mastering: {}",
        private("0x0+0x4000")
    );
    ends(&rig, &mut client, &expected);
    let journal = rig.function.journal();
    assert!(
        !journal
            .iter()
            .any(|line| line.starts_with("map") || line == "write 7 0x4 2"),
        "{journal:?}"
    );
}

#[test]
fn a_memory_map_that_cannot_be_read_is_refused_unless_the_check_is_off() {
    let rig = Rig::new();
    let ram = rig.memory(0x1000, 's');
    std::fs::remove_file(rig.maps_file()).unwrap();
    let expected = format!(
        "DMA_MAP of 0x0+0x1000 is refused: cannot read {} to see whether the guest's memory is shared; let this process read it, or set memory_check = \"off\": No such file or directory (os error 2)",
        rig.maps_file().display()
    );
    map_refused(
        &rig,
        dma_map(3, 0, 0, 0x1000),
        &[ram.as_fd()],
        |_| {},
        &expected,
    );
    let rig = Rig::with(|options| options.memory_check = MemoryCheck::Off);
    let mut client = rig.agreed();
    assert_eq!(client.map(0, 0, 0x1000, Some(&ram)).errno, 0);
    client.enable_bus_master();
    assert_eq!(rig.function.mapped().len(), 1);
}

#[test]
fn a_window_too_small_for_the_guests_memory_ends_the_session_with_the_figure() {
    let full = "the device's address space refused it: the NTB window has 0 bytes free and 1048576 are needed; a window of 2097152 bytes would do (a power of two, set in firmware), or give the guest less memory";
    // At bus-master enable, when all maps were answered long ago.
    let rig = Rig::new();
    let ram = rig.memory(0x10_0000, 's');
    let mut client = rig.agreed();
    client.map(0, 0, 0x10_0000, Some(&ram));
    rig.function.faults.lock().unwrap().map = true;
    client.send(Command::RegionWrite, &access(7, 4, 2, &[6, 0]), &[]);
    ends(
        &rig,
        &mut client,
        &format!(
            "guest memory cannot be reached by the device as the guest enables bus mastering: {full}"
        ),
    );
    // And at a map after it.
    let rig = Rig::new();
    rig.show(&ram, 0x10_0000, 's');
    let good = |client: &mut Client| {
        client.enable_bus_master();
        rig.function.faults.lock().unwrap().map = true;
    };
    map_refused(
        &rig,
        dma_map(3, 0, 0, 0x10_0000),
        &[ram.as_fd()],
        good,
        &format!("DMA_MAP of 0x0+0x100000 is refused: {full}"),
    );
}

#[test]
fn unmaps_that_cannot_be_done_are_refused() {
    let rig = Rig::new();
    let ram = rig.memory(0x10_0000, 's');
    for (flags, iova, len, expected) in [
        (
            0,
            0x1000u64,
            0x1000u64,
            "it would cut the map at 0x1000+0x4000 in two; unmap whole maps",
        ),
        (
            0,
            0,
            0x2000,
            "it would cut the map at 0x1000+0x4000 in two; unmap whole maps",
        ),
        (
            0,
            0x2000,
            0x8000,
            "it would cut the map at 0x1000+0x4000 in two; unmap whole maps",
        ),
        (
            0,
            0x1000,
            0,
            "it is empty or not aligned to 4 KiB pages (file offset 0x0)",
        ),
        (
            0,
            0x1000,
            u64::MAX,
            "it wraps around the end of the address space",
        ),
        (
            2,
            0x1000,
            0,
            "it is empty or not aligned to 4 KiB pages (file offset 0x0)",
        ),
        (
            1,
            0x1000,
            0x4000,
            "its flags 0x1 are not known; read is 1, write is 2, and one is needed",
        ),
    ] {
        let mut client = rig.agreed();
        client.map(0, 0x1000, 0x4000, Some(&ram));
        client.enable_bus_master();
        client.send(Command::DmaUnmap, &dma_unmap(flags, iova, len), &[]);
        ends(
            &rig,
            &mut client,
            &format!("DMA_UNMAP of {iova:#x}+{len:#x} is refused: {expected}"),
        );
    }
}

#[test]
fn an_unmap_that_the_device_does_not_obey_is_not_answered_as_done() {
    let mut rig = Rig::new();
    let ram = rig.memory(0x4000, 's');
    let mut client = rig.agreed();
    client.map(0, 0, 0x4000, Some(&ram));
    client.enable_bus_master();
    rig.function.faults.lock().unwrap().unmap = true;
    client.send(Command::DmaUnmap, &dma_unmap(0, 0, 0x4000), &[]);
    assert!(client.is_ended());
    rig.wait_idle();
    assert_eq!(
        rig.last_error(),
        "DMA_UNMAP of 0x0+0x4000 is refused: the device's address space refused it: the path to the function has ended: for the test"
    );
    // The undo takes away what stayed.
    assert!(rig.function.mapped().is_empty());
    rig.stop().unwrap();
}
