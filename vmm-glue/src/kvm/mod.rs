//! Functions in VMMs built on kvm-ioctls: interrupts, memory slots, doorbells, and all of it attached at once.
//!
//! ```text
//! guest's load or store -> memory slot | MMIO exit -> Attachment -> dyn Function
//! dyn Function's trigger (eventfd) -> irqfd -> GSI -> MSI route -> guest's local APIC
//! guest's doorbell -> ioeventfd -> Attachment::serve_doorbells -> dyn Function
//! dyn Function's DMA -> address_space() -> the guest's RAM (memfd)
//! ```
//! A VMM takes what it lacks: [`Routes`] and [`Vectors`] alone, [`Slots`] alone, or an
//! [`Attachment`], which is a whole PCI function for a guest. [`Vm`], [`VcpuThread`] and [`tiny`]
//! are the rest of a VMM, as small as it can be. [`Vm::stand_in`] is for where there is no KVM.
//!
//! What ends in which order: vCPUs; attachments (each resets its function, takes guest RAM away
//! from it, then its triggers, irqfds, routes, doorbells and memory slots); RAM; the VM. An
//! attachment may also end while vCPUs run: its addresses then read as ones.

mod attach;
mod error;
mod event;
mod interrupts;
mod ioeventfd;
mod irqfd;
mod memory;
mod memslot;
mod ram;
mod routes;
mod run;
pub mod tiny;
mod vm;

pub use attach::{Attachment, Placement};
pub use error::{AttachError, IrqError, RunError, SlotError};
pub use interrupts::VECTORS_MAX;
pub use ioeventfd::{DOORBELLS_MAX, Doorbell};
pub use irqfd::Vectors;
pub use memslot::{SLOTS_MAX, Slot, Slots};
pub use ram::Ram;
pub use routes::{GSI_END, GSI_FIRST, Gsi, Msi, ROUTES_MAX, Routes};
pub use run::{Bus, Ended, VcpuThread};
pub use vm::Vm;
