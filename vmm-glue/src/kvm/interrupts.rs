//! A function's MSI or MSI-X as its guest programs it: capability and table on one side, vectors on the other.

use super::{IrqError, Msi, Routes, Vectors};
use std::sync::Arc;
use vfio_shim::model::{
    BAR_COUNT, CAP_MSI, CAP_MSIX, CONFIG_BYTES_MAX, ConfigView, Function, IrqIndex, RegionIndex,
    Span,
};

/// The most vectors of a function (PCI 3.0 section 6.8.2: a table of 2048 entries).
pub const VECTORS_MAX: u32 = 2048;

/// MSI-X (PCI 3.0 section 6.8.2).
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_BYTES: usize = 16;
const ENTRY_CONTROL: usize = 12;
const ENTRY_MASKED: u8 = 1;
/// MSI (PCI 3.0 section 6.8.1).
const MSI_ENABLE: u16 = 1;
const MSI_WIDE: u16 = 1 << 7;
const MSI_MASKABLE: u16 = 1 << 8;

/// Where a table lies in a BAR.
#[derive(Clone, Copy)]
struct Place {
    region: RegionIndex,
    span: Span,
}

impl Place {
    /// From a register of the capability: the BAR in the low three bits.
    fn new(register: u32, bytes: usize) -> Option<Self> {
        let bar = register & 7;
        let span = Span::new(u64::from(register & !7), bytes as u64)?;
        ((bar as usize) < BAR_COUNT).then_some(Self {
            region: RegionIndex(bar),
            span,
        })
    }

    fn holds(&self, region: RegionIndex, access: Span) -> bool {
        self.region == region && self.span.overlaps(access)
    }
}

struct Msix {
    capability: u16,
    table: Place,
    pending: Place,
    entries: Vec<[u8; ENTRY_BYTES]>,
}

/// What the capabilities say at the moment.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Enabled {
    None,
    Msi(u32),
    Msix,
}

/// The interrupts of one attached function.
pub struct Interrupts {
    vectors: Vectors,
    enabled: Enabled,
    msi: Option<u16>,
    msix: Option<Msix>,
}

impl Msix {
    fn find(config: ConfigView<'_>, vectors: u32) -> Option<Self> {
        let at = config.capability(CAP_MSIX)?;
        let count = (u32::from(config.u16(at + 2) & 0x7ff) + 1).min(vectors) as usize;
        let mut masked = [0; ENTRY_BYTES];
        masked[ENTRY_CONTROL] = ENTRY_MASKED;
        Some(Self {
            capability: at,
            table: Place::new(config.u32(at + 4), count * ENTRY_BYTES)?,
            pending: Place::new(config.u32(at + 8), count.div_ceil(64) * 8)?,
            entries: vec![masked; count],
        })
    }

    fn message(entry: &[u8; ENTRY_BYTES]) -> Msi {
        let entry = ConfigEntry(entry);
        Msi {
            address: u64::from(entry.word(0)) | u64::from(entry.word(4)) << 32,
            data: entry.word(8),
        }
    }
}

struct ConfigEntry<'a>(&'a [u8; ENTRY_BYTES]);

impl ConfigEntry<'_> {
    fn word(&self, at: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.0[at..at + 4]);
        u32::from_le_bytes(word)
    }
}

/// Config space as the function shows it now; ones where it is gone.
fn config_bytes(function: &dyn Function, offset: u16, data: &mut [u8]) {
    if function
        .region_read(RegionIndex::CONFIG, offset.into(), data)
        .is_err()
    {
        data.fill(0xff);
    }
}

fn config_u16(function: &dyn Function, offset: u16) -> u16 {
    let mut word = [0; 2];
    config_bytes(function, offset, &mut word);
    u16::from_le_bytes(word)
}

fn config_u32(function: &dyn Function, offset: u16) -> u32 {
    let mut word = [0; 4];
    config_bytes(function, offset, &mut word);
    u32::from_le_bytes(word)
}

/// The capability's control word; 0 where the function is gone and all reads are ones.
fn control(function: &dyn Function, capability: Option<u16>, id: u8) -> u16 {
    let Some(at) = capability else { return 0 };
    match config_u16(function, at) as u8 == id {
        true => config_u16(function, at + 2),
        false => 0,
    }
}

impl Interrupts {
    /// Finds the function's capabilities. Nothing is enabled.
    pub fn new(function: &dyn Function, routes: Arc<Routes>) -> Self {
        let info = function.info();
        let size = info.region(RegionIndex::CONFIG).map_or(0, |r| r.size);
        let mut bytes = vec![0; (size as usize).min(CONFIG_BYTES_MAX)];
        config_bytes(function, 0, &mut bytes);
        let count = |index: IrqIndex| info.irqs[index as usize].count.min(VECTORS_MAX);
        let (msi, msix) = match ConfigView::new(&bytes) {
            Ok(config) => (
                config.capability(CAP_MSI),
                Msix::find(config, count(IrqIndex::Msix)),
            ),
            Err(_) => (None, None),
        };
        let most = count(IrqIndex::Msi).max(count(IrqIndex::Msix));
        Self {
            vectors: Vectors::new(routes, most),
            enabled: Enabled::None,
            msi: msi.filter(|_| count(IrqIndex::Msi) != 0),
            msix: msix.filter(|msix| !msix.entries.is_empty()),
        }
    }

    /// The vectors.
    pub fn vectors(&self) -> &Vectors {
        &self.vectors
    }

    /// Whether the access belongs here and not to the function: the MSI-X table, its pending bits.
    pub fn holds(&self, region: RegionIndex, access: Span) -> bool {
        self.msix.as_ref().is_some_and(|msix| {
            msix.table.holds(region, access) || msix.pending.holds(region, access)
        })
    }

    /// Reads the MSI-X table or the pending bits; 0 beside them.
    pub fn read(&self, region: RegionIndex, access: Span, data: &mut [u8]) {
        data.fill(0);
        let Some(msix) = &self.msix else { return };
        for (address, byte) in (access.start()..access.end()).zip(data) {
            let one = Span::new(address, 1).unwrap_or(Span::EMPTY);
            if msix.table.holds(region, one) {
                let at = (address - msix.table.span.start()) as usize;
                *byte = msix.entries[at / ENTRY_BYTES][at % ENTRY_BYTES];
            } else if msix.pending.holds(region, one) {
                let first = (address - msix.pending.span.start()) as u32 * 8;
                let bit = |at: u32| u8::from(self.vectors.is_pending(first + at)) << at;
                *byte = (0..8).map(bit).sum();
            }
        }
    }

    /// Writes the MSI-X table, and lets the vectors follow; pending bits are read only.
    pub fn write(
        &mut self,
        function: &dyn Function,
        region: RegionIndex,
        access: Span,
        data: &[u8],
    ) -> Result<(), IrqError> {
        let Some(msix) = &mut self.msix else {
            return Ok(());
        };
        let mut touched = Span::EMPTY;
        for (address, byte) in (access.start()..access.end()).zip(data) {
            let one = Span::new(address, 1).unwrap_or(Span::EMPTY);
            if !msix.table.holds(region, one) {
                continue;
            }
            let at = (address - msix.table.span.start()) as usize;
            let (entry, field) = (at / ENTRY_BYTES, at % ENTRY_BYTES);
            msix.entries[entry][field] = match field {
                ENTRY_CONTROL => byte & ENTRY_MASKED,
                0..ENTRY_CONTROL => *byte,
                _ => 0,
            };
            let start = if touched.is_empty() {
                entry as u64
            } else {
                touched.start()
            };
            touched = Span::from_inclusive(start, entry as u64).unwrap_or(Span::EMPTY);
        }
        match self.enabled {
            Enabled::Msix => self.follow_msix(function, touched),
            _ => Ok(()),
        }
    }

    /// Follows the capabilities, after any write to config space.
    pub fn follow(&mut self, function: &dyn Function) -> Result<(), IrqError> {
        let msix = self.msix.as_ref().map(|msix| msix.capability);
        let msi = control(function, self.msi, CAP_MSI);
        let enabled = if control(function, msix, CAP_MSIX) & MSIX_ENABLE != 0 {
            Enabled::Msix
        } else if msi & MSI_ENABLE != 0 {
            let count = 1u32 << ((msi >> 4 & 7).min(5));
            let there = function.info().irqs[IrqIndex::Msi as usize].count;
            Enabled::Msi(count.min(there).min(self.vectors.count()))
        } else {
            Enabled::None
        };
        if enabled != self.enabled {
            self.disable(function)?;
            self.enable(function, enabled)?;
        }
        match enabled {
            Enabled::Msix => {
                let all = Span::new(0, VECTORS_MAX.into()).unwrap_or(Span::EMPTY);
                self.follow_msix(function, all)
            }
            Enabled::Msi(count) => self.follow_msi(function, msi, count),
            Enabled::None => Ok(()),
        }
    }

    /// Gives all vectors of the index their triggers at once, as some functions' counts are fixed
    /// by the first call.
    fn enable(&mut self, function: &dyn Function, enabled: Enabled) -> Result<(), IrqError> {
        let (index, count) = match (enabled, &self.msix) {
            (Enabled::Msi(count), _) => (IrqIndex::Msi, count),
            (Enabled::Msix, Some(msix)) => (IrqIndex::Msix, msix.entries.len() as u32),
            _ => return Ok(()),
        };
        let mut triggers = Vec::with_capacity(count as usize);
        for vector in 0..count {
            self.vectors.set_masked(vector, true)?;
            triggers.push(Some(self.vectors.make_trigger(vector)?));
        }
        function.set_irqs(index, 0, triggers)?;
        self.enabled = enabled;
        Ok(())
    }

    /// Takes the triggers away from the function, then from KVM. Fine where nothing is enabled.
    pub fn disable(&mut self, function: &dyn Function) -> Result<(), IrqError> {
        let index = match self.enabled {
            Enabled::None => None,
            Enabled::Msi(_) => Some(IrqIndex::Msi),
            Enabled::Msix => Some(IrqIndex::Msix),
        };
        let disabled = index.map_or(Ok(()), |index| function.disable_irqs(index));
        self.enabled = Enabled::None;
        self.vectors.clear()?;
        disabled.map_err(Into::into)
    }

    fn follow_msix(&mut self, function: &dyn Function, entries: Span) -> Result<(), IrqError> {
        let Some(msix) = &self.msix else {
            return Ok(());
        };
        let control = control(function, Some(msix.capability), CAP_MSIX);
        let all_masked = control & MSIX_FUNCTION_MASK != 0;
        let end = entries.end().min(msix.entries.len() as u64);
        for at in entries.start()..end {
            let entry = &msix.entries[at as usize];
            let masked = all_masked || entry[ENTRY_CONTROL] & ENTRY_MASKED != 0;
            if !masked {
                self.vectors
                    .set_message(at as u32, Some(Msix::message(entry)))?;
            }
            self.vectors.set_masked(at as u32, masked)?;
        }
        Ok(())
    }

    fn follow_msi(
        &mut self,
        function: &dyn Function,
        control: u16,
        count: u32,
    ) -> Result<(), IrqError> {
        let Some(at) = self.msi else { return Ok(()) };
        let wide = control & MSI_WIDE != 0;
        let high = if wide {
            config_u32(function, at + 8)
        } else {
            0
        };
        let data = at + if wide { 12 } else { 8 };
        let mask = match control & MSI_MASKABLE != 0 {
            true => config_u32(function, data + 4),
            false => 0,
        };
        let address = u64::from(config_u32(function, at + 4)) | u64::from(high) << 32;
        let data = u32::from(config_u16(function, data));
        for vector in 0..count {
            let masked = mask >> vector & 1 != 0;
            // The function fills in the low bits by vector.
            let data = data & !(count - 1) | vector;
            if !masked {
                self.vectors
                    .set_message(vector, Some(Msi { address, data }))?;
            }
            self.vectors.set_masked(vector, masked)?;
        }
        Ok(())
    }
}
