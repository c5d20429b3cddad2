//! An IOMMU group of VFIO: the unit that is opened, and refused in words when others use it.

use super::{OpenError, ioctl};
use crate::{
    model::Bdf,
    sysfs::{Sysfs, is_vfio_driver},
};
use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};
use vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;

/// An open IOMMU group. Close it after its devices and before its container.
pub struct Group {
    fd: OwnedFd,
    number: u32,
}

impl Group {
    /// Opens the group of `bdf` in `dev` (`/dev/vfio`), if all of its devices may be used.
    pub fn open(bdf: Bdf, dev: &Path, sysfs: &Sysfs) -> Result<Self, OpenError> {
        let group = sysfs
            .iommu_group(bdf)
            .map_err(|error| OpenError::Sysfs(bdf, error))?;
        let driver = sysfs
            .driver(bdf)
            .map_err(|error| OpenError::Sysfs(bdf, error))?;
        if !driver.as_deref().is_some_and(is_vfio_driver) {
            let driver = driver.unwrap_or_else(|| "no driver".into());
            return Err(OpenError::NotVfio { bdf, driver });
        }
        let path = dev.join(group.to_string());
        let opened = File::options().read(true).write(true).open(&path);
        let fd = opened.map_err(|source| match source.kind() {
            io::ErrorKind::ResourceBusy => OpenError::Busy { bdf, group },
            _ => OpenError::kernel("open", path.display())(source),
        })?;
        let this = Self {
            fd: fd.into(),
            number: group,
        };
        let status = ioctl::group_status(this.fd.as_fd())
            .map_err(OpenError::kernel("tell the status of", path.display()))?;
        if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            let others = sysfs.group_in_words(bdf, group);
            return Err(OpenError::NotViable { bdf, group, others });
        }
        Ok(this)
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
