//! What makes one software function differ from another: its registers, and what it does at a store.

use crate::model::RegionIndex;

/// The way of a device to its host, shut while bus mastering is off.
pub(super) trait Bus {
    /// DMA. False when a part of it was refused; that part reads as ones.
    fn read(&self, address: u64, data: &mut [u8]) -> bool;
    /// DMA. False when a part of it was refused; that part is dropped.
    fn write(&self, address: u64, data: &[u8]) -> bool;
    /// A message interrupt, which is a DMA write too and stays behind those before it.
    fn interrupt(&self, vector: u32);
}

/// A device behind its BARs. Accesses come only while it decodes memory.
pub(super) trait Behaviour: Send + Sync {
    /// Loads; `data` is all ones where nothing answers.
    fn load(&self, bar: RegionIndex, offset: u64, data: &mut [u8]);
    /// Stores, and does at once what they ask for. No lock may be held while the bus is used:
    /// DMA may come back to the device's own registers.
    fn store(&self, bar: RegionIndex, offset: u64, data: &[u8], bus: &dyn Bus);
    /// Back to power-on state.
    fn reset(&self);
}
