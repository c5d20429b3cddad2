//! What a guest does with an attached function, how it ends, and what is left after it.

use kvm_tests::{
    BAR, CONFIG, DATA, Guest, RAM_BYTES, WAIT, copy, enable, ids, program_vector, vm, vms,
};
use std::sync::Arc;
use std::time::Duration;
use vfio_shim::ntb::soft::{
    IDENT, IDENT_VALUE, SCRATCH, STATUS, STATUS_DONE, STATUS_FAILED, SoftFunction,
};
use vmm_glue::kvm::tiny::{self, Step, Verdict, Width};
use vmm_glue::kvm::{AttachError, Attachment, Ended, Placement};

/// The local APIC's in-service bits of vectors 40h to 5fh (Intel SDM 3A, table 12-1).
const APIC_ISR_40H: u64 = 0xfee0_0120;

fn function() -> Arc<SoftFunction> {
    Arc::new(SoftFunction::new(ids(), 4))
}

#[test]
fn guest_reads_registers_copies_its_memory_and_takes_each_interrupt() {
    for vm in vms() {
        let guest = Guest::new(vm, function(), false);
        let mut steps = enable();
        steps.extend(program_vector(2, 0x41));
        steps.push(Step::expect(BAR + IDENT, IDENT_VALUE));
        for round in 1..=20 {
            steps.push(Step::store(DATA, 0xa500_0000 | round));
            steps.extend(copy(DATA, DATA + 0x1004, 4, 2));
            steps.push(Step::Interrupts(0x41, round.into()));
            steps.push(Step::expect(DATA + 0x1004, 0xa500_0000 | round));
            steps.push(Step::expect(BAR + STATUS, STATUS_DONE));
            steps.push(Step::expect(APIC_ISR_40H, 0));
        }
        assert_eq!(guest.run(&steps), Verdict::Done);
        assert_eq!(tiny::taken(&guest.ram, 0x41), 20);
        assert_eq!(guest.word(DATA + 0x1004), 0xa500_0000 | 20);
        assert_eq!(guest.attachment.wired_vectors(), 1);
        assert!(guest.attachment.take_trouble().is_none());
    }
}

#[test]
fn accesses_of_every_width_reach_the_register_with_their_bytes() {
    for vm in vms() {
        let guest = Guest::new(vm, function(), false);
        let scratch = BAR + SCRATCH;
        let mut steps = enable();
        steps.push(Step::store64(scratch, 0x8877_6655_4433_2211));
        for width in [Width::One, Width::Two, Width::Four, Width::Eight] {
            steps.push(Step::Load(scratch, width));
        }
        steps.push(Step::Store(scratch + 3, Width::One, 0xfa));
        steps.push(Step::Store(scratch + 4, Width::Two, 0xfbfc));
        steps.push(Step::Load(scratch, Width::Eight));
        // Nothing is beside the function.
        steps.push(Step::load(BAR + 0x10_0000));
        assert_eq!(guest.run(&steps), Verdict::Done);
        let seen = [
            0x11,
            0x2211,
            0x4433_2211,
            0x8877_6655_4433_2211,
            0x8877_fbfc_fa33_2211,
            u32::MAX.into(),
        ];
        assert_eq!(tiny::results(&guest.ram, seen.len()), seen);
    }
}

#[test]
fn config_space_tells_the_guest_where_its_bars_are() {
    for vm in vms() {
        let guest = Guest::new(vm, function(), false);
        let steps = [
            Step::expect(CONFIG, 0x0001_5b1e),
            Step::Expect {
                address: CONFIG + 0x10,
                mask: !0xf,
                value: BAR as u32,
            },
            Step::expect(CONFIG + 0x14, 0),
        ];
        assert_eq!(guest.run(&steps), Verdict::Done);
    }
}

#[test]
fn dma_outside_of_guest_memory_is_refused_and_recorded() {
    for vm in vms() {
        let function = function();
        let guest = Guest::new(vm, function.clone(), false);
        let mut steps = enable();
        steps.extend(copy(DATA, RAM_BYTES, 8, 0));
        steps.push(Step::expect(BAR + STATUS, STATUS_FAILED));
        assert_eq!(guest.run(&steps), Verdict::Done);
        let faults = function.space().faults();
        assert_eq!(faults.len(), 1);
        assert_eq!((faults[0].address, faults[0].write), (RAM_BYTES, true));
    }
}

#[test]
fn guest_that_expects_something_else_ends_with_the_steps_index() {
    for vm in vms() {
        let guest = Guest::new(vm, function(), false);
        let steps = [
            Step::load(BAR),
            Step::expect(DATA, 0),
            Step::expect(DATA, 1),
        ];
        assert_eq!(guest.run(&steps), Verdict::Mismatch(2));
    }
}

#[test]
fn guests_exception_is_told_with_its_vector() {
    for vm in vms() {
        let guest = Guest::new(vm, function(), false);
        let page_fault = 14;
        let verdict = guest.run(&[Step::load(tiny::MAPPED_BYTES)]);
        assert_eq!(verdict, Verdict::Exception(page_fault));
    }
}

#[test]
fn guest_over_its_deadline_is_killed_whether_it_spins_or_halts() {
    let never = Step::Poll {
        address: DATA,
        mask: u32::MAX,
        value: 1,
    };
    let steps = [never, Step::Interrupts(0x40, 1)];
    for (vm, step) in steps
        .into_iter()
        .flat_map(|step| vms().map(move |vm| (vm, step)))
    {
        let guest = Guest::new(vm, function(), false);
        let mut vcpu = guest.start(&[Step::store(DATA + 8, 1), step]);
        kvm_tests::until("the guest runs", || guest.word(DATA + 8) == 1);
        assert_eq!(vcpu.wait(Duration::from_millis(20)), None);
        assert_eq!(vcpu.kill(), Ended::Killed);
        assert_eq!(vcpu.kill(), Ended::Killed, "again");
    }
}

#[test]
fn killed_guests_function_is_reset_and_nothing_of_it_is_left() {
    for vm in vms() {
        let function = function();
        let guest = Guest::new(vm, function.clone(), false);
        let mut steps = enable();
        steps.extend(program_vector(1, 0x50));
        steps.push(Step::store(DATA, 1));
        steps.push(Step::Interrupts(0x50, 1));
        let mut vcpu = guest.start(&steps);
        kvm_tests::until("the guest waits", || guest.word(DATA) == 1);
        assert_eq!(vcpu.kill(), Ended::Killed);
        assert_eq!(function.triggers(), 4);
        assert_eq!(guest.vm.routes().routed().len(), 1);
        guest.attachment.detach().unwrap();
        guest.attachment.detach().unwrap();
        assert_eq!(function.resets(), 1, "once");
        assert_eq!(function.triggers(), 0);
        assert_eq!(function.space().maps(), []);
        assert_eq!(guest.vm.routes().allocated(), 0);
        assert_eq!(guest.vm.slots().used_count(), 1, "RAM alone");
    }
}

#[test]
fn function_detached_under_a_running_guest_reads_as_ones_and_takes_no_store() {
    for vm in vms() {
        let function = function();
        let guest = Guest::new(vm, function.clone(), false);
        let mut steps = enable();
        steps.push(Step::store(DATA, 1));
        steps.push(Step::Poll {
            address: BAR + IDENT,
            mask: u32::MAX,
            value: u32::MAX,
        });
        steps.push(Step::store(BAR + SCRATCH, 5));
        steps.push(Step::store(CONFIG + 4, 6));
        let mut vcpu = guest.start(&steps);
        kvm_tests::until("the guest looks", || guest.word(DATA) == 1);
        guest.attachment.detach().unwrap();
        assert_eq!(vcpu.wait(WAIT), Some(Ended::Exit(0)));
        let mut scratch = [1; 4];
        let bar =
            vfio_shim::model::Function::bar(&*function, vfio_shim::model::RegionIndex(0)).unwrap();
        bar.read(SCRATCH, &mut scratch);
        assert_eq!(scratch, [0; 4], "as the reset left it");
    }
}

#[test]
fn misplaced_function_is_refused_and_left_alone() {
    for vm in vms() {
        let function = function();
        let ram = vm
            .ram(vfio_shim::model::Span::new(0, RAM_BYTES).unwrap())
            .unwrap();
        let bars = [
            (0, BAR + 0x1000),
            (0, CONFIG),
            (0, 0),
            (1, BAR),
            (0, u64::MAX - 0xfff),
        ];
        for (bar, address) in bars {
            let mut placement = Placement {
                config: CONFIG,
                ..Placement::default()
            };
            placement.bars[bar] = Some(address);
            let refused = Attachment::new(&vm, function.clone(), &placement, &[&ram]);
            assert!(
                matches!(refused, Err(AttachError::Placement { .. })),
                "BAR{bar} at {address:#x}"
            );
        }
        assert_eq!(function.resets(), 0);
        assert_eq!(function.space().maps(), []);
    }
}

#[test]
fn guest_that_destroys_its_own_tables_ends_in_a_shutdown() {
    let Some(vm) = vm() else { return };
    let guest = Guest::new(vm, function(), false);
    // No gate is left below 2 KiB of the IDT, so the page fault has no way but out.
    let gates = (0x2000..0x2800).step_by(8);
    let mut steps: Vec<_> = gates.map(|gate| Step::store64(gate, 0)).collect();
    steps.push(Step::load(tiny::MAPPED_BYTES));
    assert_eq!(guest.start(&steps).wait(WAIT), Some(Ended::Shutdown));
}
