//! Whether a function may be lent, as far as sysfs can tell; every refusal names cause and mend.

use super::{Sysfs, SysfsError};
use crate::model::Bdf;

/// Drivers that do no DMA of their own account beside a function that VFIO has: the kernel
/// calls such a group viable.
const HARMLESS_DRIVERS: [&str; 2] = ["pcieport", "pci-stub"];

/// Why a function cannot be lent.
#[derive(Debug, thiserror::Error)]
pub enum LendError {
    /// It cannot be looked up, or has no IOMMU group.
    #[error("{0} cannot be lent")]
    Sysfs(Bdf, #[source] SysfsError),
    /// It is the parent of virtual functions.
    #[error(
        "{pf} has SR-IOV on ({count} virtual functions): lend those, or remove them first with echo 0 > /sys/bus/pci/devices/{pf}/sriov_numvfs"
    )]
    SriovOn {
        /// The physical function.
        pf: Bdf,
        /// How many virtual functions it has.
        count: u32,
    },
    /// A driver of this host has it.
    #[error(
        "{bdf} is driven by {driver} on this host: stop what uses it, then unbind it: echo {bdf} > /sys/bus/pci/drivers/{driver}/unbind"
    )]
    Driven {
        /// The function.
        bdf: Bdf,
        /// Its driver.
        driver: String,
    },
    /// Nobody tends it.
    #[error(
        "{vf} is a VF of {pf}, which has no driver, so that nobody tends it: echo {pf} > /sys/bus/pci/drivers_probe"
    )]
    Orphan {
        /// The function.
        vf: Bdf,
        /// Its physical function.
        pf: Bdf,
    },
    /// Others share its IOMMU group.
    #[error(
        "{bdf} shares IOMMU group {group} with devices that this host uses ({others}): the IOMMU cannot tell them apart. Unbind those, or put the device into a slot with ACS"
    )]
    GroupInUse {
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: u32,
        /// The others, and their drivers.
        others: String,
    },
    /// It cannot be reset.
    #[error(
        "{0} has no reset method, so one tenant's state would reach the next: it cannot be lent"
    )]
    NoReset(Bdf),
}

/// Whether this driver is VFIO's: vfio-pci, or a variant such as xe-vfio-pci.
pub fn is_vfio_driver(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("-vfio-pci") || driver.ends_with("_vfio_pci")
}

impl Sysfs {
    /// Refuses a function that must not be lent. With `unbind` a driver of this host is no
    /// hindrance, as it will be made to let go.
    pub fn check_lendable(&self, bdf: Bdf, unbind: bool) -> Result<(), LendError> {
        let failed = |error| LendError::Sysfs(bdf, error);
        let count = self.vf_count(bdf).map_err(failed)?;
        if count != 0 {
            return Err(LendError::SriovOn { pf: bdf, count });
        }
        let driver = self.driver(bdf).map_err(failed)?;
        if let Some(driver) = driver.filter(|driver| !is_vfio_driver(driver) && !unbind) {
            return Err(LendError::Driven { bdf, driver });
        }
        if let Some((pf, _)) = self.pf_of(bdf).map_err(failed)?
            && self.driver(pf).map_err(failed)?.is_none()
        {
            return Err(LendError::Orphan { vf: bdf, pf });
        }
        let group = self.iommu_group(bdf).map_err(failed)?;
        let in_use = |driver: &str| !is_vfio_driver(driver) && !HARMLESS_DRIVERS.contains(&driver);
        let members = self.group_members(group).map_err(failed)?;
        let mut others = members.iter().filter(|(other, _)| *other != bdf);
        if others.any(|(_, driver)| driver.as_deref().is_some_and(in_use)) {
            let others = self.group_in_words(bdf, group);
            return Err(LendError::GroupInUse { bdf, group, others });
        }
        match self.has_reset(bdf).map_err(failed)? {
            true => Ok(()),
            false => Err(LendError::NoReset(bdf)),
        }
    }
}
