//! A run of addresses: start and length in bytes, never wrapping.

use std::fmt;

/// A non-wrapping run of `len` bytes from `start`, in whatever address space the context names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    start: u64,
    len: u64,
}

impl Span {
    /// No bytes, at 0.
    pub const EMPTY: Self = Self { start: 0, len: 0 };

    /// `None` when `start + len` does not fit 64 bits.
    pub const fn new(start: u64, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// From inclusive bounds as VFIO reports them; `None` when `last < first` or the length
    /// does not fit 64 bits.
    pub const fn from_inclusive(first: u64, last: u64) -> Option<Self> {
        match last.checked_sub(first) {
            Some(distance) => match distance.checked_add(1) {
                // The very last byte of the address space is given up, so that `end` fits.
                Some(len) => match Self::new(first, len) {
                    Some(span) => Some(span),
                    None => Self::new(first, distance),
                },
                None => Self::new(first, distance),
            },
            None => None,
        }
    }

    /// The first address.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The length in bytes.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// True for zero bytes.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first address past the run.
    pub const fn end(self) -> u64 {
        self.start + self.len
    }

    /// Whether every byte of `other` lies in `self`.
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether the two share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end() && self.len != 0 && other.len != 0
    }

    /// Whether start and length are multiples of `align` (a power of two).
    pub const fn is_aligned(self, align: u64) -> bool {
        (self.start | self.len) & (align - 1) == 0
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len)
    }
}

/// Whether two of the spans share a byte, and which.
pub fn overlap_among(spans: impl Iterator<Item = Span>) -> Option<Span> {
    let mut sorted: Vec<Span> = spans.collect();
    sorted.sort_unstable();
    let clash = sorted.windows(2).find(|pair| pair[0].overlaps(pair[1]));
    clash.map(|pair| pair[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inclusive_bounds_up_to_the_last_byte_do_not_wrap() {
        let span = Span::from_inclusive(0xfef0_0000, u64::MAX).unwrap();
        assert_eq!(span.end(), u64::MAX);
        assert_eq!(Span::from_inclusive(0, u64::MAX).unwrap().len(), u64::MAX);
        assert_eq!(Span::from_inclusive(1, 0), None);
    }

    #[test]
    fn empty_spans_overlap_nothing() {
        let span = Span::new(0, 16).unwrap();
        assert!(!span.overlaps(Span::new(8, 0).unwrap()));
        assert!(span.overlaps(Span::new(15, 1).unwrap()));
        assert!(!span.overlaps(Span::new(16, 1).unwrap()));
    }

    #[test]
    fn spans_that_share_a_byte_are_found_in_any_order() {
        let of = |spans: [(u64, u64); 3]| {
            let spans = spans.map(|(start, len)| Span::new(start, len).unwrap());
            overlap_among(spans.into_iter())
        };
        assert_eq!(of([(4, 4), (0, 4), (8, 1)]), None);
        assert_eq!(of([(4, 5), (0, 4), (8, 1)]), Span::new(8, 1));
    }
}
