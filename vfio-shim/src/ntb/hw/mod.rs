//! The NTB chips that Sublet drives.

mod gen4;
mod intel;

pub use intel::IntelPort;
