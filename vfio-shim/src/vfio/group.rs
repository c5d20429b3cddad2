//! An IOMMU group of VFIO: the unit that is opened, and refused in words when others use it.

use super::{OpenError, ioctl};
use crate::{model::Bdf, sysfs::Sysfs};
use std::{
    ffi::CString,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};
use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;

/// An open IOMMU group. Close it after its devices and before its container.
pub struct Group {
    fd: OwnedFd,
    number: u32,
}

impl Group {
    /// The group of `bdf` that is behind `fd`, if all of its devices may be used.
    pub(super) fn adopt(bdf: Bdf, fd: OwnedFd, sysfs: &Sysfs) -> Result<Self, OpenError> {
        let number = sysfs
            .iommu_group(bdf)
            .map_err(|error| OpenError::Sysfs(bdf, error))?;
        let status = ioctl::group_status(fd.as_fd())
            .map_err(OpenError::kernel("tell the status of IOMMU group", number))?;
        if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            let others = sysfs.group_in_words(bdf, number);
            return Err(OpenError::NotViable {
                bdf,
                group: number,
                others,
            });
        }
        Ok(Self { fd, number })
    }

    /// Its number, as in `/dev/vfio/NUMBER`.
    pub fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn device(&self, bdf: Bdf) -> Result<OwnedFd, OpenError> {
        let name = CString::new(bdf.to_string()).unwrap_or_default();
        ioctl::group_device_fd(self.fd.as_fd(), &name)
            .map_err(OpenError::kernel("open the VFIO device", bdf))
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
