//! One half of the bridge: its client, registers, configuration space, DMA table and vectors.

use crate::config_space::{ConfigSpace, VECTORS};
use crate::counters::Counters;
use crate::dma_table::DmaTable;
use crate::egress::Egress;
use crate::msix::Vectors;
use crate::options::DeviceOptions;
use crate::registers::{Effects, Registers};
use crate::stream::Stream;
use crate::window::Inbound;

/// Which half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The upstream side, PPD1 0x200.
    A,
    /// The other one, PPD1 0x4200.
    B,
}

impl Side {
    /// Both halves.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The other half.
    pub fn peer(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// The half's place in an array.
    pub fn index(self) -> usize {
        self as usize
    }

    fn ppd1(self) -> u32 {
        match self {
            Self::A => 0x200,
            Self::B => 0x4200,
        }
    }
}

/// Bytes of the MSI-X table: nothing but storage, the client's triggers decide.
const TABLE_BYTES: usize = 16 * VECTORS;

/// One half.
#[derive(Debug)]
pub struct Half {
    pub stream: Option<Stream>,
    /// The version was agreed on this connection.
    pub negotiated: bool,
    pub registers: Registers,
    pub config: ConfigSpace,
    pub dma: DmaTable,
    pub vectors: Vectors,
    pub msix_table: [u8; TABLE_BYTES],
    pub egress: Egress,
    pub counters: Counters,
    next_id: u16,
}

impl Half {
    /// A half without a client.
    pub fn new(side: Side, options: &DeviceOptions) -> Self {
        let window_bytes = [options.bar2_bytes(side), options.bar4_bytes];
        Self {
            stream: None,
            negotiated: false,
            registers: Registers::new(side.ppd1(), options.intvec_reset),
            config: ConfigSpace::new(options.device_id.0, options.revision(), window_bytes),
            dma: DmaTable::default(),
            vectors: Vectors::default(),
            msix_table: [0; TABLE_BYTES],
            egress: Egress::default(),
            counters: Counters::default(),
            next_id: 0,
        }
    }

    /// What DEVICE_RESET does: registers and configuration space to their reset values.
    pub fn reset(&mut self) {
        self.registers.reset();
        self.config.reset();
        self.msix_table = [0; TABLE_BYTES];
    }

    /// What the end of the client's connection does.
    pub fn disconnect(&mut self) {
        self.stream = None;
        self.negotiated = false;
        self.reset();
        self.dma.clear();
        self.vectors.clear();
        self.egress.clear();
    }

    /// An id for a message of the model itself to this half's client.
    pub fn next_id(&mut self) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    /// Where an access of the peer to a window arrives.
    pub fn inbound(&self, window: usize) -> Inbound {
        let (base, limit) = self.registers.window(window);
        Inbound {
            base,
            limit,
            bar_base: self.config.window_base(window),
        }
    }

    /// Fires vectors, if this half may start MSIs at all.
    pub fn fire(&mut self, vectors: u64) {
        if vectors == 0 || !self.config.bus_master() {
            return;
        }
        let enabled = self.config.msix_enabled();
        for vector in (0..VECTORS).filter(|vector| vectors >> vector & 1 != 0) {
            self.counters.msis += u64::from(self.vectors.fire(vector, enabled));
        }
    }

    /// Rings this half's doorbells.
    pub fn ring(&mut self, doorbells: u32) {
        let vectors = self.registers.raise(doorbells.into());
        self.fire(vectors);
    }

    /// A write to one of the half's own registers.
    pub fn write_register(&mut self, offset: u16, bytes: u16, value: u64) -> Effects {
        let effects = self.registers.write(offset, bytes, value);
        self.fire(effects.fire);
        effects
    }
}
