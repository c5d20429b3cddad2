//! The whole way: a guest under KVM on host 1 drives a function of host 0, over the soft fabric and two engines.

use kvm_tests::{BAR, DATA, Guest, WAIT, copy, enable, ids, program_vector, until, vms};
use std::sync::Arc;
use vfio_shim::model::{Bdf, Function, PortIova};
use vfio_shim::ntb::soft::{
    IDENT, IDENT_VALUE, STATUS, STATUS_DONE, SoftFunction, SoftLink, SoftPortConfig,
};
use vfio_shim::path::engine::{BorrowedFunction, Engine, EngineConfig};
use vfio_shim::path::message::{LeaseId, PoolEntry, PoolState};
use vmm_glue::kvm::Ended;
use vmm_glue::kvm::tiny::{self, Step, Verdict};

const WINDOW_BYTES: u64 = 64 << 20;

/// Host 0 lends to host 1.
pub struct Fabric {
    pub engines: [Arc<Engine>; 2],
    pub function: Arc<SoftFunction>,
    link: SoftLink,
}

fn bdf() -> Bdf {
    "4a:00.1".parse().unwrap()
}

impl Fabric {
    fn new() -> Self {
        Self::of(SoftFunction::new(ids(), 4), 4, 8192)
    }

    pub fn of(function: SoftFunction, irq_count: u32, bar_bytes: u64) -> Self {
        let config = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link = SoftLink::new([config; 2]).unwrap();
        let engines = [0, 1].map(|side| {
            let config = EngineConfig {
                name: format!("soft{side}"),
                node: side + 1,
                window_base: PortIova(1 << 32),
                window_bytes: WINDOW_BYTES,
                heartbeat_ms: 10,
                lost_after_ms: 10_000,
                limits: Default::default(),
            };
            Engine::start(link.port(usize::from(side)), config).unwrap()
        });
        let function = Arc::new(function);
        let entry = PoolEntry {
            bdf: bdf(),
            ids: function.info().ids,
            state: PoolState::Available,
            irq_count,
            bar_bytes,
            serial: 0,
        };
        engines[0]
            .offer(entry, Arc::clone(&function) as Arc<dyn Function>)
            .unwrap();
        Self {
            engines,
            function,
            link,
        }
    }

    pub fn borrow(&self) -> (LeaseId, Arc<BorrowedFunction>) {
        until("the function is available", || {
            let entries = self.engines[1].list().unwrap_or_default();
            entries
                .first()
                .is_some_and(|entry| entry.state == PoolState::Available)
        });
        let (lease, _, function) = self.engines[1].borrow(bdf(), None).unwrap();
        (lease, function)
    }

    pub fn maps(&self) -> [usize; 3] {
        let ports = [0, 1].map(|side| self.link.port(side).space().maps().len());
        [ports[0], ports[1], self.function.space().maps().len()]
    }
}

fn work(rounds: u32) -> Vec<Step> {
    let mut steps = enable();
    steps.extend(program_vector(2, 0x41));
    steps.push(Step::expect(BAR + IDENT, IDENT_VALUE));
    for round in 1..=rounds {
        steps.push(Step::store(DATA, 0xb600_0000 | round));
        steps.extend(copy(DATA, DATA + 0x1004, 4, 2));
        steps.push(Step::Interrupts(0x41, round.into()));
        // No poll: the interrupt is behind its data.
        steps.push(Step::expect(DATA + 0x1004, 0xb600_0000 | round));
    }
    steps.push(Step::expect(BAR + STATUS, STATUS_DONE));
    steps
}

#[test]
fn guest_drives_a_function_of_the_other_host_and_nothing_is_left_after_it() {
    let fabric = Fabric::new();
    for vm in vms().chain(vms()) {
        let (lease, function) = fabric.borrow();
        let guest = Guest::new(vm, function, false);
        assert_eq!(guest.run(&work(10)), Verdict::Done);
        assert_eq!(tiny::taken(&guest.ram, 0x41), 10);
        guest.attachment.detach().unwrap();
        fabric.engines[1].give_back(lease).unwrap();
        assert_eq!(fabric.maps(), [1, 1, 0], "the mailboxes");
        assert_eq!(fabric.function.triggers(), 0);
    }
}

#[test]
fn guest_killed_amid_its_work_gives_the_function_back_reset() {
    let fabric = Fabric::new();
    for vm in vms() {
        let (lease, function) = fabric.borrow();
        let guest = Guest::new(vm, function, false);
        let mut vcpu = guest.start(&work(200));
        until("the guest works", || tiny::taken(&guest.ram, 0x41) > 3);
        let how = vcpu.kill();
        assert!(matches!(how, Ended::Killed | Ended::Exit(0)), "{how:?}");
        let resets = fabric.function.resets();
        drop((vcpu, guest));
        assert!(fabric.function.resets() > resets);
        fabric.engines[1].give_back(lease).unwrap();
        assert_eq!(fabric.maps(), [1, 1, 0]);
    }
}

#[test]
fn cable_pulled_under_a_guest_reads_as_ones() {
    for vm in vms() {
        let fabric = Fabric::new();
        let (_, function) = fabric.borrow();
        let guest = Guest::new(vm, function, false);
        let mut steps = work(1);
        steps.push(Step::store(DATA + 8, 1));
        steps.push(Step::Poll {
            address: BAR + IDENT,
            mask: u32::MAX,
            value: u32::MAX,
        });
        let mut vcpu = guest.start(&steps);
        until("the guest looks", || guest.word(DATA + 8) == 1);
        fabric.link.cut();
        assert_eq!(vcpu.wait(WAIT), Some(Ended::Exit(0)));
    }
}
