//! A VM with the tiny guest and one function, and what a driver of the software function does.

use std::sync::Arc;
use std::time::{Duration, Instant};
use vfio_shim::model::{Function, FunctionIds, Span};
use vfio_shim::ntb::soft::{DESTINATION, DOORBELL, LENGTH, SOURCE, VECTOR};
use vmm_glue::kvm::tiny::{self, Step, Verdict, Width};
use vmm_glue::kvm::{Attachment, Ended, Placement, Ram, VcpuThread, Vm};

/// Where the guest finds the function's config space.
pub const CONFIG: u64 = 0xe000_0000;
/// Where the guest finds its BAR0.
pub const BAR: u64 = 0xe010_0000;
/// The software function's MSI-X table.
pub const TABLE: u64 = BAR + 0x1000;
/// Guest memory that steps may use.
pub const DATA: u64 = tiny::FREE;
/// All of the guest's memory.
pub const RAM_BYTES: u64 = 4 << 20;
/// How long a condition is waited for. Nothing takes this long but a failure.
pub const WAIT: Duration = Duration::from_secs(30);

/// The software function's MSI-X control word.
const MSIX_CONTROL: u64 = CONFIG + 0x42;
const MSIX_ENABLE: u64 = 0x8000;
const COMMAND: u64 = CONFIG + 4;
const MEMORY_AND_MASTER: u64 = 6;

/// A VM, or why there is none here, printed.
pub fn vm() -> Option<Vm> {
    let (vm, why) = Vm::new_or_stand_in().expect("a VM");
    if let Some(why) = why {
        let cause = std::error::Error::source(&why);
        eprintln!("KVM is skipped: {why}: {cause:?}");
        return None;
    }
    Some(vm)
}

/// A stand-in, and a VM where there is KVM.
pub fn vms() -> impl Iterator<Item = Vm> {
    let stand_in = std::iter::once_with(Vm::stand_in);
    stand_in.chain(std::iter::once_with(vm).flatten())
}

/// Looks until it is so.
pub fn until(what: &str, mut look: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !look() {
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The ids of the software function.
pub fn ids() -> FunctionIds {
    FunctionIds {
        vendor: 0x5b1e,
        device: 1,
        ..FunctionIds::default()
    }
}

/// A VM with one function. Fields end in this order.
pub struct Guest {
    /// The function.
    pub attachment: Arc<Attachment>,
    /// The memory.
    pub ram: Ram,
    /// The VM.
    pub vm: Vm,
}

impl Guest {
    /// With its BAR0 at [`BAR`]; where `mapped`, in memory slots as far as can be.
    pub fn new(vm: Vm, function: Arc<dyn Function>, mapped: bool) -> Self {
        let mut placement = Placement {
            config: CONFIG,
            mapped,
            ..Placement::default()
        };
        placement.bars[0] = Some(BAR);
        Self::place(vm, function, placement)
    }

    /// With its regions placed so.
    pub fn place(vm: Vm, function: Arc<dyn Function>, placement: Placement) -> Self {
        let ram = vm.ram(Span::new(0, RAM_BYTES).unwrap()).unwrap();
        let attachment = Attachment::new(&vm, function, &placement, &[&ram]).unwrap();
        Self {
            attachment,
            ram,
            vm,
        }
    }

    /// Lets the guest do the steps. A VM has one vCPU, so only once.
    pub fn start(&self, steps: &[Step]) -> VcpuThread {
        let attachments = vec![Arc::clone(&self.attachment)];
        tiny::start(&self.vm, &self.ram, attachments, steps).unwrap()
    }

    /// The same, to its end.
    pub fn run(&self, steps: &[Step]) -> Verdict {
        match self.start(steps).wait(WAIT) {
            Some(Ended::Exit(code)) => Verdict::of(code),
            other => panic!("the guest did not end by itself: {other:?}"),
        }
    }

    /// 32 bits of guest memory.
    pub fn word(&self, address: u64) -> u32 {
        self.ram.read_u64(address).unwrap() as u32
    }
}

/// Decoding, bus mastering and MSI-X on.
pub fn enable() -> Vec<Step> {
    vec![
        Step::Store(COMMAND, Width::Two, MEMORY_AND_MASTER),
        Step::Store(MSIX_CONTROL, Width::Two, MSIX_ENABLE),
    ]
}

/// Programs and unmasks an entry of the MSI-X table, as a driver does.
pub fn program_vector(entry: u64, vector: u8) -> Vec<Step> {
    let entry = TABLE + 16 * entry;
    let message = tiny::message(vector);
    vec![
        Step::store(entry + 12, 1),
        Step::store(entry, message.address as u32),
        Step::store(entry + 4, (message.address >> 32) as u32),
        Step::store(entry + 8, message.data),
        Step::store(entry + 12, 0),
    ]
}

/// Starts a copy that ends with an interrupt of the entry.
pub fn copy(source: u64, destination: u64, length: u32, entry: u32) -> Vec<Step> {
    vec![
        Step::store64(BAR + SOURCE, source),
        Step::store64(BAR + DESTINATION, destination),
        Step::store(BAR + LENGTH, length),
        Step::store(BAR + VECTOR, entry),
        Step::store(BAR + DOORBELL, 1),
    ]
}
