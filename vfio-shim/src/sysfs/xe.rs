//! What the xe driver offers beside SR-IOV itself: a VF that is stopped from outside, and a driver that waits until its memory is cleared.

use super::{Sysfs, SysfsError};
use crate::model::{Bdf, FunctionIds};
use std::path::{Path, PathBuf};

/// Of a VF of xe on plain vfio-pci: by then its PF has cleared its memory, or never will.
pub const XE_CLEARED_MS: u64 = 12_000;
/// The variant driver that waits for the PF, by the names that it may have.
const DRIVERS: [&str; 2] = ["xe-vfio-pci", "xe_vfio_pci"];
const INTEL: u16 = 0x8086;
/// Display controllers (PCI Code and ID Assignment, 1.4).
const CLASS_DISPLAY: u32 = 0x03;

impl Sysfs {
    /// Whether a function is a VF of the kind that xe drives: its own memory outlives a reset for
    /// as long as its PF takes to clear it.
    pub fn is_xe_vf(&self, bdf: Bdf, ids: &FunctionIds) -> Result<bool, SysfsError> {
        let display = ids.vendor == INTEL && ids.class >> 16 == CLASS_DISPLAY;
        Ok(display && self.pf_of(bdf)?.is_some())
    }

    /// The driver that waits in a reset until such a VF is cleared, where this kernel has it.
    pub fn xe_vfio_driver(&self) -> Option<&'static str> {
        let there = |name: &&str| self.path("bus/pci/drivers").join(name).is_dir();
        DRIVERS.into_iter().find(there)
    }

    /// The file by which xe stops a VF until its next reset, where its driver has one.
    pub fn xe_stop(&self, vf: Bdf) -> Result<Option<PathBuf>, SysfsError> {
        let Some((pf, index)) = self.pf_of(vf)? else {
            return Ok(None);
        };
        // xe counts VFs from 1.
        let name = format!("sriov_admin/vf{}/stop", index + 1);
        let file = self.function_path(pf).join(name);
        Ok(file.is_file().then_some(file))
    }

    /// Stops it.
    pub fn stop_xe_vf(&self, stop: &Path) -> Result<(), SysfsError> {
        self.write(stop, "1")
    }
}
