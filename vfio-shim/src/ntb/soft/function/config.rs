//! A software function's config space: what is in it, and which bits of it can be written.

use crate::model::{CAP_EXP, CAP_MSI, COMMAND, COMMAND_MASTER, COMMAND_MEMORY, FunctionIds};

const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const BAR_FIRST: u16 = 0x10;
const BAR_64_BIT: u32 = 1 << 2;
const BAR_PREFETCHABLE: u32 = 1 << 3;
const CAP_POINTER: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;

/// MSI with a 64-bit address and a mask register (PCI 3.0 section 6.8.1).
const MSI_64: u16 = 1 << 7;
const MSI_MASKABLE: u16 = 1 << 8;
const MSI_MASK: u16 = 0x10;
/// PCI Express: a version 2 endpoint with function level reset.
const EXPRESS_VERSION: u16 = 2;
const DEVICE_CAP_FLR: u32 = 1 << 28;

/// Config space with power-on values and write masks.
pub(super) struct Config {
    bytes: Vec<u8>,
    power_on: Vec<u8>,
    writable: Vec<u8>,
    next_pointer: u16,
    extended_last: Option<u16>,
    msi: Option<u16>,
}

impl Config {
    pub(super) fn new(ids: &FunctionIds, len: usize) -> Self {
        let mut this = Self {
            bytes: vec![0; len],
            power_on: Vec::new(),
            writable: vec![0; len],
            next_pointer: CAP_POINTER,
            extended_last: None,
            msi: None,
        };
        this.put(0x00, &ids.vendor.to_le_bytes());
        this.put(0x02, &ids.device.to_le_bytes());
        this.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        let class = ids.class << 8 | u32::from(ids.revision);
        this.put(0x08, &class.to_le_bytes());
        this.put(0x2c, &ids.subsystem_vendor.to_le_bytes());
        this.put(0x2e, &ids.subsystem_device.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER;
        this.allow(COMMAND, &command.to_le_bytes());
        this.allow(INTERRUPT_LINE, &[0xff]);
        this
    }

    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// A 64-bit memory BAR of a power of two bytes.
    pub(super) fn bar(&mut self, bar: u32, size: u64, prefetchable: bool) {
        let at = BAR_FIRST + 4 * bar as u16;
        let kind = if prefetchable { BAR_PREFETCHABLE } else { 0 };
        self.put(at, &(BAR_64_BIT | kind).to_le_bytes());
        self.allow(at, &(!(size - 1)).to_le_bytes());
    }

    /// A standard capability; `body` is what follows its id and link.
    pub(super) fn capability(&mut self, at: u16, id: u8, body: &[u8]) {
        self.put(self.next_pointer, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.next_pointer = at + 1;
    }

    /// An extended capability of version 1; `body` is what follows its header.
    pub(super) fn extended(&mut self, at: u16, id: u16, body: &[u8]) {
        if let Some(last) = self.extended_last {
            self.put(last + 2, &(at << 4 | 1).to_le_bytes());
        }
        self.put(at, &id.to_le_bytes());
        self.put(at + 2, &1u16.to_le_bytes());
        self.put(at + 4, body);
        self.extended_last = Some(at);
    }

    pub(super) fn express(&mut self, at: u16) {
        let mut body = [0; 0x3a];
        body[..2].copy_from_slice(&EXPRESS_VERSION.to_le_bytes());
        body[2..6].copy_from_slice(&DEVICE_CAP_FLR.to_le_bytes());
        self.capability(at, CAP_EXP, &body);
    }

    /// One MSI with a mask register.
    pub(super) fn msi(&mut self, at: u16) {
        let control = MSI_64 | MSI_MASKABLE;
        self.capability(at, CAP_MSI, &control.to_le_bytes());
        self.allow(at + 2, &[1]);
        self.allow(at + 4, &(!3u64).to_le_bytes());
        self.allow(at + 0xc, &[0xff; 2]);
        self.allow(at + MSI_MASK, &[1]);
        self.msi = Some(at);
    }

    /// What is in it now is what it has at power-on.
    pub(super) fn seal(mut self) -> Self {
        self.power_on.clone_from(&self.bytes);
        self
    }

    pub(super) fn put(&mut self, at: u16, value: &[u8]) {
        let bytes = self.bytes.iter_mut().skip(at.into());
        bytes.zip(value).for_each(|(old, byte)| *old = *byte);
    }

    pub(super) fn allow(&mut self, at: u16, mask: &[u8]) {
        let writable = self.writable.iter_mut().skip(at.into());
        writable.zip(mask).for_each(|(old, byte)| *old |= *byte);
    }

    /// What a device changes in its own config space is its power-on value from then on.
    pub(super) fn assign(&mut self, at: u16, value: &[u8]) {
        self.put(at, value);
        let power_on = self.power_on.iter_mut().skip(at.into());
        power_on.zip(value).for_each(|(old, byte)| *old = *byte);
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes.iter().skip(offset as usize);
        data.iter_mut()
            .zip(bytes)
            .for_each(|(byte, value)| *byte = *value);
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(&self.writable);
        for ((old, mask), byte) in bytes.skip(offset as usize).zip(data) {
            *old = *old & !mask | byte & mask;
        }
    }

    /// As VFIO leaves it: memory decoding stays as it was, bus mastering is off.
    pub(super) fn reset(&mut self) {
        let memory = self.command() & COMMAND_MEMORY;
        self.bytes.clone_from(&self.power_on);
        self.put(COMMAND, &memory.to_le_bytes());
    }

    pub(super) fn command(&self) -> u16 {
        let mut word = [0; 2];
        self.read(COMMAND.into(), &mut word);
        u16::from_le_bytes(word)
    }

    /// Whether the guest has masked its one MSI.
    pub(super) fn msi_masked(&self) -> bool {
        let mut mask = [0];
        if let Some(at) = self.msi {
            self.read((at + MSI_MASK).into(), &mut mask);
        }
        mask[0] & 1 != 0
    }
}
