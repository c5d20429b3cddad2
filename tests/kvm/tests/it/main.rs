//! A tiny guest under KVM drives functions; skipped, with the reason printed, where /dev/kvm does not open.

mod fabric;
mod guest;
mod interrupts;
mod slots;
mod vectors;
