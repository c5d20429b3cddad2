//! A VMM's bad input with a whole path behind it: told in words, both hosts as before, the next VMM served.

use sim_tests::{MAILBOX_BYTES, Ram, Sim, WINDOW_BYTES};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use vfio_shim::ntb::soft::{IDENT, IDENT_VALUE};
use vfio_user::Client;

const RAM_BYTES: u64 = 2 << 20;
const CONFIG: u32 = 7;
/// PCI 3.0, 6.2.2: memory space and bus mastering.
const ENABLE: [u8; 2] = [6, 0];

/// A session that `bad` gets ended; its words, and nothing left of it.
fn refused(sim: &Sim, expected: &str, bad: impl FnOnce(&mut Client)) {
    let before = sim.left();
    let resets = sim.function.resets();
    let mut client = sim.vmm();
    bad(&mut client);
    // The client takes no notice of an error in answer to a map: ask it for something else.
    let goes_on = client.region_read(CONFIG, 0, &mut [0; 2]).is_ok();
    assert!(!goes_on, "the session goes on; expected: {expected}");
    drop(client);
    sim.wait_idle();
    assert_eq!(sim.shared.last_error().as_deref(), Some(expected));
    sim.wait_left(before);
    assert!(sim.function.resets() > resets, "no reset after a guest");
    serves(sim);
    sim.wait_left(before);
}

/// A VMM that behaves gets as far as the function's registers and DMA.
fn serves(sim: &Sim) {
    let ram = Ram::shared(RAM_BYTES);
    let mut client = sim.vmm();
    client.dma_map(0, 0, RAM_BYTES, ram.raw()).unwrap();
    client.region_write(CONFIG, 4, &ENABLE).unwrap();
    assert_eq!(sim.function.space().maps().len(), 1);
    let mut word = [0; 4];
    client.region_read(0, IDENT, &mut word).unwrap();
    assert_eq!(u32::from_le_bytes(word), IDENT_VALUE);
    client.shutdown().unwrap();
    drop(client);
    sim.wait_idle();
}

#[test]
fn window_too_small_for_the_guests_ram_ends_the_session_with_the_figure() {
    let sim = Sim::new();
    let bytes = WINDOW_BYTES;
    let text = |free: u64| {
        format!(
            "the device's address space refused it: the guest's RAM needs {bytes} bytes of the \
             NTB window; {free} of {WINDOW_BYTES} are free: a window of {} bytes would do (set it \
             in both hosts' firmware), or use less memory",
            2 * WINDOW_BYTES
        )
    };
    let large = Ram::shared(bytes);
    let enable = "guest memory cannot be reached by the device as the guest enables bus mastering";
    let expected = format!("{enable}: {}", text(WINDOW_BYTES - MAILBOX_BYTES));
    refused(&sim, &expected, |client| {
        client.dma_map(0, 0, bytes, large.raw()).unwrap();
        let _ = client.region_write(CONFIG, 4, &ENABLE);
    });
    // With some of it mapped on both hosts already, which must go as well.
    let small = Ram::shared(RAM_BYTES);
    let free = WINDOW_BYTES - MAILBOX_BYTES - RAM_BYTES;
    let at = 1u64 << 32;
    let expected = format!("DMA_MAP of {at:#x}+{bytes:#x} is refused: {}", text(free));
    refused(&sim, &expected, |client| {
        client.dma_map(0, 0, RAM_BYTES, small.raw()).unwrap();
        client.region_write(CONFIG, 4, &ENABLE).unwrap();
        let _ = client.dma_map(0, at, bytes, large.raw());
    });
    sim.end();
}

#[test]
fn map_over_the_reserved_range_is_refused_before_and_after_bus_mastering() {
    let sim = Sim::new();
    let ram = Ram::shared(RAM_BYTES);
    let expected = "DMA_MAP of 0xfee00000+0x1000 is refused: the IOMMU cannot map those \
                    addresses; it can map 0x0..=0xfedfffff and 0xfef00000..=0xfffffffffffff: give \
                    the guest a memory layout inside them";
    for enabled in [false, true] {
        refused(&sim, expected, |client| {
            if enabled {
                client.dma_map(0, 0, RAM_BYTES, ram.raw()).unwrap();
                client.region_write(CONFIG, 4, &ENABLE).unwrap();
            }
            let _ = client.dma_map(0, 0xfee0_0000, 0x1000, ram.raw());
        });
    }
    sim.end();
}

#[test]
fn memory_that_the_guest_does_not_share_never_reaches_either_host() {
    let sim = Sim::new();
    let ram = Ram::unmapped(RAM_BYTES);
    let expected = format!(
        "DMA_MAP of 0x0+0x200000 is refused: process {} does not map bytes 0x0+0x200000 of that \
         memory shared, so DMA would reach pages that the guest never sees; start the VMM with \
         share=on (QEMU) or shared=on (cloud-hypervisor)",
        std::process::id()
    );
    refused(&sim, &expected, |client| {
        let _ = client.dma_map(0, 0, RAM_BYTES, ram.raw());
    });
    // Shared when it was mapped, and private when the guest's driver starts.
    let mut ram = Ram::shared(RAM_BYTES);
    let expected = expected.replace(
        "DMA_MAP of 0x0+0x200000 is refused",
        "guest memory cannot be reached by the device as the guest enables bus mastering",
    );
    refused(&sim, &expected, |client| {
        client.dma_map(0, 0, RAM_BYTES, ram.raw()).unwrap();
        ram.unmap();
        let _ = client.region_write(CONFIG, 4, &ENABLE);
    });
    sim.end();
}

#[test]
fn fds_that_are_no_guest_memory_leave_nothing_of_what_was_mapped_before() {
    let sim = Sim::new();
    let ram = Ram::shared(RAM_BYTES);
    let null = File::open("/dev/null").unwrap();
    let words = "DMA_MAP of 0x40000000+0x1000 is refused: the memory's fd";
    let kind = "is no memfd or hugetlbfs file; give the guest memory by memory-backend-memfd with \
                share=on (QEMU) or shared=on (cloud-hypervisor)";
    let short = "has 0x200000 bytes, and the map needs them up to 0x201000";
    let cases = [(null.as_raw_fd(), 0, kind), (ram.raw(), RAM_BYTES, short)];
    for (fd, offset, text) in cases {
        refused(&sim, &format!("{words} {text}"), |client| {
            client.dma_map(0, 0, RAM_BYTES, ram.raw()).unwrap();
            client.region_write(CONFIG, 4, &ENABLE).unwrap();
            let _ = client.dma_map(offset, 1 << 30, 0x1000, fd);
        });
    }
    sim.end();
}

#[test]
fn bytes_that_are_no_message_end_the_session_and_leave_nothing() {
    let sim = Sim::new();
    let before = sim.left();
    let mut stream = UnixStream::connect(&sim.socket).unwrap();
    stream.write_all(&[0xff; 64]).unwrap();
    drop(stream);
    sim_tests::until("the words", || sim.shared.last_error());
    sim.wait_idle();
    assert_eq!(
        sim.shared.last_error().as_deref(),
        Some("the VMM sent a malformed message: command 65535 is unknown")
    );
    sim.wait_left(before);
    serves(&sim);
    sim.end();
}
