//! What a function's own reset may leave behind and the next tenant could read, by class: cleared by hand after it.

use crate::model::{Function, FunctionError, RegionIndex};

/// Mass storage, non-volatile memory, NVM Express (PCI Code and ID Assignment, 1.2).
const CLASS_NVME: u32 = 0x01_0802;
/// AQA, ASQ and ACQ of an NVMe controller (NVMe Base Specification 2.0, 3.1.3), in words of 32
/// bits. A function level reset has to put them back to zero. Not every controller does it, and
/// two of them are addresses in the last tenant's memory. With CC.EN at zero, as after any reset,
/// a store here has no other effect.
const NVME_ADMIN_QUEUES: [u64; 5] = [0x24, 0x28, 0x2c, 0x30, 0x34];

/// After a reset, with memory decoding on, before anybody reaches the function's BARs.
pub(super) fn scrub(function: &dyn Function) -> Result<(), FunctionError> {
    if function.info().ids.class != CLASS_NVME {
        return Ok(());
    }
    for offset in NVME_ADMIN_QUEUES {
        function.region_write(RegionIndex(0), offset, &0u32.to_le_bytes())?;
    }
    Ok(())
}
