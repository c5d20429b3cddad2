//! Eventfds as KVM's ioctls take them and as functions take them.
#![allow(unsafe_code)] // An fd changes hands between two owning types of different crates.

use kvm_ioctls::{IoEventAddress, VmFd};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use vmm_sys_util::eventfd::EventFd;

/// An eventfd, as the ioctls take it.
pub struct Event(EventFd);

impl Event {
    /// A new one that never blocks.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self::from_fd(fd))
    }

    /// One that exists. What is no eventfd is refused by KVM.
    pub fn from_fd(fd: OwnedFd) -> Self {
        // SAFETY: `into_raw_fd` gives up the fd, so that it has no other owner.
        Self(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
    }

    /// A duplicate, for whoever signals it.
    pub fn to_fd(&self) -> io::Result<OwnedFd> {
        self.as_fd().try_clone_to_owned()
    }

    /// Whether it was signalled and nobody has taken it.
    pub fn is_pending(&self) -> bool {
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready == 1)
    }

    /// Takes what was signalled: how often.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        // The look before keeps a blocking fd of somebody else from holding this thread.
        match self
            .is_pending()
            .then(|| rustix::io::read(self, &mut count))
        {
            Some(Ok(8)) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// Signals it.
    pub fn signal(&self) {
        // Only fails when the counter is at its limit, and then it is readable.
        let _ = rustix::io::write(self, &1u64.to_ne_bytes());
    }

    /// Lets it raise `gsi`. What was signalled before is raised now.
    pub fn wire(&self, vm: &VmFd, gsi: u32) -> io::Result<()> {
        vm.register_irqfd(&self.0, gsi).map_err(Into::into)
    }

    /// The reverse. When it returns, no signal raises the GSI, and what was raised is not pending.
    pub fn unwire(&self, vm: &VmFd, gsi: u32) -> io::Result<()> {
        vm.unregister_irqfd(&self.0, gsi).map_err(Into::into)
    }

    /// Lets the guest's 32-bit store of `value` at `address` signal it, without an exit.
    pub fn listen(&self, vm: &VmFd, address: u64, value: u32) -> io::Result<()> {
        vm.register_ioevent(&self.0, &IoEventAddress::Mmio(address), value)
            .map_err(Into::into)
    }

    /// The reverse.
    pub fn deafen(&self, vm: &VmFd, address: u64, value: u32) -> io::Result<()> {
        vm.unregister_ioevent(&self.0, &IoEventAddress::Mmio(address), value)
            .map_err(Into::into)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the fd is open as long as `self`, which the borrow holds.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
