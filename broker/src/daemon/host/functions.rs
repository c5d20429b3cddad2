//! The functions of a host, as the lender's verbs see them: the kernel's here, soft ones elsewhere.

use super::refuse;
use crate::daemon::vocabulary::{ErrorCode, VerbError};
use std::io;
use std::path::Path;
use std::sync::Arc;
use vfio_shim::model::{Bdf, ConfigView, Function, FunctionIds};
use vfio_shim::path::{Keep, ResetFailed, ScrubPlan, StopFunction};
use vfio_shim::sysfs::{
    BindError, BindGuard, KernelLog, LendError, Sysfs, SysfsError, XE_CLEARED_MS,
};
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

impl KernelFunctions {
    /// Of a VF that xe drives: its PF, and its number there, counted from 1.
    fn xe_vf(&self, bdf: Bdf) -> Result<Option<(Bdf, u32)>, VerbError> {
        let ids = self.ids(bdf)?;
        let is_xe = self.sysfs.is_xe_vf(bdf, &ids);
        let pf = || self.sysfs.pf_of(bdf);
        match is_xe.and_then(|is_xe| if is_xe { pf() } else { Ok(None) }) {
            Ok(found) => Ok(found.map(|(pf, index)| (pf, index + 1))),
            Err(error) => Err(from_sysfs(&error)),
        }
    }

    fn stop(&self, bdf: Bdf) -> Result<Option<StopFunction>, VerbError> {
        let file = self.sysfs.xe_stop(bdf);
        let file = file.map_err(|error| from_sysfs(&error))?;
        Ok(file.map(|file| {
            let sysfs = self.sysfs.clone();
            let stop = move || sysfs.stop_xe_vf(&file).map_err(io::Error::other);
            Box::new(stop) as StopFunction
        }))
    }
}

/// How a function's own memory is cleared of a tenant.
fn scrub_plan(xe: Option<(Bdf, u32)>, waits: Option<&str>) -> ScrubPlan {
    match (xe, waits) {
        (None, _) => ScrubPlan::Reset,
        (Some(_), Some(_)) => ScrubPlan::DriverWaits,
        (Some(_), None) => ScrubPlan::Wait { ms: XE_CLEARED_MS },
    }
}

/// The PF's driver tells in the kernel's log alone that it could not clear a VF.
fn reset_failed((pf, number): (Bdf, u32)) -> Option<ResetFailed> {
    let log = KernelLog::open(Path::new("/dev/kmsg"));
    let log = log.inspect_err(|error| {
        tracing::warn!(%error, "a reset of {pf}'s VFs that fails will not be told by the kernel's log");
    });
    let mut log = log.ok()?;
    let (pf, vf) = (pf.to_string(), format!("VF{number} "));
    Some(Box::new(move || log.find(&[&pf, &vf, "FLR failed"])))
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
        let xe = self.xe_vf(bdf)?;
        let waits = self.sysfs.xe_vfio_driver().filter(|_| xe.is_some());
        let bind = BindGuard::bind(&self.sysfs, bdf, waits.unwrap_or("vfio-pci"), false);
        let bind = bind.map_err(|error| from_bind(&error))?;
        let function = VfioFunction::open(bdf, &self.sysfs).map_err(|error| from_open(&error))?;
        let config = function
            .config_space()
            .map_err(|error| refuse(ErrorCode::Kernel, chain(&error)))?;
        Ok(OpenFunction {
            function: Arc::new(function),
            serial: ConfigView::new(&config).map_or(0, |view| view.serial()),
            keep: Keep {
                scrub: scrub_plan(xe, waits),
                stop: self.stop(bdf)?,
                reset_failed: xe.and_then(reset_failed),
                kept: Some(Box::new(bind)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vf_of_xe_is_waited_for_by_its_driver_or_by_the_clock_and_others_are_not() {
        let xe = Some(("4a:00.0".parse().unwrap(), 1));
        assert_eq!(scrub_plan(None, None), ScrubPlan::Reset);
        let plan = scrub_plan(xe, Some("xe-vfio-pci"));
        assert_eq!(plan, ScrubPlan::DriverWaits);
        assert_eq!(scrub_plan(xe, None), ScrubPlan::Wait { ms: 12_000 });
    }
}
