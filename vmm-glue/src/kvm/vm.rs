//! A VM with the in-kernel irqchip, or a stand-in for one, and what hands out its memory slots, routes and vCPUs.

use super::{Ram, Routes, RunError, SlotError, Slots};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::Arc;
use vfio_shim::model::Span;

/// Three pages that Intel's virtualization needs somewhere below 4 GiB: under the firmware's.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A VM of this process.
pub struct Vm {
    kvm: Option<(Kvm, Arc<VmFd>)>,
    slots: Arc<Slots>,
    routes: Arc<Routes>,
}

impl Vm {
    /// An empty VM.
    pub fn new() -> Result<Self, RunError> {
        let kvm = Kvm::new().map_err(RunError::kernel("open /dev/kvm"))?;
        Self::make(kvm)
    }

    /// An empty VM; a stand-in, and why, exactly where `/dev/kvm` does not open. What fails behind
    /// an open door is an error.
    pub fn new_or_stand_in() -> Result<(Self, Option<RunError>), RunError> {
        match Kvm::new() {
            Ok(kvm) => Ok((Self::make(kvm)?, None)),
            Err(error) => {
                let why = RunError::kernel("open /dev/kvm")(error);
                Ok((Self::stand_in(), Some(why)))
            }
        }
    }

    fn make(kvm: Kvm) -> Result<Self, RunError> {
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
            slots: Slots::new(Arc::clone(&fd), first_slot),
            routes: Routes::new(Arc::clone(&fd)),
            kvm: Some((kvm, fd)),
        }
    }

    /// What stands in for a VM where `/dev/kvm` does not open: attachments are the same but for
    /// KVM's part, and [`tiny::start`](super::tiny::start) does the steps in a thread of this
    /// process. It has no vCPU.
    pub fn stand_in() -> Self {
        Self {
            kvm: None,
            slots: Slots::of(None, 0),
            routes: Routes::of(None),
        }
    }

    /// Whether it is a VM, and no stand-in.
    pub fn is_kvm(&self) -> bool {
        self.kvm.is_some()
    }

    /// Gives the guest memory at these addresses.
    pub fn ram(&self, span: Span) -> Result<Ram, SlotError> {
        Ram::new(&self.slots, span)
    }

    /// A vCPU with all that the host's CPU and KVM support.
    pub fn vcpu(&self, id: u64) -> Result<VcpuFd, RunError> {
        let (kvm, fd) = self.kvm.as_ref().ok_or(RunError::StandIn)?;
        let vcpu = fd
            .create_vcpu(id)
            .map_err(RunError::kernel("make a vCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(RunError::kernel("tell what vCPUs support"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(RunError::kernel("set the vCPU's features"))?;
        Ok(vcpu)
    }

    /// KVM's own handle; none in a stand-in.
    pub fn fd(&self) -> Option<&Arc<VmFd>> {
        self.kvm.as_ref().map(|(_, fd)| fd)
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
