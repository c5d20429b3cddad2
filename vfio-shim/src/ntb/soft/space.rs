//! A soft IOMMU: translates, checks permissions, and records each access that it refuses.

use super::armed::Armed;
use super::fault::{Fault, FaultPlan, Operation};
use super::files::MemoryFiles;
use crate::model::{Access, AddressSpace, Aperture, DmaMap, MapError, Memory, Span};
use rustix::io::Errno;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// How many of the last faults are kept; all are counted.
pub const FAULTS_MAX: usize = 64;
/// Mappings per space, as in a type1 container.
const MAPS_MAX: usize = 65_535;
const PAGE: u64 = 4096;
/// Where x86 takes writes for interrupts: no IOMMU maps it.
const MSI_START: u64 = 0xfee0_0000;
const MSI_END: u64 = 0xfef0_0000;
const ADDRESS_END: u64 = 1 << 48;

thread_local! {
    /// The device whose access this thread is inside of; 0 = it is none, but software.
    static REQUESTER: Cell<u64> = const { Cell::new(PROCESSORS) };
}

/// The requester that all software of a host is: its processors keep the order of their stores.
pub(super) const PROCESSORS: u64 = 0;

/// Who accesses what this thread accesses now: a device, which is known by its soft IOMMU, or
/// the processors.
pub(super) fn requester() -> u64 {
    REQUESTER.get()
}

/// Whether this thread is inside a device's access. Only devices go through a soft IOMMU, so all
/// that happens beneath one is hardware, which goes on when a host's software stands still.
pub(super) fn in_hardware() -> bool {
    requester() != PROCESSORS
}

struct InHardware {
    outer: u64,
}

impl InHardware {
    fn enter(space: &SoftSpace) -> Self {
        let id = std::ptr::from_ref(space).addr() as u64;
        Self {
            outer: REQUESTER.replace(id),
        }
    }
}

impl Drop for InHardware {
    fn drop(&mut self) {
        REQUESTER.set(self.outer);
    }
}

/// An access that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftFault {
    /// Its first address that was refused.
    pub address: u64,
    /// Whether it was a write.
    pub write: bool,
}

struct Entry {
    span: Span,
    access: Access,
    target: Arc<dyn Aperture>,
    offset: u64,
}

/// The entries of a space by their first address, apart from each other.
type Table = BTreeMap<u64, Entry>;

/// The entry that begins before `end` as the last; only it can hold the bytes below.
fn last_before(table: &Table, end: u64) -> Option<&Entry> {
    table.range(..end).next_back().map(|(_, entry)| entry)
}

fn check_free(table: &Table, span: Span) -> Result<(), MapError> {
    let last = last_before(table, span.end());
    match last.is_some_and(|last| last.span.overlaps(span)) {
        true => Err(MapError::Overlap(span)),
        false => Ok(()),
    }
}

/// The address space of one soft function or port.
#[derive(Default)]
pub struct SoftSpace {
    /// Held for reading over a whole access, so that `unmap` returns after the last access that
    /// used a mapping. Accesses nest from one space into another and never back.
    table: RwLock<Table>,
    files: Mutex<MemoryFiles>,
    faults: Mutex<VecDeque<SoftFault>>,
    fault_count: AtomicU64,
    planned: Armed,
}

impl SoftSpace {
    /// Nothing is mapped.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on these maps and unmaps fail, counted from 1.
    pub fn arm(&self, plan: FaultPlan) {
        self.planned.arm(plan);
    }

    /// Which faults of the plan have struck, and how often.
    pub fn struck(&self) -> BTreeMap<Fault, u64> {
        self.planned.struck()
    }

    fn planned(&self, act: &'static str, span: Span, operation: Operation) -> Result<(), MapError> {
        match self.planned.roll(operation) {
            None => Ok(()),
            Some(_) => Err(MapError::Kernel {
                act,
                span,
                source: Errno::IO.into(),
            }),
        }
    }

    /// A device's read. False when a part of it was refused; that part reads as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let len = data.len();
        self.walk(address, len, false, |entry, offset, range| {
            entry.target.read(offset, &mut data[range]);
        })
    }

    /// A device's write. False when a part of it was refused; that part is dropped.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.walk(address, data.len(), true, |entry, offset, range| {
            entry.target.write(offset, &data[range]);
        })
    }

    /// How many accesses were refused.
    pub fn fault_count(&self) -> u64 {
        self.fault_count.load(Ordering::Acquire)
    }

    /// The last refused accesses.
    pub fn faults(&self) -> Vec<SoftFault> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.iter().copied().collect()
    }

    /// What is mapped.
    pub fn maps(&self) -> Vec<(Span, Access)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.values().map(|e| (e.span, e.access)).collect()
    }

    fn entry(&self, map: &DmaMap<'_>) -> Result<Entry, MapError> {
        let span = map.span;
        let refused = |source| MapError::Kernel {
            act: "map",
            span,
            source,
        };
        let (target, offset): (Arc<dyn Aperture>, u64) = match &map.memory {
            Memory::Fd(fd, offset) => {
                let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
                files.aperture(*fd, *offset, span.len()).map_err(refused)?
            }
            Memory::Aperture(aperture, offset) => (Arc::clone(aperture), *offset),
        };
        let end = offset.checked_add(span.len());
        if end.is_none_or(|end| end > target.len()) {
            return Err(refused(Errno::FAULT.into()));
        }
        Ok(Entry {
            span,
            access: map.access,
            target,
            offset,
        })
    }

    fn fault(&self, address: u64, write: bool) {
        self.fault_count.fetch_add(1, Ordering::AcqRel);
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() == FAULTS_MAX {
            faults.pop_front();
        }
        faults.push_back(SoftFault { address, write });
    }

    /// Cuts an access at the borders of mappings and pages, as a device's packets are.
    fn walk(
        &self,
        address: u64,
        len: usize,
        write: bool,
        mut access: impl FnMut(&Entry, u64, std::ops::Range<usize>),
    ) -> bool {
        let _hardware = InHardware::enter(self);
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let mut whole = true;
        let mut done = 0;
        while done < len {
            let Some(at) = address.checked_add(done as u64) else {
                self.fault(address, write);
                return false;
            };
            let left = (len - done).min((PAGE - at % PAGE) as usize);
            // Maps are whole pages, so one entry answers for all of this piece.
            let entry = at.checked_add(1).and_then(|end| last_before(&table, end));
            let allowed = |entry: &&Entry| {
                let allowed = if write {
                    entry.access.write
                } else {
                    entry.access.read
                };
                at < entry.span.end() && allowed
            };
            match entry.filter(allowed) {
                Some(entry) => {
                    let offset = entry.offset + (at - entry.span.start());
                    access(entry, offset, done..done + left);
                }
                None => {
                    self.fault(at, write);
                    whole = false;
                }
            }
            done += left;
        }
        whole
    }
}

impl AddressSpace for SoftSpace {
    fn usable(&self) -> Vec<Span> {
        let below = Span::new(0, MSI_START);
        let above = Span::new(MSI_END, ADDRESS_END - MSI_END);
        below.into_iter().chain(above).collect()
    }

    fn available(&self) -> u32 {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        (MAPS_MAX - table.len()) as u32
    }

    fn map(&self, maps: &[DmaMap<'_>]) -> Result<(), MapError> {
        let first = maps.first().map_or(Span::EMPTY, |map| map.span);
        self.planned("map", first, Operation::Map)?;
        let usable = self.usable();
        let mut entries = Table::new();
        for map in maps {
            let span = map.span;
            if span.is_empty() || !span.is_aligned(PAGE) {
                return Err(MapError::Align(span));
            }
            if !usable.iter().any(|usable| usable.contains(span)) {
                let words: Vec<_> = usable.iter().map(Span::to_string).collect();
                let usable = words.join(", ");
                return Err(MapError::Unusable { span, usable });
            }
            check_free(&entries, span)?;
            entries.insert(span.start(), self.entry(map)?);
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        for entry in entries.values() {
            check_free(&table, entry.span)?;
        }
        if table.len() + entries.len() > MAPS_MAX {
            return Err(MapError::TooMany(MAPS_MAX as u32));
        }
        table.extend(entries);
        Ok(())
    }

    fn unmap(&self, span: Span) -> Result<u64, MapError> {
        self.planned("unmap", span, Operation::Unmap)?;
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let touched: Vec<Span> = table
            .range(..span.end())
            .rev()
            .map(|(_, entry)| entry.span)
            .take_while(|held| held.overlaps(span))
            .collect();
        if touched.iter().any(|held| !span.contains(*held)) {
            return Err(MapError::Bisect(span));
        }
        for held in &touched {
            table.remove(&held.start());
        }
        Ok(touched.iter().map(|held| held.len()).sum())
    }
}
