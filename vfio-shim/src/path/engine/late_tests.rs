//! What comes late does no harm: a function's last writes, and calls on a lease whose id is another's now.
//!
//! Found by the simulator. A device's write that was under way when its maps were taken away arrived
//! after the confirmation of that, in whatever lay behind the window next. And a VMM of a lost lease
//! mapped its memory for another's function, to which a lender that was started again had given the
//! same id.

use super::soft_tests::{Rig, bdf, engine, until};
use super::*;
use crate::model::{Access, Aperture, DmaMap, FunctionIds, Memory, RegionIndex, Span};
use crate::ntb::soft::{
    CHANCE_ONE, DESTINATION, DOORBELL, Fault, FaultPlan, LENGTH, SOURCE, SoftFunction,
};
use crate::vfio::MappedAperture;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};

const BAR: RegionIndex = RegionIndex(0);
const BYTES: u64 = 8192;
const VALUE: u64 = 0x1122_3344_5566_7788;

fn rig() -> Rig {
    let plan = FaultPlan::seeded(1).chance(Fault::DmaHeld(u32::MAX), CHANCE_ONE);
    Rig::with(SoftFunction::new(FunctionIds::default(), 4), plan, 10_000)
}

fn memory() -> (OwnedFd, MappedAperture) {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, BYTES).unwrap();
    let mapped = MappedAperture::memory(fd.as_fd(), 0, BYTES).unwrap();
    (fd, mapped)
}

fn map(function: &BorrowedFunction, fd: &OwnedFd) -> Result<(), MapError> {
    function.address_space().map(&[DmaMap {
        span: all(),
        access: Access::READ_WRITE,
        memory: Memory::Fd(fd.as_fd(), 0),
    }])
}

fn all() -> Span {
    Span::new(0, BYTES).unwrap()
}

/// Copies a value from the first page to the second; the write is held on its way.
fn copy(function: &BorrowedFunction, ram: &MappedAperture) {
    let command = 6u16.to_le_bytes();
    function
        .region_write(RegionIndex::CONFIG, 4, &command)
        .unwrap();
    ram.write_u64(0, VALUE);
    let store = |at, value: &[u8]| function.region_write(BAR, at, value).unwrap();
    store(SOURCE, &0u64.to_le_bytes());
    store(DESTINATION, &4096u64.to_le_bytes());
    store(LENGTH, &8u32.to_le_bytes());
    store(DOORBELL, &1u32.to_le_bytes());
    assert_eq!(ram.read_u64(4096), 0, "it is under way");
}

#[test]
fn last_write_has_arrived_when_a_reset_is_answered() {
    let rig = rig();
    let (_, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    let (fd, ram) = memory();
    map(&function, &fd).unwrap();
    copy(&function, &ram);
    function.reset().unwrap();
    assert_eq!(ram.read_u64(4096), VALUE);
    rig.engines[1].give_back_function(&function).unwrap();
}

#[test]
fn last_write_into_a_slice_does_not_reach_who_has_the_slice_next() {
    let rig = rig();
    let (_, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    let free = || rig.engines[1].status().unwrap().window_free;
    let before = free();
    let (fd, ram) = memory();
    map(&function, &fd).unwrap();
    copy(&function, &ram);
    function.address_space().unmap(all()).unwrap();
    until("the lender confirms", || (free() == before).then_some(()));
    let (next, other) = memory();
    map(&function, &next).unwrap();
    rig.link.settle();
    assert_eq!(other.read_u64(4096), 0);
    rig.engines[1].give_back_function(&function).unwrap();
}

#[test]
fn calls_on_a_lost_lease_do_not_reach_the_one_that_has_its_id_now() {
    let mut rig = Rig::with(
        SoftFunction::new(FunctionIds::default(), 4),
        FaultPlan::default(),
        10_000,
    );
    let (lease, _, old) = rig.engines[1].borrow(bdf(), None).unwrap();
    rig.engines[0].stop();
    until("the lease is lost", || old.lost());
    rig.engines[0] = engine(&rig.link, 0, 10_000);
    rig.lend(bdf(), &rig.function);
    rig.wait_for_pool();
    let (again, _, new) = rig.engines[1].borrow(bdf(), None).unwrap();
    assert_eq!(lease, again, "a lender that forgets its leases counts anew");
    let (fd, _ram) = memory();
    assert!(matches!(map(&old, &fd), Err(MapError::Gone(_))));
    assert!(rig.function.space().maps().is_empty());
    assert!(matches!(
        rig.engines[1].give_back_function(&old),
        Err(CallError::Gone(_))
    ));
    map(&new, &fd).unwrap();
    assert_eq!(rig.function.space().maps().len(), 1);
    rig.engines[1].give_back_function(&new).unwrap();
}
