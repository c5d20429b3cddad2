//! How an access to a memory window becomes a DMA address of the receiving host.

/// Where the receiving half's registers put its end of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inbound {
    /// XBASE: the DMA address that offset 0 reaches.
    pub base: u64,
    /// XLMT: the end of the open part, in the receiving half's own BAR address space.
    pub limit: u64,
    /// The receiving half's own BAR base.
    pub bar_base: u64,
}

impl Inbound {
    /// The DMA address that an access reaches, or `None` when the window is closed there.
    pub fn translate(&self, offset: u64, bytes: u64) -> Option<u64> {
        let open_bytes = self.limit.checked_sub(self.bar_base)?;
        let end = offset.checked_add(bytes)?;
        if end > open_bytes {
            return None;
        }
        let address = self.base.checked_add(offset)?;
        address.checked_add(bytes)?;
        Some(address)
    }
}

/// First address of the range where a 4-byte write is an MSI.
const MSI_FIRST: u64 = 0xFEE0_0000;
/// Last address of that range.
const MSI_LAST: u64 = 0xFEEF_FFFF;

/// True when any byte of an access lies in the interrupt range.
pub fn touches_msi_range(address: u64, bytes: u64) -> bool {
    address <= MSI_LAST && address.saturating_add(bytes) > MSI_FIRST
}

/// True for the one form of write that is an MSI: 4 bytes, naturally aligned.
pub fn is_msi(address: u64, bytes: u64) -> bool {
    touches_msi_range(address, bytes) && bytes == 4 && address.is_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Inbound = Inbound {
        base: 0x8000_0000,
        limit: 0x5000,
        bar_base: 0x4000,
    };

    #[test]
    fn access_up_to_the_limit_passes_and_one_byte_more_does_not() {
        assert_eq!(OPEN.translate(0, 8), Some(0x8000_0000));
        assert_eq!(OPEN.translate(0xFF8, 8), Some(0x8000_0FF8));
        assert_eq!(OPEN.translate(0xFF9, 8), None);
        assert_eq!(OPEN.translate(0x1000, 1), None);
    }

    #[test]
    fn limit_at_or_below_the_bar_closes_the_window() {
        for limit in [0, 0x3FFF, 0x4000] {
            assert_eq!(Inbound { limit, ..OPEN }.translate(0, 1), None);
        }
    }

    #[test]
    fn sums_that_overflow_are_refused() {
        assert_eq!(OPEN.translate(u64::MAX, 8), None);
        let high = Inbound {
            base: u64::MAX - 4,
            limit: u64::MAX,
            bar_base: 0,
        };
        assert_eq!(high.translate(0, 8), None);
    }

    #[test]
    fn only_an_aligned_write_of_four_bytes_in_the_range_is_an_msi() {
        assert!(is_msi(0xFEE0_0000, 4) && is_msi(0xFEEF_FFFC, 4));
        assert!(!is_msi(0xFEE0_0002, 4) && !is_msi(0xFEE0_0000, 8) && !is_msi(0xFEF0_0000, 4));
        assert!(touches_msi_range(0xFEDF_FFFC, 8) && !touches_msi_range(0xFEDF_FFFC, 4));
    }
}
