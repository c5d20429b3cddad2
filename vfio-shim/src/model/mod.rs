//! What PCIe, VFIO and an NTB are made of, as plain types and the two traits; no I/O.

mod addr;
mod bdf;
mod config_space;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
mod function;
mod irq;
mod region;
mod runtime;
mod shadow_config;
mod space;
#[cfg(any(test, feature = "contract"))]
pub mod space_contract;
mod span;
mod undo;

pub use addr::{BarOffset, GuestAddress, Iova, PortIova, WindowOffset};
pub use bdf::{Bdf, BdfError, Fdid};
pub use config_space::{
    CAP_EXP, CAP_MSI, CAP_MSIX, CAP_PM, COMMAND, COMMAND_INTX_DISABLE, COMMAND_MASTER,
    COMMAND_MEMORY, CONFIG_BYTES_MAX, CONFIG_BYTES_MIN, Capability, ConfigError, ConfigView,
    EXT_CAP_ATS, EXT_CAP_DSN, EXT_CAP_PASID, EXT_CAP_PRI, EXT_CAP_REBAR, EXT_CAP_SRIOV,
};
pub use function::{Function, FunctionError, FunctionIds, FunctionInfo};
pub use irq::{IrqIndex, IrqInfo};
pub use region::{BAR_COUNT, MmapArea, RegionIndex, RegionInfo};
pub use runtime::{Idle, JoinOnDrop, OsRuntime, Runtime, Task, Wait};
pub use shadow_config::{Effects, ShadowConfig, ShadowError};
pub use space::{Access, AddressSpace, Aperture, DmaMap, MapError, Mapping, Memory};
pub use span::{Span, overlap_among};
pub use undo::UndoStep;
