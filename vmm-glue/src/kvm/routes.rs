//! The VM's MSI routes: which message a GSI sends, and which GSIs are free.

use super::IrqError;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The first GSI of an MSI: those below are the pins of the I/O APIC.
pub const GSI_FIRST: u32 = 24;
/// KVM takes no GSI from here on (`KVM_MAX_IRQ_ROUTES`).
pub const GSI_END: u32 = 4096;
/// The most MSI routes of a VM. With both legacy chips' pins this stays within KVM's own limit.
pub const ROUTES_MAX: usize = 4000;
/// Pins of one 8259.
const PIC_PINS: u32 = 8;
/// The pin by which the second 8259 hangs on the first.
const PIC_CASCADE: u32 = 2;

/// An MSI message as a guest's driver programs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Where it is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Owns a VM's whole routing table: nobody else may call `KVM_SET_GSI_ROUTING` on this VM.
pub struct Routes {
    /// None in a stand-in.
    vm: Option<Arc<VmFd>>,
    table: Mutex<Table>,
}

struct Table {
    free: BTreeSet<u32>,
    msis: BTreeMap<u32, Msi>,
}

/// A GSI of its own, given back on drop.
pub struct Gsi {
    routes: Arc<Routes>,
    number: u32,
}

/// What KVM sets up itself when the in-kernel irqchip is made, as `KVM_SET_GSI_ROUTING` replaces
/// the table whole.
fn irqchip_pins() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let entry = |gsi, chip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = chip;
        entry.u.irqchip.pin = pin;
        entry
    };
    (0..GSI_FIRST).flat_map(move |gsi| {
        let pic = match gsi / PIC_PINS {
            0 if gsi == PIC_CASCADE => None,
            0 => Some(entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            1 => Some(entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS)),
            _ => None,
        };
        pic.into_iter().chain([entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)])
    })
}

fn msi_entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = msi.address as u32;
    entry.u.msi.address_hi = (msi.address >> 32) as u32;
    entry.u.msi.data = msi.data;
    entry
}

impl Routes {
    /// The table of a VM with the whole in-kernel irqchip; its pins stay as KVM has them.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Self::of(Some(vm))
    }

    pub(super) fn of(vm: Option<Arc<VmFd>>) -> Arc<Self> {
        let table = Table {
            free: (GSI_FIRST..GSI_END).take(ROUTES_MAX).collect(),
            msis: BTreeMap::new(),
        };
        Arc::new(Self {
            vm,
            table: Mutex::new(table),
        })
    }

    /// A free GSI; it sends nothing before its first [`Gsi::route`].
    pub fn allocate(self: &Arc<Self>) -> Result<Gsi, IrqError> {
        let number = self.table().free.pop_first();
        Ok(Gsi {
            routes: Arc::clone(self),
            number: number.ok_or(IrqError::RoutesFull(ROUTES_MAX))?,
        })
    }

    /// What is routed, by GSI.
    pub fn routed(&self) -> Vec<(u32, Msi)> {
        let table = self.table();
        table.msis.iter().map(|(gsi, msi)| (*gsi, *msi)).collect()
    }

    /// How many GSIs are in use.
    pub fn allocated(&self) -> usize {
        ROUTES_MAX - self.table().free.len()
    }

    /// The VM; none in a stand-in.
    pub(super) fn vm(&self) -> Option<&VmFd> {
        self.vm.as_deref()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit(&self, msis: &BTreeMap<u32, Msi>, gsi: u32) -> Result<(), IrqError> {
        let Some(vm) = self.vm() else {
            return Ok(());
        };
        let msis = msis.iter().map(|(gsi, msi)| msi_entry(*gsi, *msi));
        let entries: Vec<_> = irqchip_pins().chain(msis).collect();
        let refused = |source| IrqError::Kernel {
            act: "route an MSI",
            number: gsi,
            source,
        };
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| refused(rustix::io::Errno::NOSPC.into()))?;
        vm.set_gsi_routing(&routing)
            .map_err(|error| refused(error.into()))
    }
}

impl Gsi {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Sends this message from now on. The change is atomic: an interrupt is the old message or
    /// the new one. The same message again costs nothing.
    pub fn route(&self, msi: Msi) -> Result<(), IrqError> {
        let mut table = self.routes.table();
        let before = table.msis.insert(self.number, msi);
        if before == Some(msi) {
            return Ok(());
        }
        let done = self.routes.commit(&table.msis, self.number);
        if done.is_err() {
            match before {
                Some(before) => table.msis.insert(self.number, before),
                None => table.msis.remove(&self.number),
            };
        }
        done
    }
}

impl Drop for Gsi {
    fn drop(&mut self) {
        let mut table = self.routes.table();
        let routed = table.msis.remove(&self.number).is_some();
        if routed && let Err(error) = self.routes.commit(&table.msis, self.number) {
            // It is not free again, so that nobody gets it with this route. Nothing raises it.
            tracing::error!(gsi = self.number, %error, "a GSI keeps its old route");
            return;
        }
        table.free.insert(self.number);
    }
}
