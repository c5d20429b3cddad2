//! A tiny guest drives functions, under KVM where /dev/kvm opens (else the reason is printed), and in a stand-in everywhere.

mod arc;
mod client;
mod fabric;
mod guest;
mod interrupts;
mod slots;
mod vectors;
