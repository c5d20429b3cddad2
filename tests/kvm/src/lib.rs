//! A guest with one function attached, for the tests of vmm-glue's KVM half.

mod mapped;
mod rig;

pub use mapped::MappedFunction;
pub use rig::{
    BAR, CONFIG, DATA, Guest, RAM_BYTES, TABLE, WAIT, copy, enable, ids, program_vector, until, vm,
    vms,
};
