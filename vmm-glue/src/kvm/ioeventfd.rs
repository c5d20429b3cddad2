//! A doorbell of a function that the guest rings without an exit: an ioeventfd at a BAR's offset.
//!
//! It fits a 32-bit register whose store starts something and always has the same value. The store
//! reaches the function from the thread in `Attachment::serve_doorbells`, or before the guest's
//! next trapped access, whichever is first: stores stay in the guest's order.

use super::AttachError;
use super::event::Event;
use kvm_ioctls::VmFd;
use std::sync::{Arc, Mutex, PoisonError};
use vfio_shim::model::{Function, RegionIndex};

/// The most doorbells of one function.
pub const DOORBELLS_MAX: usize = 64;

/// Which store is a doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// The BAR.
    pub region: RegionIndex,
    /// The register's offset in it.
    pub offset: u64,
    /// The value that is stored, 32 bits.
    pub value: u32,
}

/// A doorbell that is listened to; on drop the guest's stores exit again.
pub(super) struct DoorbellFd {
    vm: Option<Arc<VmFd>>,
    bell: Doorbell,
    address: u64,
    event: Event,
    /// Held from taking the rings until they are with the function.
    order: Mutex<()>,
}

impl DoorbellFd {
    /// Without a VM, in a stand-in, every store comes as a trapped one anyway.
    pub fn new(vm: Option<Arc<VmFd>>, bell: Doorbell, address: u64) -> Result<Self, AttachError> {
        let refused = |act| {
            move |source| AttachError::Doorbell {
                act,
                address,
                source,
            }
        };
        let event = Event::new().map_err(refused("make an eventfd for"))?;
        if let Some(vm) = &vm {
            let listened = event.listen(vm, address, bell.value);
            listened.map_err(refused("listen to"))?;
        }
        Ok(Self {
            vm,
            bell,
            address,
            event,
            order: Mutex::default(),
        })
    }

    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Makes the stores that were rung so far.
    pub fn ring(&self, function: &dyn Function) {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let Doorbell {
            region,
            offset,
            value,
        } = self.bell;
        for _ in 0..self.event.take() {
            if let Err(error) = function.region_write(region, offset, &value.to_le_bytes()) {
                tracing::debug!(?region, offset, %error, "a doorbell was dropped");
            }
        }
    }
}

impl Drop for DoorbellFd {
    fn drop(&mut self) {
        let Some(vm) = &self.vm else { return };
        if let Err(error) = self.event.deafen(vm, self.address, self.bell.value) {
            tracing::error!(address = self.address, %error, "a doorbell is left until the VM ends");
        }
    }
}
