//! Why a function could not be opened, each with its cause and its mend.

use crate::{model::Bdf, sysfs::SysfsError};
use std::io;

/// Why a function could not be opened through VFIO.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be looked up, or sysfs refuses.
    #[error("{0} cannot be opened")]
    Sysfs(Bdf, #[source] SysfsError),
    /// Another driver has it.
    #[error(
        "{bdf} is bound to {driver}, not to vfio-pci: stop what uses it, unbind it, and bind it: echo vfio-pci > /sys/bus/pci/devices/{bdf}/driver_override; echo {bdf} > /sys/bus/pci/drivers_probe"
    )]
    NotVfio {
        /// The function.
        bdf: Bdf,
        /// Its driver, or `no driver`.
        driver: String,
    },
    /// The group is open elsewhere.
    #[error(
        "IOMMU group {group} of {bdf} is in use: one process at a time can hold it; find the holder with `fuser -v /dev/vfio/{group}`, or, of one that was killed and still has a device mapped, with `grep -l vfio-device /proc/[0-9]*/task/*/maps`"
    )]
    Busy {
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: u32,
    },
    /// Other devices of the group are driven by the host.
    #[error(
        "IOMMU group {group} of {bdf} holds devices that the host uses ({others}): the IOMMU cannot tell them apart. Unbind them, or put the device into a slot with ACS"
    )]
    NotViable {
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: u32,
        /// The other members and their drivers.
        others: String,
    },
    /// A VFIO of another shape.
    #[error("/dev/vfio/vfio has no type 1 v2 IOMMU (API version {version}): load vfio_iommu_type1")]
    NoType1 {
        /// Its API version.
        version: i32,
    },
    /// Interrupts cannot be kept apart.
    #[error(
        "vfio_iommu_type1 runs with allow_unsafe_interrupts={0}: the peer host could raise any interrupt vector. Turn interrupt remapping on in firmware and set the parameter to N"
    )]
    UnsafeInterrupts(String),
    /// The function may send translated requests.
    #[error(
        "{0} has ATS enabled: its translated requests would pass by the IOMMU. Boot this host with pci=noats"
    )]
    Ats(Bdf),
    /// Its config space makes no sense.
    #[error("{0} has a config space that cannot be read: {1}. Reset the device or the host")]
    Config(Bdf, crate::model::ConfigError),
    /// The kernel refused.
    #[error("the kernel refused to {act} {object}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Of what.
        object: String,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

impl OpenError {
    /// For `map_err`.
    pub(super) fn kernel(
        act: &'static str,
        object: impl ToString,
    ) -> impl FnOnce(io::Error) -> Self {
        let object = object.to_string();
        move |source| Self::Kernel {
            act,
            object,
            source,
        }
    }
}
