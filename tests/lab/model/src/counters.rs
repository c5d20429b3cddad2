//! What one half has done, for `ctl counters`.

use serde::Serialize;

/// Counters of one half, from the start of the process on.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Accesses by this half's host to its windows.
    pub window_reads: u64,
    pub window_writes: u64,
    /// Accesses by the peer that reached this half's host through a mapped file.
    pub dma_direct_reads: u64,
    pub dma_direct_writes: u64,
    /// The same by DMA_READ and DMA_WRITE messages.
    pub dma_message_reads: u64,
    pub dma_message_writes: u64,
    /// DMA messages that were sent again after an error reply.
    pub dma_retries: u64,
    /// MSIs that the peer wrote into this half's interrupt range.
    pub msi_writes: u64,
    /// Doorbells that this half's host rang.
    pub doorbells: u64,
    /// Interrupts that reached this half's host.
    pub msis: u64,
    /// Window accesses of this half's host that reached nothing.
    pub refused: u64,
    /// Times the link changed.
    pub link_changes: u64,
    /// Requests of any kind from this half's client.
    pub requests: u64,
}
