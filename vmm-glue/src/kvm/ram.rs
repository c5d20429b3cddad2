//! A guest's memory: a memfd in a memory slot, which a function may reach by DMA.

use super::{Slot, SlotError, Slots};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vfio_shim::model::Span;

/// One contiguous run of guest memory. It ends after the vCPUs and the attachments.
pub struct Ram {
    slot: Slot,
    fd: OwnedFd,
}

impl Ram {
    /// Empty memory at these guest-physical addresses.
    pub fn new(slots: &Arc<Slots>, span: Span) -> Result<Self, SlotError> {
        let refused = |act| {
            move |source: rustix::io::Errno| SlotError::Kernel {
                act,
                span,
                source: source.into(),
            }
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create("guest-ram", flags).map_err(refused("make memory for"))?;
        ftruncate(&fd, span.len()).map_err(refused("size the memory for"))?;
        // Whoever gets the fd relies on its size.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(refused("seal the memory for"))?;
        let slot = slots.map(span, fd.as_fd(), 0)?;
        Ok(Self { slot, fd })
    }

    /// Guest-physical addresses.
    pub fn span(&self) -> Span {
        self.slot.span()
    }

    /// The memory itself, to be mapped for DMA.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Reads at a guest-physical address. False, and nothing read, where it is not all inside.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let offset = address.checked_sub(self.span().start());
        offset.is_some_and(|offset| self.slot.memory().read(offset, data))
    }

    /// Writes at a guest-physical address. False, and nothing written, where it is not all inside.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let offset = address.checked_sub(self.span().start());
        offset.is_some_and(|offset| self.slot.memory().write(offset, data))
    }

    /// A little-endian word.
    pub fn read_u64(&self, address: u64) -> Option<u64> {
        let mut word = [0; 8];
        self.read(address, &mut word)
            .then(|| u64::from_le_bytes(word))
    }
}
