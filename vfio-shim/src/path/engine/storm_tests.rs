//! Functions that raise interrupts without end, and guests that map without end: each is held to its limit, told, and costs no neighbour.

use super::soft_tests::{Rig, bdf, until};
use super::*;
use crate::model::contract::Driver;
use crate::model::{Access, Aperture, Function, FunctionIds, IrqIndex, Span};
use crate::ntb::soft::function_tests::ENGINE;
use crate::ntb::soft::{FaultPlan, SoftFunction};
use crate::path::borrower::GuestMap;
use crate::path::refusal::RefusalCode;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// Whole rounds of a quiet guest, for a median.
const ROUNDS: usize = 41;

fn rig(limits: Limits) -> Rig {
    let function = SoftFunction::new(FunctionIds::default(), 4);
    Rig::limited(function, (FaultPlan::default(), 10_000), limits)
}

fn interrupts(interrupts_per_second: u32) -> Limits {
    Limits {
        interrupts_per_second,
        ..Limits::default()
    }
}

fn vector(rig: &Rig, bdf: Bdf, vector: usize) -> VectorStatus {
    let lent = rig.engines[0].status().unwrap().lent;
    let lent = lent.iter().find(|lent| lent.offer.entry.bdf == bdf);
    lent.unwrap().vectors[vector]
}

#[test]
fn vector_over_its_rate_is_masked_and_told_and_its_last_raise_comes_when_the_rate_allows() {
    // A bucket of one, and half a second or more until there is another.
    let rig = rig(interrupts(1));
    let (_, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    let driver = Driver::new(&*function, ENGINE);
    driver.start();
    driver.copy(PAGE, 2 * PAGE, 8);
    assert!(driver.interrupted());
    let used = ENGINE.vector.1 as usize;
    let before = vector(&rig, bdf(), used);
    let began = Instant::now();
    until("it is masked for its rate", || {
        let raised = rig.function.raise_irqs(IrqIndex::Msix, ENGINE.vector.1, 1);
        raised.unwrap();
        (vector(&rig, bdf(), used).rate_limits != before.rate_limits).then_some(())
    });
    // Nobody reads its eventfd while it is masked: what it raises there is kept.
    driver.pending();
    driver.ram.write_u64(PAGE, 0x5afe);
    driver.copy(PAGE, 2 * PAGE, 8);
    assert!(driver.interrupted(), "the last raise is not lost");
    assert_eq!(driver.ram.read_u64(2 * PAGE), 0x5afe);
    until("it is unmasked", || {
        (!vector(&rig, bdf(), used).rate_limited).then_some(())
    });
    let told = vector(&rig, bdf(), used);
    let most = 3 + began.elapsed().as_secs();
    assert!(told.bells <= most, "{} of {most}", told.bells);
    assert!(told.raised > told.bells, "{told:?}");
}

/// Ends a storm, also where its test has failed.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How long the middle one of many copies with their interrupts takes.
fn median(driver: &Driver<'_>) -> Duration {
    let round = |round| {
        let began = Instant::now();
        driver.ram.write_u64(PAGE, round);
        driver.copy(PAGE, 2 * PAGE, 8);
        assert!(driver.interrupted(), "round {round}");
        assert_eq!(driver.ram.read_u64(2 * PAGE), round);
        began.elapsed()
    };
    let mut rounds: Vec<_> = (1..=ROUNDS as u64).map(round).collect();
    rounds.sort();
    rounds[ROUNDS / 2]
}

#[test]
fn storm_of_one_function_does_not_keep_the_interrupts_of_another_of_its_port() {
    let rig = rig(interrupts(20_000));
    let quiet = "4a:00.2".parse().unwrap();
    let function = Arc::new(SoftFunction::new(FunctionIds::default(), 4));
    rig.lend(quiet, &function);
    let (_, _, stormy) = rig.engines[1].borrow(bdf(), None).unwrap();
    let (_, _, borrowed) = rig.engines[1].borrow(quiet, None).unwrap();
    let storming = Driver::new(&*stormy, ENGINE);
    storming.start();
    let driver = Driver::new(&*borrowed, ENGINE);
    driver.start();
    let alone = median(&driver);
    let stop = AtomicBool::new(false);
    let used = ENGINE.vector.1 as usize;
    let beside = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let raised = rig.function.raise_irqs(IrqIndex::Msix, ENGINE.vector.1, 1);
                raised.unwrap();
            }
        });
        let _stop = StopOnDrop(&stop);
        until("the storm is held to its rate", || {
            vector(&rig, bdf(), used).rate_limited.then_some(())
        });
        median(&driver)
    });
    // The storm's own thread takes a processor from both, so the bound is wide: without a turn for
    // everybody it would be the storm's length.
    let most = alone * 20 + Duration::from_millis(20);
    assert!(beside < most, "{beside:?} beside a storm, {alone:?} alone");
    assert_eq!(vector(&rig, quiet, used).rate_limits, 0);
    // And the storm has an end for its own guest as well: nothing of it is lost.
    storming.pending();
    storming.ram.write_u64(PAGE, 0xcafe);
    storming.copy(PAGE, 2 * PAGE, 8);
    assert!(storming.interrupted());
    until("all that was raised is read", || {
        let told = vector(&rig, bdf(), used);
        (!told.rate_limited).then_some(())
    });
}

fn memory(bytes: u64) -> Arc<OwnedFd> {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    Arc::new(fd)
}

/// Guest pages, each a mapping of its own.
fn pages(fd: &Arc<OwnedFd>, pages: std::ops::Range<u64>) -> Vec<GuestMap> {
    let page = |page| GuestMap {
        span: Span::new(page * PAGE, PAGE).unwrap(),
        access: Access::READ_WRITE,
        fd: Arc::clone(fd),
        fd_offset: page * PAGE,
    };
    pages.map(page).collect()
}

fn refusal(result: CallReply) -> (u64, String) {
    match result {
        Err(CallError::Refused(refusal)) => {
            assert_eq!(refusal.code, RefusalCode::Limit);
            (refusal.figure, refusal.text)
        }
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn guest_has_as_many_mappings_and_bytes_as_its_port_allows_and_not_one_more() {
    let maps = Limits {
        guest_maps: 3,
        ..Limits::default()
    };
    let bytes = Limits {
        guest_mapped_bytes: 3 * PAGE,
        ..Limits::default()
    };
    for limits in [maps, bytes] {
        let rig = rig(limits);
        let (lease, _) = {
            let (lease, entry, _function) = rig.engines[1].borrow(bdf(), None).unwrap();
            (lease, entry)
        };
        let fd = memory(8 * PAGE);
        let map = |range| rig.engines[1].call(Call::Map(lease, pages(&fd, range)), MAP_WAIT_MS);
        let unmap = |page: u64| {
            let span = Span::new(page * PAGE, PAGE).unwrap();
            rig.engines[1].call(Call::Unmap(lease, span), MAP_WAIT_MS)
        };
        let (figure, _) = refusal(map(0..4));
        let most = match limits.guest_maps {
            3 => 3,
            _ => 3 * PAGE,
        };
        assert_eq!(figure, most);
        map(0..3).unwrap();
        let (_, words) = refusal(map(3..4));
        let mend = match limits.guest_maps {
            3 => "a guest has at most 3 mappings: give it larger pages",
            _ => {
                "the guest would have 16384 bytes of memory mapped, and 12288 are the most it may have: give it less memory"
            }
        };
        assert_eq!(words, mend);
        // What was taken away makes room for as much.
        unmap(1).unwrap();
        map(5..6).unwrap();
        refusal(map(6..7));
    }
}
