//! The door itself: a function's group and a container, opened here or for another process that may not.

use super::OpenError;
use crate::{
    model::Bdf,
    sysfs::{Sysfs, is_vfio_driver},
};
use std::{
    any::Any,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// What a function is opened with. Whoever holds these holds the function.
#[derive(Debug)]
pub struct OpenGroup {
    /// The function's IOMMU group.
    pub group: OwnedFd,
    /// A container that nothing is attached to yet.
    pub container: OwnedFd,
    /// What goes last of all, when the function and its container are closed.
    pub kept: Option<Box<dyn Any + Send + Sync>>,
}

/// Where VFIO's groups and containers are: `/dev/vfio`.
#[derive(Clone, Debug)]
pub struct Door {
    dev: PathBuf,
}

impl Default for Door {
    fn default() -> Self {
        Self::new("/dev/vfio")
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open(path)?;
    Ok(file.into())
}

impl Door {
    /// The door in folder `dev`.
    pub fn new(dev: impl Into<PathBuf>) -> Self {
        Self { dev: dev.into() }
    }

    /// Opens the group of `bdf`, which is bound to vfio-pci, and a container for it.
    pub fn open(&self, bdf: Bdf, sysfs: &Sysfs) -> Result<OpenGroup, OpenError> {
        let looked_up = sysfs.iommu_group(bdf).and_then(|group| {
            let driver = sysfs.driver(bdf)?;
            Ok((group, driver))
        });
        let (group, driver) = looked_up.map_err(|error| OpenError::Sysfs(bdf, error))?;
        if !driver.as_deref().is_some_and(is_vfio_driver) {
            let driver = driver.unwrap_or_else(|| "no driver".into());
            return Err(OpenError::NotVfio { bdf, driver });
        }
        let path = self.dev.join(group.to_string());
        let fd = open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::ResourceBusy => OpenError::Busy { bdf, group },
            _ => OpenError::kernel("open", path.display())(source),
        })?;
        let container = self.dev.join("vfio");
        Ok(OpenGroup {
            group: fd,
            container: open(&container).map_err(OpenError::kernel("open", container.display()))?,
            kept: None,
        })
    }
}
