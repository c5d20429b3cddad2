//! Each command as QEMU and cloud-hypervisor use it, byte by byte.

use crate::{
    fake::{BAR_FD_OFFSET, MSIX_PAGE, VECTORS, span},
    rig::{Rig, access, dma_map, dma_unmap, words},
};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, OwnedFd};
use vfio_shim::model::IrqIndex;
use vmm_glue::vfio_user::{BarMode, wire::Command};

const TRIGGER_NONE: u32 = 32 | 1;
const TRIGGER_BOOL: u32 = 32 | 2;
const TRIGGER_EVENTFD: u32 = 32 | 4;
const MASK_NONE: u32 = 8 | 1;
const UNMASK_BOOL: u32 = 16 | 2;
const MASK_EVENTFD: u32 = 8 | 4;
const MSIX: u32 = 2;

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn fired(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

fn region_info(argsz: u32, index: u32) -> Vec<u8> {
    words(&[argsz, 0, index, 0, 0, 0, 0, 0])
}

#[test]
fn version_answers_what_was_asked_and_no_more() {
    for minor in [0, 1] {
        let rig = Rig::new();
        let answer = rig.connect().version(minor);
        assert_eq!(answer.u32(0), minor << 16);
        let json = std::str::from_utf8(&answer.body[4..]).unwrap();
        assert_eq!(
            json,
            "{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"pgsizes\":1075843072,\"max_dma_maps\":65535}}\0"
        );
    }
}

#[test]
fn device_info_tells_vfio_pcis_indices() {
    let rig = Rig::new();
    let answer = rig
        .agreed()
        .ask(Command::DeviceGetInfo, &words(&[16, 0, 0, 0]), &[]);
    assert_eq!(answer.body, words(&[16, 3, 9, 5]));
}

#[test]
fn trapped_regions_offer_no_mapping_and_no_fd() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    for (index, flags, size) in [
        (0, 3, 0x4000),
        (1, 0, 0),
        (6, 0, 0),
        (7, 3, 4096),
        (8, 0, 0),
    ] {
        let answer = client.ask(Command::DeviceGetRegionInfo, &region_info(4096, index), &[]);
        assert_eq!(answer.body, words(&[32, flags, index, 0, size, 0, 0, 0]));
        assert!(answer.fds.is_empty());
    }
}

#[test]
fn a_mapped_bar_tells_its_size_first_and_its_areas_and_fd_then() {
    let rig = Rig::with(|options| options.bars = BarMode::Mapped);
    let mut client = rig.agreed();
    let full = 32 + 16 + 2 * 16;
    let head = [full, 15, 0, 32, 0x4000, 0, BAR_FD_OFFSET as u32, 0];
    let short = client.ask(Command::DeviceGetRegionInfo, &region_info(32, 0), &[]);
    assert_eq!(short.body, words(&head));
    assert!(short.fds.is_empty());
    let answer = client.ask(Command::DeviceGetRegionInfo, &region_info(full, 0), &[]);
    assert_eq!(answer.body[..32], words(&head));
    let areas = [1 | 1 << 16, 0, 2, 0, 0, 0, 0x2000, 0, 0x3000, 0, 0x1000, 0];
    assert_eq!(answer.body[32..], words(&areas));
    assert_eq!(answer.fds.len(), 1);
    let size = rustix::fs::fstat(&answer.fds[0]).unwrap().st_size;
    assert_eq!(size as u64, BAR_FD_OFFSET + 0x4000);
    // Config space is not to be mapped.
    let config = client.ask(Command::DeviceGetRegionInfo, &region_info(4096, 7), &[]);
    assert_eq!((config.u32(4), config.fds.len()), (3, 0));
}

#[test]
fn each_access_in_an_area_is_one_load_or_store_of_its_width() {
    let rig = Rig::with(|options| options.bars = BarMode::Mapped);
    let mut client = rig.agreed();
    for width in [1, 2, 4, 8] {
        let data = client.read(0, 0x108, width);
        assert_eq!(data, (8..8 + width as u8).collect::<Vec<_>>());
        client.write(0, 0x3ff0, &data);
    }
    let expected = [1, 2, 4, 8].map(|w| [format!("load 0x108 {w}"), format!("store 0x3ff0 {w}")]);
    assert_eq!(rig.function.journal(), expected.concat());
    // The MSI-X page is the function's, and so is what crosses into it.
    client.read(0, MSIX_PAGE, 4);
    client.read(0, MSIX_PAGE - 4, 8);
    client.write(0, MSIX_PAGE + 12, &[1, 0, 0, 0]);
    assert_eq!(
        rig.function.journal(),
        ["read 0 0x2000 4", "read 0 0x1ffc 8", "write 0 0x200c 4"]
    );
    let counters = &rig.shared.counters;
    assert_eq!(
        (counters.bar_reads.get(), counters.bar_writes.get()),
        (6, 5)
    );
    assert_eq!(counters.refused.get(), 0);
}

#[test]
fn config_space_is_the_functions_own_affair() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    assert_eq!(client.read(7, 0x40, 4), [0x40, 0x41, 0x42, 0x43]);
    client.write(7, 0x10, &[0xff; 4]);
    assert_eq!(rig.function.journal(), ["read 7 0x40 4", "write 7 0x10 4"]);
    let counters = &rig.shared.counters;
    assert_eq!(
        (counters.config_reads.get(), counters.config_writes.get()),
        (1, 1)
    );
    assert_eq!(
        (counters.bar_reads.get(), counters.bar_writes.get()),
        (0, 0)
    );
}

#[test]
fn what_cannot_be_accessed_reads_as_ones_and_drops_writes() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    for (region, offset) in [
        (0, 0x4000),
        (0, 0x3ffd),
        (0, u64::MAX),
        (1, 0),
        (7, 4096),
        (99, 0),
    ] {
        assert_eq!(client.read(region, offset, 4), [0xff; 4]);
        client.write(region, offset, &[0; 4]);
    }
    assert!(rig.function.journal().is_empty());
    assert_eq!(rig.shared.counters.refused.get(), 12);
    rig.function.faults.lock().unwrap().region = true;
    assert_eq!(client.read(7, 0, 2), [0xff; 2]);
    rig.function.faults.lock().unwrap().region = true;
    client.write(7, 0, &[0; 2]);
    assert_eq!(client.read(7, 0, 2), [0, 1]);
}

#[test]
fn the_largest_read_is_answered() {
    let rig = Rig::new();
    let data = rig.agreed().read(0, 0, 1 << 20);
    assert!(data.len() == 1 << 20 && data.iter().all(|byte| *byte == 0xff));
}

#[test]
fn writes_that_want_no_reply_get_none() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    let body = access(0, 0x10, 4, &[1, 2, 3, 4]);
    for _ in 0..3 {
        client.send_raw(Command::RegionWrite as u16, 36, 0x10, &body, &[]);
    }
    // Also where it is refused.
    client.send_raw(
        Command::DeviceGetIrqInfo as u16,
        32,
        0x10,
        &words(&[16, 0, 9, 0]),
        &[],
    );
    assert_eq!(client.read(0, 0x10, 4), [1, 2, 3, 4]);
}

#[test]
fn irq_infos_offer_no_intx() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    for (index, flags, count) in [(0, 0, 0), (1, 11, 1), (2, 9, VECTORS), (3, 9, 1), (4, 9, 1)] {
        let answer = client.ask(Command::DeviceGetIrqInfo, &words(&[16, 0, index, 0]), &[]);
        assert_eq!(answer.body, words(&[16, flags, index, count]));
    }
}

#[test]
fn refusals_carry_the_full_answer_so_that_no_client_waits_for_the_rest() {
    let rig = Rig::new();
    let mut client = rig.connect();
    client.version(1);
    let answer = client.ask(Command::DeviceGetIrqInfo, &words(&[16, 0, 5, 0]), &[]);
    assert_eq!((answer.errno, answer.body.len()), (22, 16));
    let answer = client.ask(Command::DeviceGetRegionInfo, &region_info(32, 9), &[]);
    assert_eq!((answer.errno, answer.body.len()), (22, 32));
    let answer = client.ask(Command::DeviceGetRegionIoFds, &words(&[16, 0, 9, 0]), &[]);
    assert_eq!((answer.errno, answer.body.len()), (22, 16));
    assert_eq!(rig.shared.counters.refused.get(), 3);
}

#[test]
fn there_are_no_region_io_fds() {
    let rig = Rig::new();
    let answer = rig
        .agreed()
        .ask(Command::DeviceGetRegionIoFds, &words(&[16, 0, 0, 0]), &[]);
    assert_eq!((answer.errno, answer.body), (0, words(&[16, 0, 0, 0])));
}

/// Per MSI-X enable: take away, the fd three times over, disable, and all of it again.
#[test]
fn qemus_way_of_enabling_msix_ends_with_the_last_eventfd() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    let mut last = event();
    for _ in 0..2 {
        assert_eq!(
            client.set_irqs(TRIGGER_EVENTFD, MSIX, 0, 1, &[], &[]).errno,
            0
        );
        for _ in 0..3 {
            last = event();
            let answer = client.set_irqs(TRIGGER_EVENTFD, MSIX, 0, 1, &[], &[last.as_fd()]);
            assert_eq!(answer.errno, 0);
            assert_eq!(rig.function.fire(IrqIndex::Msix, 0), 1);
            assert_eq!(fired(&last), 1);
        }
        assert_eq!(client.set_irqs(TRIGGER_NONE, MSIX, 0, 0, &[], &[]).errno, 0);
        assert_eq!(rig.function.fire(IrqIndex::Msix, 0), 0);
        // Once more, with nothing enabled.
        assert_eq!(client.set_irqs(TRIGGER_NONE, MSIX, 0, 0, &[], &[]).errno, 0);
    }
    client.set_irqs(TRIGGER_EVENTFD, MSIX, 0, 1, &[], &[last.as_fd()]);
    let one_fd = "triggers Msix 0+1 fds 1";
    let once = [
        "triggers Msix 0+1 fds 0",
        one_fd,
        one_fd,
        one_fd,
        "disable Msix",
        "disable Msix",
    ];
    let mut expected = [once, once].concat();
    expected.push(one_fd);
    assert_eq!(rig.function.journal(), expected);
}

/// cloud-hypervisor sends all vectors in one message, whatever `max_msg_fds` said.
#[test]
fn a_batch_of_eventfds_takes_over_at_once() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    for _ in 0..2 {
        let events: Vec<_> = (0..VECTORS).map(|_| event()).collect();
        let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
        assert_eq!(
            client
                .set_irqs(TRIGGER_EVENTFD, MSIX, 0, VECTORS, &[], &fds)
                .errno,
            0
        );
        for (vector, event) in (0..).zip(&events) {
            assert_eq!(rig.function.fire(IrqIndex::Msix, vector), 1);
            assert_eq!(fired(event), 1);
        }
        assert_eq!(client.set_irqs(TRIGGER_NONE, MSIX, 0, 0, &[], &[]).errno, 0);
    }
}

#[test]
fn vectors_are_raised_masked_and_unmasked_as_named() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    assert_eq!(client.set_irqs(TRIGGER_NONE, MSIX, 3, 2, &[], &[]).errno, 0);
    assert_eq!(
        client
            .set_irqs(TRIGGER_BOOL, MSIX, 3, 5, &[1, 1, 0, 0, 9], &[])
            .errno,
        0
    );
    assert_eq!(client.set_irqs(MASK_NONE, MSIX, 1, 1, &[], &[]).errno, 0);
    assert_eq!(
        client.set_irqs(UNMASK_BOOL, MSIX, 0, 2, &[0, 1], &[]).errno,
        0
    );
    let expected = [
        "raise Msix 3+2",
        "raise Msix 3+2",
        "raise Msix 7+1",
        "mask Msix 1+1",
        "unmask Msix 1+1",
    ];
    assert_eq!(rig.function.journal(), expected);
}

#[test]
fn vectors_that_do_not_exist_are_refused_and_the_session_goes_on() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    for (index, start, count) in [
        (2, VECTORS, 1),
        (2, 0, VECTORS + 1),
        (2, u32::MAX, 2),
        (0, 0, 1),
        (5, 0, 1),
    ] {
        assert_eq!(
            client
                .set_irqs(TRIGGER_NONE, index, start, count, &[], &[])
                .errno,
            22
        );
    }
    assert_eq!(
        client.set_irqs(MASK_EVENTFD, MSIX, 0, 1, &[], &[]).errno,
        22
    );
    // INTx is disabled by some VMMs whether they have it or not.
    assert_eq!(client.set_irqs(TRIGGER_NONE, 0, 0, 0, &[], &[]).errno, 0);
    assert!(rig.function.journal().is_empty());
}

#[test]
fn maps_are_recorded_at_once_and_programmed_at_the_first_bus_master_enable() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    let ram = rig.memory(0x40_0000, 's');
    // Firmware maps, unmaps, maps again; some of it without an fd, some of it read-only.
    for _ in 0..3 {
        assert_eq!(
            client
                .map(0x10_0000, 0x10_0000, 0x30_0000, Some(&ram))
                .errno,
            0
        );
        assert_eq!(client.unmap(0x10_0000, 0x30_0000).u64(16), 0x30_0000);
    }
    client.map(0x10_0000, 0x10_0000, 0x30_0000, Some(&ram));
    client.map(0, 0xfffc_0000, 0x4_0000, None);
    client.ask(
        Command::DmaMap,
        &dma_map(1, 0xc_0000, 0xc_0000, 0x1000),
        &[ram.as_fd()],
    );
    client.map(0, 0, 0xa_0000, Some(&ram));
    client.write(7, 4, &[2, 0]);
    assert_eq!(rig.function.journal(), ["write 7 0x4 2"]);
    client.enable_bus_master();
    let all = "map 0x0+0xa0000 @0x0 rw, 0xc0000+0x1000 @0xc0000 r, 0x100000+0x300000 @0x100000 rw";
    assert_eq!(rig.function.journal(), [all, "write 7 0x4 2"]);
    // From now on a map is a map, also while bus mastering is off for a while.
    client.write(7, 4, &[2, 0]);
    client.enable_bus_master();
    client.map(0xa_0000, 0xa_0000, 0x1000, Some(&ram));
    client.map(0, 0xe000_0000, 0x1000, None);
    assert_eq!(client.unmap(0xc_0000, 0x1000).u64(16), 0x1000);
    assert_eq!(client.unmap(0xe000_0000, 0x1000).errno, 0);
    assert_eq!(client.unmap(0x5000_0000, 0x1000).u64(16), 0);
    let expected = [
        "write 7 0x4 2",
        "write 7 0x4 2",
        "map 0xa0000+0x1000 @0xa0000 rw",
        "unmap 0xc0000+0x1000",
    ];
    assert_eq!(rig.function.journal(), expected);
    assert_eq!(
        rig.function.mapped(),
        [
            span(0, 0xa_0000),
            span(0x10_0000, 0x30_0000),
            span(0xa_0000, 0x1000)
        ]
    );
    assert_eq!(rig.shared.counters.maps_now.get(), 4);
    assert_eq!(rig.shared.counters.bytes_now.get(), 0x3a_1000);
}

#[test]
fn one_unmap_takes_many_maps_and_all_takes_the_rest() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    let ram = rig.memory(0x80_0000, 's');
    for block in 0..4 {
        client.map(block << 21, block << 21, 1 << 21, Some(&ram));
    }
    client.enable_bus_master();
    assert_eq!(client.unmap(0, 2 << 21).u64(16), 2 << 21);
    let answer = client.ask(Command::DmaUnmap, &dma_unmap(2, 0, 0), &[]);
    assert_eq!((answer.errno, answer.u64(16)), (0, 2 << 21));
    assert!(rig.function.mapped().is_empty());
    let answer = client.ask(Command::DmaUnmap, &dma_unmap(2, 0, 0), &[]);
    assert_eq!((answer.errno, answer.u64(16)), (0, 0));
    // Up to the end of the address space, as a VMM with a virtual IOMMU does.
    client.map(0, 1 << 32, 0x1000, Some(&ram));
    assert_eq!(
        client.unmap(1 << 31, 0u64.wrapping_sub(1 << 31)).u64(16),
        0x1000
    );
}

#[test]
fn requests_that_were_sent_without_waiting_are_answered_in_order() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    let ram = rig.memory(0x100_0000, 's');
    let sent: Vec<u16> = (0..64u64)
        .map(|page| {
            let fd = (page % 3 != 0).then(|| ram.as_fd());
            let body = dma_map(3, page << 12, page << 12, 1 << 12);
            client.send(Command::DmaMap, &body, fd.as_slice())
        })
        .collect();
    for id in sent {
        let (got, answer) = client.answer().unwrap();
        assert_eq!((got, answer.errno), (id, 0));
    }
    assert_eq!(rig.shared.counters.maps_now.get(), 64);
    assert_eq!(rig.shared.counters.bytes_now.get(), 42 << 12);
}

#[test]
fn a_reset_of_an_untouched_function_answers_at_once() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    let reset = |client: &mut crate::rig::Client| client.ask(Command::DeviceReset, &[], &[]).errno;
    // What QEMU does at realize and before each reset.
    client.read(7, 0, 4);
    client.write(7, 4, &[0, 0]);
    client.set_irqs(TRIGGER_EVENTFD, 3, 0, 1, &[], &[event().as_fd()]);
    assert_eq!(reset(&mut client), 0);
    let expected = ["read 7 0x0 4", "write 7 0x4 2", "triggers Err 0+1 fds 1"];
    assert_eq!(rig.function.journal(), expected);
    client.set_irqs(TRIGGER_EVENTFD, MSIX, 0, 1, &[], &[event().as_fd()]);
    assert_eq!(reset(&mut client), 0);
    assert_eq!(rig.function.journal(), ["triggers Msix 0+1 fds 1", "reset"]);
    client.write(0, 0x14, &[1, 0, 0, 0]);
    assert_eq!(reset(&mut client), 0);
    assert_eq!(reset(&mut client), 0);
    assert_eq!(rig.function.journal(), ["store 0x14 4", "reset"]);
    client.enable_bus_master();
    rig.function.faults.lock().unwrap().reset = true;
    assert_eq!(reset(&mut client), 5);
    assert_eq!(reset(&mut client), 0);
    assert_eq!(rig.shared.counters.resets.get(), 3);
}

#[test]
fn maps_outlive_a_reset_and_unmaps_after_it_are_honoured() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    let ram = rig.memory(0x2000, 's');
    client.map(0, 0, 0x2000, Some(&ram));
    client.enable_bus_master();
    assert_eq!(client.ask(Command::DeviceReset, &[], &[]).errno, 0);
    assert_eq!(rig.function.mapped(), [span(0, 0x2000)]);
    assert_eq!(client.unmap(0, 0x2000).errno, 0);
    assert!(rig.function.mapped().is_empty());
}

#[test]
fn a_command_that_is_not_offered_is_an_error_to_qemu() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    for command in [
        Command::DirtyPages,
        Command::RegionWriteMulti,
        Command::DeviceFeature,
        Command::DmaRead,
    ] {
        assert_eq!(client.ask(command, &[0; 32], &[]).errno, 95);
    }
    assert_eq!(client.read(7, 0, 1), [0]);
}
