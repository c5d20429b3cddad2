//! A tiny guest: one vCPU in long mode that does the steps of a program, to drive a function without an operating system.
//!
//! Its memory begins at address 0 and holds at least [`FREE`] bytes of its own. It takes
//! interrupts, counts them by vector, and says by its exit port how it ended. The first
//! [`MAPPED_BYTES`] of addresses are mapped to themselves; everything placed lies there. In a
//! stand-in for a VM a thread of this process does the same steps.

mod code;
mod layout;
mod stand_in;
mod step;

pub use layout::{EXIT_PORT, FREE, MAPPED_BYTES, STEPS_MAX, VECTOR_END, VECTOR_FIRST};
pub use step::{Step, Verdict, Width};

use super::{Attachment, Bus, Msi, Ram, RunError, VcpuThread, Vm};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use layout::{
    APIC, CODE, COUNTERS, DIRECTORIES, GDT, HANDLERS, IDT, RESULTS, STACK_END, STEP_BYTES, STEPS,
    TABLES,
};
use std::sync::Arc;

const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 16;
/// Flat segments as descriptors: long-mode code, data (Intel SDM 3A, 3.4.5).
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;
/// A present 64-bit interrupt gate (Intel SDM 3A, 6.14.1).
const GATE: u64 = 0x8e00;
/// Page table entries: present and writable, and a large page.
const PRESENT: u64 = 3;
const LARGE: u64 = 1 << 7;
/// CR0: protection and paging; CR4: physical address extension; EFER: long mode, enabled and
/// active.
const CR0_PE_PG: u64 = 1 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// RFLAGS: its bit that is always 1.
const RFLAGS: u64 = 2;

/// The message by which a function raises one of the guest's vectors.
pub fn message(vector: u8) -> Msi {
    Msi {
        address: APIC,
        data: vector.into(),
    }
}

/// Starts the guest with this program, which ends with [`Step::Exit`] of 0 unless it ends before.
pub fn start(
    vm: &Vm,
    ram: &Ram,
    attachments: Vec<Arc<Attachment>>,
    steps: &[Step],
) -> Result<VcpuThread, RunError> {
    load(ram, steps)?;
    let bus = Bus {
        attachments,
        exit_port: EXIT_PORT,
    };
    if !vm.is_kvm() {
        return stand_in::start(ram, bus);
    }
    let vcpu = vm.vcpu(0)?;
    set_registers(&vcpu)?;
    VcpuThread::start(vcpu, bus)
}

/// The values of the program's first `count` loads, in order.
pub fn results(ram: &Ram, count: usize) -> Vec<u64> {
    let words = (0..count.min(STEPS_MAX) as u64).map(|at| ram.read_u64(RESULTS + 8 * at));
    words.map_while(|word| word).collect()
}

/// How often the guest took the vector.
pub fn taken(ram: &Ram, vector: u8) -> u64 {
    ram.read_u64(COUNTERS + 8 * u64::from(vector)).unwrap_or(0)
}

/// Writes code, tables and steps into the guest's memory.
fn load(ram: &Ram, steps: &[Step]) -> Result<(), RunError> {
    if steps.len() >= STEPS_MAX {
        return Err(RunError::Program {
            steps: steps.len(),
            max: STEPS_MAX - 1,
        });
    }
    if ram.span().start() != 0 || ram.span().len() < FREE {
        return Err(RunError::Memory(FREE));
    }
    let put = |at: u64, words: &mut dyn Iterator<Item = u64>| {
        for (at, word) in (at..).step_by(8).zip(words) {
            ram.write(at, &word.to_le_bytes());
        }
    };
    put(GDT, &mut [0, CODE_DESCRIPTOR, DATA_DESCRIPTOR].into_iter());
    put(IDT, &mut (0..HANDLERS).flat_map(gate));
    put(COUNTERS, &mut (0..HANDLERS).map(|_| 0));
    let pointers = TABLES + 4096;
    let directories = pointers + 4096;
    put(TABLES, &mut [pointers | PRESENT].into_iter());
    put(
        pointers,
        &mut (0..DIRECTORIES).map(|at| (directories + 4096 * at) | PRESENT),
    );
    put(
        directories,
        &mut (0..512 * DIRECTORIES).map(|at| at << 21 | PRESENT | LARGE),
    );
    ram.write(CODE, code::code());
    let program = steps.iter().copied().chain([Step::Exit(0)]);
    for (at, step) in (STEPS..).step_by(STEP_BYTES as usize).zip(program) {
        ram.write(at, &step.bytes());
    }
    Ok(())
}

/// The two words of the gate to a vector's handler, all below 64 KiB.
fn gate(vector: u64) -> [u64; 2] {
    let handler = CODE + 16 * (vector + 1);
    let low = handler & 0xffff | u64::from(CODE_SELECTOR) << 16 | GATE << 32;
    [low | (handler >> 16 & 0xffff) << 48, handler >> 32]
}

fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: if code { 11 } else { 3 },
        present: 1,
        s: 1,
        l: u8::from(code),
        db: u8::from(!code),
        g: 1,
        ..Default::default()
    }
}

fn set_registers(vcpu: &VcpuFd) -> Result<(), RunError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(RunError::kernel("read the vCPU's registers"))?;
    let table = |base, entries: u64, bytes: u64| kvm_dtable {
        base,
        limit: (entries * bytes - 1) as u16,
        ..Default::default()
    };
    sregs.gdt = table(GDT, 3, 8);
    sregs.idt = table(IDT, HANDLERS, 16);
    sregs.cs = segment(CODE_SELECTOR, true);
    let data = segment(DATA_SELECTOR, false);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 |= CR0_PE_PG;
    sregs.cr3 = TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME_LMA;
    let set = RunError::kernel("set the vCPU's registers");
    vcpu.set_sregs(&sregs).map_err(&set)?;
    let regs = kvm_regs {
        rip: CODE,
        rsp: STACK_END,
        rsi: STEPS,
        rdi: RESULTS,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(&set)
}
