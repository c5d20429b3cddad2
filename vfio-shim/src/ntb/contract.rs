//! What every port keeps to, whatever is behind it: generic checks over a fresh pair of joined ports.
//!
//! Each check takes two ports as they are after opening: link off, windows closed, nothing mapped.
//! A port of hardware is told of a bell some time after it was rung, so what must come is waited
//! for, and what must not come is looked for a while.
#![allow(missing_docs, reason = "the names of the checks are sentences")]

use super::NtbPort;
use crate::model::{Access, Aperture, DmaMap, Memory, PortIova, Span};
use crate::vfio::MappedAperture;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const BASE: u64 = 1 << 32;
/// How long what must come may take. Nothing takes this long but a failure.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long what must not come is looked for.
const QUIET: Duration = Duration::from_millis(20);

/// Memory of the host of a port, at `BASE` of the port's container; unmapped on drop.
struct Ram<'a, P: NtbPort> {
    memory: MappedAperture,
    port: &'a P,
    span: Span,
    _fd: OwnedFd,
}

impl<'a, P: NtbPort> Ram<'a, P> {
    fn mapped(port: &'a P, pages: u64, access: Access) -> Self {
        let bytes = pages * PAGE;
        let fd = memfd_create("contract", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        let span = Span::new(BASE, bytes).unwrap();
        let map = DmaMap {
            span,
            access,
            memory: Memory::Fd(fd.as_fd(), 0),
        };
        port.address_space().map(&[map]).unwrap();
        let memory = MappedAperture::memory(fd.as_fd(), 0, bytes).unwrap();
        Self {
            memory,
            port,
            span,
            _fd: fd,
        }
    }
}

impl<P: NtbPort> Drop for Ram<'_, P> {
    fn drop(&mut self) {
        self.port.window_close(0);
        self.port.address_space().unmap(self.span).unwrap();
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

/// What the far host finds in its memory: a load through the window pushes the stores before it.
fn arrived<P: NtbPort>(window: &dyn Aperture, ram: &Ram<'_, P>, offset: u64) -> u64 {
    load(window, 0);
    load(&ram.memory, offset)
}

fn until(what: &str, mut look: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !look() {
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::yield_now();
    }
}

fn link_up<P: NtbPort>(ports: (&P, &P)) {
    ports.0.link_enable(true);
    ports.1.link_enable(true);
    until("link up on both ends", || {
        ports.0.link_is_up() && ports.1.link_is_up()
    });
}

fn event_within(port: &impl NtbPort, time: Duration) -> bool {
    let limit = Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    };
    let event = port.event();
    poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&limit)).unwrap();
    rustix::io::read(port.event(), &mut [0u8; 8]).is_ok()
}

/// Whether the event fires.
fn fires(port: &impl NtbPort) -> bool {
    event_within(port, PATIENCE)
}

/// Whether it does not.
fn is_quiet(port: &impl NtbPort) -> bool {
    !event_within(port, QUIET)
}

/// Takes what came of the link's training, until no more comes.
fn calm(port: &impl NtbPort) {
    loop {
        let taken = port.doorbell_take();
        if is_quiet(port) && taken == 0 {
            return;
        }
    }
}

/// Takes until all of these bits were there; gives all that were.
fn takes(port: &impl NtbPort, bits: u64) -> u64 {
    let mut taken = 0;
    until("bells", || {
        taken |= port.doorbell_take();
        taken & bits == bits
    });
    taken
}

pub fn closed_window_drops_stores_and_reads_ones<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let ram = Ram::mapped(ports.1, 1, Access::READ_WRITE);
    let window = ports.0.window(0);
    store(&*window, 0, 1);
    assert_eq!(load(&*window, 0), u64::MAX);
    ports.1.window_open(0, PortIova(BASE), PAGE).unwrap();
    store(&*window, 8, 2);
    assert_eq!(load(&*window, 8), 2);
    ports.1.window_close(0);
    store(&*window, 16, 3);
    assert_eq!(load(&*window, 8), u64::MAX);
    assert_eq!([0, 8, 16].map(|at| load(&ram.memory, at)), [0, 2, 0]);
}

pub fn open_window_reaches_memory_up_to_its_limit<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let ram = Ram::mapped(ports.1, 3, Access::READ_WRITE);
    ports.1.window_open(0, PortIova(BASE + PAGE), PAGE).unwrap();
    let window = ports.0.window(0);
    assert_eq!(window.len(), ports.0.info().window_bytes[0]);
    store(&*window, 0, 11);
    store(&*window, PAGE - 8, 12);
    store(&*window, PAGE, 13);
    store(&*window, u64::MAX - 7, 14);
    let seen = [PAGE, 2 * PAGE - 8, 2 * PAGE].map(|at| arrived(&*window, &ram, at));
    assert_eq!(seen, [11, 12, 0]);
    assert_eq!(load(&*window, 0), 11);
    assert_eq!(load(&*window, PAGE), u64::MAX);
    assert_eq!(load(&*window, u64::MAX - 7), u64::MAX);
}

pub fn container_of_the_far_port_decides_what_is_reached<P: NtbPort>(ports: (&P, &P)) {
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

pub fn unusable_window_is_refused_and_stays_closed<P: NtbPort>(ports: (&P, &P)) {
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

pub fn bell_fires_once_until_taken_and_again_after<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    ports.1.doorbell_unmask_only(0b11);
    calm(ports.0);
    calm(ports.1);
    ports.0.peer_doorbell_ring(0b10);
    assert!(fires(ports.1));
    ports.0.peer_doorbell_ring(0b10);
    assert!(is_quiet(ports.1), "a bit that is set is silent");
    ports.0.peer_doorbell_ring(0b01);
    assert!(fires(ports.1));
    assert_eq!(ports.1.doorbell_take(), 0b11);
    assert_eq!(ports.1.doorbell_take(), 0);
    ports.0.peer_doorbell_ring(0b10);
    assert!(fires(ports.1));
    assert_eq!(ports.1.doorbell_take(), 0b10);
    assert!(is_quiet(ports.0), "nobody rang here");
}

pub fn masked_bell_is_silent_and_fires_when_unmasked<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    ports.1.doorbell_unmask_only(0b01);
    calm(ports.1);
    ports.0.peer_doorbell_ring(0b10);
    assert!(is_quiet(ports.1));
    ports.1.doorbell_unmask_only(0b11);
    assert!(fires(ports.1));
    assert_eq!(ports.1.doorbell_take(), 0b10);
}

pub fn store_before_a_bell_is_there_when_the_bell_is_taken<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let ram = Ram::mapped(ports.1, 1, Access::READ_WRITE);
    ports.1.window_open(0, PortIova(BASE), PAGE).unwrap();
    ports.1.doorbell_unmask_only(1);
    calm(ports.1);
    let window = ports.0.window(0);
    for round in 1..=1000 {
        store(&*window, 0, round);
        if !ports.0.info().doorbell_ordered {
            load(&*window, 0);
        }
        ports.0.peer_doorbell_ring(1);
        assert_eq!(takes(ports.1, 1), 1);
        assert_eq!(load(&ram.memory, 0), round);
    }
}

pub fn scratchpads_are_the_owners_and_written_by_the_peer<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let last = ports.0.info().spad_count - 1;
    ports.0.peer_spad_write(0, 7);
    ports.0.peer_spad_write(last, 8);
    ports.1.spad_write(1, 9);
    until("scratchpads", || {
        [0, 1, last].map(|at| ports.1.spad_read(at)) == [7, 9, 8]
    });
    assert_eq!([0, 1, last].map(|at| ports.0.spad_read(at)), [0, 0, 0]);
    ports.0.peer_spad_write(last + 1, 1);
    assert_eq!(ports.1.spad_read(last + 1), u32::MAX);
}

pub fn nothing_crosses_a_link_that_is_down_and_both_ends_are_told<P: NtbPort>(ports: (&P, &P)) {
    link_up(ports);
    let link_bit = 1 << ports.0.info().doorbell_count;
    let ram = Ram::mapped(ports.1, 1, Access::READ_WRITE);
    ports.1.window_open(0, PortIova(BASE), PAGE).unwrap();
    for port in [ports.0, ports.1] {
        port.doorbell_unmask_only(0b11);
        calm(port);
    }
    ports.1.link_enable(false);
    for port in [ports.0, ports.1] {
        assert!(fires(port));
        assert!(!port.link_is_up());
        assert_eq!(takes(port, link_bit), link_bit);
    }
    let window = ports.0.window(0);
    store(&*window, 0, 1);
    assert_eq!(load(&*window, 0), u64::MAX);
    ports.0.peer_spad_write(0, 1);
    ports.0.peer_doorbell_ring(1);
    assert!(is_quiet(ports.1));
    assert_eq!(ports.1.doorbell_take(), 0);
    ports.1.link_enable(true);
    assert_eq!(takes(ports.0, link_bit), link_bit, "up is a change too");
    assert_eq!(load(&ram.memory, 0), 0, "dropped, not delayed");
    assert_eq!(ports.1.spad_read(0), 0);
}

/// Names all checks to a macro.
#[macro_export]
macro_rules! port_contract {
    ($with:ident) => {
        $with! {
            closed_window_drops_stores_and_reads_ones
            open_window_reaches_memory_up_to_its_limit
            container_of_the_far_port_decides_what_is_reached
            unusable_window_is_refused_and_stays_closed
            bell_fires_once_until_taken_and_again_after
            masked_bell_is_silent_and_fires_when_unmasked
            store_before_a_bell_is_there_when_the_bell_is_taken
            scratchpads_are_the_owners_and_written_by_the_peer
            nothing_crosses_a_link_that_is_down_and_both_ends_are_told
        }
    };
}
