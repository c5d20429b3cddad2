//! The port trait: one NTB function of this host, whose peer is the half at the far end.

use crate::model::{AddressSpace, Aperture, PortIova};
use std::{io, os::fd::BorrowedFd, sync::Arc};

/// What a port is; fixed as long as it is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// The chip's name, for `status`.
    pub chip: &'static str,
    /// Size of the outbound memory windows in bytes (window 0 = BAR2, window 1 = BAR4).
    pub window_bytes: [u64; 2],
    /// How many doorbells each half has, the link's own not counted.
    pub doorbell_count: u32,
    /// How many scratchpads each half has.
    pub spad_count: u32,
    /// Whether a doorbell never overtakes an earlier store through a window.
    pub doorbell_ordered: bool,
}

/// Why a port could not be opened or programmed.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// It cannot be opened through VFIO.
    #[error("the NTB cannot be opened")]
    Open(#[from] crate::vfio::OpenError),
    /// The function behind it refused.
    #[error("the NTB cannot be set up")]
    Function(#[from] crate::model::FunctionError),
    /// Not a chip that this code drives.
    #[error(
        "{vendor:04x}:{device:04x} revision {revision:#04x} is no NTB that Sublet drives; it drives Intel SPR, EMR and GNR (8086:347e revision above 0x0f, 8086:0db4)"
    )]
    Unknown {
        /// PCI vendor id.
        vendor: u16,
        /// PCI device id.
        device: u16,
        /// PCI revision id.
        revision: u8,
    },
    /// A register did not read back what was written.
    #[error(
        "NTB register {register} reads {read:#x} after {written:#x} was written; the device is not in working order, reset the host"
    )]
    Readback {
        /// The register's name.
        register: &'static str,
        /// What was written.
        written: u64,
        /// What was read.
        read: u64,
    },
    /// The device answers with ones.
    #[error("the NTB answers with ones: it has fallen off the bus or has no memory decoding")]
    Gone,
    /// A register address or window size that the chip cannot have.
    #[error("the NTB's {what} is {value:#x}, which cannot be: check the firmware's NTB settings")]
    Geometry {
        /// What is wrong.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The kernel refused.
    #[error("the kernel refused to {act} of the NTB")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

/// One NTB function of this host. All methods are cheap register accesses; none waits.
pub trait NtbPort: Send + Sync {
    /// What it is.
    fn info(&self) -> &PortInfo;

    /// Lets the link train, or takes it down.
    fn link_enable(&self, enable: bool);
    /// Whether the link is up.
    fn link_is_up(&self) -> bool;

    /// Points inbound window `index` at `bytes` bytes from `base` of this port's container.
    /// With another base it is closed first, so that at no moment the old base goes with the new
    /// limit; with the same one it only gets another size.
    fn window_open(&self, index: usize, base: PortIova, bytes: u64) -> Result<(), PortError>;
    /// Closes inbound window `index`: the peer's stores are dropped, its loads give ones.
    fn window_close(&self, index: usize);
    /// Outbound window `index`: loads and stores reach the peer's inbound window.
    fn window(&self, index: usize) -> Arc<dyn Aperture>;

    /// Reads an own scratchpad, which the peer writes.
    fn spad_read(&self, index: u32) -> u32;
    /// Writes an own scratchpad.
    fn spad_write(&self, index: u32, value: u32);
    /// Writes a scratchpad of the peer.
    fn peer_spad_write(&self, index: u32, value: u32);

    /// Masks all doorbells but those in `bits`.
    fn doorbell_unmask_only(&self, bits: u64);
    /// Rings the peer's doorbells in `bits`.
    fn peer_doorbell_ring(&self, bits: u64);
    /// Takes the pending doorbells (and bit `doorbell_count` for a change of link): reads the
    /// status, clears what it read, and reads back, so that the clear has arrived (NTB.md). The
    /// caller scans and calls again until it returns 0.
    fn doorbell_take(&self) -> u64;
    /// The eventfd that becomes readable on a doorbell or a change of link.
    fn event(&self) -> BorrowedFd<'_>;

    /// The port's own container: what the peer's accesses go through.
    fn address_space(&self) -> &dyn AddressSpace;
    /// The port's VFIO fd and the offset of outbound window `index` in it, for a trusted VMM
    /// that maps a BAR itself; `None` where there is none.
    fn window_fd(&self, index: usize) -> Option<(BorrowedFd<'_>, u64)>;
}
