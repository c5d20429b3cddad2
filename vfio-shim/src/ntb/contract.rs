//! What every port keeps to, whatever is behind it: generic checks over a fresh pair of joined ports.
//!
//! Each check takes two ports as they are after opening: link off, windows closed, nothing mapped.

use super::NtbPort;
use crate::model::{Access, Aperture, DmaMap, Memory, PortIova, Span};
use crate::vfio::MappedAperture;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};

const PAGE: u64 = 4096;
const BASE: u64 = 1 << 32;

/// Memory of the host of a port, at `BASE` of the port's container.
struct Ram {
    memory: MappedAperture,
    _fd: OwnedFd,
}

impl Ram {
    fn mapped(port: &impl NtbPort, pages: u64, access: Access) -> Self {
        let bytes = pages * PAGE;
        let fd = memfd_create("contract", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        let map = DmaMap {
            span: Span::new(BASE, bytes).unwrap(),
            access,
            memory: Memory::Fd(fd.as_fd(), 0),
        };
        port.address_space().map(&[map]).unwrap();
        let memory = MappedAperture::memory(fd.as_fd(), 0, bytes).unwrap();
        Self { memory, _fd: fd }
    }
}

fn load(aperture: &dyn Aperture, offset: u64) -> u64 {
    let mut word = [0; 8];
    aperture.read(offset, &mut word);
    u64::from_le_bytes(word)
}

fn store(aperture: &dyn Aperture, offset: u64, value: u64) {
    aperture.write(offset, &value.to_le_bytes());
}

fn link_up<P: NtbPort>(ports: (&P, &P)) {
    ports.0.link_enable(true);
    ports.1.link_enable(true);
    assert!(ports.0.link_is_up() && ports.1.link_is_up());
}

/// Whether the event has fired since last asked.
fn fired(port: &impl NtbPort) -> bool {
    rustix::io::read(port.event(), &mut [0u8; 8]).is_ok()
}

pub(super) fn closed_window_drops_stores_and_reads_ones<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let ram = Ram::mapped(ports.1, 1, Access::READ_WRITE);
    let window = ports.0.window(0);
    store(&*window, 0, 1);
    assert_eq!(load(&*window, 0), u64::MAX);
    ports.1.window_open(0, PortIova(BASE), PAGE).unwrap();
    store(&*window, 8, 2);
    ports.1.window_close(0);
    store(&*window, 16, 3);
    assert_eq!(load(&*window, 8), u64::MAX);
    assert_eq!([0, 8, 16].map(|at| load(&ram.memory, at)), [0, 2, 0]);
}

pub(super) fn open_window_reaches_memory_up_to_its_limit<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let ram = Ram::mapped(ports.1, 3, Access::READ_WRITE);
    ports.1.window_open(0, PortIova(BASE + PAGE), PAGE).unwrap();
    let window = ports.0.window(0);
    assert_eq!(window.len(), ports.0.info().window_bytes[0]);
    store(&*window, 0, 11);
    store(&*window, PAGE - 8, 12);
    store(&*window, PAGE, 13);
    store(&*window, u64::MAX - 7, 14);
    let seen = [PAGE, 2 * PAGE - 8, 2 * PAGE].map(|at| load(&ram.memory, at));
    assert_eq!(seen, [11, 12, 0]);
    assert_eq!(load(&*window, 0), 11);
    assert_eq!(load(&*window, PAGE), u64::MAX);
    assert_eq!(load(&*window, u64::MAX - 7), u64::MAX);
}

pub(super) fn container_of_the_far_port_decides_what_is_reached<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let ram = Ram::mapped(ports.1, 1, Access::READ);
    ports.1.window_open(0, PortIova(BASE), 2 * PAGE).unwrap();
    let window = ports.0.window(0);
    store(&ram.memory, 0, 5);
    store(&*window, 0, 6);
    assert_eq!(load(&*window, 0), 5, "read only");
    assert_eq!(load(&*window, PAGE), u64::MAX, "not mapped");
    let span = Span::new(BASE, PAGE).unwrap();
    assert_eq!(ports.1.address_space().unmap(span).unwrap(), PAGE);
    assert_eq!(load(&*window, 0), u64::MAX, "not mapped any more");
}

pub(super) fn unusable_window_is_refused_and_stays_closed<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let _ram = Ram::mapped(ports.1, 1, Access::READ_WRITE);
    let own = ports.1.info().window_bytes[0];
    let bad = [
        (BASE, 0),
        (BASE, own + PAGE),
        (BASE, 100),
        (BASE + 8, PAGE),
        (u64::MAX - PAGE + 1, PAGE),
    ];
    for (base, bytes) in bad {
        let opened = ports.1.window_open(0, PortIova(base), bytes);
        assert!(opened.is_err(), "{base:#x} {bytes:#x}");
        assert_eq!(load(&*ports.0.window(0), 0), u64::MAX);
    }
}

pub(super) fn bell_fires_once_until_taken_and_again_after<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    ports.1.doorbell_unmask_only(0b11);
    ports.1.doorbell_take();
    fired(ports.1);
    ports.0.peer_doorbell_ring(0b10);
    assert!(fired(ports.1));
    ports.0.peer_doorbell_ring(0b10);
    assert!(!fired(ports.1), "a bit that is set is silent");
    ports.0.peer_doorbell_ring(0b01);
    assert!(fired(ports.1));
    assert_eq!(ports.1.doorbell_take(), 0b11);
    assert_eq!(ports.1.doorbell_take(), 0);
    ports.0.peer_doorbell_ring(0b10);
    assert!(fired(ports.1));
    assert_eq!(ports.1.doorbell_take(), 0b10);
    assert!(!fired(ports.0), "nobody rang here");
}

pub(super) fn masked_bell_is_silent_and_fires_when_unmasked<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    ports.1.doorbell_unmask_only(0b01);
    ports.1.doorbell_take();
    fired(ports.1);
    ports.0.peer_doorbell_ring(0b10);
    assert!(!fired(ports.1));
    ports.1.doorbell_unmask_only(0b11);
    assert!(fired(ports.1));
    assert_eq!(ports.1.doorbell_take(), 0b10);
}

pub(super) fn store_before_a_bell_is_there_when_the_bell_is_taken<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let ram = Ram::mapped(ports.1, 1, Access::READ_WRITE);
    ports.1.window_open(0, PortIova(BASE), PAGE).unwrap();
    ports.1.doorbell_unmask_only(1);
    ports.1.doorbell_take();
    for round in 1..=1000 {
        let window = ports.0.window(0);
        store(&*window, 0, round);
        if !ports.0.info().doorbell_ordered {
            load(&*window, 0);
        }
        ports.0.peer_doorbell_ring(1);
        assert_eq!(ports.1.doorbell_take(), 1);
        assert_eq!(load(&ram.memory, 0), round);
    }
}

pub(super) fn scratchpads_are_the_owners_and_written_by_the_peer<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let last = ports.0.info().spad_count - 1;
    ports.0.peer_spad_write(0, 7);
    ports.0.peer_spad_write(last, 8);
    ports.1.spad_write(1, 9);
    assert_eq!([0, 1, last].map(|at| ports.1.spad_read(at)), [7, 9, 8]);
    assert_eq!([0, 1, last].map(|at| ports.0.spad_read(at)), [0, 0, 0]);
    ports.0.peer_spad_write(last + 1, 1);
    assert_eq!(ports.1.spad_read(last + 1), u32::MAX);
}

pub(super) fn nothing_crosses_a_link_that_is_down_and_both_ends_are_told<P: NtbPort>(
    ports: (&P, &P),
) {
    link_up(ports);
    let link_bit = 1 << ports.0.info().doorbell_count;
    let ram = Ram::mapped(ports.1, 1, Access::READ_WRITE);
    ports.1.window_open(0, PortIova(BASE), PAGE).unwrap();
    for port in [ports.0, ports.1] {
        port.doorbell_unmask_only(0b11);
        port.doorbell_take();
        fired(port);
    }
    ports.1.link_enable(false);
    for port in [ports.0, ports.1] {
        assert!(!port.link_is_up());
        assert!(fired(port));
        assert_eq!(port.doorbell_take(), link_bit);
    }
    let window = ports.0.window(0);
    store(&*window, 0, 1);
    assert_eq!(load(&*window, 0), u64::MAX);
    ports.0.peer_spad_write(0, 1);
    ports.0.peer_doorbell_ring(1);
    assert_eq!(ports.1.doorbell_take(), 0);
    ports.1.link_enable(true);
    assert_eq!(ports.0.doorbell_take(), link_bit, "up is a change too");
    assert_eq!(load(&ram.memory, 0), 0, "dropped, not delayed");
    assert_eq!(ports.1.spad_read(0), 0);
}
