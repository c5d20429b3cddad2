//! A function of the shape of an Arc Pro VF: a large BAR above 4 GiB, one plain MSI, interrupt status by DMA before it.

use crate::fabric::Fabric;
use kvm_tests::{CONFIG, DATA, Guest, vms};
use std::sync::Arc;
use vfio_shim::model::Function;
use vfio_shim::ntb::soft::{
    ARC_BAR0_BYTES, ARC_DESTINATION, ARC_DOORBELL, ARC_FLAGS, ARC_FROM_VRAM, ARC_IDENT,
    ARC_IDENT_VALUE, ARC_LENGTH, ARC_MEMIRQ, ARC_MEMIRQ_ENABLE, ARC_MEMIRQ_SOURCE,
    ARC_MEMIRQ_STATUS, ARC_SOURCE, ARC_STATUS, STATUS_DONE, STATUS_FAILED, SoftFunction,
};
use vmm_glue::kvm::tiny::{self, Step, Verdict, Width};
use vmm_glue::kvm::{Placement, Vm};

const BAR0: u64 = 0xd000_0000;
/// Above 4 GiB, as firmware places what is prefetchable.
const BAR2: u64 = 0x8_0000_0000;
const MSI: u64 = CONFIG + 0xac;
const MSI_MASK: u64 = MSI + 0x10;
pub const VECTOR: u8 = 0x50;
const MEMIRQ: u64 = DATA + 0x2000;
const TO: u64 = DATA + 0x1000;

pub fn place(vm: Vm, function: Arc<dyn Function>) -> Guest {
    let mut placement = Placement {
        config: CONFIG,
        mapped: true,
        ..Placement::default()
    };
    placement.bars[0] = Some(BAR0);
    placement.bars[2] = Some(BAR2);
    Guest::place(vm, function, placement)
}

/// What a driver does first: decoding and bus mastering, the MSI, the memirq page.
fn probe() -> Vec<Step> {
    let message = tiny::message(VECTOR);
    vec![
        Step::Store(CONFIG + 4, Width::Two, 6),
        Step::expect(BAR0 + ARC_IDENT, ARC_IDENT_VALUE),
        Step::expect(CONFIG + 0x1c, (BAR2 >> 32) as u32),
        Step::store(MSI + 4, message.address as u32),
        Step::store(MSI + 8, 0),
        Step::Store(MSI + 0xc, Width::Two, message.data.into()),
        Step::Store(MSI + 2, Width::Two, 1),
        Step::store(MEMIRQ + ARC_MEMIRQ_ENABLE, 1),
        Step::store64(BAR0 + ARC_MEMIRQ, MEMIRQ),
    ]
}

/// Copies 8 bytes of the device's memory to this address.
fn copy(vram: u64, to: u64) -> Vec<Step> {
    vec![
        Step::store64(BAR0 + ARC_SOURCE, vram),
        Step::store64(BAR0 + ARC_DESTINATION, to),
        Step::store(BAR0 + ARC_LENGTH, 8),
        Step::store(BAR0 + ARC_FLAGS, ARC_FROM_VRAM),
        Step::store(BAR0 + ARC_DOORBELL, 1),
    ]
}

/// The status bytes of the memirq page are there, and are taken away again.
fn take_status() -> Vec<Step> {
    let bytes = [ARC_MEMIRQ_SOURCE, ARC_MEMIRQ_STATUS].map(|offset| MEMIRQ + offset);
    let look = bytes.map(|at| Step::Expect {
        address: at & !3,
        mask: 0xff << (8 * (at & 3)),
        value: 0xff << (8 * (at & 3)),
    });
    let clear = bytes.map(|at| Step::Store(at, Width::One, 0));
    look.into_iter().chain(clear).collect()
}

pub fn work(rounds: u64, vram_bytes: u64) -> Vec<Step> {
    let mut steps = probe();
    for round in 1..=rounds {
        let vram = vram_bytes - 8 * round;
        steps.push(Step::store64(BAR2 + vram, 0xc0de_0000 + round));
        steps.extend(copy(vram, TO));
        steps.push(Step::Interrupts(VECTOR, round));
        // The status and the data are before the interrupt.
        steps.extend(take_status());
        steps.push(Step::expect(TO, 0xc0de_0000 + round as u32));
        steps.push(Step::expect(BAR0 + ARC_STATUS, STATUS_DONE));
    }
    steps
}

#[test]
fn guest_uses_a_large_bar_above_4_gib_and_takes_the_plain_msi_behind_its_status() {
    for vm in vms() {
        let vram_bytes = 8 << 30;
        let function = Arc::new(SoftFunction::arc_pro(vram_bytes).unwrap());
        let guest = place(vm, function.clone());
        assert_eq!(guest.run(&work(10, vram_bytes)), Verdict::Done);
        assert_eq!(tiny::taken(&guest.ram, VECTOR), 10);
        assert_eq!(guest.attachment.wired_vectors(), 1);
        guest.attachment.detach().unwrap();
        assert_eq!(function.triggers(), 0);
        assert_eq!(guest.vm.routes().allocated(), 0);
    }
}

#[test]
fn plain_msi_raised_while_masked_fires_once_at_unmask() {
    for vm in vms() {
        let guest = place(vm, Arc::new(SoftFunction::arc_pro(1 << 24).unwrap()));
        let mut steps = probe();
        steps.push(Step::store(MSI_MASK, 1));
        steps.extend(copy(0, TO));
        steps.extend(copy(0, TO));
        steps.extend(take_status());
        steps.push(Step::store(MSI_MASK, 0));
        steps.push(Step::Interrupts(VECTOR, 1));
        steps.extend(copy(0, TO));
        steps.push(Step::Interrupts(VECTOR, 2));
        assert_eq!(guest.run(&steps), Verdict::Done);
        assert_eq!(tiny::taken(&guest.ram, VECTOR), 2);
    }
}

#[test]
fn guest_of_one_host_drives_the_arc_of_the_other_and_its_stray_dma_is_refused() {
    let vram_bytes = 16 << 20;
    let function = SoftFunction::arc_pro(vram_bytes).unwrap();
    let fabric = Fabric::of(function, 1, ARC_BAR0_BYTES + vram_bytes);
    for vm in vms() {
        let faults = fabric.function.space().fault_count();
        let (lease, function) = fabric.borrow();
        let guest = place(vm, function);
        let mut steps = work(10, vram_bytes);
        steps.extend(copy(0, kvm_tests::RAM_BYTES));
        steps.push(Step::Interrupts(VECTOR, 11));
        steps.push(Step::expect(BAR0 + ARC_STATUS, STATUS_FAILED));
        assert_eq!(guest.run(&steps), Verdict::Done);
        assert_eq!(fabric.function.space().fault_count(), faults + 1);
        guest.attachment.detach().unwrap();
        fabric.engines[1].give_back(lease).unwrap();
        assert_eq!(fabric.maps(), [1, 1, 0], "the mailboxes");
    }
}
