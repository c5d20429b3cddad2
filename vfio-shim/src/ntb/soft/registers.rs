//! What the software function consists of: its config space and its page of registers.

use crate::model::FunctionIds;

/// Register: which device this is, 32 bits, read only.
pub const IDENT: u64 = 0x00;
/// What `IDENT` reads.
pub const IDENT_VALUE: u32 = 0x5375_6246;
/// Register: DMA address to copy from, 64 bits.
pub const SOURCE: u64 = 0x08;
/// Register: DMA address to copy to, 64 bits.
pub const DESTINATION: u64 = 0x10;
/// Register: how many bytes, 32 bits, at most `TRANSFER_BYTES_MAX`.
pub const LENGTH: u64 = 0x18;
/// Register: the vector that tells the end, 32 bits.
pub const VECTOR: u64 = 0x1c;
/// Register: any store starts the copy, 32 bits.
pub const DOORBELL: u64 = 0x20;
/// Register: what came of the last copy, 32 bits, read only.
pub const STATUS: u64 = 0x24;
/// Register: how many copies were done since reset, 32 bits, read only.
pub const COMPLETED: u64 = 0x28;
/// Register: 64 bits that do nothing.
pub const SCRATCH: u64 = 0x30;

/// `STATUS`: none since reset.
pub const STATUS_IDLE: u32 = 0;
/// `STATUS`: copied.
pub const STATUS_DONE: u32 = 1;
/// `STATUS`: an address was refused, or bus mastering is off.
pub const STATUS_FAILED: u32 = 2;
/// The longest copy.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 16;

pub(super) const PAGE: usize = 4096;
/// BAR0: the registers' page, then the page of the MSI-X table and PBA.
pub(super) const BAR_BYTES: u64 = 2 * PAGE as u64;
pub(super) const CONFIG_BYTES: usize = 256;

/// PCI config space offsets (PCI 3.0 section 6.1) and COMMAND's bits.
pub(super) const COMMAND: usize = 0x04;
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
pub(super) const COMMAND_MASTER: u16 = 1 << 2;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR0: usize = 0x10;
const BAR1: usize = 0x14;
const BAR_64_BIT: u8 = 1 << 2;
const CAPABILITIES: usize = 0x34;
const MSIX: usize = 0x40;
const MSIX_ID: u8 = 0x11;
const MSIX_TABLE: u32 = PAGE as u32;
const MSIX_PBA: u32 = PAGE as u32 + 0x800;
const EXPRESS: usize = 0x60;
const EXPRESS_ID: u8 = 0x10;
const EXPRESS_VERSION: u8 = 2;
const DEVICE_CAP_FLR: u32 = 1 << 28;

/// Config space and registers.
pub(super) struct Registers {
    pub(super) config: [u8; CONFIG_BYTES],
    power_on: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    pub(super) page: [u8; PAGE],
}

/// A copy that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) source: u64,
    pub(super) destination: u64,
    pub(super) length: u32,
    pub(super) vector: u32,
    pub(super) allowed: bool,
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

impl Registers {
    pub(super) fn new(ids: &FunctionIds, vectors: u16) -> Self {
        let mut config = [0; CONFIG_BYTES];
        put(&mut config, 0x00, &ids.vendor.to_le_bytes());
        put(&mut config, 0x02, &ids.device.to_le_bytes());
        put(&mut config, 0x06, &STATUS_CAPABILITIES.to_le_bytes());
        let class = ids.class << 8 | u32::from(ids.revision);
        put(&mut config, 0x08, &class.to_le_bytes());
        config[BAR0] = BAR_64_BIT;
        put(&mut config, 0x2c, &ids.subsystem_vendor.to_le_bytes());
        put(&mut config, 0x2e, &ids.subsystem_device.to_le_bytes());
        config[CAPABILITIES] = MSIX as u8;
        config[MSIX] = MSIX_ID;
        config[MSIX + 1] = EXPRESS as u8;
        put(&mut config, MSIX + 2, &(vectors - 1).to_le_bytes());
        put(&mut config, MSIX + 4, &MSIX_TABLE.to_le_bytes());
        put(&mut config, MSIX + 8, &MSIX_PBA.to_le_bytes());
        config[EXPRESS] = EXPRESS_ID;
        config[EXPRESS + 2] = EXPRESS_VERSION;
        put(&mut config, EXPRESS + 4, &DEVICE_CAP_FLR.to_le_bytes());

        let mut writable = [0; CONFIG_BYTES];
        let command = COMMAND_MEMORY | COMMAND_MASTER;
        put(&mut writable, COMMAND, &command.to_le_bytes());
        let bar_mask = !(BAR_BYTES as u32 - 1);
        put(&mut writable, BAR0, &bar_mask.to_le_bytes());
        put(&mut writable, BAR1, &u32::MAX.to_le_bytes());
        writable[0x3c] = 0xff;
        writable[MSIX + 3] = 0xc0;
        let mut this = Self {
            config,
            power_on: config,
            writable,
            page: [0; PAGE],
        };
        this.reset();
        this
    }

    pub(super) fn command(&self) -> u16 {
        u16::from_le_bytes([self.config[COMMAND], self.config[COMMAND + 1]])
    }

    /// As VFIO leaves it: memory decoding stays as it was, bus mastering is off.
    pub(super) fn reset(&mut self) {
        let memory = self.command() & COMMAND_MEMORY;
        self.config = self.power_on;
        put(&mut self.config, COMMAND, &memory.to_le_bytes());
        self.page.fill(0);
        put(&mut self.page, IDENT as usize, &IDENT_VALUE.to_le_bytes());
    }

    pub(super) fn config_write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..CONFIG_BYTES).zip(data) {
            let mask = self.writable[at];
            self.config[at] = self.config[at] & !mask | byte & mask;
        }
    }

    fn u32(&self, register: u64) -> u32 {
        self.u64(register) as u32
    }

    fn u64(&self, register: u64) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.page[register as usize..register as usize + 8]);
        u64::from_le_bytes(word)
    }

    /// A store to the page; a transfer when it touched the doorbell.
    pub(super) fn store(&mut self, offset: usize, data: &[u8]) -> Option<Transfer> {
        let plain = |at: usize| {
            let at = at as u64;
            (SOURCE..DOORBELL).contains(&at) || (SCRATCH..SCRATCH + 8).contains(&at)
        };
        let mut rung = false;
        for (at, byte) in (offset..PAGE).zip(data) {
            if plain(at) {
                self.page[at] = *byte;
            }
            rung |= at as u64 == DOORBELL;
        }
        rung.then(|| Transfer {
            source: self.u64(SOURCE),
            destination: self.u64(DESTINATION),
            length: self.u32(LENGTH),
            vector: self.u32(VECTOR),
            allowed: self.command() & COMMAND_MASTER != 0,
        })
    }

    pub(super) fn completed(&mut self, status: u32) {
        let count = self.u32(COMPLETED).wrapping_add(1);
        put(&mut self.page, STATUS as usize, &status.to_le_bytes());
        put(&mut self.page, COMPLETED as usize, &count.to_le_bytes());
    }
}
