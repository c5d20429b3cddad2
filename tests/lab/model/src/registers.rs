//! The BAR0 registers of one half as a pure state machine: an access in, effects out.
//!
//! Offsets and meanings are those of Linux drivers/ntb/hw/intel/ntb_hw_gen4.h, as the unmodified
//! driver uses them. Everything that reaches the peer (doorbells, the peer's scratchpads) is only
//! *named* here: the model carries it out in the order of the half's posted writes.

pub const NTBCNTL: u16 = 0x0000;
pub const XBASE: [u16; 2] = [0x0010, 0x0020];
pub const XLMT: [u16; 2] = [0x0018, 0x0028];
pub const INT_STATUS: u16 = 0x0040;
pub const INT_DISABLE: u16 = 0x0048;
pub const INTVEC: u16 = 0x0050;
pub const XBASE_IDX: [u16; 2] = [0x0074, 0x0076];
pub const SPAD: u16 = 0x0080;
pub const DOORBELL: u16 = 0x0100;
pub const PEER_SPAD: u16 = 0x8080;
pub const LINK_CTRL: u16 = 0xB050;
pub const LINK_STATUS: u16 = 0xB052;
pub const SLOTSTS: u16 = 0xB05A;
pub const PPD0: u16 = 0xB0D4;
pub const PPD1: u16 = 0xB4C0;

/// Scratchpads of a half.
pub const SPADS: usize = 16;
/// Bytes of a bank of scratchpads.
pub const SPAD_BANK_BYTES: u16 = 4 * SPADS as u16;
/// Doorbells of a half.
pub const DOORBELLS: usize = 32;
/// Status bits, and so entries of INTVEC: the doorbells and the link.
pub const INT_SOURCES: usize = DOORBELLS + 1;
/// Bit of the link in INT_STATUS.
pub const LINK_BIT: u64 = 1 << DOORBELLS;

const INT_BITS: u64 = (1 << INT_SOURCES) - 1;
const LINK_CTRL_RESET: u16 = 0x10;
const LINK_DISABLED: u16 = 0x10;
const LINK_TRAINING: u32 = 1 << 3;
/// x16 at gen4 speed, data link active (bit 13).
const LINK_STATUS_UP: u16 = 0x2104;
const SLOTSTS_LINK_CHANGED: u16 = 1 << 8;

/// What INTVEC holds after a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum IntvecReset {
    /// 1..32, then 0, as silicon has it.
    #[default]
    Table,
    /// Every source on vector 0.
    Zero,
    /// Source n on vector 32 - n.
    Reverse,
}

impl IntvecReset {
    fn values(self) -> [u8; INT_SOURCES] {
        std::array::from_fn(|n| match self {
            Self::Table => ((n + 1) % INT_SOURCES) as u8,
            Self::Zero => 0,
            Self::Reverse => (INT_SOURCES - 1 - n) as u8,
        })
    }
}

/// What an access asks of the rest of the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use]
pub struct Effects {
    /// MSI-X vectors of this half to fire, as bits.
    pub fire: u64,
    /// Doorbells of the peer to ring, as bits.
    pub ring: u32,
    /// LINK_CTRL or PPD0 was written: the link may have to change.
    pub link_inputs: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Ntbcntl,
    Xbase(usize),
    Xlmt(usize),
    IntStatus,
    IntDisable,
    Intvec(usize),
    XbaseIdx(usize),
    Spad(usize),
    Doorbell(usize),
    LinkCtrl,
    LinkStatus,
    Slotsts,
    Ppd0,
    Ppd1,
}

/// Finds the register that has the byte at `offset`: the register, its offset, its width.
fn find(offset: u16) -> Option<(Register, u16, u16)> {
    let index = |base: u16, width: u16| usize::from((offset - base) / width);
    let found = match offset {
        0x0000..=0x0003 => (Register::Ntbcntl, NTBCNTL, 4),
        0x0010..=0x0017 => (Register::Xbase(0), XBASE[0], 8),
        0x0018..=0x001F => (Register::Xlmt(0), XLMT[0], 8),
        0x0020..=0x0027 => (Register::Xbase(1), XBASE[1], 8),
        0x0028..=0x002F => (Register::Xlmt(1), XLMT[1], 8),
        0x0040..=0x0047 => (Register::IntStatus, INT_STATUS, 8),
        0x0048..=0x004F => (Register::IntDisable, INT_DISABLE, 8),
        0x0050..=0x0070 => (Register::Intvec(index(INTVEC, 1)), offset, 1),
        0x0074..=0x0077 => {
            let n = index(XBASE_IDX[0], 2);
            (Register::XbaseIdx(n), XBASE_IDX[n], 2)
        }
        0x0080..=0x00BF => {
            let n = index(SPAD, 4);
            (Register::Spad(n), SPAD + 4 * n as u16, 4)
        }
        0x0100..=0x017F => {
            let n = index(DOORBELL, 4);
            (Register::Doorbell(n), DOORBELL + 4 * n as u16, 4)
        }
        0xB050..=0xB051 => (Register::LinkCtrl, LINK_CTRL, 2),
        0xB052..=0xB053 => (Register::LinkStatus, LINK_STATUS, 2),
        0xB05A..=0xB05B => (Register::Slotsts, SLOTSTS, 2),
        0xB0D4..=0xB0D7 => (Register::Ppd0, PPD0, 4),
        0xB4C0..=0xB4C3 => (Register::Ppd1, PPD1, 4),
        _ => return None,
    };
    Some(found)
}

/// The registers of one half.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registers {
    ppd1: u32,
    intvec_reset: IntvecReset,
    ntbcntl: u32,
    xbase: [u64; 2],
    xlmt: [u64; 2],
    int_status: u64,
    int_disable: u64,
    intvec: [u8; INT_SOURCES],
    xbase_idx: [u16; 2],
    spad: [u32; SPADS],
    link_ctrl: u16,
    link_up: bool,
    slotsts: u16,
    ppd0: u32,
}

impl Registers {
    /// Registers at their reset values; `ppd1` tells which side of the bridge this is.
    pub fn new(ppd1: u32, intvec_reset: IntvecReset) -> Self {
        Self {
            ppd1,
            intvec_reset,
            ntbcntl: 0,
            xbase: [0; 2],
            xlmt: [0; 2],
            int_status: 0,
            int_disable: 0,
            intvec: intvec_reset.values(),
            xbase_idx: [0; 2],
            spad: [0; SPADS],
            link_ctrl: LINK_CTRL_RESET,
            link_up: false,
            slotsts: 0,
            ppd0: 0,
        }
    }

    /// Back to the reset column.
    pub fn reset(&mut self) {
        *self = Self::new(self.ppd1, self.intvec_reset);
    }

    /// Reads up to 8 bytes; bytes without a register read as 0.
    pub fn read(&self, offset: u16, bytes: u16) -> u64 {
        (0..bytes.min(8)).fold(0, |value, n| {
            let at = offset.wrapping_add(n);
            let byte = find(at).map_or(0, |(register, start, _)| {
                self.value(register) >> (8 * (at - start)) & 0xFF
            });
            value | byte << (8 * n)
        })
    }

    fn value(&self, register: Register) -> u64 {
        match register {
            Register::Ntbcntl => self.ntbcntl.into(),
            Register::Xbase(n) => self.xbase[n],
            Register::Xlmt(n) => self.xlmt[n],
            Register::IntStatus => self.int_status,
            Register::IntDisable => self.int_disable,
            Register::Intvec(n) => self.intvec[n].into(),
            Register::XbaseIdx(n) => self.xbase_idx[n].into(),
            Register::Spad(n) => self.spad[n].into(),
            Register::Doorbell(_) => 0,
            Register::LinkCtrl => self.link_ctrl.into(),
            Register::LinkStatus => u64::from(if self.link_up { LINK_STATUS_UP } else { 0 }),
            Register::Slotsts => self.slotsts.into(),
            Register::Ppd0 => self.ppd0.into(),
            Register::Ppd1 => self.ppd1.into(),
        }
    }

    /// Writes up to 8 bytes, register by register.
    pub fn write(&mut self, offset: u16, bytes: u16, value: u64) -> Effects {
        let mut effects = Effects::default();
        let end = bytes.min(8);
        let mut n = 0;
        while n < end {
            let at = offset.wrapping_add(n);
            let Some((register, start, width)) = find(at) else {
                n += 1;
                continue;
            };
            let lane = at - start;
            let taken = (width - lane).min(end - n);
            let mask = (u64::MAX >> (64 - 8 * taken)) << (8 * lane);
            let bits = (value >> (8 * n)) << (8 * lane) & mask;
            self.apply(register, bits, mask, &mut effects);
            n += taken;
        }
        effects
    }

    fn apply(&mut self, register: Register, bits: u64, mask: u64, effects: &mut Effects) {
        let merged = self.value(register) & !mask | bits;
        match register {
            Register::Ntbcntl => self.ntbcntl = merged as u32,
            Register::Xbase(n) => self.xbase[n] = merged,
            Register::Xlmt(n) => self.xlmt[n] = merged,
            Register::IntStatus => self.int_status &= !bits,
            Register::IntDisable => {
                let unmasked = self.int_disable & !merged;
                self.int_disable = merged & INT_BITS;
                effects.fire |= self.vectors(self.int_status & unmasked);
            }
            Register::Intvec(n) => self.intvec[n] = merged as u8,
            Register::XbaseIdx(n) => self.xbase_idx[n] = merged as u16,
            Register::Spad(n) => self.spad[n] = merged as u32,
            Register::Doorbell(n) => effects.ring |= (bits as u32 & 1) << n,
            Register::LinkCtrl => {
                self.link_ctrl = merged as u16;
                effects.link_inputs = true;
            }
            Register::Slotsts => self.slotsts &= !(bits as u16 & SLOTSTS_LINK_CHANGED),
            Register::Ppd0 => {
                self.ppd0 = merged as u32;
                effects.link_inputs = true;
            }
            Register::LinkStatus | Register::Ppd1 => {}
        }
    }

    /// The vectors of some interrupt sources, as bits.
    fn vectors(&self, sources: u64) -> u64 {
        (0..INT_SOURCES)
            .filter(|n| sources >> n & 1 != 0 && usize::from(self.intvec[*n]) < INT_SOURCES)
            .fold(0, |fire, n| fire | 1 << self.intvec[n])
    }

    /// Sets bits of INT_STATUS and returns the vectors to fire: only of bits that were clear.
    #[must_use]
    pub fn raise(&mut self, sources: u64) -> u64 {
        let fresh = sources & INT_BITS & !self.int_status;
        self.int_status |= fresh;
        self.vectors(fresh & !self.int_disable)
    }

    /// Shows a link change to this half and returns the vectors to fire.
    #[must_use]
    pub fn set_link(&mut self, up: bool) -> u64 {
        if self.link_up == up {
            return 0;
        }
        self.link_up = up;
        self.slotsts |= SLOTSTS_LINK_CHANGED;
        self.raise(LINK_BIT)
    }

    /// True while this half wants the link.
    pub fn link_enabled(&self) -> bool {
        self.link_ctrl & LINK_DISABLED == 0 && self.ppd0 & LINK_TRAINING != 0
    }

    /// Translate base and limit of a window.
    pub fn window(&self, window: usize) -> (u64, u64) {
        (self.xbase[window], self.xlmt[window])
    }
}

#[cfg(test)]
#[path = "registers_tests.rs"]
mod tests;
