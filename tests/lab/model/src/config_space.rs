//! The 256 bytes of configuration space of one half.

/// Bytes of the configuration space: no PCI Express capability, so no extended space.
pub const CONFIG_BYTES: usize = 256;
/// Bytes of BAR0, the registers.
pub const BAR0_BYTES: u64 = 64 << 10;
/// MSI-X vectors.
pub const VECTORS: usize = 33;
/// Where the MSI-X table lies in BAR0.
pub const MSIX_TABLE: u16 = 0x4000;
/// Where the pending bits lie in BAR0.
pub const MSIX_PBA: u16 = 0x5000;

const VENDOR_INTEL: u16 = 0x8086;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITY: usize = 0x80;
const MSIX_CONTROL: usize = CAPABILITY + 2;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const MSIX_ENABLE: u8 = 1 << 7;
/// 64 bit, prefetchable.
const BAR_FLAGS: u8 = 0xC;

/// Configuration space with the bits that a client may write.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bar_bytes: [u64; 3],
}

impl ConfigSpace {
    /// The function as it comes out of reset; `window_bytes` are the sizes of BAR2 and BAR4.
    pub fn new(device: u16, revision: u8, window_bytes: [u64; 2]) -> Self {
        let mut bytes = [0; CONFIG_BYTES];
        let mut writable = [0; CONFIG_BYTES];
        bytes[0..2].copy_from_slice(&VENDOR_INTEL.to_le_bytes());
        bytes[2..4].copy_from_slice(&device.to_le_bytes());
        bytes[STATUS] = 1 << 4;
        bytes[8] = revision;
        // Class 06 80 00: bridge, other.
        bytes[0x0A] = 0x80;
        bytes[0x0B] = 0x06;
        bytes[0x2C..0x2E].copy_from_slice(&VENDOR_INTEL.to_le_bytes());
        bytes[0x34] = CAPABILITY as u8;
        bytes[CAPABILITY] = 0x11;
        bytes[MSIX_CONTROL] = VECTORS as u8 - 1;
        bytes[CAPABILITY + 4..CAPABILITY + 8].copy_from_slice(&u32::from(MSIX_TABLE).to_le_bytes());
        bytes[CAPABILITY + 8..CAPABILITY + 12].copy_from_slice(&u32::from(MSIX_PBA).to_le_bytes());
        writable[COMMAND..COMMAND + 2].copy_from_slice(&0x0546u16.to_le_bytes());
        writable[0x0C] = 0xFF;
        writable[0x3C] = 0xFF;
        writable[MSIX_CONTROL + 1] = 0xC0;
        let bar_bytes = [BAR0_BYTES, window_bytes[0], window_bytes[1]];
        for (n, size) in bar_bytes.into_iter().enumerate() {
            let at = BARS + 8 * n;
            bytes[at] = BAR_FLAGS;
            writable[at..at + 8].copy_from_slice(&(!(size - 1) & !0xF).to_le_bytes());
        }
        Self {
            bytes,
            writable,
            bar_bytes,
        }
    }

    /// Forgets everything a client wrote.
    pub fn reset(&mut self) {
        for (byte, writable) in self.bytes.iter_mut().zip(self.writable) {
            *byte &= !writable;
        }
    }

    /// The bytes at `offset`, or `None` outside the space.
    pub fn read(&self, offset: u64, count: usize) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes.get(start..start.checked_add(count)?)
    }

    /// Writes what is writable; `None` outside the space.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<()> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(data.len())?;
        let bytes = self.bytes.get_mut(start..end)?;
        for ((byte, writable), new) in bytes.iter_mut().zip(&self.writable[start..end]).zip(data) {
            *byte = *byte & !writable | new & writable;
        }
        Some(())
    }

    /// Whether the function may start DMA and MSIs.
    pub fn bus_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_BUS_MASTER != 0
    }

    /// Whether MSI-X is enabled.
    pub fn msix_enabled(&self) -> bool {
        self.bytes[MSIX_CONTROL + 1] & MSIX_ENABLE != 0
    }

    /// The base address of a window's BAR as the client programmed it.
    pub fn window_base(&self, window: usize) -> u64 {
        let at = BARS + 8 * (window + 1);
        let value = self.bytes[at..at + 8]
            .iter()
            .rev()
            .fold(0, |v, b| v << 8 | u64::from(*b));
        value & !0xF
    }

    /// Bytes of a region by its VFIO index; 0 for a region that is not there.
    pub fn region_bytes(&self, index: u32) -> u64 {
        match index {
            0 => self.bar_bytes[0],
            2 => self.bar_bytes[1],
            4 => self.bar_bytes[2],
            7 => CONFIG_BYTES as u64,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ConfigSpace {
        ConfigSpace::new(0x347E, 0x10, [1 << 30, 1 << 20])
    }

    #[test]
    fn header_and_msix_capability_are_those_of_the_map() {
        let config = config();
        assert_eq!(config.read(0, 4), Some(&[0x86, 0x80, 0x7E, 0x34][..]));
        assert_eq!(config.read(8, 4), Some(&[0x10, 0x00, 0x80, 0x06][..]));
        assert_eq!(config.read(0x0E, 1), Some(&[0][..]));
        let capability = [0x11, 0, 0x20, 0, 0x00, 0x40, 0, 0, 0x00, 0x50, 0, 0];
        assert_eq!(config.read(0x80, 12), Some(&capability[..]));
    }

    #[test]
    fn sizing_a_bar_gives_its_size_and_64_bit_prefetchable() {
        for (at, size) in [(0x10, 64u64 << 10), (0x18, 1 << 30), (0x20, 1 << 20)] {
            let mut config = config();
            config.write(at, &[0xFF; 8]).expect("inside");
            let expected = (!(size - 1) | 0xC).to_le_bytes();
            assert_eq!(config.read(at, 8), Some(&expected[..]));
        }
    }

    #[test]
    fn programmed_bar_is_the_window_base_and_a_reset_forgets_it() {
        let mut config = config();
        config
            .write(0x18, &0x80_4000_000Cu64.to_le_bytes())
            .expect("inside");
        config.write(0x04, &[0xFF, 0xFF]).expect("inside");
        config.write(0x82, &[0xFF, 0xFF]).expect("inside");
        assert_eq!(config.window_base(0), 0x80_4000_0000);
        assert!(config.bus_master() && config.msix_enabled());
        config.reset();
        assert_eq!(config.window_base(0), 0);
        assert!(!config.bus_master() && !config.msix_enabled());
        assert_eq!(config.read(0x80, 4), Some(&[0x11, 0, 0x20, 0][..]));
    }

    #[test]
    fn access_past_the_end_is_refused() {
        let mut config = config();
        assert_eq!(config.read(252, 8), None);
        assert_eq!(config.read(u64::MAX, 8), None);
        assert_eq!(config.write(255, &[0, 0]), None);
    }
}
