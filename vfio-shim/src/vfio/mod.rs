//! The only door to /dev/vfio: groups, type1 containers, functions, and their mapped memory.

mod caps;
mod container;
mod door;
mod error;
mod function;
mod group;
mod ioctl;
mod irqs;
mod mapping;
mod mmio;
mod regions;
mod table;

pub use container::Container;
pub use door::{Door, OpenGroup};
pub use error::OpenError;
pub use function::VfioFunction;
pub use group::Group;
pub use ioctl::requests;
pub use mapping::{BAR_ALIGN, FdMapping};
pub use mmio::MappedAperture;
