//! A VM's memory slots, and the mappable areas of a function's regions in them.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION lets a guest into memory of this process.

use super::SlotError;
use super::memory::Memory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, mem::ManuallyDrop};
use vfio_shim::model::{Function, RegionIndex, Span};

/// The most slots of a VM that are ours; KVM on x86 has 32,764.
pub const SLOTS_MAX: u32 = 512;
const PAGE: u64 = 4096;

/// Owns the slot numbers of a VM from `first` on; those below are the VMM's own.
pub struct Slots {
    /// None in a stand-in.
    vm: Option<Arc<VmFd>>,
    first: u32,
    used: Mutex<BTreeSet<u32>>,
}

/// Memory that the guest reaches without an exit. On drop the slot goes first, and the guest is
/// out when KVM has taken it away; only then is the memory unmapped.
pub struct Slot {
    slots: Arc<Slots>,
    number: u32,
    span: Span,
    memory: ManuallyDrop<Memory>,
}

impl Slots {
    /// Slots `first..first + SLOTS_MAX` of this VM.
    pub fn new(vm: Arc<VmFd>, first: u32) -> Arc<Self> {
        Self::of(Some(vm), first)
    }

    pub(super) fn of(vm: Option<Arc<VmFd>>, first: u32) -> Arc<Self> {
        Arc::new(Self {
            vm,
            first,
            used: Mutex::default(),
        })
    }

    /// Shows the guest memory of `fd`, from `offset` on, at the addresses `span`.
    pub fn map(
        self: &Arc<Self>,
        span: Span,
        fd: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<Slot, SlotError> {
        if span.is_empty() || !span.is_aligned(PAGE) || !offset.is_multiple_of(PAGE) {
            return Err(SlotError::Align(span));
        }
        let refused = |act| move |source: io::Error| SlotError::Kernel { act, span, source };
        let memory = Memory::new(fd, offset, span.len(), span.start())
            .map_err(refused("map the memory behind"))?;
        let mut used = self.used();
        let number = (self.first..self.first.saturating_add(SLOTS_MAX))
            .find(|number| !used.contains(number))
            .ok_or(SlotError::Full(SLOTS_MAX))?;
        self.set(number, span.start(), &memory, span.len())
            .map_err(refused("add a memory slot at"))?;
        used.insert(number);
        Ok(Slot {
            slots: Arc::clone(self),
            number,
            span,
            memory: ManuallyDrop::new(memory),
        })
    }

    /// Shows the guest the areas of a function's region that may be mapped; the region begins at
    /// guest address `at`. Empty where every access has to be trapped.
    pub fn map_region(
        self: &Arc<Self>,
        function: &dyn Function,
        region: RegionIndex,
        at: u64,
    ) -> Result<Vec<Slot>, SlotError> {
        let Some(info) = function.info().region(region) else {
            return Ok(Vec::new());
        };
        let Some((fd, base)) = function.mmap_fd(region) else {
            return Ok(Vec::new());
        };
        let bad = || SlotError::Areas(region.0);
        if !info.areas_are_sound() {
            return Err(bad());
        }
        let map = |area: &Span| {
            let start = at.checked_add(area.start()).ok_or_else(bad)?;
            let span = Span::new(start, area.len()).ok_or_else(bad)?;
            let offset = base.checked_add(area.start()).ok_or_else(bad)?;
            self.map(span, fd, offset)
        };
        info.areas.iter().map(map).collect()
    }

    /// How many slots are in use.
    pub fn used_count(&self) -> usize {
        self.used().len()
    }

    fn used(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, number: u32, guest: u64, memory: &Memory, len: u64) -> io::Result<()> {
        let Some(vm) = &self.vm else {
            return Ok(());
        };
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: memory.host_address(),
        };
        // SAFETY: `memory` is mapped for `len` bytes, shared, and read by us in volatile accesses
        // only. `Slot` unmaps it only after this slot is taken away.
        unsafe { vm.set_user_memory_region(region) }.map_err(Into::into)
    }
}

impl Slot {
    /// The guest-physical addresses.
    pub fn span(&self) -> Span {
        self.span
    }

    /// The memory behind it.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // A size of 0 takes it away.
        if let Err(error) = self
            .slots
            .set(self.number, self.span.start(), &self.memory, 0)
        {
            // The mapping stays for good: another one at its address would be open to the guest.
            tracing::error!(span = %self.span, %error, "a memory slot stays");
            return;
        }
        self.slots.used().remove(&self.number);
        // SAFETY: the field is not used after this, as the slot itself is going.
        unsafe { ManuallyDrop::drop(&mut self.memory) };
    }
}
