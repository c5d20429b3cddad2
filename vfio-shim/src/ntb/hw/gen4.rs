//! The register program of Intel's gen4 NTB (SPR, EMR, GNR) against its BAR0.
//!
//! Intel publishes no register text for it. Names and offsets are those of Linux's
//! drivers/ntb/hw/intel/ntb_hw_gen4.h, which the stock driver uses; NTB.md's table says what each
//! does. IM = the half in this host, EM = the far half.

use crate::model::{Aperture, PortIova};
use crate::ntb::PortError;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// How many doorbells each half has (GEN4_DB_COUNT).
pub(super) const DOORBELLS: u32 = 32;
/// How many MSI-X vectors: one per doorbell and one for the link (GEN4_DB_MSIX_VECTOR_COUNT).
pub(super) const VECTORS: u32 = 33;
/// How many scratchpads each half has (GEN4_SPAD_COUNT).
pub(super) const SPADS: u32 = 16;
/// The vector that all doorbells and the link share.
pub(super) const SHARED_VECTOR: u8 = 0;

/// GEN4_NTBCNTL_OFFSET, 32 bits: snooping per window and direction.
const NTBCNTL: u64 = 0x0000;
/// NTB_CTL_{E2I,I2E}_BAR{23,45}_SNOOP: all four, as the stock driver writes.
const NTBCNTL_SNOOP: u32 = 0x0154;
/// GEN4_IM23XBASE_OFFSET, 64 bits; window 1 is 0x10 further on. The base of the inbound window.
const XBASE: u64 = 0x0010;
/// GEN4_IM23XLMT_OFFSET, 64 bits; window 1 is 0x10 further on. Its limit in BAR addresses.
const XLMT: u64 = 0x0018;
const WINDOW_STRIDE: u64 = 0x10;
/// GEN4_IM_INT_STATUS_OFFSET, 64 bits, write 1 to clear: doorbells, then the link.
const INT_STATUS: u64 = 0x0040;
/// GEN4_IM_INT_DISABLE_OFFSET, 64 bits, 1 = masked.
const INT_DISABLE: u64 = 0x0048;
/// GEN4_INTVEC_OFFSET, 33 bytes: status bit to MSI-X vector. 1..32, 0 after reset.
const INTVEC: u64 = 0x0050;
/// GEN4_IM_SPAD_OFFSET, 16 times 32 bits: own scratchpads.
const IM_SPAD: u64 = 0x0080;
/// GEN4_IM_DOORBELL_OFFSET, 32 times 32 bits: write 1 to ring the far half.
const IM_DOORBELL: u64 = 0x0100;
/// GEN4_EM_SPAD_OFFSET, 16 times 32 bits: the far half's scratchpads.
const EM_SPAD: u64 = 0x8080;
/// GEN4_LINK_CTRL_OFFSET, 16 bits, and GEN4_LINK_CTRL_LINK_DISABLE.
const LINK_CTRL: u64 = 0xb050;
const LINK_CTRL_DISABLE: u16 = 0x0010;
/// GEN4_LINK_STATUS_OFFSET, 16 bits (PCIe 6.0 section 7.5.3.8), and its data link layer bit.
const LINK_STATUS: u64 = 0xb052;
const LINK_STATUS_ACTIVE: u16 = 1 << 13;
/// GEN4_SLOTSTS, 16 bits, and GEN4_SLOTSTS_DLLSCS: write 1 to clear, before the link's bit.
const SLOTSTS: u64 = 0xb05a;
const SLOTSTS_DLLSCS: u16 = 0x0100;
/// GEN4_PPD0_OFFSET, 32 bits, and GEN4_PPD_LINKTRN: starts link training, must read back.
const PPD0: u64 = 0xb0d4;
const PPD0_LINKTRN: u32 = 0x0008;
/// GEN4_PPD1_OFFSET, 32 bits: SPR_PPD_CONN_MASK (ICX has one bit less) tells whether it is wired
/// back to back.
const PPD1: u64 = 0xb4c0;
const PPD1_CONN_MASK: u32 = 0x0700;
const PPD1_CONN_B2B: u32 = 0x0200;

/// Doorbells and the link's own bit, which is the one past them (GEN4_DB_LINK_BIT).
const LINK_BIT: u64 = 1 << DOORBELLS;
const ALL_BITS: u64 = LINK_BIT | (LINK_BIT - 1);
/// Translation is in pages on these chips; ICX, where it is in BAR sizes, is not driven.
const PAGE: u64 = 4096;

/// Where a window's BAR lies in this host's physical address space: limits are told in that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WindowBar {
    pub physical: u64,
    pub bytes: u64,
}

/// One half's registers.
pub(super) struct Gen4 {
    registers: Arc<dyn Aperture>,
    windows: [WindowBar; 2],
    /// The doorbells that are not masked.
    unmasked: AtomicU64,
}

macro_rules! register_access {
    ($read:ident, $write:ident, $type:ty) => {
        fn $read(&self, offset: u64) -> $type {
            let mut bytes = [0; size_of::<$type>()];
            self.registers.read(offset, &mut bytes);
            <$type>::from_le_bytes(bytes)
        }

        fn $write(&self, offset: u64, value: $type) {
            self.registers.write(offset, &value.to_le_bytes());
        }
    };
}

impl Gen4 {
    register_access!(read16, write16, u16);
    register_access!(read32, write32, u32);
    register_access!(read64, write64, u64);

    /// Brings the half to the state in which nothing gets in and nothing rings: doorbells masked
    /// and cleared, windows closed, the link off, all status bits on the one shared vector.
    pub fn start(registers: Arc<dyn Aperture>, windows: [WindowBar; 2]) -> Result<Self, PortError> {
        let this = Self {
            registers,
            windows,
            unmasked: AtomicU64::new(0),
        };
        if this.read32(PPD1) == u32::MAX && this.read32(NTBCNTL) == u32::MAX {
            return Err(PortError::Gone);
        }
        this.check_geometry()?;
        this.write64(INT_DISABLE, ALL_BITS);
        this.check(INT_DISABLE, "IM_INT_DISABLE", ALL_BITS)?;
        for index in 0..windows.len() {
            this.close(index)?;
        }
        this.link_disable();
        for bit in 0..u64::from(VECTORS) {
            this.registers.write(INTVEC + bit, &[SHARED_VECTOR]);
        }
        this.acknowledge(ALL_BITS);
        Ok(this)
    }

    fn check_geometry(&self) -> Result<(), PortError> {
        let ppd1 = self.read32(PPD1);
        if ppd1 & PPD1_CONN_MASK != PPD1_CONN_B2B {
            return Err(PortError::Geometry {
                what: "PPD1 (it must be set to back-to-back, B2B)",
                value: ppd1.into(),
            });
        }
        for (index, bar) in self.windows.iter().enumerate() {
            // Window 1 may be switched off in firmware; window 0 carries everything.
            let off = bar.bytes == 0 && index != 0;
            let sound = bar.bytes.is_power_of_two()
                && bar.bytes >= PAGE
                && bar.physical != 0
                && bar.physical % bar.bytes == 0;
            if !off && !sound {
                let what = ["BAR2 size or address", "BAR4 size or address"][index];
                return Err(PortError::Geometry {
                    what,
                    value: if bar.bytes.is_power_of_two() {
                        bar.physical
                    } else {
                        bar.bytes
                    },
                });
            }
        }
        Ok(())
    }

    fn check(&self, offset: u64, register: &'static str, written: u64) -> Result<(), PortError> {
        match self.read64(offset) {
            read if read == written => Ok(()),
            read => Err(PortError::Readback {
                register,
                written,
                read,
            }),
        }
    }

    fn window(&self, index: usize) -> Option<(WindowBar, u64)> {
        let bar = self.windows.get(index).filter(|bar| bar.bytes != 0)?;
        Some((*bar, index as u64 * WINDOW_STRIDE))
    }

    /// Closes a window: its limit is its beginning. Fine for one that is not there.
    pub fn close(&self, index: usize) -> Result<(), PortError> {
        let Some((bar, at)) = self.window(index) else {
            return Ok(());
        };
        self.write64(XLMT + at, bar.physical);
        // The read also makes sure that the write has arrived: after it, nothing gets in.
        self.check(XLMT + at, ["IM23XLMT", "IM45XLMT"][index], bar.physical)
    }

    /// It is closed first, then the base is written, then the limit: at no moment does the old base
    /// go with the new limit. Of one that is open with this base only the size changes; a closed one
    /// has its base written, be it the same, as the chip may have to be told after each link-up. A
    /// register that does not take its value leaves the window closed.
    pub fn open(&self, index: usize, base: PortIova, bytes: u64) -> Result<(), PortError> {
        let Some((bar, at)) = self.window(index) else {
            let what = "window's size in firmware";
            return Err(PortError::Geometry { what, value: 0 });
        };
        if bytes == 0 || bytes > bar.bytes || !bytes.is_multiple_of(PAGE) {
            let what = "window size asked for";
            return Err(PortError::Geometry { what, value: bytes });
        }
        if !base.0.is_multiple_of(PAGE) || base.checked_add(bytes).is_none() {
            let what = "window base asked for";
            return Err(PortError::Geometry {
                what,
                value: base.0,
            });
        }
        let is_closed = self.read64(XLMT + at) == bar.physical;
        if is_closed || self.read64(XBASE + at) != base.0 {
            self.close(index)?;
            self.write64(XBASE + at, base.0);
            self.check(XBASE + at, ["IM23XBASE", "IM45XBASE"][index], base.0)?;
        }
        let limit = bar.physical + bytes;
        self.write64(XLMT + at, limit);
        let opened = self.check(XLMT + at, ["IM23XLMT", "IM45XLMT"][index], limit);
        if opened.is_err() {
            self.close(index)?;
        }
        opened
    }

    /// Lets the link train.
    pub fn link_enable(&self) -> Result<(), PortError> {
        self.write32(NTBCNTL, NTBCNTL_SNOOP);
        let control = self.read16(LINK_CTRL);
        self.write16(LINK_CTRL, control & !LINK_CTRL_DISABLE);
        let ppd0 = self.read32(PPD0) | PPD0_LINKTRN;
        self.write32(PPD0, ppd0);
        match self.read32(PPD0) {
            read if read & PPD0_LINKTRN != 0 => Ok(()),
            read => Err(PortError::Readback {
                register: "PPD0",
                written: ppd0.into(),
                read: read.into(),
            }),
        }
    }

    /// Takes the link down.
    pub fn link_disable(&self) {
        let control = self.read16(LINK_CTRL);
        self.write16(LINK_CTRL, control | LINK_CTRL_DISABLE);
        self.write32(NTBCNTL, self.read32(NTBCNTL) & !NTBCNTL_SNOOP);
    }

    /// Whether the data link layer is up. A half that is gone is not.
    pub fn link_is_up(&self) -> bool {
        let status = self.read16(LINK_STATUS);
        status != u16::MAX && status & LINK_STATUS_ACTIVE != 0
    }

    /// Masks all doorbells but `bits`; the link's own bit is never masked here.
    pub fn unmask_only(&self, bits: u64) {
        let unmasked = (bits & ALL_BITS) | LINK_BIT;
        self.unmasked.store(unmasked, Ordering::Release);
        self.write64(INT_DISABLE, ALL_BITS & !unmasked);
    }

    /// Masks all, and the link's bit too.
    pub fn mask_all(&self) {
        self.unmasked.store(0, Ordering::Release);
        self.write64(INT_DISABLE, ALL_BITS);
    }

    fn acknowledge(&self, status: u64) {
        if status & LINK_BIT != 0 {
            // The link's bit stays set while the slot's does (gen4_poll_link).
            self.write16(SLOTSTS, SLOTSTS_DLLSCS);
        }
        self.write64(INT_STATUS, status);
        // The clear is posted: a bell that arrives before it would find its bit set and stay
        // silent. The read pushes it through, so a bell after this is a new interrupt.
        self.read64(INT_STATUS);
    }

    /// Takes what is pending. All ones mean that the half is gone: nothing is pending then.
    pub fn take(&self) -> u64 {
        let status = self.read64(INT_STATUS);
        let pending = status & ALL_BITS;
        if status == u64::MAX || pending == 0 {
            return 0;
        }
        self.acknowledge(pending);
        pending & self.unmasked.load(Ordering::Acquire)
    }

    /// Rings the far half.
    pub fn ring(&self, bits: u64) {
        let bells = (0..u64::from(DOORBELLS)).filter(|bell| bits & 1 << bell != 0);
        bells.for_each(|bell| self.write32(IM_DOORBELL + 4 * bell, 1));
    }

    /// Reads an own scratchpad; one that does not exist is all ones.
    pub fn spad_read(&self, index: u32) -> u32 {
        match index < SPADS {
            true => self.read32(IM_SPAD + 4 * u64::from(index)),
            false => u32::MAX,
        }
    }

    /// Writes an own scratchpad.
    pub fn spad_write(&self, index: u32, value: u32) {
        if index < SPADS {
            self.write32(IM_SPAD + 4 * u64::from(index), value);
        }
    }

    /// Writes a scratchpad of the far half.
    pub fn peer_spad_write(&self, index: u32, value: u32) {
        if index < SPADS {
            self.write32(EM_SPAD + 4 * u64::from(index), value);
        }
    }
}

#[cfg(test)]
#[path = "gen4_tests.rs"]
mod tests;
