//! Whole paths in one process: two engines over the soft fabric, one lending a software function to the other.

use super::*;
use crate::model::{Access, Aperture, DmaMap, FunctionIds, IrqIndex, Memory, RegionIndex, Span};
use crate::ntb::soft::{
    DESTINATION, DOORBELL, Fault, FaultPlan, IDENT, IDENT_VALUE, LENGTH, SCRATCH, SOURCE, STATUS,
    STATUS_DONE, SoftFault, SoftFunction, SoftLink, SoftPortConfig, SoftSpace, VECTOR,
};
use crate::path::message::PoolState;
use crate::path::wire::ScratchpadSet;
use crate::vfio::MappedAperture;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// Room for the large BARs of several functions: numbers only, until something is mapped.
const WINDOW_BYTES: u64 = 4 << 30;
const WINDOW_BASE: PortIova = PortIova(1 << 32);
const RAM_BYTES: u64 = 1 << 21;
const BAR: RegionIndex = RegionIndex(0);
const VECTOR_USED: u32 = 2;
/// How long a condition is waited for. Nothing takes this long but a failure.
const WAIT: Duration = Duration::from_secs(20);

/// Looks until it is so.
pub(super) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + WAIT;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn bdf() -> Bdf {
    "4a:00.1".parse().unwrap()
}

pub(super) fn engine(link: &SoftLink, side: u8, lost_after_ms: u64) -> Arc<Engine> {
    limited(link, side, lost_after_ms, Limits::default())
}

fn limited(link: &SoftLink, side: u8, lost_after_ms: u64, limits: Limits) -> Arc<Engine> {
    let config = EngineConfig {
        name: format!("soft{side}"),
        node: u16::from(side) + 1,
        window_base: WINDOW_BASE,
        window_bytes: WINDOW_BYTES,
        heartbeat_ms: 10,
        lost_after_ms,
        limits,
    };
    Engine::start(link.port(usize::from(side)), config).unwrap()
}

/// Host 0 lends to host 1.
pub(super) struct Rig {
    pub(super) engines: [Arc<Engine>; 2],
    pub(super) function: Arc<SoftFunction>,
    pub(super) link: SoftLink,
}

impl Rig {
    fn new() -> Self {
        let ids = FunctionIds {
            vendor: 0x5b1e,
            device: 1,
            ..FunctionIds::default()
        };
        Self::with(SoftFunction::new(ids, 4), FaultPlan::default(), 10_000)
    }

    /// Lends this function over a fabric with these faults.
    pub(super) fn with(function: SoftFunction, plan: FaultPlan, lost_after_ms: u64) -> Self {
        Self::limited(function, (plan, lost_after_ms), Limits::default())
    }

    /// The same between hosts that hold their tenants to these limits.
    pub(super) fn limited(
        function: SoftFunction,
        (plan, lost_after_ms): (FaultPlan, u64),
        limits: Limits,
    ) -> Self {
        let config = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link = SoftLink::faulty([config; 2], plan).unwrap();
        let engines = [0, 1].map(|side| self::limited(&link, side, lost_after_ms, limits));
        let rig = Self {
            engines,
            function: Arc::new(function),
            link,
        };
        rig.lend(bdf(), &rig.function);
        rig.wait_for_pool();
        rig
    }

    pub(super) fn lend(&self, bdf: Bdf, function: &Arc<SoftFunction>) {
        let info = function.info();
        let entry = PoolEntry {
            bdf,
            ids: info.ids,
            state: PoolState::Available,
            irq_count: info.irqs.iter().map(|irq| irq.count).max().unwrap_or(0),
            bar_bytes: info.regions[..6].iter().map(|region| region.size).sum(),
            serial: 0,
        };
        let function = Arc::clone(function) as Arc<dyn Function>;
        self.engines[0].offer(entry, function).unwrap();
    }

    pub(super) fn wait_for_pool(&self) {
        until("the function shows in the borrower's list", || {
            let entries = self.engines[1].list().ok()?;
            (entries.first()?.state == PoolState::Available).then_some(())
        });
    }

    fn spaces(&self) -> [Arc<SoftSpace>; 3] {
        [
            Arc::clone(self.link.port(0).space()),
            Arc::clone(self.link.port(1).space()),
            Arc::clone(self.function.space()),
        ]
    }

    /// What is mapped at all: in a host without a path that is its mailbox.
    pub(super) fn maps(&self) -> [usize; 3] {
        self.spaces().map(|space| space.maps().len())
    }

    fn guest(&self) -> Guest {
        let (lease, entry, function) = self.engines[1].borrow(bdf(), None).unwrap();
        assert_eq!(entry.bdf, bdf());
        Guest::new(lease, function)
    }
}

/// A guest that drives the borrowed function.
struct Guest {
    lease: LeaseId,
    function: Arc<BorrowedFunction>,
    ram: MappedAperture,
    event: OwnedFd,
}

impl Guest {
    fn new(lease: LeaseId, function: Arc<BorrowedFunction>) -> Self {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, RAM_BYTES).unwrap();
        let map = DmaMap {
            span: Span::new(0, RAM_BYTES).unwrap(),
            access: Access::READ_WRITE,
            memory: Memory::Fd(fd.as_fd(), 0),
        };
        function.address_space().map(&[map]).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let guest = Self {
            lease,
            function,
            ram: MappedAperture::memory(fd.as_fd(), 0, RAM_BYTES).unwrap(),
            event,
        };
        guest.drive();
        guest
    }

    /// What a driver does first.
    fn drive(&self) {
        self.function
            .region_write(RegionIndex::CONFIG, 4, &6u16.to_le_bytes())
            .unwrap();
        let trigger = Some(self.event.try_clone().unwrap());
        self.function
            .set_irqs(IrqIndex::Msix, VECTOR_USED, vec![trigger])
            .unwrap();
    }

    fn register(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.function.region_read(BAR, register, &mut word).unwrap();
        u32::from_le_bytes(word)
    }

    fn store(&self, register: u64, value: &[u8]) {
        self.function.region_write(BAR, register, value).unwrap();
    }

    fn copy(&self, source: u64, destination: u64, length: u32) {
        self.store(SOURCE, &source.to_le_bytes());
        self.store(DESTINATION, &destination.to_le_bytes());
        self.store(LENGTH, &length.to_le_bytes());
        self.store(VECTOR, &VECTOR_USED.to_le_bytes());
        self.store(DOORBELL, &1u32.to_le_bytes());
    }

    fn interrupted(&self) -> bool {
        let mut fds = [PollFd::new(&self.event, PollFlags::IN)];
        let wait = Timespec {
            tv_sec: WAIT.as_secs() as i64,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&wait)).unwrap();
        rustix::io::read(&self.event, &mut [0u8; 8]).is_ok()
    }
}

#[test]
fn borrowed_function_copies_guest_memory_and_interrupts_the_guest() {
    let rig = Rig::new();
    let guest = rig.guest();
    assert_eq!(guest.register(IDENT), IDENT_VALUE);
    for round in 1..=50u8 {
        guest.ram.write(0, &[round; 3000]);
        guest.copy(0, PAGE + 17, 3000);
        assert!(guest.interrupted(), "round {round}");
        let mut copied = [0; 3000];
        guest.ram.read(PAGE + 17, &mut copied);
        assert_eq!(copied, [round; 3000], "the interrupt came behind the data");
    }
    assert_eq!(guest.register(STATUS), STATUS_DONE);
    let lent = rig.engines[0].status().unwrap().lent;
    let vector = lent[0].vectors[VECTOR_USED as usize];
    assert_eq!(vector.raised, 50);
    assert!(vector.bells <= vector.raised);
    rig.engines[1].give_back(guest.lease).unwrap();
}

#[test]
fn dma_outside_of_guest_memory_faults_at_the_lenders_iommu_for_the_function() {
    let rig = Rig::new();
    let guest = rig.guest();
    let space = rig.function.space();
    // Past the guest's RAM, interrupts, and where both hosts' ports have their mailboxes.
    for (count, address) in [RAM_BYTES, 0xfee0_0000, WINDOW_BASE.0]
        .into_iter()
        .enumerate()
    {
        guest.copy(0, address, 8);
        assert!(guest.interrupted());
        assert_eq!(space.fault_count(), count as u64 + 1);
        let fault = SoftFault {
            address,
            write: true,
        };
        assert_eq!(space.faults().last(), Some(&fault));
    }
    assert_eq!(rig.link.port(1).space().fault_count(), 0);
    rig.engines[1].give_back(guest.lease).unwrap();
}

#[test]
fn only_raise_before_a_reset_does_not_hide_the_first_one_after_it() {
    let rig = Rig::new();
    let guest = rig.guest();
    for round in 0..3 {
        guest.copy(0, PAGE, 8);
        assert!(guest.interrupted(), "round {round}");
        guest.function.reset().unwrap();
        guest.drive();
    }
    rig.engines[1].give_back(guest.lease).unwrap();
}

#[test]
fn given_back_function_is_reset_and_nothing_of_the_path_is_left() {
    let rig = Rig::new();
    let before = rig.maps();
    assert_eq!(before, [1, 1, 0], "the mailboxes");
    for _ in 0..3 {
        let guest = rig.guest();
        guest.store(SCRATCH, &[1; 8]);
        guest.copy(0, PAGE, 8);
        assert!(guest.interrupted());
        let resets = rig.function.resets();
        rig.engines[1].give_back(guest.lease).unwrap();
        assert!(rig.function.resets() > resets);
        assert_eq!(rig.function.triggers(), 0);
        assert_eq!(rig.maps(), before);
        rig.wait_for_pool();
    }
}

#[test]
fn pulled_cable_loses_the_lease_undoes_both_hosts_and_a_new_borrow_works() {
    let rig = Rig::new();
    let before = rig.maps();
    let guest = rig.guest();
    rig.link.cut();
    until("the lease is lost", || guest.function.lost());
    assert_eq!(guest.register(IDENT), u32::MAX, "ones, and no error");
    until("both hosts are as before", || {
        (rig.maps() == before && rig.function.triggers() == 0).then_some(())
    });
    drop(guest);
    rig.link.plug();
    rig.wait_for_pool();
    let again = rig.guest();
    again.copy(0, PAGE, 8);
    assert!(again.interrupted());
    rig.engines[1].give_back(again.lease).unwrap();
}

#[test]
fn function_that_goes_on_when_the_link_is_back_meets_a_shut_window_and_not_the_borrowers_iommu() {
    let rig = Rig::new();
    let guest = rig.guest();
    // The lender's software does not get to stop its function.
    rig.link.host(0).freeze();
    rig.link.cut();
    until("the lease is lost", || guest.function.lost());
    until("its memory is unpinned", || {
        (rig.maps()[1] == 1).then_some(())
    });
    rig.link.plug();
    until("the borrower has its mailbox open", || {
        let status = rig.engines[1].status().unwrap();
        (status.link == "agreeing with the peer").then_some(())
    });
    let store = |register, value: &[u8]| rig.function.region_write(BAR, register, value).unwrap();
    store(SOURCE, &0u64.to_le_bytes());
    store(DESTINATION, &PAGE.to_le_bytes());
    store(LENGTH, &64u32.to_le_bytes());
    store(DOORBELL, &1u32.to_le_bytes());
    until("it has copied", || {
        let mut status = [0; 4];
        rig.function.region_read(BAR, STATUS, &mut status).unwrap();
        (u32::from_le_bytes(status) == STATUS_DONE).then_some(())
    });
    let faults = rig.link.port(1).space().fault_count();
    rig.link.host(0).thaw();
    rig.wait_for_pool();
    assert_eq!(faults, 0);
}

#[test]
fn cable_out_and_in_again_at_once_still_ends_the_session() {
    let rig = Rig::new();
    let guest = rig.guest();
    rig.link.cut();
    rig.link.plug();
    until("the lease is lost", || guest.function.lost());
    drop(guest);
    rig.wait_for_pool();
}

#[test]
fn bars_of_a_lease_given_back_read_ones_and_reach_no_slice() {
    let rig = Rig::new();
    let guest = rig.guest();
    rig.engines[1].give_back(guest.lease).unwrap();
    assert_eq!(guest.register(IDENT), u32::MAX);
    guest.store(SCRATCH, &[1; 8]);
    assert_eq!(rig.link.port(0).space().fault_count(), 0);
}

#[test]
fn lease_that_comes_when_its_caller_has_gone_goes_back() {
    let rig = Rig::new();
    let call = rig.engines[1].call(Call::Borrow(bdf(), None), 0);
    assert!(matches!(call, Err(CallError::Timeout(0))));
    until("the lease is given back", || {
        let lent = rig.engines[0].status()?.lent;
        (lent[0].offer.last_end.as_deref() == Some("returned")).then_some(())
    });
    rig.wait_for_pool();
}

#[test]
fn masks_end_with_a_reset_and_with_the_vectors_at_both_ends() {
    let rig = Rig::new();
    let guest = rig.guest();
    let mask = || {
        let function = &guest.function;
        function.mask_irqs(IrqIndex::Msix, VECTOR_USED, 1, true)
    };
    mask().unwrap();
    guest.function.reset().unwrap();
    guest.drive();
    guest.copy(0, PAGE, 8);
    assert!(guest.interrupted(), "after a reset");
    mask().unwrap();
    guest.function.disable_irqs(IrqIndex::Msix).unwrap();
    guest.drive();
    guest.copy(0, PAGE, 8);
    assert!(guest.interrupted(), "after the vectors were disabled");
    rig.engines[1].give_back(guest.lease).unwrap();
}

#[test]
fn masks_end_with_the_vectors_also_where_the_lender_could_not_arm_them() {
    let rig = Rig::new();
    let guest = rig.guest();
    rig.function
        .arm(FaultPlan::default().nth(Fault::SetIrqsFails, 1));
    assert!(guest.function.reset().is_err(), "armed anew");
    let function = &guest.function;
    function
        .mask_irqs(IrqIndex::Msix, VECTOR_USED, 1, true)
        .unwrap();
    function.disable_irqs(IrqIndex::Msix).unwrap();
    guest.drive();
    guest.copy(0, PAGE, 8);
    assert!(guest.interrupted());
    rig.engines[1].give_back(guest.lease).unwrap();
}

#[test]
fn interrupts_come_behind_a_reset_that_failed_with_the_triggers_of_before_it_and_with_new_ones() {
    for anew in [false, true] {
        let rig = Rig::new();
        let guest = rig.guest();
        rig.function
            .arm(FaultPlan::default().nth(Fault::ResetFails, 1));
        assert!(guest.function.reset().is_err());
        if anew {
            guest.drive();
        }
        rig.function
            .raise_irqs(IrqIndex::Msix, VECTOR_USED, 1)
            .unwrap();
        assert!(guest.interrupted(), "triggers set anew: {anew}");
        rig.engines[1].give_back(guest.lease).unwrap();
    }
}

#[test]
fn what_a_mask_held_back_does_not_outlive_a_reset() {
    let rig = Rig::new();
    let guest = rig.guest();
    let masked = |masked| {
        let function = &guest.function;
        function.mask_irqs(IrqIndex::Msix, VECTOR_USED, 1, masked)
    };
    masked(true).unwrap();
    guest
        .function
        .raise_irqs(IrqIndex::Msix, VECTOR_USED, 1)
        .unwrap();
    guest.function.reset().unwrap();
    masked(false).unwrap();
    // Vectors are signalled in their order: when a later one's has come, nothing is left of this.
    let later = Some(guest.event.try_clone().unwrap());
    let function = &guest.function;
    function
        .set_irqs(IrqIndex::Msix, VECTOR_USED + 1, vec![later])
        .unwrap();
    function
        .raise_irqs(IrqIndex::Msix, VECTOR_USED + 1, 1)
        .unwrap();
    until("the later vector's signal", || {
        (function.signals()[VECTOR_USED as usize + 1] == 1).then_some(())
    });
    assert_eq!(function.signals()[VECTOR_USED as usize], 0);
    rig.engines[1].give_back(guest.lease).unwrap();
}

#[test]
fn peer_with_another_protocol_version_is_told_in_words_with_both_ranges() {
    let config = SoftPortConfig {
        window_bytes: [WINDOW_BYTES; 2],
    };
    let link = SoftLink::new([config; 2]).unwrap();
    let engine = engine(&link, 0, 10_000);
    let peer = link.port(1);
    peer.link_enable(true);
    let foreign = ScratchpadSet {
        nonce: 0x1234_5678,
        echo: 0,
        highest: 9,
        lowest: 7,
    };
    let status = until("the mismatch is told", || {
        for (index, word) in foreign.stores() {
            peer.peer_spad_write(index, word);
        }
        let status = engine.status()?;
        status.link.contains("versions").then_some(status)
    });
    assert_eq!(
        status.link,
        "the peer speaks protocol versions 7..=9, this host 1..=1: upgrade the older one"
    );
    assert_eq!(status.own_versions, (1, 1));
    assert_eq!(status.peer_versions, Some((7, 9)));
    assert!(status.session.is_none());
    let refused = engine.borrow(bdf(), None).map(|_| ()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "no link session is open (the peer speaks protocol versions 7..=9, this host 1..=1: \
         upgrade the older one): see `sublet status`, and check that the other host's daemon runs \
         and the cable is in"
    );
    // Only the mailbox, as ever; and a peer that goes away is no longer told of.
    assert_eq!(link.port(0).space().maps().len(), 1);
    link.cut();
    until("the peer is gone", || {
        (engine.status()?.peer_versions.is_none()).then_some(())
    });
}

#[test]
fn open_session_tells_both_ranges_of_versions() {
    let rig = Rig::new();
    let status = rig.engines[0].status().unwrap();
    assert_eq!(status.peer_versions, Some(status.own_versions));
}
