//! Where everything lies in the tiny guest's memory, and the numbers that its code and this crate share.

/// Memory from here on is the steps' to use; the guest's own is below.
pub const FREE: u64 = 0x10_0000;
/// The port to which the guest writes how it ended.
pub const EXIT_PORT: u16 = 0xf4;
/// The first vector that interrupts can have; those below are exceptions.
pub const VECTOR_FIRST: u8 = 32;
/// One past the last.
pub const VECTOR_END: u8 = 128;
/// The most steps of a program, its end included.
pub const STEPS_MAX: usize = ((RESULTS - STEPS) / STEP_BYTES) as usize;

pub(super) const GDT: u64 = 0x1000;
pub(super) const IDT: u64 = 0x2000;
/// 64-bit counters, one for each vector.
pub(super) const COUNTERS: u64 = 0x3000;
pub(super) const CODE: u64 = 0x4000;
pub(super) const STACK_END: u64 = 0x8000;
/// The page tables: PML4, page directory pointers, then `DIRECTORIES` page directories.
pub(super) const TABLES: u64 = 0x1_0000;
pub(super) const DIRECTORIES: u64 = 64;
/// What they map to itself.
pub const MAPPED_BYTES: u64 = DIRECTORIES << 30;
pub(super) const STEPS: u64 = 0x6_0000;
/// Where loaded values go, in order.
pub(super) const RESULTS: u64 = 0xa_0000;

pub(super) const HANDLERS: u64 = VECTOR_END as u64;
pub(super) const STEP_SHIFT: u64 = 5;
pub(super) const STEP_BYTES: u64 = 1 << STEP_SHIFT;
/// Exit codes above those of steps: a mismatch, with the step's index; an exception, with its
/// vector; a step that is none.
pub(super) const MISMATCH: u32 = 0x1000_0000;
pub(super) const FAULT: u32 = 0x2000_0000;
pub(super) const FAULT_STEP: u32 = FAULT | 0xffff;

/// The local APIC's registers (Intel SDM 3A, table 12-1).
pub(super) const APIC: u64 = 0xfee0_0000;
pub(super) const APIC_EOI: u64 = APIC + 0xb0;
pub(super) const APIC_SVR: u64 = APIC + 0xf0;
/// Enabled, with 255 as the spurious vector.
pub(super) const APIC_SVR_ENABLED: u32 = 0x1ff;

const _: () = assert!(TABLES + (2 + DIRECTORIES) * 4096 <= STEPS);
const _: () = assert!(RESULTS + 8 * STEPS_MAX as u64 <= FREE);
