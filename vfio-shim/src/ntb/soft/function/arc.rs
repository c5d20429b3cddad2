//! The shape of an Arc Pro B: a large BAR of memory, one plain MSI, interrupt status by DMA before it.
//!
//! Ids, BARs, capabilities and the layout of the memirq page are those of the device and of the
//! kernel's xe driver (SMARTIO.md; drivers/gpu/drm/xe/xe_memirq.c). The registers of its copy
//! engine are this model's own, and addresses are DMA addresses where the device has its GGTT's.
//!
//! ```text
//! BAR0  0       registers        8 MiB  GGTT (memory here)
//! BAR2  memory of the device (VRAM)
//! ```

use super::behaviour::{Behaviour, Bus};
use super::config::Config;
use super::page::Page;
use crate::model::{
    Aperture, CAP_PM, CONFIG_BYTES_MAX, EXT_CAP_ATS, EXT_CAP_REBAR, FunctionIds, RegionIndex,
};
use crate::vfio::MappedAperture;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The ids of an Arc Pro B, as in the seed document.
pub const ARC_IDS: FunctionIds = FunctionIds {
    vendor: 0x8086,
    device: 0xe212,
    subsystem_vendor: 0x8086,
    subsystem_device: 0x1114,
    class: 0x03_00_00,
    revision: 0,
};
/// BAR0: registers and GGTT.
pub const ARC_BAR0_BYTES: u64 = 16 << 20;
/// Where in BAR0 the GGTT begins.
pub const ARC_GGTT: u64 = 8 << 20;

/// Register: which device this is, 32 bits, read only.
pub const ARC_IDENT: u64 = 0x00;
/// What `ARC_IDENT` reads.
pub const ARC_IDENT_VALUE: u32 = 0x4172_6342;
/// Register: what came of the last copy (`STATUS_IDLE`, ...), 32 bits, read only.
pub const ARC_STATUS: u64 = 0x04;
/// Register: where to copy from, 64 bits.
pub const ARC_SOURCE: u64 = 0x08;
/// Register: where to copy to, 64 bits.
pub const ARC_DESTINATION: u64 = 0x10;
/// Register: how many bytes, 32 bits, at most `TRANSFER_BYTES_MAX`.
pub const ARC_LENGTH: u64 = 0x18;
/// Register: which addresses are offsets into BAR2, 32 bits.
pub const ARC_FLAGS: u64 = 0x1c;
/// Register: DMA address of the memirq page, 64 bits, 0 = no interrupts.
pub const ARC_MEMIRQ: u64 = 0x20;
/// Register: 64 bits that do nothing.
pub const ARC_SCRATCH: u64 = 0x28;
/// Register: any store starts the copy, 32 bits.
pub const ARC_DOORBELL: u64 = 0x30;
/// Register: how many copies were done since reset, 32 bits, read only.
pub const ARC_COMPLETED: u64 = 0x34;

/// `ARC_FLAGS`: the source is in the device's memory.
pub const ARC_FROM_VRAM: u32 = 1;
/// `ARC_FLAGS`: the destination is in the device's memory.
pub const ARC_TO_VRAM: u32 = 2;

/// The copy engine's place in the memirq page.
pub const ARC_MEMIRQ_UNIT: u64 = 15;
/// Memirq page: 16 bytes for each unit, one for each of its events, FFh = it happened. The copy
/// engine's only event is 0, the user interrupt.
pub const ARC_MEMIRQ_STATUS: u64 = 16 * ARC_MEMIRQ_UNIT;
/// Memirq page: one byte for each unit, FFh = it has an event.
pub const ARC_MEMIRQ_SOURCE: u64 = 0x400 + ARC_MEMIRQ_UNIT;
/// Memirq page: 32 bits, which the device reads: the events that may interrupt.
pub const ARC_MEMIRQ_ENABLE: u64 = 0x440;
const USER_INTERRUPT: u32 = 1;

/// Where the seed document's lspci shows the capabilities.
const EXPRESS: u16 = 0x70;
const MSI: u16 = 0xac;
const PM: u16 = 0xd0;
const ARI: u16 = 0x100;
const ATS: u16 = 0x200;
const REBAR: u16 = 0x420;
const EXT_CAP_ARI: u16 = 0x0e;
const PM_VERSION: u16 = 3;
const MIB_SHIFT: u32 = 20;

/// Its config space; `vram_bytes` is a power of two of at least 1 MiB.
pub(super) fn config(vram_bytes: u64) -> Config {
    let mut config = Config::new(&ARC_IDS, CONFIG_BYTES_MAX);
    config.bar(0, ARC_BAR0_BYTES, true);
    config.bar(2, vram_bytes, true);
    config.express(EXPRESS);
    config.msi(MSI);
    config.capability(PM, CAP_PM, &PM_VERSION.to_le_bytes());
    config.extended(ARI, EXT_CAP_ARI, &[0; 4]);
    config.extended(ATS, EXT_CAP_ATS, &[0; 4]);
    config.extended(REBAR, EXT_CAP_REBAR, &rebar_body(vram_bytes));
    config
}

/// A resizable BAR capability behind its header: one BAR, number 2, of so many bytes or fewer.
pub(super) fn rebar_body(bytes: u64) -> [u8; 8] {
    // Size n is 1 MiB << n; bit n + 4 of the capability offers it.
    let size = bytes.ilog2() - MIB_SHIFT;
    let offered = (1u64 << (size + 5)) - (1 << 4);
    let control = u64::from(size << 8 | 1 << 5 | 2);
    (control << 32 | offered & u64::from(u32::MAX)).to_le_bytes()
}

/// Memory of a device: pages come into being when they are stored to.
struct Sparse {
    fd: OwnedFd,
    memory: MappedAperture,
}

impl Sparse {
    fn new(bytes: u64) -> io::Result<Self> {
        let fd = memfd_create("soft-device", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, bytes)?;
        let memory = MappedAperture::memory(fd.as_fd(), 0, bytes)?;
        Ok(Self { fd, memory })
    }

    fn clear(&self) {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = fallocate(&self.fd, hole, 0, self.memory.len()) {
            tracing::error!(%error, "a software function's memory was not cleared");
        }
    }

    fn holds(&self, at: u64, len: usize) -> bool {
        at.checked_add(len as u64)
            .is_some_and(|end| end <= self.memory.len())
    }
}

#[derive(Clone, Copy, Debug)]
struct Copy {
    source: u64,
    destination: u64,
    length: u32,
    flags: u32,
    memirq: u64,
}

pub(super) struct Arc {
    page: Mutex<Page>,
    ggtt: Sparse,
    vram: Sparse,
}

impl Arc {
    pub(super) fn new(vram_bytes: u64) -> io::Result<Self> {
        Ok(Self {
            page: Mutex::new(Page::new(ARC_IDENT_VALUE)),
            ggtt: Sparse::new(ARC_BAR0_BYTES - ARC_GGTT)?,
            vram: Sparse::new(vram_bytes)?,
        })
    }

    fn page(&self) -> MutexGuard<'_, Page> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self, offset: u64, data: &[u8]) -> Option<Copy> {
        let writable = |at| (ARC_SOURCE..ARC_DOORBELL).contains(&at);
        let mut page = self.page();
        page.store(offset, data, ARC_DOORBELL, writable)
            .then(|| Copy {
                source: page.u64(ARC_SOURCE),
                destination: page.u64(ARC_DESTINATION),
                length: page.u32(ARC_LENGTH),
                flags: page.u32(ARC_FLAGS),
                memirq: page.u64(ARC_MEMIRQ),
            })
    }

    fn copy(&self, copy: Copy, bus: &dyn Bus) -> bool {
        if copy.length > super::TRANSFER_BYTES_MAX {
            return false;
        }
        let mut data = vec![0; copy.length as usize];
        let vram = &self.vram;
        let read = match copy.flags & ARC_FROM_VRAM {
            0 => bus.read(copy.source, &mut data),
            _ => {
                vram.memory.read(copy.source, &mut data);
                vram.holds(copy.source, data.len())
            }
        };
        read && match copy.flags & ARC_TO_VRAM {
            0 => bus.write(copy.destination, &data),
            _ => {
                vram.memory.write(copy.destination, &data);
                vram.holds(copy.destination, data.len())
            }
        }
    }

    /// Status, then source, then the MSI: the guest looks at the source first.
    fn interrupt(&self, page: u64, bus: &dyn Bus) {
        let at = |offset| page.checked_add(offset);
        let places = (
            at(ARC_MEMIRQ_ENABLE),
            at(ARC_MEMIRQ_STATUS),
            at(ARC_MEMIRQ_SOURCE),
        );
        let (true, (Some(enable), Some(status), Some(source))) = (page != 0, places) else {
            return;
        };
        let mut mask = [0; 4];
        let enabled = bus.read(enable, &mut mask) && u32::from_le_bytes(mask) & USER_INTERRUPT != 0;
        if bus.write(status, &[0xff]) && bus.write(source, &[0xff]) && enabled {
            bus.interrupt(0);
        }
    }
}

impl Behaviour for Arc {
    fn load(&self, bar: RegionIndex, offset: u64, data: &mut [u8]) {
        match (bar.0, offset.checked_sub(ARC_GGTT)) {
            (0, Some(entry)) => self.ggtt.memory.read(entry, data),
            (0, None) => {
                // Registers that are not there read as zero, as the device's do.
                data.fill(0);
                self.page().load(offset, data);
            }
            _ => self.vram.memory.read(offset, data),
        }
    }

    fn store(&self, bar: RegionIndex, offset: u64, data: &[u8], bus: &dyn Bus) {
        match (bar.0, offset.checked_sub(ARC_GGTT)) {
            (0, Some(entry)) => return self.ggtt.memory.write(entry, data),
            (0, None) => {}
            _ => return self.vram.memory.write(offset, data),
        }
        let Some(copy) = self.asked(offset, data) else {
            return;
        };
        let done = self.copy(copy, bus);
        let mut page = self.page();
        let completed = page.u32(ARC_COMPLETED).wrapping_add(1);
        page.set_u32(ARC_COMPLETED, completed);
        let status = if done {
            super::STATUS_DONE
        } else {
            super::STATUS_FAILED
        };
        page.set_u32(ARC_STATUS, status);
        drop(page);
        self.interrupt(copy.memirq, bus);
    }

    /// A function level reset clears the GGTT's part and all of the memory.
    fn reset(&self) {
        *self.page() = Page::new(ARC_IDENT_VALUE);
        self.ggtt.clear();
        self.vram.clear();
    }
}
