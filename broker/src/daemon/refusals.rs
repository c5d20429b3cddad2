//! What this host's kernel refuses of a function, as refusals of verbs.

use super::vocabulary::{ErrorCode, VerbError};
use vfio_shim::path::words;
use vfio_shim::sysfs::{BindError, LendError, SysfsError};
use vfio_shim::vfio::OpenError;

pub(crate) fn from_sysfs(error: &SysfsError) -> VerbError {
    let code = match error {
        SysfsError::NoFunction { .. } => ErrorCode::UnknownFunction,
        _ => ErrorCode::Kernel,
    };
    VerbError::new(code, words(error))
}

pub(crate) fn from_lend(error: &LendError) -> VerbError {
    let code = match error {
        LendError::Sysfs(_, SysfsError::NoFunction(_)) => ErrorCode::UnknownFunction,
        LendError::Sysfs(..) => ErrorCode::Kernel,
        LendError::SriovOn { .. } => ErrorCode::SriovOn,
        LendError::Driven { .. } => ErrorCode::DriverBound,
        LendError::Orphan { .. } => ErrorCode::WrongState,
        LendError::GroupInUse { .. } => ErrorCode::GroupInUse,
        LendError::NoReset(_) => ErrorCode::NoReset,
    };
    VerbError::new(code, words(error))
}

pub(crate) fn from_bind(error: &BindError) -> VerbError {
    let code = match error {
        BindError::Driven { .. } => ErrorCode::DriverBound,
        _ => ErrorCode::Kernel,
    };
    VerbError::new(code, words(error))
}

pub(crate) fn from_open(error: &OpenError) -> VerbError {
    let code = match error {
        OpenError::NotViable { .. } => ErrorCode::GroupInUse,
        OpenError::Busy { .. } => ErrorCode::Busy,
        _ => ErrorCode::Kernel,
    };
    VerbError::new(code, words(error))
}
