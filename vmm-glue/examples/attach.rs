//! Attaches a software function to a VM on kvm-ioctls, and lets a tiny guest copy memory with it.

use std::{error::Error, sync::Arc, time::Duration};
use vfio_shim::model::{FunctionIds, RegionIndex, Span};
use vfio_shim::ntb::soft::{DESTINATION, DOORBELL, IDENT, LENGTH, SOURCE, SoftFunction, VECTOR};
use vmm_glue::kvm::tiny::{self, Step, Verdict, Width};
use vmm_glue::kvm::{Attachment, Ended, Placement, Vm};

const CONFIG: u64 = 0xe000_0000;
const BAR: u64 = 0xe010_0000;
/// The function's MSI-X: its control word in config space, and its table in BAR0.
const MSIX_CONTROL: u64 = CONFIG + 0x42;
const MSIX_TABLE: u64 = BAR + 0x1000;
const INTERRUPT: u8 = 0x40;
const FROM: u64 = tiny::FREE;
const TO: u64 = tiny::FREE + 0x1000;

/// What the guest does, as a driver would.
fn driver() -> Vec<Step> {
    let message = tiny::message(INTERRUPT);
    vec![
        Step::load(BAR + IDENT),
        // Memory decoding and bus mastering; one vector; MSI-X.
        Step::Store(CONFIG + 4, Width::Two, 6),
        Step::load(BAR + IDENT),
        Step::store64(MSIX_TABLE, message.address),
        Step::store(MSIX_TABLE + 8, message.data),
        Step::store(MSIX_TABLE + 12, 0),
        Step::Store(MSIX_CONTROL, Width::Two, 0x8000),
        // A copy; the guest halts until the function's interrupt.
        Step::store64(BAR + SOURCE, FROM),
        Step::store64(BAR + DESTINATION, TO),
        Step::store(BAR + LENGTH, 13),
        Step::store(BAR + VECTOR, 0),
        Step::store(BAR + DOORBELL, 1),
        Step::Interrupts(INTERRUPT, 1),
    ]
}

fn main() -> Result<(), Box<dyn Error>> {
    let vm = Vm::new()?;
    let ram = vm.ram(Span::new(0, 4 << 20).ok_or("no such memory")?)?;
    let function = Arc::new(SoftFunction::new(FunctionIds::default(), 4));

    let mut placement = Placement {
        config: CONFIG,
        mapped: true,
        ..Placement::default()
    };
    placement.bars[RegionIndex(0).0 as usize] = Some(BAR);
    let attachment = Attachment::new(&vm, function, &placement, &[&ram])?;

    ram.write(FROM, b"Hello, guest!");
    let mut vcpu = tiny::start(&vm, &ram, vec![attachment.clone()], &driver())?;
    let ended = match vcpu.wait(Duration::from_secs(10)) {
        Some(ended) => ended,
        None => vcpu.kill(),
    };
    attachment.detach()?;

    let mut copied = [0; 13];
    ram.read(TO, &mut copied);
    println!(
        "registers, before and after decoding: {:x?}",
        tiny::results(&ram, 2)
    );
    println!("interrupts: {}", tiny::taken(&ram, INTERRUPT));
    println!(
        "copied by the function: {}",
        String::from_utf8_lossy(&copied)
    );
    match ended {
        Ended::Exit(code) if Verdict::of(code) == Verdict::Done => Ok(()),
        other => Err(format!("the guest ended so: {other:?}").into()),
    }
}
