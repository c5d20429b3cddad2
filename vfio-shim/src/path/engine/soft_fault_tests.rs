//! Whole paths over a soft fabric that breaks: data before its interrupt, no interrupt lost, nothing left behind.

use super::soft_tests::{Rig, bdf, until};
use super::*;
use crate::model::contract::{Driver, Recipe};
use crate::model::{Access, Aperture, DmaMap, FunctionIds, IrqIndex, Memory, RegionIndex, Span};
use crate::ntb::soft::function_tests::{ARC, ENGINE, memirq_taken};
use crate::ntb::soft::{CHANCE_ONE, Fault, FaultPlan, SoftFunction, SoftPf, VfShape};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};

const VECTORS: u32 = 4;
const LOST_AFTER_MS: u64 = 10_000;
const BAR: RegionIndex = RegionIndex(0);

fn engine() -> SoftFunction {
    SoftFunction::new(FunctionIds::default(), VECTORS as u16)
}

fn arc() -> SoftFunction {
    SoftFunction::arc_pro(16 << 20).unwrap()
}

fn holding() -> FaultPlan {
    FaultPlan::seeded(3).chance(Fault::StoreHeld(60), CHANCE_ONE / 2)
}

fn late_dma() -> FaultPlan {
    FaultPlan::seeded(4).chance(Fault::DmaHeld(1000), CHANCE_ONE / 2)
}

fn borrow(rig: &Rig) -> (LeaseId, Arc<BorrowedFunction>) {
    let (lease, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    (lease, function)
}

/// Borrows, copies so many times with a look at the data at each interrupt, gives back.
fn copies(rig: &Rig, recipe: Recipe, rounds: u64, look: fn(&Driver<'_>)) {
    let (lease, function) = borrow(rig);
    let driver = Driver::new(&*function, recipe);
    driver.start();
    for round in 1..=rounds {
        driver.ram.write_u64(4096, round);
        driver.copy(4096, 8192, 8);
        assert!(driver.interrupted(), "round {round}");
        look(&driver);
        assert_eq!(driver.ram.read_u64(8192), round);
    }
    drop(driver);
    rig.engines[1].give_back(lease).unwrap();
}

#[test]
fn memirq_is_in_guest_memory_before_its_interrupt_where_bells_overtake_stores() {
    let rig = Rig::with(arc(), holding(), LOST_AFTER_MS);
    assert!(!rig.link.port(0).info().doorbell_ordered);
    copies(&rig, ARC, 300, |driver| assert!(memirq_taken(&driver.ram)));
    assert!(rig.link.struck()[&Fault::StoreHeld(60)] > 300);
}

/// What the relay's fence is for: the port promises order for the processors' stores alone.
#[test]
fn memirq_is_in_guest_memory_before_its_interrupt_where_dma_is_late() {
    let rig = Rig::with(arc(), late_dma(), LOST_AFTER_MS);
    assert!(rig.link.port(0).info().doorbell_ordered);
    copies(&rig, ARC, 300, |driver| assert!(memirq_taken(&driver.ram)));
    assert!(rig.link.struck()[&Fault::DmaHeld(1000)] > 150);
}

#[test]
fn copy_is_in_guest_memory_before_its_interrupt_where_stores_or_dma_are_late() {
    for plan in [holding(), late_dma()] {
        let rig = Rig::with(engine(), plan, LOST_AFTER_MS);
        copies(&rig, ENGINE, 300, |_| {});
    }
}

/// The eventfds of all vectors of a borrowed engine.
struct Storm<'a> {
    rig: &'a Rig,
    events: Vec<OwnedFd>,
}

impl<'a> Storm<'a> {
    fn new(rig: &'a Rig, function: &BorrowedFunction) -> Self {
        let event = |_| eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let events: Vec<OwnedFd> = (0..VECTORS).map(event).collect();
        let triggers = events.iter().map(|e| Some(e.try_clone().unwrap()));
        let set = function.set_irqs(IrqIndex::Msix, 0, triggers.collect());
        set.unwrap();
        // The lender may arm its end after the reply.
        until("all vectors are armed", || {
            (rig.function.triggers() == VECTORS as usize).then_some(())
        });
        let storm = Self { rig, events };
        storm.raise();
        storm.events.iter().for_each(while_signalled);
        storm
    }

    fn raise(&self) {
        let raised = self.rig.function.raise_irqs(IrqIndex::Msix, 0, VECTORS);
        raised.unwrap();
    }

    /// One raise of each vector, and one signal of each.
    fn round(&self) {
        self.raise();
        for (vector, event) in self.events.iter().enumerate() {
            assert!(signalled(event, 20_000), "vector {vector}");
        }
    }
}

fn signalled(event: &OwnedFd, ms: i64) -> bool {
    let wait = Timespec {
        tv_sec: ms / 1000,
        tv_nsec: (ms % 1000 * 1_000_000) as _,
    };
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&wait)).unwrap();
    rustix::io::read(event, &mut [0u8; 8]).is_ok()
}

/// Takes signals until none comes for many heartbeats: then none is under way.
fn while_signalled(event: &OwnedFd) {
    while signalled(event, 200) {}
}

fn storm(rig: &Rig, lost: u32, rounds: u32) {
    let (lease, function) = borrow(rig);
    let driver = Driver::new(&*function, ENGINE);
    driver.start();
    let storm = Storm::new(rig, &function);
    let plan = FaultPlan::seeded(5).chance(Fault::BellLost, lost);
    rig.link.arm(plan).unwrap();
    // Each raise is answered by one signal, so none can stand in for another.
    (0..rounds).for_each(|_| storm.round());
    // And a burst: at least the last raise is seen.
    (0..1000).for_each(|_| storm.raise());
    for event in &storm.events {
        assert!(signalled(event, 20_000));
        while_signalled(event);
    }
    storm.round();
    assert!(rig.link.struck()[&Fault::BellLost] > u64::from(rounds / 2));
    rig.link.arm(FaultPlan::default()).unwrap();
    drop(driver);
    rig.engines[1].give_back(lease).unwrap();
}

#[test]
fn no_interrupt_is_lost_when_every_bell_is() {
    let rig = Rig::with(engine(), FaultPlan::default(), LOST_AFTER_MS);
    storm(&rig, CHANCE_ONE, 25);
}

#[test]
fn no_interrupt_of_a_storm_is_lost_when_half_of_the_bells_are() {
    let rig = Rig::with(engine(), FaultPlan::default(), LOST_AFTER_MS);
    storm(&rig, CHANCE_ONE / 2, 200);
}

/// The lease is lost, both hosts are as before, and a new borrow works.
fn lost_and_found(rig: &Rig, function: &BorrowedFunction, before: [usize; 3]) {
    until("the lease is lost", || function.lost());
    until("both hosts are as before", || {
        (rig.maps() == before && rig.function.triggers() == 0).then_some(())
    });
}

#[test]
fn flap_at_a_store_ends_the_lease_and_leaves_nothing() {
    let rig = Rig::with(engine(), FaultPlan::default(), LOST_AFTER_MS);
    let before = rig.maps();
    for away in [0, 20] {
        let (_, function) = borrow(&rig);
        let driver = Driver::new(&*function, ENGINE);
        driver.start();
        let plan = FaultPlan::default().nth(Fault::FlapAtStore(away), 3);
        rig.link.arm(plan).unwrap();
        driver.copy(4096, 8192, 8);
        lost_and_found(&rig, &function, before);
        rig.link.arm(FaultPlan::default()).unwrap();
        drop(driver);
        drop(function);
        rig.wait_for_pool();
    }
    copies(&rig, ENGINE, 3, |_| {});
}

#[test]
fn frozen_lender_loses_the_lease_and_undoes_it_when_thawed() {
    let rig = Rig::with(engine(), FaultPlan::default(), 300);
    let before = rig.maps();
    let (_, function) = borrow(&rig);
    let driver = Driver::new(&*function, ENGINE);
    driver.start();
    rig.link.host(0).freeze();
    until("the borrower gives the lender up", || function.lost());
    let mut word = [0; 4];
    function.region_read(BAR, 0, &mut word).unwrap();
    assert_eq!(word, [0xff; 4]);
    assert_ne!(rig.maps()[2], 0, "the lender has not undone it yet");
    rig.link.host(0).thaw();
    lost_and_found(&rig, &function, before);
    drop(driver);
    drop(function);
    rig.wait_for_pool();
    copies(&rig, ENGINE, 3, |_| {});
}

#[test]
fn map_that_fails_on_either_host_is_told_and_leaves_nothing() {
    let rig = Rig::with(engine(), FaultPlan::default(), LOST_AFTER_MS);
    let before = rig.maps();
    let spaces = [
        rig.link.port(1).space().clone(),
        rig.function.space().clone(),
    ];
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, 4096).unwrap();
    let map = DmaMap {
        span: Span::new(0, 4096).unwrap(),
        access: Access::READ_WRITE,
        memory: Memory::Fd(fd.as_fd(), 0),
    };
    let maps = [map];
    for space in spaces {
        let (lease, function) = borrow(&rig);
        let open = rig.maps();
        space.arm(FaultPlan::default().nth(Fault::MapFails, 1));
        assert!(function.address_space().map(&maps).is_err());
        assert_eq!(space.struck()[&Fault::MapFails], 1);
        until("what was half mapped is undone", || {
            (rig.maps() == open).then_some(())
        });
        function.address_space().map(&maps).unwrap();
        drop(function);
        rig.engines[1].give_back(lease).unwrap();
        until("both hosts are as before", || {
            (rig.maps() == before).then_some(())
        });
        rig.wait_for_pool();
    }
    copies(&rig, ENGINE, 3, |_| {});
}

#[test]
fn function_that_does_not_reset_is_lent_to_nobody_else() {
    let rig = Rig::with(engine(), FaultPlan::default(), LOST_AFTER_MS);
    let (lease, function) = borrow(&rig);
    drop(function);
    rig.function
        .arm(FaultPlan::default().nth(Fault::ResetFails, 1));
    let _ = rig.engines[1].give_back(lease);
    until("it is in quarantine", || {
        let status = rig.engines[0].status()?;
        let state = &status.lent.first()?.offer.state;
        matches!(state, OfferState::Quarantine(_)).then_some(())
    });
    assert!(rig.engines[1].borrow(bdf(), None).is_err());
}

#[test]
fn five_functions_of_one_pf_are_borrowed_at_once_and_share_nothing() {
    let rig = Rig::with(engine(), FaultPlan::default(), LOST_AFTER_MS);
    let shape = VfShape::ArcPro {
        vram_bytes: 256 << 20,
    };
    let host = Arc::clone(rig.link.host(0));
    let pf = SoftPf::new("5a:00.0".parse().unwrap(), shape, host).unwrap();
    pf.set_num_vfs(5).unwrap();
    let vfs = pf.vfs();
    vfs.iter().for_each(|(bdf, vf)| rig.lend(*bdf, vf));
    until("all are in the borrower's list", || {
        (rig.engines[1].list().ok()?.len() == 6).then_some(())
    });
    let borrow = |(bdf, _): &(Bdf, _)| rig.engines[1].borrow(*bdf, None).unwrap();
    let borrowed: Vec<_> = vfs.iter().map(borrow).collect();
    let functions = borrowed.iter().map(|(_, _, function)| &**function);
    let drivers: Vec<_> = functions.map(|f| Driver::new(f, ARC)).collect();
    for (number, driver) in (1..).zip(&drivers) {
        driver.start();
        let vram = driver.function.bar(RegionIndex(2)).unwrap();
        vram.write_u64((256 << 20) - 8, number);
        driver.ram.write_u64(4096, number);
    }
    for (number, driver) in (1..).zip(&drivers) {
        driver.copy(4096, 8192, 8);
        assert!(driver.interrupted() && memirq_taken(&driver.ram));
        let vram = driver.function.bar(RegionIndex(2)).unwrap();
        let seen = [driver.ram.read_u64(8192), vram.read_u64((256 << 20) - 8)];
        assert_eq!(seen, [number; 2]);
    }
    drop(drivers);
    for ((lease, _, _), (_, vf)) in borrowed.iter().zip(&vfs) {
        rig.engines[1].give_back(*lease).unwrap();
        let vram = vf.bar(RegionIndex(2)).unwrap();
        assert_eq!(vram.read_u64((256 << 20) - 8), 0, "cleared");
        assert_eq!(vf.triggers() + vf.space().maps().len(), 0);
    }
}

mod contract_over_the_path {
    use super::*;
    use crate::model::contract::{self, function_contract};

    macro_rules! engine_tests {
        ($($name:ident)*) => { mod engine_is_lent { use super::*; $(#[test] fn $name() {
            let rig = Rig::with(engine(), FaultPlan::default(), LOST_AFTER_MS);
            contract::$name(&Driver::new(&*borrow(&rig).1, ENGINE));
        })* } };
    }
    macro_rules! arc_tests {
        ($($name:ident)*) => { mod arc_is_lent { use super::*; $(#[test] fn $name() {
            let rig = Rig::with(arc(), FaultPlan::default(), LOST_AFTER_MS);
            contract::$name(&Driver::new(&*borrow(&rig).1, ARC));
        })* } };
    }
    macro_rules! space_tests {
        ($($name:ident)*) => { mod guest_memory { use super::*; $(#[test] fn $name() {
            let rig = Rig::with(engine(), FaultPlan::default(), LOST_AFTER_MS);
            crate::model::space_contract::$name(borrow(&rig).1.address_space());
        })* } };
    }
    crate::space_contract! { space_tests }
    function_contract! { engine_tests }
    function_contract! { arc_tests }
}
