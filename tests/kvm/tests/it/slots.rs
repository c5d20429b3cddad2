//! Memory slots of BARs that can be mapped, and doorbells: accesses that are no exits.

use kvm_tests::{
    BAR, DATA, Guest, MappedFunction, TABLE, WAIT, copy, enable, ids, program_vector, vm, vms,
};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::AsFd;
use std::sync::Arc;
use vfio_shim::model::{RegionIndex, Span};
use vfio_shim::ntb::soft::{COMPLETED, DOORBELL, SoftFunction};
use vmm_glue::kvm::tiny::{self, Step, Verdict};
use vmm_glue::kvm::{AttachError, Doorbell, Ended, SlotError};

const BELL: Doorbell = Doorbell {
    region: RegionIndex(0),
    offset: DOORBELL,
    value: 1,
};

#[test]
fn mapped_page_is_reached_without_the_function_and_the_msix_page_through_it() {
    for vm in vms() {
        let function = Arc::new(MappedFunction::new(SoftFunction::new(ids(), 4)));
        let guest = Guest::new(vm, function.clone(), true);
        assert_eq!(guest.vm.slots().used_count(), 2, "RAM and one area");
        let mut steps = enable();
        steps.push(Step::store(BAR + 0x10, 0x1234_5678));
        steps.push(Step::store(BAR + 0xffc, 0x9abc_def0));
        steps.push(Step::expect(BAR + 0x10, 0x1234_5678));
        steps.push(Step::store(TABLE, 0xfee0_0000));
        steps.push(Step::expect(TABLE, 0xfee0_0000));
        assert_eq!(guest.run(&steps), Verdict::Done);
        let page = function.page();
        assert_eq!(page[0x10..0x14], 0x1234_5678u32.to_le_bytes());
        assert_eq!(page[0xffc..], 0x9abc_def0u32.to_le_bytes());
        assert_eq!(function.accesses(), 0, "neither memory nor the table");
        let bell = guest.attachment.add_doorbell(BELL);
        assert!(matches!(bell, Err(AttachError::Placement { .. })));
    }
}

#[test]
fn mapped_page_is_gone_for_a_running_guest_when_the_function_is_detached() {
    for vm in vms() {
        let function = Arc::new(MappedFunction::new(SoftFunction::new(ids(), 4)));
        let guest = Guest::new(vm, function.clone(), true);
        let steps = [
            Step::store(DATA, 1),
            Step::Poll {
                address: BAR,
                mask: u32::MAX,
                value: u32::MAX,
            },
            Step::store(BAR, 7),
        ];
        let mut vcpu = guest.start(&steps);
        kvm_tests::until("the guest looks", || guest.word(DATA) == 1);
        guest.attachment.detach().unwrap();
        assert_eq!(vcpu.wait(WAIT), Some(Ended::Exit(0)));
        assert_eq!(function.page()[..4], [0; 4]);
        assert_eq!(guest.vm.slots().used_count(), 1);
    }
}

#[test]
fn slots_are_refused_unaligned_and_given_again_after_they_went() {
    let Some(vm) = vm() else { return };
    let span = |start, len| Span::new(start, len).unwrap();
    for bad in [span(0x800, 0x1000), span(0, 0x800), span(0x1000, 0)] {
        assert!(matches!(
            vm.ram(bad),
            Err(SlotError::Kernel { .. } | SlotError::Align(_))
        ));
    }
    let ram = vm.ram(span(0, 0x1000)).unwrap();
    let taken = vm.ram(span(0, 0x2000)).err().unwrap();
    assert!(matches!(taken, SlotError::Kernel { .. }), "{taken}");
    drop(ram);
    assert_eq!(vm.slots().used_count(), 0);
    for _ in 0..20 {
        assert!(vm.ram(span(0, 0x2000)).is_ok());
    }
}

#[test]
fn doorbell_served_by_a_thread_starts_the_copy_without_any_other_access() {
    for vm in vms() {
        let guest = Guest::new(vm, Arc::new(SoftFunction::new(ids(), 4)), false);
        guest.attachment.add_doorbell(BELL).unwrap();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut steps = enable();
        steps.extend(program_vector(0, 0x40));
        for round in 1..=20 {
            steps.extend(copy(DATA, DATA + 0x1000, 64, 0));
            steps.push(Step::Interrupts(0x40, round));
        }
        std::thread::scope(|scope| {
            let served = scope.spawn(|| guest.attachment.serve_doorbells(stop.as_fd()));
            assert_eq!(guest.run(&steps), Verdict::Done);
            rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
            served.join().unwrap().unwrap();
        });
        assert_eq!(tiny::taken(&guest.ram, 0x40), 20);
    }
}

#[test]
fn doorbells_that_nobody_serves_are_made_before_the_next_access() {
    for vm in vms() {
        let guest = Guest::new(vm, Arc::new(SoftFunction::new(ids(), 4)), false);
        guest.attachment.add_doorbell(BELL).unwrap();
        let again = guest.attachment.add_doorbell(BELL);
        let refused = matches!(again, Err(AttachError::Doorbell { .. }));
        assert_eq!(refused, guest.vm.is_kvm(), "KVM has it");
        let mut steps = enable();
        steps.extend(copy(DATA, DATA + 0x1000, 64, 0));
        steps.push(Step::store(BAR + DOORBELL, 1));
        steps.push(Step::expect(BAR + COMPLETED, 2));
        // Another value is no bell, but an exit.
        steps.push(Step::store(BAR + DOORBELL, 2));
        steps.push(Step::expect(BAR + COMPLETED, 3));
        assert_eq!(guest.run(&steps), Verdict::Done);
    }
}
