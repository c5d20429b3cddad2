//! Who has which part of an address range: slices of a window, and where a window goes.

mod allocator;
mod base;
mod runs;

pub use allocator::{SpanAllocator, SpanError};
pub use base::{BaseError, window_base};
