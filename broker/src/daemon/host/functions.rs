//! The functions of a host, as the lender's verbs see them: the kernel's here, soft ones elsewhere.

use super::refuse;
use crate::daemon::vocabulary::{ErrorCode, VerbError};
use std::sync::Arc;
use vfio_shim::model::{Bdf, ConfigView, Function, FunctionIds};
use vfio_shim::path::Keep;
use vfio_shim::sysfs::{BindError, BindGuard, LendError, Sysfs, SysfsError};
use vfio_shim::vfio::{OpenError, VfioFunction};

/// Where the functions of a host come from.
pub trait Functions: Send + Sync {
    /// Refused in words where there is no such function.
    fn check_exists(&self, bdf: Bdf) -> Result<(), VerbError>;
    /// What a function is.
    fn ids(&self, bdf: Bdf) -> Result<FunctionIds, VerbError>;
    /// Refused in words where it cannot be lent.
    fn check_lendable(&self, bdf: Bdf) -> Result<(), VerbError>;
    /// Opens it for lending.
    fn open(&self, bdf: Bdf) -> Result<OpenFunction, VerbError>;
}

/// An open function.
pub struct OpenFunction {
    /// The function.
    pub function: Arc<dyn Function>,
    /// Its device serial number; 0 = it has none.
    pub serial: u64,
    /// What comes with it; dropped after it is closed.
    pub keep: Keep,
}

/// The functions of this machine: sysfs and VFIO.
pub(super) struct KernelFunctions {
    sysfs: Sysfs,
}

impl KernelFunctions {
    pub(super) fn new(sysfs: Sysfs) -> Self {
        Self { sysfs }
    }
}

impl Functions for KernelFunctions {
    fn check_exists(&self, bdf: Bdf) -> Result<(), VerbError> {
        let checked = self.sysfs.check_exists(bdf);
        checked.map_err(|error| from_sysfs(&error))
    }

    fn ids(&self, bdf: Bdf) -> Result<FunctionIds, VerbError> {
        let ids = self.sysfs.ids(bdf);
        ids.map_err(|error| refuse(ErrorCode::Kernel, error.to_string()))
    }

    fn check_lendable(&self, bdf: Bdf) -> Result<(), VerbError> {
        let checked = self.sysfs.check_lendable(bdf, false);
        checked.map_err(|error| from_lend(&error))
    }

    fn open(&self, bdf: Bdf) -> Result<OpenFunction, VerbError> {
        let bind = BindGuard::bind(&self.sysfs, bdf, "vfio-pci", false);
        let bind = bind.map_err(|error| from_bind(&error))?;
        let function = VfioFunction::open(bdf, &self.sysfs).map_err(|error| from_open(&error))?;
        let config = function
            .config_space()
            .map_err(|error| refuse(ErrorCode::Kernel, chain(&error)))?;
        Ok(OpenFunction {
            function: Arc::new(function),
            serial: ConfigView::new(&config).map_or(0, |view| view.serial()),
            keep: Keep {
                kept: Some(Box::new(bind)),
                ..Keep::default()
            },
        })
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    vfio_shim::path::words(error)
}

fn from_sysfs(error: &SysfsError) -> VerbError {
    let code = match error {
        SysfsError::NoFunction { .. } => ErrorCode::UnknownFunction,
        _ => ErrorCode::Kernel,
    };
    refuse(code, chain(error))
}

fn from_lend(error: &LendError) -> VerbError {
    let code = match error {
        LendError::Sysfs(_, SysfsError::NoFunction(_)) => ErrorCode::UnknownFunction,
        LendError::Sysfs(..) => ErrorCode::Kernel,
        LendError::SriovOn { .. } => ErrorCode::SriovOn,
        LendError::Driven { .. } => ErrorCode::DriverBound,
        LendError::GroupInUse { .. } => ErrorCode::GroupInUse,
        LendError::NoReset(_) => ErrorCode::NoReset,
    };
    refuse(code, chain(error))
}

fn from_bind(error: &BindError) -> VerbError {
    let code = match error {
        BindError::Driven { .. } => ErrorCode::DriverBound,
        _ => ErrorCode::Kernel,
    };
    refuse(code, chain(error))
}

fn from_open(error: &OpenError) -> VerbError {
    let code = match error {
        OpenError::NotViable { .. } => ErrorCode::GroupInUse,
        _ => ErrorCode::Kernel,
    };
    refuse(code, chain(error))
}
