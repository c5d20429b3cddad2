//! Makes and removes virtual functions, and tells which belongs to which physical one.

use super::{Sysfs, SysfsError, found, link_name, read_number};
use crate::model::{Bdf, ConfigView};
use std::fs;

/// The most virtual functions that one physical function can have (16 bits in PCIe).
pub const VFS_MAX: u32 = 0xffff;

/// Why virtual functions were not made or removed.
#[derive(Debug, thiserror::Error)]
pub enum SriovError {
    /// sysfs did not tell or take something.
    #[error("the virtual functions of {0} cannot be changed")]
    Sysfs(Bdf, #[source] SysfsError),
    /// It has no SR-IOV.
    #[error(
        "{0} offers no SR-IOV: turn it on in firmware, or its driver does not support it (an Arc Pro needs Linux 6.17)"
    )]
    None(Bdf),
    /// Too many.
    #[error("{pf} has at most {total} virtual functions, not {wanted}")]
    TooMany {
        /// The physical function.
        pf: Bdf,
        /// How many were asked for.
        wanted: u32,
        /// How many it can have.
        total: u32,
    },
    /// There are some already.
    #[error(
        "{pf} has {now} virtual functions already; another number means ending all of them first: take them back, then echo 0 > /sys/bus/pci/devices/{pf}/sriov_numvfs"
    )]
    Busy {
        /// The physical function.
        pf: Bdf,
        /// How many it has.
        now: u32,
    },
}

/// A physical function's identity: what survives its moving to another address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PfIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Device serial number, 0 = none.
    pub serial: u64,
}

impl Sysfs {
    /// How many virtual functions it has now; 0 also where it has no SR-IOV.
    pub fn vf_count(&self, pf: Bdf) -> Result<u32, SysfsError> {
        self.check_exists(pf)?;
        let count = found(read_number(&self.function_path(pf).join("sriov_numvfs")))?;
        Ok(count.unwrap_or(0).min(VFS_MAX.into()) as u32)
    }

    /// How many virtual functions it can have; `None` where it has no SR-IOV.
    pub fn vf_total(&self, pf: Bdf) -> Result<Option<u32>, SysfsError> {
        self.check_exists(pf)?;
        let total = found(read_number(&self.function_path(pf).join("sriov_totalvfs")))?;
        Ok(total.map(|total| total.min(VFS_MAX.into()) as u32))
    }

    /// Makes `count` virtual functions that no driver grabs. Fine if there are as many already.
    pub fn create_vfs(&self, pf: Bdf, count: u32) -> Result<(), SriovError> {
        let failed = |error| SriovError::Sysfs(pf, error);
        let total = self.vf_total(pf).map_err(failed)?.unwrap_or(0);
        let now = self.vf_count(pf).map_err(failed)?;
        if total == 0 {
            return Err(SriovError::None(pf));
        }
        if count > total {
            let wanted = count;
            return Err(SriovError::TooMany { pf, wanted, total });
        }
        if now == count {
            return Ok(());
        }
        if now != 0 {
            return Err(SriovError::Busy { pf, now });
        }
        let path = self.function_path(pf);
        self.write(path.join("sriov_drivers_autoprobe"), "0")
            .map_err(failed)?;
        self.write(path.join("sriov_numvfs"), &count.to_string())
            .map_err(failed)
    }

    /// Removes all virtual functions. It blocks while VFIO still has one of them open.
    pub fn destroy_vfs(&self, pf: Bdf) -> Result<(), SriovError> {
        let failed = |error| SriovError::Sysfs(pf, error);
        if self.vf_count(pf).map_err(failed)? == 0 {
            return Ok(());
        }
        self.write(self.function_path(pf).join("sriov_numvfs"), "0")
            .map_err(failed)
    }

    /// The address of virtual function `index` of `pf`, from 0 on.
    pub fn vf(&self, pf: Bdf, index: u32) -> Result<Option<Bdf>, SysfsError> {
        self.check_exists(pf)?;
        let name = link_name(&self.function_path(pf).join(format!("virtfn{index}")))?;
        Ok(name.and_then(|name| name.parse().ok()))
    }

    /// The addresses of all virtual functions of `pf`, by index.
    pub fn vfs(&self, pf: Bdf) -> Result<Vec<Bdf>, SysfsError> {
        let mut all = Vec::new();
        for index in 0..self.vf_count(pf)? {
            all.extend(self.vf(pf, index)?);
        }
        Ok(all)
    }

    /// The physical function of a virtual one, and its index there.
    pub fn pf_of(&self, vf: Bdf) -> Result<Option<(Bdf, u32)>, SysfsError> {
        self.check_exists(vf)?;
        let name = link_name(&self.function_path(vf).join("physfn"))?;
        let Some(pf) = name.and_then(|name| name.parse().ok()) else {
            return Ok(None);
        };
        for index in 0..self.vf_count(pf)? {
            if self.vf(pf, index)? == Some(vf) {
                return Ok(Some((pf, index)));
            }
        }
        Ok(None)
    }

    /// What names a physical function also after it has moved.
    pub fn identity(&self, pf: Bdf) -> Result<PfIdentity, SysfsError> {
        let ids = self.ids(pf)?;
        Ok(PfIdentity {
            vendor: ids.vendor,
            device: ids.device,
            serial: self.serial(pf),
        })
    }

    /// A function's device serial number; 0 = none, or config space cannot be read as far.
    pub fn serial(&self, bdf: Bdf) -> u64 {
        let config = fs::read(self.function_path(bdf).join("config")).unwrap_or_default();
        ConfigView::new(&config).map_or(0, ConfigView::serial)
    }
}
