//! A page of device registers: bytes that the guest stores, and words that the device reads and sets.

pub(super) const PAGE: usize = 4096;

/// Registers, little endian.
pub(super) struct Page {
    bytes: Box<[u8; PAGE]>,
}

impl Page {
    /// All zero but the ident register at 0.
    pub(super) fn new(ident: u32) -> Self {
        let mut this = Self {
            bytes: Box::new([0; PAGE]),
        };
        this.set_u32(0, ident);
        this
    }

    pub(super) fn u32(&self, register: u64) -> u32 {
        self.u64(register) as u32
    }

    /// Registers lie well before the end of the page; there it reads as zero.
    pub(super) fn u64(&self, register: u64) -> u64 {
        let bytes = self.bytes.iter().skip(register as usize).take(8);
        bytes
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte))
    }

    pub(super) fn set_u32(&mut self, register: u64, value: u32) {
        let bytes = self.bytes.iter_mut().skip(register as usize);
        for (old, byte) in bytes.zip(value.to_le_bytes()) {
            *old = byte;
        }
    }

    /// A load; past the page nothing is changed in `data`.
    pub(super) fn load(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(self.bytes.iter().skip(from)) {
            *byte = *value;
        }
    }

    /// A guest's store: the bytes for which `writable` holds are stored. True when it touched
    /// `doorbell`.
    pub(super) fn store(
        &mut self,
        offset: u64,
        data: &[u8],
        doorbell: u64,
        writable: impl Fn(u64) -> bool,
    ) -> bool {
        let mut rung = false;
        for (at, byte) in (offset..PAGE as u64).zip(data) {
            rung |= at == doorbell;
            if writable(at) {
                self.bytes[at as usize] = *byte;
            }
        }
        rung
    }
}
