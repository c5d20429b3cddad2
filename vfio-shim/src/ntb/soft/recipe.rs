//! How the functions' contract drives each kind of software function.

use super::*;
use crate::model::contract::{Recipe, RegisterStore};
use crate::model::{Aperture, IrqIndex};
use crate::vfio::MappedAperture;

const PAGE: u64 = 4096;
/// Where the driver of the Arc's shape puts its memirq page.
pub const MEMIRQ: u64 = 64 * PAGE;

/// The engine with MSI-X, of at least three vectors.
pub const ENGINE: Recipe = Recipe {
    vector: (IrqIndex::Msix, 2),
    scratch: SCRATCH,
    copy: engine_copy,
    prepare: |_| {},
};
/// The Arc's shape.
pub const ARC: Recipe = Recipe {
    vector: (IrqIndex::Msi, 0),
    scratch: ARC_SCRATCH,
    copy: arc_copy,
    prepare: |ram| ram.write(MEMIRQ + ARC_MEMIRQ_ENABLE, &0xffffu32.to_le_bytes()),
};

fn store<const N: usize>(register: u64, value: [u8; N]) -> RegisterStore {
    (register, value.to_vec())
}

fn engine_copy(source: u64, destination: u64, length: u32) -> Vec<RegisterStore> {
    vec![
        store(SOURCE, source.to_le_bytes()),
        store(DESTINATION, destination.to_le_bytes()),
        store(LENGTH, length.to_le_bytes()),
        store(VECTOR, 2u32.to_le_bytes()),
        store(DOORBELL, 1u32.to_le_bytes()),
    ]
}

fn arc_copy(source: u64, destination: u64, length: u32) -> Vec<RegisterStore> {
    vec![
        store(ARC_SOURCE, source.to_le_bytes()),
        store(ARC_DESTINATION, destination.to_le_bytes()),
        store(ARC_LENGTH, length.to_le_bytes()),
        store(ARC_MEMIRQ, MEMIRQ.to_le_bytes()),
        store(ARC_DOORBELL, 1u32.to_le_bytes()),
    ]
}

/// What the driver of the Arc's shape does at an interrupt: true when the copy engine has told.
pub fn memirq_taken(ram: &MappedAperture) -> bool {
    let take = |offset| {
        let mut byte = [0];
        ram.read(MEMIRQ + offset, &mut byte);
        ram.write(MEMIRQ + offset, &[0]);
        byte == [0xff]
    };
    take(ARC_MEMIRQ_SOURCE) && take(ARC_MEMIRQ_STATUS)
}
