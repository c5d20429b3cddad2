//! What PCIe, VFIO and an NTB are made of, as plain types and the two traits; no I/O.

mod addr;
mod bdf;
mod function;
mod irq;
mod region;
mod space;
mod span;

pub use addr::{BarOffset, GuestAddress, Iova, PortIova, WindowOffset};
pub use bdf::{Bdf, BdfError, Fdid};
pub use function::{Function, FunctionError, FunctionIds, FunctionInfo};
pub use irq::{IrqIndex, IrqInfo};
pub use region::{BAR_COUNT, MmapArea, RegionIndex, RegionInfo};
pub use space::{Access, AddressSpace, Aperture, DmaMap, MapError, Mapping, Memory};
pub use span::Span;
