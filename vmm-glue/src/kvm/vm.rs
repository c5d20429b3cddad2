//! A VM with the in-kernel irqchip, and what hands out its memory slots, routes and vCPUs.

use super::{Ram, Routes, RunError, SlotError, Slots};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::Arc;
use vfio_shim::model::Span;

/// Three pages that Intel's virtualization needs somewhere below 4 GiB: under the firmware's.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A VM of this process.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    slots: Arc<Slots>,
    routes: Arc<Routes>,
}

impl Vm {
    /// An empty VM. The first error, where there is no KVM, is that of opening `/dev/kvm`.
    pub fn new() -> Result<Self, RunError> {
        let kvm = Kvm::new().map_err(RunError::kernel("open /dev/kvm"))?;
        let fd = kvm.create_vm().map_err(RunError::kernel("make a VM"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(RunError::kernel("place the VM's TSS"))?;
        fd.create_irq_chip()
            .map_err(RunError::kernel("make the VM's irqchip"))?;
        Ok(Self::adopt(kvm, Arc::new(fd), 0))
    }

    /// A VM that exists, with the whole in-kernel irqchip. Memory slots from `first_slot` on and
    /// the routing table belong to the returned value alone.
    pub fn adopt(kvm: Kvm, fd: Arc<VmFd>, first_slot: u32) -> Self {
        Self {
            kvm,
            slots: Slots::new(Arc::clone(&fd), first_slot),
            routes: Routes::new(Arc::clone(&fd)),
            fd,
        }
    }

    /// Gives the guest memory at these addresses.
    pub fn ram(&self, span: Span) -> Result<Ram, SlotError> {
        Ram::new(&self.slots, span)
    }

    /// A vCPU with all that the host's CPU and KVM support.
    pub fn vcpu(&self, id: u64) -> Result<VcpuFd, RunError> {
        let vcpu = self
            .fd
            .create_vcpu(id)
            .map_err(RunError::kernel("make a vCPU"))?;
        let cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(RunError::kernel("tell what vCPUs support"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(RunError::kernel("set the vCPU's features"))?;
        Ok(vcpu)
    }

    /// KVM's own handle.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// Its memory slots.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Its routing table.
    pub fn routes(&self) -> &Arc<Routes> {
        &self.routes
    }
}
