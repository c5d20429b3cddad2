//! Where an inbound window goes in the port's container.

use crate::model::{PortIova, Span};

/// Below 4 GiB lie the interrupt page and what firmware reserves.
const FOUR_GIB: u64 = 1 << 32;
const ONE_GIB: u64 = 1 << 30;

/// No place for the window.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the NTB's IOMMU has no contiguous range of {wanted} bytes (its ranges: {ranges}); choose a \
     smaller window in firmware, or set window_limit_bytes in the port's config"
)]
pub struct BaseError {
    /// The window's size in bytes.
    pub wanted: u64,
    /// The usable ranges, in words.
    pub ranges: String,
}

/// The first address, aligned to the window's size (at most 1 GiB), of a place for `bytes`:
/// above 4 GiB where there is one.
pub fn window_base(usable: &[Span], bytes: u64) -> Result<PortIova, BaseError> {
    let align = bytes.next_power_of_two().min(ONE_GIB);
    let place = |from: u64| {
        usable.iter().find_map(|range| {
            let start = range.start().max(from).checked_next_multiple_of(align)?;
            range
                .contains(Span::new(start, bytes)?)
                .then_some(PortIova(start))
        })
    };
    place(FOUR_GIB).or_else(|| place(0)).ok_or_else(|| {
        let words: Vec<String> = usable.iter().map(Span::to_string).collect();
        BaseError {
            wanted: bytes,
            ranges: words.join(", "),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn x86(end: u64) -> Vec<Span> {
        vec![
            Span::from_inclusive(0, 0xfedf_ffff).unwrap(),
            Span::from_inclusive(0xfef0_0000, end).unwrap(),
        ]
    }

    #[test]
    fn a_window_goes_above_4_gib_where_there_is_room() {
        let base = window_base(&x86((1 << 39) - 1), 1 << 30).unwrap();
        assert_eq!(base, PortIova(FOUR_GIB));
    }

    #[test]
    fn a_narrow_iommu_gets_it_below_the_interrupt_page() {
        let base = window_base(&x86(u64::from(u32::MAX)), 1 << 30).unwrap();
        assert_eq!(base, PortIova(0));
    }

    #[test]
    fn no_room_is_told_with_the_ranges() {
        let error = window_base(&x86((1 << 39) - 1), 1 << 40).unwrap_err();
        assert!(error.to_string().contains("0x0+0xfee00000"), "{error}");
    }
}
