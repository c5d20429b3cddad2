//! The DMA and checksum engine: copies or sums at a doorbell, then raises one of its MSI-X vectors.

use super::behaviour::{Behaviour, Bus};
use super::config::Config;
use super::page::{PAGE, Page};
use crate::model::{CAP_MSIX, FunctionIds, RegionIndex};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Register: which device this is, 32 bits, read only.
pub const IDENT: u64 = 0x00;
/// What `IDENT` reads.
pub const IDENT_VALUE: u32 = 0x5375_6246;
/// Register: DMA address to read from, 64 bits.
pub const SOURCE: u64 = 0x08;
/// Register: DMA address to copy to, 64 bits.
pub const DESTINATION: u64 = 0x10;
/// Register: how many bytes, 32 bits, at most `TRANSFER_BYTES_MAX`.
pub const LENGTH: u64 = 0x18;
/// Register: the vector that tells the end, 32 bits.
pub const VECTOR: u64 = 0x1c;
/// Register: any store starts the transfer, 32 bits.
pub const DOORBELL: u64 = 0x20;
/// Register: what came of the last transfer, 32 bits, read only.
pub const STATUS: u64 = 0x24;
/// Register: how many transfers were done since reset, 32 bits, read only.
pub const COMPLETED: u64 = 0x28;
/// Register: 64 bits that do nothing.
pub const SCRATCH: u64 = 0x30;
/// Register: what to do, 32 bits.
pub const OPERATION: u64 = 0x38;
/// Register: the last sum, 32 bits, read only.
pub const CHECKSUM: u64 = 0x3c;

/// `OPERATION`: copy from source to destination.
pub const OPERATION_COPY: u32 = 0;
/// `OPERATION`: CRC-32C of the source into `CHECKSUM`.
pub const OPERATION_CHECKSUM: u32 = 1;
/// `STATUS`: none since reset.
pub const STATUS_IDLE: u32 = 0;
/// `STATUS`: done.
pub const STATUS_DONE: u32 = 1;
/// `STATUS`: an address or operation was refused, or bus mastering is off.
pub const STATUS_FAILED: u32 = 2;
/// The longest transfer.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 16;

/// BAR0: the registers' page, then the page of the MSI-X table and PBA.
pub(super) const BAR_BYTES: u64 = 2 * PAGE as u64;
pub(super) const CONFIG_BYTES: usize = 256;
/// The most MSI-X vectors: as many as the table's half page holds.
pub(super) const VECTORS_MAX: u16 = 128;

const MSIX: u16 = 0x40;
const MSIX_TABLE: u32 = PAGE as u32;
const MSIX_PBA: u32 = PAGE as u32 + 0x800;
const EXPRESS: u16 = 0x60;

/// Its config space of `len` bytes.
pub(super) fn config(ids: &FunctionIds, vectors: u16, len: usize) -> Config {
    let mut config = Config::new(ids, len);
    config.bar(0, BAR_BYTES, false);
    let mut msix = (vectors - 1).to_le_bytes().to_vec();
    msix.extend(MSIX_TABLE.to_le_bytes());
    msix.extend(MSIX_PBA.to_le_bytes());
    config.capability(MSIX, CAP_MSIX, &msix);
    config.allow(MSIX + 3, &[0xc0]);
    config.express(EXPRESS);
    config
}

#[derive(Clone, Copy, Debug)]
struct Transfer {
    operation: u32,
    source: u64,
    destination: u64,
    length: u32,
    vector: u32,
}

impl Transfer {
    /// The sum (0 for a copy), or `None` where something was refused.
    fn run(&self, bus: &dyn Bus) -> Option<u32> {
        if self.length > TRANSFER_BYTES_MAX {
            return None;
        }
        let mut data = vec![0; self.length as usize];
        if !bus.read(self.source, &mut data) {
            return None;
        }
        match self.operation {
            OPERATION_COPY => bus.write(self.destination, &data).then_some(0),
            OPERATION_CHECKSUM => Some(crc32c::crc32c(&data)),
            _ => None,
        }
    }
}

pub(super) struct Engine {
    page: Mutex<Page>,
}

impl Engine {
    pub(super) fn new() -> Self {
        Self {
            page: Mutex::new(Page::new(IDENT_VALUE)),
        }
    }

    fn page(&self) -> MutexGuard<'_, Page> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asked(&self, offset: u64, data: &[u8]) -> Option<Transfer> {
        let writable = |at| {
            let scratch = SCRATCH..CHECKSUM;
            (SOURCE..DOORBELL).contains(&at) || scratch.contains(&at)
        };
        let mut page = self.page();
        page.store(offset, data, DOORBELL, writable)
            .then(|| Transfer {
                operation: page.u32(OPERATION),
                source: page.u64(SOURCE),
                destination: page.u64(DESTINATION),
                length: page.u32(LENGTH),
                vector: page.u32(VECTOR),
            })
    }
}

impl Behaviour for Engine {
    fn load(&self, _bar: RegionIndex, offset: u64, data: &mut [u8]) {
        // The MSI-X table's page stays all ones, as VFIO shows it.
        self.page().load(offset, data);
    }

    fn store(&self, _bar: RegionIndex, offset: u64, data: &[u8], bus: &dyn Bus) {
        let Some(transfer) = self.asked(offset, data) else {
            return;
        };
        let sum = transfer.run(bus);
        let mut page = self.page();
        let completed = page.u32(COMPLETED).wrapping_add(1);
        page.set_u32(COMPLETED, completed);
        page.set_u32(CHECKSUM, sum.unwrap_or(0));
        let status = if sum.is_some() {
            STATUS_DONE
        } else {
            STATUS_FAILED
        };
        page.set_u32(STATUS, status);
        drop(page);
        bus.interrupt(transfer.vector);
    }

    fn reset(&self) {
        *self.page() = Page::new(IDENT_VALUE);
    }
}
