//! MSI-X as a guest's driver programs it: masks, pending bits, new messages, off and on again.

use kvm_tests::{BAR, CONFIG, DATA, Guest, TABLE, copy, enable, ids, program_vector, vms};
use std::sync::Arc;
use vfio_shim::ntb::soft::SoftFunction;
use vmm_glue::kvm::tiny::{self, Step, Verdict, Width};

const CONTROL: u64 = CONFIG + 0x42;
const ENTRY_CONTROL: u64 = TABLE + 12;
const PENDING: u64 = TABLE + 0x800;

fn guests() -> impl Iterator<Item = Guest> {
    vms().map(|vm| Guest::new(vm, Arc::new(SoftFunction::new(ids(), 4)), false))
}

/// The guest with MSI-X on and entry 0 raising 0x40, in front of these steps.
fn run(guest: &Guest, steps: &[Step]) -> Verdict {
    let mut all = enable();
    all.extend(program_vector(0, 0x40));
    all.extend(steps);
    guest.run(&all)
}

fn raise() -> Vec<Step> {
    copy(DATA, DATA + 0x1000, 8, 0)
}

#[test]
fn vector_raised_twice_while_masked_is_pending_and_fires_once_at_unmask() {
    for guest in guests() {
        let mut steps = vec![Step::expect(PENDING, 0), Step::store(ENTRY_CONTROL, 1)];
        steps.extend(raise());
        steps.extend(raise());
        steps.push(Step::expect(PENDING, 1));
        steps.push(Step::load(PENDING));
        steps.push(Step::store(ENTRY_CONTROL, 0));
        steps.push(Step::Interrupts(0x40, 1));
        steps.push(Step::expect(PENDING, 0));
        // The mask again finds nothing left over.
        steps.push(Step::store(ENTRY_CONTROL, 1));
        steps.push(Step::expect(PENDING, 0));
        steps.push(Step::store(ENTRY_CONTROL, 0));
        steps.extend(raise());
        steps.push(Step::Interrupts(0x40, 2));
        assert_eq!(run(&guest, &steps), Verdict::Done);
        assert_eq!(tiny::taken(&guest.ram, 0x40), 2);
    }
}

#[test]
fn function_mask_holds_every_vector_and_its_end_lets_them_go() {
    for guest in guests() {
        let mut steps = vec![Step::Store(CONTROL, Width::Two, 0xc000)];
        steps.extend(raise());
        steps.push(Step::expect(PENDING, 1));
        steps.push(Step::Store(CONTROL, Width::Two, 0x8000));
        steps.push(Step::Interrupts(0x40, 1));
        assert_eq!(run(&guest, &steps), Verdict::Done);
    }
}

#[test]
fn reprogrammed_vector_raises_the_new_message_and_takes_no_second_route() {
    for guest in guests() {
        let mut steps = Vec::new();
        let mut counts = [0u64; 2];
        for round in 0..40 {
            let vector = [0x40, 0x60][round % 2];
            counts[round % 2] += 1;
            steps.extend(program_vector(0, vector));
            steps.extend(raise());
            steps.push(Step::Interrupts(vector, counts[round % 2]));
        }
        assert_eq!(run(&guest, &steps), Verdict::Done);
        let taken = [0x40, 0x60].map(|vector| tiny::taken(&guest.ram, vector));
        assert_eq!(taken, counts);
        assert_eq!(guest.vm.routes().allocated(), 1);
    }
}

#[test]
fn msix_off_and_on_again_many_times_still_interrupts() {
    for guest in guests() {
        let mut steps = Vec::new();
        for round in 1..=20 {
            steps.push(Step::Store(CONTROL, Width::Two, 0));
            steps.push(Step::Store(CONTROL, Width::Two, 0));
            steps.push(Step::Store(CONTROL, Width::Two, 0x8000));
            steps.push(Step::Store(CONTROL, Width::Two, 0x8000));
            steps.extend(raise());
            steps.push(Step::Interrupts(0x40, round));
        }
        assert_eq!(run(&guest, &steps), Verdict::Done);
        assert_eq!(tiny::taken(&guest.ram, 0x40), 20);
        assert_eq!(guest.vm.routes().allocated(), 1);
    }
}

#[test]
fn table_reads_back_what_was_written_and_reserved_bits_as_zero() {
    for guest in guests() {
        let mut steps = enable();
        steps.push(Step::expect(TABLE + 16 * 3 + 12, 1));
        steps.push(Step::store64(TABLE + 16, 0x0123_4567_89ab_cdef));
        steps.push(Step::store(TABLE + 24, 0x7654_3210));
        steps.push(Step::store(TABLE + 28, u32::MAX));
        steps.push(Step::Load(TABLE + 16, Width::Eight));
        steps.push(Step::Load(TABLE + 24, Width::Eight));
        // Past the last entry the page is the function's, which hides it.
        steps.push(Step::load(TABLE + 16 * 4));
        assert_eq!(guest.run(&steps), Verdict::Done);
        let seen = [0x0123_4567_89ab_cdef, 0x1_7654_3210, u32::MAX.into()];
        assert_eq!(tiny::results(&guest.ram, 3), seen);
        assert_eq!(guest.attachment.wired_vectors(), 0);
    }
}

#[test]
fn copy_before_any_vector_is_programmed_disturbs_nothing() {
    for guest in guests() {
        let mut steps = vec![Step::Store(CONFIG + 4, Width::Two, 6)];
        steps.extend(raise());
        steps.push(Step::load(BAR));
        assert_eq!(guest.run(&steps), Verdict::Done);
        assert_eq!(guest.vm.routes().allocated(), 0);
    }
}
