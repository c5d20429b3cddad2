//! What a container has mapped: a sorted table, so that overlaps and cuts are refused in words.

use crate::model::{Aperture, MapError, Span};
use std::{collections::BTreeMap, sync::Arc};

/// The longest run that one ioctl maps or unmaps: the kernel holds the container's lock meanwhile.
pub(super) const STEP_BYTES_MAX: u64 = 1 << 30;

/// One mapping.
pub(super) struct Entry {
    pub span: Span,
    /// Keeps an aperture's memory mapped for as long as a device can reach it.
    #[expect(dead_code, reason = "held, not read")]
    pub behind: Option<Arc<dyn Aperture>>,
}

/// The mappings of a container by their first address, apart from each other.
#[derive(Default)]
pub(super) struct Table {
    entries: BTreeMap<u64, Entry>,
    steps: u64,
}

/// Cuts a span at multiples of `STEP_BYTES_MAX`, so that large IOMMU pages stay possible.
pub(super) fn steps(span: Span) -> impl Iterator<Item = Span> {
    let mut at = span.start();
    std::iter::from_fn(move || {
        let left = span.end() - at;
        if left == 0 {
            return None;
        }
        let len = left.min(STEP_BYTES_MAX - at % STEP_BYTES_MAX);
        let step = Span::new(at, len)?;
        at += len;
        Some(step)
    })
}

impl Table {
    /// How many mappings of the kernel there are.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn overlapping(&self, span: Span) -> impl Iterator<Item = &Entry> {
        // The one entry that may begin before `span` is the last that does: entries are apart.
        let before = self.entries.range(..span.start()).next_back();
        let inside = self.entries.range(span.start()..span.end());
        let all = before.into_iter().chain(inside).map(|(_, entry)| entry);
        all.filter(move |entry| entry.span.overlaps(span))
    }

    /// Refuses a span of which any byte is mapped.
    pub fn check_free(&self, span: Span) -> Result<(), MapError> {
        match self.overlapping(span).next() {
            Some(entry) => Err(MapError::Overlap(entry.span)),
            None => Ok(()),
        }
    }

    /// The mappings that lie whole within `span`; an error if one lies across its border.
    pub fn whole_within(&self, span: Span) -> Result<Vec<Span>, MapError> {
        let mut whole = Vec::new();
        for entry in self.overlapping(span) {
            if !span.contains(entry.span) {
                return Err(MapError::Bisect(entry.span));
            }
            whole.push(entry.span);
        }
        Ok(whole)
    }

    /// Adds a mapping; its span is free.
    pub fn insert(&mut self, entry: Entry) {
        self.steps += steps(entry.span).count() as u64;
        self.entries.insert(entry.span.start(), entry);
    }

    /// Takes the mapping at `start` out.
    pub fn remove(&mut self, start: u64) -> Option<Entry> {
        let entry = self.entries.remove(&start)?;
        self.steps -= steps(entry.span).count() as u64;
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64) -> Span {
        Span::new(start, len).unwrap()
    }

    fn table(spans: &[Span]) -> Table {
        let mut table = Table::default();
        for &span in spans {
            let behind = None;
            table.insert(Entry { span, behind });
        }
        table
    }

    #[test]
    fn a_map_over_another_is_refused_and_beside_it_is_not() {
        let table = table(&[span(0x1000, 0x2000), span(0x8000, 0x1000)]);
        for (start, len) in [(0, 0x1001), (0x2000, 0x100), (0x2fff, 1), (0, 0x10000)] {
            let refused = table.check_free(span(start, len));
            assert!(matches!(refused, Err(MapError::Overlap(_))), "{start:#x}");
        }
        for (start, len) in [(0, 0x1000), (0x3000, 0x5000), (0x9000, 0x1000)] {
            assert!(table.check_free(span(start, len)).is_ok(), "{start:#x}");
        }
    }

    #[test]
    fn unmap_takes_whole_mappings_and_never_cuts_one() {
        let mut table = table(&[span(0x1000, 0x2000), span(0x8000, 0x1000)]);
        let all = table.whole_within(span(0, 0x9000)).unwrap();
        assert_eq!(all, [span(0x1000, 0x2000), span(0x8000, 0x1000)]);
        assert!(table.whole_within(span(0x4000, 0x1000)).unwrap().is_empty());
        for (start, len) in [(0, 0x2000), (0x2000, 0x1000), (0x8000, 0xfff)] {
            let cut = table.whole_within(span(start, len));
            assert!(matches!(cut, Err(MapError::Bisect(_))), "{start:#x}");
        }
        assert!(table.remove(0x1000).is_some());
        assert!(table.remove(0x1000).is_none());
        assert_eq!(table.steps(), 1);
    }

    #[test]
    fn steps_are_cut_at_multiples_of_a_gib_and_add_up() {
        let long = span(0x3000_0000, 0x9000_0000);
        let cut: Vec<_> = steps(long).collect();
        assert_eq!(
            cut,
            [
                span(0x3000_0000, 0x1000_0000),
                span(0x4000_0000, 0x4000_0000),
                span(0x8000_0000, 0x4000_0000),
            ]
        );
        assert_eq!(table(&[long]).steps(), 3);
    }
}
