//! What the owner decides about a guest session.

use super::{holders::Holders, memory_check::MemoryMaps, peer::Peers, spin, version::MAPS_MAX};
use std::{path::PathBuf, sync::Arc};
use vfio_shim::model::{OsRuntime, Runtime};

/// How a VMM reaches the function's BARs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BarMode {
    /// Every access is a message; the VMM gets no fd, so it is as hostile as its guest.
    #[default]
    Trapped,
    /// The VMM maps the regions' areas by the function's own fd, and so holds all that the fd
    /// gives: only for a VMM that is trusted.
    Mapped,
}

/// Whether guest memory must be mapped shared in the VMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryCheck {
    /// It must, and the VMM's memory map must be readable.
    #[default]
    On,
    /// Whatever the VMM says is believed. A private mapping then loses the guest's data.
    Off,
}

/// What holds for the guest sessions of an endpoint.
#[derive(Clone, Debug)]
pub struct Options {
    /// How BARs are reached.
    pub bars: BarMode,
    /// Whether guest memory must be mapped shared.
    pub memory_check: MemoryCheck,
    /// Whose VMMs may attach.
    pub peers: Peers,
    /// The most DMA maps at once; over [`MAPS_MAX`] is the same as that.
    pub maps_max: u32,
    /// The most bytes of guest memory mapped at once, over all maps.
    pub bytes_max: u64,
    /// Where memory maps of processes are read, or who is asked.
    pub memory_maps: Arc<dyn MemoryMaps>,
    /// Who keeps account of VMMs with mapped BARs; none = whoever serves knows them all.
    pub holders: Option<Arc<dyn Holders>>,
    /// What the serving thread stands on.
    pub runtime: Arc<dyn Runtime>,
    /// How many threads of this process may wait awake for their VMMs at once; 0 = none ever.
    pub spinners_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bars: BarMode::default(),
            memory_check: MemoryCheck::default(),
            peers: Peers::default(),
            maps_max: MAPS_MAX,
            bytes_max: u64::MAX,
            memory_maps: Arc::new(PathBuf::from("/proc")),
            holders: None,
            runtime: Arc::new(OsRuntime),
            // Asked for here, and not at the first wait: a sandbox may be closed by then.
            spinners_max: spin::spinners_max(),
        }
    }
}
