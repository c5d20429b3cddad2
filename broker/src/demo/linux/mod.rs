//! The demonstration with a Linux guest under QEMU instead of the tiny one: a stock kernel, and this program as its init.

mod init;
mod initramfs;
mod qemu;

pub(super) use init::interrupts_after;
pub use init::run as run_init;
pub use qemu::{Qemu, become_qemu};
