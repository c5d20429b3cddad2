//! Walks a config space's standard and extended capabilities: total, bounded, loops refused.

/// The longest config space (PCIe 6.0 section 7.2).
pub const CONFIG_BYTES_MAX: usize = 4096;
/// The part that plain PCI has.
pub const CONFIG_BYTES_MIN: usize = 256;

/// Offset of the command register.
pub const COMMAND: u16 = 0x04;
/// COMMAND: memory decoding.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// COMMAND: bus mastering, which is DMA and MSI.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// COMMAND: INTx disabled.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Capability id: power management.
pub const CAP_PM: u8 = 0x01;
/// Capability id: MSI.
pub const CAP_MSI: u8 = 0x05;
/// Capability id: PCI Express.
pub const CAP_EXP: u8 = 0x10;
/// Capability id: MSI-X.
pub const CAP_MSIX: u8 = 0x11;

/// Extended capability id: device serial number.
pub const EXT_CAP_DSN: u16 = 0x0003;
/// Extended capability id: address translation services.
pub const EXT_CAP_ATS: u16 = 0x000f;
/// Extended capability id: SR-IOV.
pub const EXT_CAP_SRIOV: u16 = 0x0010;
/// Extended capability id: page requests.
pub const EXT_CAP_PRI: u16 = 0x0013;
/// Extended capability id: resizable BAR.
pub const EXT_CAP_REBAR: u16 = 0x0015;
/// Extended capability id: process address space ids.
pub const EXT_CAP_PASID: u16 = 0x001b;

const STATUS: u16 = 0x06;
const STATUS_CAP_LIST: u16 = 1 << 4;
const CAP_POINTER: u16 = 0x34;
const CAP_FIRST: u16 = 0x40;
const EXT_CAP_FIRST: u16 = 0x100;

/// Why a config space cannot be walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Too short or too long.
    #[error("a config space has 256 to 4096 bytes, not {0}")]
    Length(usize),
    /// A pointer to where no capability can be.
    #[error("the capability list points to {0:#x}, where no capability can be")]
    Pointer(u16),
    /// A pointer to a capability that was passed already.
    #[error("the capability list runs in a loop at {0:#x}")]
    Loop(u16),
}

/// A capability: where it is, and what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its id: 8 bits wide in the standard list, 16 in the extended one.
    pub id: u16,
    /// Where it begins.
    pub offset: u16,
}

/// A config space's bytes, read only. Reads past the end give ones.
#[derive(Clone, Copy, Debug)]
pub struct ConfigView<'a> {
    bytes: &'a [u8],
}

impl<'a> ConfigView<'a> {
    /// Of 256 to 4096 bytes.
    pub fn new(bytes: &'a [u8]) -> Result<Self, ConfigError> {
        if !(CONFIG_BYTES_MIN..=CONFIG_BYTES_MAX).contains(&bytes.len()) {
            return Err(ConfigError::Length(bytes.len()));
        }
        Ok(Self { bytes })
    }

    pub(super) fn of_any_length(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// One byte.
    pub fn u8(self, at: u16) -> u8 {
        self.bytes.get(at as usize).copied().unwrap_or(0xff)
    }

    /// Two bytes, little endian.
    pub fn u16(self, at: u16) -> u16 {
        u16::from_le_bytes([self.u8(at), self.u8(at.saturating_add(1))])
    }

    /// Four bytes, little endian.
    pub fn u32(self, at: u16) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at.saturating_add(2))) << 16
    }

    /// Eight bytes, little endian.
    pub fn u64(self, at: u16) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at.saturating_add(4))) << 32
    }

    /// The standard capabilities in the order of the list.
    pub fn capabilities(self) -> Result<Vec<Capability>, ConfigError> {
        let mut found: Vec<Capability> = Vec::new();
        if self.u16(STATUS) & STATUS_CAP_LIST == 0 {
            return Ok(found);
        }
        // PCI 3.0 section 6.7: the two low bits of a pointer are reserved.
        let mut at = u16::from(self.u8(CAP_POINTER) & !3);
        while at != 0 {
            if at < CAP_FIRST {
                return Err(ConfigError::Pointer(at));
            }
            if found.iter().any(|cap| cap.offset == at) {
                return Err(ConfigError::Loop(at));
            }
            found.push(Capability {
                id: self.u8(at).into(),
                offset: at,
            });
            at = u16::from(self.u8(at + 1) & !3);
        }
        Ok(found)
    }

    /// The extended capabilities in the order of the list; none in a config space of 256 bytes.
    pub fn extended_capabilities(self) -> Result<Vec<Capability>, ConfigError> {
        let mut found: Vec<Capability> = Vec::new();
        let mut at = EXT_CAP_FIRST;
        while at != 0 && self.bytes.len() > EXT_CAP_FIRST as usize {
            if at < EXT_CAP_FIRST || at as usize + 4 > self.bytes.len() {
                return Err(ConfigError::Pointer(at));
            }
            if found.iter().any(|cap| cap.offset == at) {
                return Err(ConfigError::Loop(at));
            }
            // PCIe 6.0 section 7.6.3: id 15:0, version 19:16, next 31:20.
            let header = self.u32(at);
            if found.is_empty() && (header == 0 || header == u32::MAX) {
                break;
            }
            found.push(Capability {
                id: header as u16,
                offset: at,
            });
            at = (header >> 20) as u16 & !3;
        }
        Ok(found)
    }

    /// Where the first standard capability of this id begins. A broken list has none.
    pub fn capability(self, id: u8) -> Option<u16> {
        let all = self.capabilities().ok()?;
        let found = all.iter().find(|cap| cap.id == u16::from(id))?;
        Some(found.offset)
    }

    /// Where the first extended capability of this id begins. A broken list has none.
    pub fn extended_capability(self, id: u16) -> Option<u16> {
        let all = self.extended_capabilities().ok()?;
        Some(all.iter().find(|cap| cap.id == id)?.offset)
    }

    /// The device serial number, 0 = none (PCIe 6.0 section 7.9.3).
    pub fn serial(self) -> u64 {
        self.extended_capability(EXT_CAP_DSN)
            .map_or(0, |at| self.u64(at + 4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> [u8; 4096] {
        let mut config = [0; 4096];
        config[0x06] = 0x10;
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[CAP_PM, 0x80]);
        config[0x80..0x82].copy_from_slice(&[CAP_MSIX, 0]);
        config[0x100..0x104].copy_from_slice(&[0x03, 0, 1, 0x20]);
        config[0x104..0x10c].copy_from_slice(&7u64.to_le_bytes());
        config[0x200..0x204].copy_from_slice(&[0x0f, 0, 1, 0]);
        config
    }

    #[test]
    fn both_lists_are_walked_in_order() {
        let bytes = config();
        let view = ConfigView::new(&bytes).unwrap();
        let ids = |caps: Vec<Capability>| caps.iter().map(|c| (c.id, c.offset)).collect::<Vec<_>>();
        assert_eq!(ids(view.capabilities().unwrap()), [(1, 0x40), (0x11, 0x80)]);
        let extended = ids(view.extended_capabilities().unwrap());
        assert_eq!(extended, [(3, 0x100), (0xf, 0x200)]);
        assert_eq!(view.serial(), 7);
        assert_eq!(view.extended_capability(EXT_CAP_ATS), Some(0x200));
        let short = ConfigView::new(&bytes[..256]).unwrap();
        assert_eq!(short.extended_capabilities(), Ok(vec![]));
    }

    #[test]
    fn loops_and_wild_pointers_are_refused() {
        let mut bytes = config();
        bytes[0x81] = 0x40;
        bytes[0x203] = 0x10;
        let view = ConfigView::new(&bytes).unwrap();
        assert_eq!(view.capabilities(), Err(ConfigError::Loop(0x40)));
        assert_eq!(view.extended_capabilities(), Err(ConfigError::Loop(0x100)));
        bytes[0x81] = 0x10;
        bytes[0x203] = 0x04;
        let view = ConfigView::new(&bytes).unwrap();
        assert_eq!(view.capabilities(), Err(ConfigError::Pointer(0x10)));
        assert_eq!(
            view.extended_capabilities(),
            Err(ConfigError::Pointer(0x40))
        );
        for length in [0, 255, 4097] {
            let refused = ConfigView::new(&vec![0; length]).map(drop);
            assert_eq!(refused, Err(ConfigError::Length(length)));
        }
    }

    proptest! {
        #[test]
        fn any_config_space_is_walked_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 256..=4096)) {
            let view = ConfigView::new(&bytes).unwrap();
            if let Ok(caps) = view.capabilities() {
                prop_assert!(caps.len() <= 48);
            }
            if let Ok(caps) = view.extended_capabilities() {
                prop_assert!(caps.len() <= 960);
            }
            view.serial();
        }
    }
}
