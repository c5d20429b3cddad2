//! Planned faults of the soft fabric: each can be seen, and what the relay does against them is needed.

use super::function_tests::{ARC, memirq_taken};
use super::*;
use crate::model::{
    Access, AddressSpace, Aperture, DmaMap, Function, FunctionIds, IrqIndex, MapError, Memory,
    PortIova, RegionIndex, Span,
};
use crate::ntb::{NtbPort, contract};
use crate::path::relay::{RelayStep, Scan, VectorRelay};
use crate::path::wire::session_id;
use crate::vfio::MappedAperture;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::Duration;

const PAGE: u64 = 4096;
const RAM_BYTES: u64 = 128 * PAGE;
const BASE: u64 = 1 << 32;
const CONFIG: SoftPortConfig = SoftPortConfig {
    window_bytes: [1 << 20; 2],
};
const LINK_BIT: u64 = 1 << 32;
/// Long enough for a thread that does not wait.
const MOMENT: Duration = Duration::from_millis(50);
const WAIT: Duration = Duration::from_secs(20);

fn holding() -> FaultPlan {
    FaultPlan::seeded(1).chance(Fault::StoreHeld(1000), CHANCE_ONE / 2)
}

/// A link that is up, whose side 0 reaches some memory of side 1.
struct Rig {
    link: SoftLink,
    ram: MappedAperture,
    ports: [Arc<SoftPort>; 2],
}

impl Rig {
    fn new(plan: FaultPlan) -> Self {
        let link = SoftLink::faulty([CONFIG; 2], plan).unwrap();
        let ports = [0, 1].map(|side| link.port(side));
        let fd = memfd_create("faults", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, RAM_BYTES).unwrap();
        let map = DmaMap {
            span: Span::new(BASE, RAM_BYTES).unwrap(),
            access: Access::READ_WRITE,
            memory: Memory::Fd(fd.as_fd(), 0),
        };
        ports[1].address_space().map(&[map]).unwrap();
        ports[1].window_open(0, PortIova(BASE), RAM_BYTES).unwrap();
        for port in &ports {
            port.link_enable(true);
            port.doorbell_unmask_only(0b11);
        }
        for port in &ports {
            port.doorbell_take();
        }
        let ram = MappedAperture::memory(fd.as_fd(), 0, RAM_BYTES).unwrap();
        Self { link, ram, ports }
    }
}

#[test]
fn contract_of_data_before_bell_holds_where_the_store_is_read_back() {
    let link = SoftLink::faulty([CONFIG; 2], holding()).unwrap();
    assert!(!link.port(0).info().doorbell_ordered);
    contract::store_before_a_bell_is_there_when_the_bell_is_taken((&*link.port(0), &*link.port(1)));
    assert!(link.struck()[&Fault::StoreHeld(1000)] > 300);
}

#[test]
fn bell_overtakes_a_held_store_and_a_load_of_any_requester_pushes_it() {
    let rig = Rig::new(FaultPlan::default().nth(Fault::StoreHeld(1000), 1));
    let [near, far] = &rig.ports;
    let window = near.window(0);
    window.write_u64(0, 1);
    window.write_u64(8, 2);
    near.peer_doorbell_ring(1);
    assert_eq!(far.doorbell_take(), 1);
    let seen = |at| rig.ram.read_u64(at);
    assert_eq!(
        [seen(0), seen(8)],
        [0, 0],
        "the second stays behind the first"
    );
    let (device, _) = lent_arc(&rig);
    assert!(device.space().write(16, &3u64.to_le_bytes()));
    assert_eq!(
        [seen(0), seen(16)],
        [0, 3],
        "another requester's store passes"
    );
    near.window(0).read_u64(24);
    assert_eq!([seen(0), seen(8)], [1, 2]);
}

#[test]
fn held_store_arrives_by_itself_or_is_lost_with_the_link() {
    let plan = FaultPlan::default().nth(Fault::StoreHeld(10), 1);
    let rig = Rig::new(plan.clone().nth(Fault::StoreHeld(10), 2));
    rig.ports[0].window(0).write_u64(0, 1);
    for _ in 0..10 {
        assert_eq!(rig.ram.read_u64(0), 0);
        rig.ports[1].doorbell_take();
    }
    assert_eq!(rig.ram.read_u64(0), 1);
    rig.ports[0].window(0).write_u64(0, 2);
    rig.link.cut();
    rig.link.plug();
    rig.link.settle();
    assert_eq!(rig.ram.read_u64(0), 1, "lost, not late");
    let ordered = SoftLink::new([CONFIG; 2]).unwrap();
    assert_eq!(ordered.arm(plan), Err(StoresAreOrdered));
}

#[test]
fn bell_is_lost_or_late_as_planned() {
    let plan = FaultPlan::default();
    let rig = Rig::new(plan.nth(Fault::BellLost, 1).nth(Fault::BellLate(3), 2));
    let [near, far] = &rig.ports;
    near.peer_doorbell_ring(1);
    assert_eq!(far.doorbell_take(), 0);
    near.peer_doorbell_ring(2);
    let taken: Vec<u64> = (0..4).map(|_| far.doorbell_take()).collect();
    assert_eq!(taken, [0, 0, 2, 0]);
    assert_eq!(rig.link.struck().len(), 2);
}

#[test]
fn flap_at_a_store_loses_it_and_tells_both_ends() {
    for (away, up) in [(0, true), (4, false)] {
        let rig = Rig::new(FaultPlan::default().nth(Fault::FlapAtStore(away), 2));
        let window = rig.ports[0].window(0);
        window.write_u64(0, 1);
        window.write_u64(8, 2);
        assert_eq!(rig.ports[0].link_is_up(), up);
        for port in &rig.ports {
            assert_eq!(port.doorbell_take(), LINK_BIT);
        }
        while !rig.ports[0].link_is_up() {}
        window.write_u64(16, 3);
        let seen = [0, 8, 16].map(|at| rig.ram.read_u64(at));
        assert_eq!(seen, [1, 0, 3]);
    }
}

/// A function of the Arc's shape whose DMA goes through side 0's window, and its MSI's eventfd.
fn lent_arc(rig: &Rig) -> (SoftFunction, OwnedFd) {
    let function = SoftFunction::arc_pro(1 << 20).unwrap();
    let map = DmaMap {
        span: Span::new(0, RAM_BYTES).unwrap(),
        access: Access::READ_WRITE,
        memory: Memory::Aperture(rig.ports[0].window(0), 0),
    };
    function.address_space().map(&[map]).unwrap();
    let command = 6u16.to_le_bytes();
    function
        .region_write(RegionIndex::CONFIG, 4, &command)
        .unwrap();
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let trigger = vec![Some(event.try_clone().unwrap())];
    function.set_irqs(IrqIndex::Msi, 0, trigger).unwrap();
    (ARC.prepare)(&rig.ram);
    (function, event)
}

#[test]
fn lost_store_of_a_device_is_missing_and_those_of_the_processors_are_not() {
    let rig = Rig::new(FaultPlan::default().nth(Fault::DmaLost, 1));
    let (function, event) = lent_arc(&rig);
    rig.ports[0].window(0).write_u64(PAGE, 7);
    let seen = [(); 2].map(|()| {
        for (register, value) in (ARC.copy)(PAGE, 2 * PAGE, 8) {
            let written = function.region_write(RegionIndex(0), register, &value);
            written.unwrap();
        }
        let interrupted = rustix::io::read(&event, &mut [0; 8]).is_ok();
        (rig.ram.read_u64(2 * PAGE), interrupted)
    });
    assert_eq!(seen, [(0, true), (7, true)]);
    assert_eq!(rig.link.struck()[&Fault::DmaLost], 1);
}

/// Memirq by way of the relay, 1000 times: how often a scan saw the interrupt's word before the
/// status that the function had written, and how often the bell came before the word.
fn relayed(fence: bool, read_back: bool) -> (usize, usize) {
    const NONCE: u64 = 0xaaaa_bbbb_cccc_dddd;
    const WORD: u64 = 64;
    let rig = Rig::new(holding());
    let [near, far] = &rig.ports;
    let (function, event) = lent_arc(&rig);
    rig.ram.write_u64(0, NONCE);
    let session = session_id(NONCE, 7);
    let window = near.window(0);
    let (mut relay, mut scan) = (VectorRelay::default(), Scan::new(1));
    let (mut early, mut missed) = (0, 0);
    for _ in 0..1000 {
        for (register, value) in (ARC.copy)(PAGE, 2 * PAGE, 8) {
            let written = function.region_write(RegionIndex(0), register, &value);
            written.unwrap();
        }
        rustix::io::read(&event, &mut [0; 8]).unwrap();
        assert_eq!(relay.on_raise(1), RelayStep::Fence);
        let read = match fence {
            true => window.read_u32(0),
            false => NONCE as u32,
        };
        let RelayStep::Store(word) = relay.on_fence(read, NONCE, session) else {
            panic!("no store");
        };
        window.write_u64(WORD, word);
        // A heartbeat's scan may come at any time, so also now.
        let mut raised = scan.scan(|_| rig.ram.read_u64(WORD), session);
        early += usize::from(!raised.is_empty() && !memirq_taken(&rig.ram));
        if read_back {
            window.read_u64(WORD);
        }
        near.peer_doorbell_ring(1);
        assert_eq!(far.doorbell_take(), 1);
        raised.extend(scan.scan(|_| rig.ram.read_u64(WORD), session));
        missed += usize::from(raised.is_empty());
        // What is late arrives before the next round.
        rig.link.settle();
        scan.scan(|_| rig.ram.read_u64(WORD), session);
        memirq_taken(&rig.ram);
    }
    (early, missed)
}

#[test]
fn relay_with_fence_and_read_back_has_memirq_before_the_interrupt_and_the_word_before_the_bell() {
    assert_eq!(relayed(true, true), (0, 0));
}

#[test]
fn relay_without_the_read_back_is_seen_to_ring_before_its_word() {
    let (early, missed) = relayed(true, false);
    assert!(early == 0 && missed > 300, "{early} {missed}");
}

#[test]
fn relay_without_the_fence_is_seen_to_interrupt_before_memirq() {
    let (early, missed) = relayed(false, true);
    assert!(early > 100 && missed == 0, "{early} {missed}");
}

#[test]
fn frozen_host_does_nothing_until_thawed_and_its_memory_is_served() {
    let rig = Rig::new(FaultPlan::default());
    let [near, far] = rig.ports.clone();
    rig.link.host(0).freeze();
    let (sender, done) = mpsc::channel();
    let frozen = std::thread::spawn(move || {
        near.window(0).write_u64(0, 5);
        near.peer_doorbell_ring(1);
        sender.send(()).unwrap();
    });
    assert!(done.recv_timeout(MOMENT).is_err());
    assert_eq!((rig.ram.read_u64(0), far.doorbell_take()), (0, 0));
    assert!(far.link_is_up());
    rig.link.host(0).thaw();
    done.recv_timeout(WAIT).unwrap();
    frozen.join().unwrap();
    assert_eq!((rig.ram.read_u64(0), far.doorbell_take()), (5, 1));
}

#[test]
fn device_of_a_frozen_host_goes_on() {
    let rig = Rig::new(FaultPlan::default());
    let function = SoftFunction::new(FunctionIds::default(), 1);
    let map = DmaMap {
        span: Span::new(0, PAGE).unwrap(),
        access: Access::READ_WRITE,
        memory: Memory::Aperture(rig.ports[0].window(0), 0),
    };
    function.address_space().map(&[map]).unwrap();
    rig.link.host(0).freeze();
    assert!(function.space().write(8, &7u64.to_le_bytes()));
    assert_eq!(rig.ram.read_u64(8), 7);
}

#[test]
fn stopped_host_takes_its_links_down_and_starts_as_after_a_reset() {
    let rig = Rig::new(FaultPlan::default());
    let [near, far] = &rig.ports;
    rig.link.host(1).stop();
    assert!(!near.link_is_up());
    assert_eq!(near.doorbell_take(), LINK_BIT);
    far.link_enable(true);
    near.window(0).write_u64(0, 1);
    assert!(!near.link_is_up(), "without power nothing trains");
    rig.link.host(1).start();
    assert!(!near.link_is_up());
    far.link_enable(true);
    assert!(near.link_is_up());
    assert_eq!(near.window(0).read_u64(0), u64::MAX, "closed");
}

#[test]
fn planned_map_and_unmap_fail_and_change_nothing() {
    let space = SoftSpace::new();
    let plan = FaultPlan::default().nth(Fault::MapFails, 1);
    space.arm(plan.nth(Fault::UnmapFails, 1));
    let fd = memfd_create("faults", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, PAGE).unwrap();
    let span = Span::new(0, PAGE).unwrap();
    let map = DmaMap {
        span,
        access: Access::READ,
        memory: Memory::Fd(fd.as_fd(), 0),
    };
    let maps = [map];
    assert!(matches!(
        space.map(&maps),
        Err(MapError::Kernel { act: "map", .. })
    ));
    assert_eq!(space.maps(), []);
    space.map(&maps).unwrap();
    assert!(matches!(
        space.unmap(span),
        Err(MapError::Kernel { act: "unmap", .. })
    ));
    assert_eq!(space.maps().len(), 1);
    assert_eq!(space.unmap(span).unwrap(), PAGE);
    assert_eq!(space.struck().len(), 2);
}
