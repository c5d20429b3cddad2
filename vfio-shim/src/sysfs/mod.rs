//! What the kernel's sysfs tells of PCI functions, and the few files that are written.

mod bind;
mod device;
mod dma_faults;
mod kernel_log;
mod lend;
mod sriov;
#[cfg(test)]
mod tests;
mod xe;

pub use bind::{BindError, BindGuard, OldBinding};
pub use device::{BarAddress, FunctionLookup};
pub use dma_faults::DmaFaults;
pub use kernel_log::KernelLog;
pub use lend::{LendError, is_vfio_driver};
pub use sriov::{PfIdentity, SriovError, VFS_MAX};
pub use xe::XE_CLEARED_MS;

use crate::model::Bdf;
use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Why sysfs did not tell or take something.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// A file could not be read, written or listed.
    #[error("could not {act} {}", path.display())]
    Io {
        /// `read`, `write`, ...
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A file holds something else than what the kernel writes there.
    #[error("{} holds `{text}`, which is no {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
        /// What it holds.
        text: String,
    },
    /// There is no such function.
    #[error("there is no PCI function {0} on this host: look with lspci -D")]
    NoFunction(Bdf),
    /// It has no IOMMU group.
    #[error(
        "{0} is in no IOMMU group, so nothing would keep its DMA apart: turn the IOMMU on (VT-d or AMD-Vi in firmware, and intel_iommu=on on the kernel's command line)"
    )]
    NoGroup(Bdf),
}

/// A sysfs tree; tests use a directory.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
    on_write: Option<Hook>,
}

/// What a stand-in for the kernel does after a write: the file below the root, and the text.
pub type OnWrite = dyn Fn(&Path, &str) + Send + Sync;

#[derive(Clone)]
struct Hook(Arc<OnWrite>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::new("/sys")
    }
}

impl Sysfs {
    /// The tree at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            on_write: None,
        }
    }

    /// The tree at `root`, which is no kernel's: `on_write` does what a kernel would.
    pub fn stand_in(root: impl Into<PathBuf>, on_write: Arc<OnWrite>) -> Self {
        Self {
            root: root.into(),
            on_write: Some(Hook(on_write)),
        }
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.root.join(below)
    }

    pub(crate) fn function_path(&self, bdf: Bdf) -> PathBuf {
        self.path("bus/pci/devices").join(bdf.to_string())
    }

    /// One write(2) to a file of the tree, as sysfs wants it.
    pub(crate) fn write(&self, below: impl AsRef<Path>, text: &str) -> Result<(), SysfsError> {
        let path = self.path(below);
        let write = || {
            let mut file = fs::File::options().write(true).truncate(true).open(&path)?;
            io::Write::write_all(&mut file, text.as_bytes())
        };
        write().map_err(io_error("write", &path))?;
        if let Some(hook) = &self.on_write {
            (hook.0)(path.strip_prefix(&self.root).unwrap_or(&path), text);
        }
        Ok(())
    }

    /// A module's parameter; `None` if the module is not loaded.
    pub fn module_parameter(&self, module: &str, name: &str) -> Result<Option<String>, SysfsError> {
        let path = self
            .path("module")
            .join(module)
            .join("parameters")
            .join(name);
        found(read(&path))
    }
}

pub(crate) fn io_error<'a>(
    act: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> SysfsError + 'a {
    move |source| SysfsError::Io {
        act,
        path: path.to_owned(),
        source,
    }
}

/// A file's text without the newline.
pub(crate) fn read(path: &Path) -> Result<String, SysfsError> {
    let bytes = fs::read(path).map_err(io_error("read", path))?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// A number in decimal or with 0x.
pub(crate) fn read_number(path: &Path) -> Result<u64, SysfsError> {
    let text = read(path)?;
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map_err(|_| SysfsError::Content {
        path: path.to_owned(),
        what: "number",
        text: text.chars().take(64).collect(),
    })
}

/// Turns "no such file" into `None`.
pub(crate) fn found<T>(result: Result<T, SysfsError>) -> Result<Option<T>, SysfsError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(SysfsError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The last part of where a symbolic link points; `None` if there is none.
pub(crate) fn link_name(path: &Path) -> Result<Option<String>, SysfsError> {
    let target = found(fs::read_link(path).map_err(io_error("read", path)))?;
    let name = target.and_then(|target| Some(target.file_name()?.to_string_lossy().into_owned()));
    Ok(name)
}
