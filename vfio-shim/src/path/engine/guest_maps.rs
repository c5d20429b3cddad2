//! The guest memory behind a lent function, by address: one map more or less costs no look at the others.

use crate::model::Span;
use std::collections::BTreeMap;

/// Spans apart from each other, and how many bytes they have.
#[derive(Debug, Default)]
pub(super) struct GuestMaps {
    lens: BTreeMap<u64, u64>,
    bytes: u64,
}

impl GuestMaps {
    pub(super) fn count(&self) -> u64 {
        self.lens.len() as u64
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lens.is_empty()
    }

    pub(super) fn insert(&mut self, span: Span) {
        let old = self.lens.insert(span.start(), span.len());
        self.bytes += span.len() - old.unwrap_or(0);
    }

    /// Takes out all that lie whole within the span.
    pub(super) fn remove_within(&mut self, span: Span) {
        let inside = self.lens.range(span.start()..span.end());
        let whole = inside.filter(|(start, len)| *start + *len <= span.end());
        let gone: Vec<u64> = whole.map(|(start, _)| *start).collect();
        for start in gone {
            self.bytes -= self.lens.remove(&start).unwrap_or(0);
        }
    }

    /// All of them.
    pub(super) fn spans(&self) -> Vec<Span> {
        let span = |(start, len): (&u64, &u64)| Span::new(*start, *len);
        self.lens.iter().filter_map(span).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64) -> Span {
        Span::new(start, len).unwrap()
    }

    #[test]
    fn bytes_are_those_of_the_maps_that_are_left() {
        let mut maps = GuestMaps::default();
        for at in 0..4 {
            maps.insert(span(at * 0x4000, 0x2000));
        }
        assert_eq!((maps.count(), maps.bytes()), (4, 0x8000));
        // The first whole, the second cut, the third not reached.
        maps.remove_within(span(0, 0x5000));
        assert_eq!((maps.count(), maps.bytes()), (3, 0x6000));
        maps.remove_within(span(0x4000, 0x8000));
        assert_eq!(maps.spans(), [span(0xc000, 0x2000)]);
        maps.remove_within(span(0, 1 << 40));
        assert!(maps.is_empty() && maps.bytes() == 0);
    }
}
