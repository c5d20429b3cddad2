//! The messages between two ports as values: requests, replies, refusals.

pub use super::refusal::{Refusal, RefusalCode, clean_text};
use crate::model::{
    Access, BAR_COUNT, Bdf, FunctionIds, FunctionInfo, IrqIndex, IrqInfo, RegionIndex, RegionInfo,
    Span, WindowOffset,
};
use std::fmt;

/// The most entries in one `List` reply.
pub const LIST_MAX: usize = 64;
/// The most entries that a borrower collects from one pool.
pub const ENTRIES_MAX: usize = 1024;
/// The most ranges in one `Map`, and spans in one `Unmap`.
pub const RANGES_MAX: usize = 64;
/// The most bytes of config space in one reply.
pub const CONFIG_BYTES_MAX: usize = 2048;
/// The most mappable areas of one region.
pub const AREAS_MAX: usize = 16;
/// The widest access to a region.
pub const ACCESS_BYTES_MAX: usize = 8;

/// An operation's id: chosen by the requester, growing within a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

impl fmt::Display for OpId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A lease's id: chosen by the lender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// What whoever opens a path has to show: handed out with the lease. It compares in constant
/// time and never shows in a log.
#[derive(Clone, Copy)]
pub struct Secret(pub [u8; 16]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        let differ = |sum: u8, (a, b): (&u8, &u8)| sum | (a ^ b);
        std::hint::black_box(self.0.iter().zip(&other.0).fold(0, differ)) == 0
    }
}

impl Eq for Secret {}

/// Guest memory for the function: DMA addresses, and where in the lender's outbound window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRange {
    /// DMA addresses of the function.
    pub span: Span,
    /// Where they lead in the window.
    pub offset: WindowOffset,
    /// What the function may do.
    pub access: Access,
}

/// What one side asks of the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Who is there.
    Hello {
        /// The asker's node id.
        node: u16,
        /// Its usable window.
        window_bytes: u64,
    },
    /// The pool, from this cursor on.
    List {
        /// 0, or the last reply's `next`.
        cursor: u32,
    },
    /// A lease of one function.
    Borrow {
        /// Which.
        bdf: Bdf,
    },
    /// The end of a lease; an open path is undone first.
    Return {
        /// Which.
        lease: LeaseId,
    },
    /// The path is to be opened.
    Open {
        /// Of which lease.
        lease: LeaseId,
        /// Handed out with it.
        secret: Secret,
        /// First word in the borrower's interrupt table.
        irq_first: u32,
        /// How many words.
        irq_count: u32,
    },
    /// A piece of config space.
    Config {
        /// Of which lease.
        lease: LeaseId,
        /// First byte.
        offset: u16,
        /// How many, at most `CONFIG_BYTES_MAX`.
        len: u16,
    },
    /// Mappings for the function: all or none.
    Map {
        /// Of which lease.
        lease: LeaseId,
        /// At most `RANGES_MAX`.
        ranges: Vec<MapRange>,
    },
    /// Mappings taken away.
    Unmap {
        /// Of which lease.
        lease: LeaseId,
        /// At most `RANGES_MAX`.
        spans: Vec<Span>,
    },
    /// All vectors of the index on or off.
    Irqs {
        /// Of which lease.
        lease: LeaseId,
        /// Which kind.
        index: IrqIndex,
        /// On or off.
        enable: bool,
    },
    /// Vectors masked or unmasked.
    Mask {
        /// Of which lease.
        lease: LeaseId,
        /// Which kind.
        index: IrqIndex,
        /// First vector.
        start: u32,
        /// How many.
        count: u32,
        /// Masked or not.
        masked: bool,
    },
    /// Bus mastering on or off.
    BusMaster {
        /// Of which lease.
        lease: LeaseId,
        /// On or off.
        enable: bool,
    },
    /// The function is to be reset.
    Reset {
        /// Of which lease.
        lease: LeaseId,
    },
    /// A load of what no slice covers.
    RegionRead {
        /// Of which lease.
        lease: LeaseId,
        /// Which region.
        region: u8,
        /// Where.
        offset: u64,
        /// 1, 2, 4 or 8 bytes.
        len: u8,
    },
    /// A store to what no slice covers.
    RegionWrite {
        /// Of which lease.
        lease: LeaseId,
        /// Which region.
        region: u8,
        /// Where.
        offset: u64,
        /// 1, 2, 4 or 8 bytes.
        data: Vec<u8>,
    },
    /// The lender ended the lease.
    Revoked {
        /// Which.
        lease: LeaseId,
        /// Why, for people.
        text: String,
    },
}

impl Request {
    /// The same request for another lease; one that is about none stays as it is.
    #[must_use]
    pub fn of(mut self, lease: LeaseId) -> Self {
        match &mut self {
            Self::Hello { .. } | Self::List { .. } | Self::Borrow { .. } => {}
            Self::Return { lease: named }
            | Self::Open { lease: named, .. }
            | Self::Config { lease: named, .. }
            | Self::Map { lease: named, .. }
            | Self::Unmap { lease: named, .. }
            | Self::Irqs { lease: named, .. }
            | Self::Mask { lease: named, .. }
            | Self::BusMaster { lease: named, .. }
            | Self::Reset { lease: named }
            | Self::RegionRead { lease: named, .. }
            | Self::RegionWrite { lease: named, .. }
            | Self::Revoked { lease: named, .. } => *named = lease,
        }
        self
    }
}

/// What came of a request. (A reply is made, sent and dropped; boxing the large one gains nothing.)
#[expect(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Done, and nothing to tell.
    Done,
    /// To `Hello`.
    Hello {
        /// The answerer's node id.
        node: u16,
        /// Its usable window.
        window_bytes: u64,
    },
    /// To `List`.
    List {
        /// Where to go on; 0 = that was all.
        next: u32,
        /// At most `LIST_MAX`.
        entries: Vec<PoolEntry>,
    },
    /// To `Borrow`.
    Borrowed {
        /// The lease.
        lease: LeaseId,
        /// What `Open` has to show.
        secret: Secret,
        /// The function.
        entry: PoolEntry,
    },
    /// To `Open`.
    Opened(RemoteFunction),
    /// To `Config` and `RegionRead`.
    Bytes(Vec<u8>),
}

/// Whether a function of the pool can be borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PoolState {
    /// It can.
    Available = 0,
    /// Somebody has it.
    InUse = 1,
    /// It could not be brought back to power-on state.
    Quarantine = 2,
}

/// A function of the lender's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolEntry {
    /// Its address on the lender.
    pub bdf: Bdf,
    /// Ids and class.
    pub ids: FunctionIds,
    /// Whether it can be borrowed.
    pub state: PoolState,
    /// The larger of MSI's and MSI-X's vectors.
    pub irq_count: u32,
    /// Sum of its BARs.
    pub bar_bytes: u64,
    /// Device serial number; 0 = none.
    pub serial: u64,
}

/// A region of an opened function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteRegion {
    /// Size, access and mappable areas.
    pub info: RegionInfo,
    /// Window offset of the region's first byte; `None` = no slice.
    pub slice: Option<WindowOffset>,
}

/// An opened function, as the borrower sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteFunction {
    /// Bytes of config space.
    pub config_len: u16,
    /// By vfio-pci's index.
    pub regions: [RemoteRegion; RegionIndex::COUNT as usize],
    /// By vfio-pci's index.
    pub irqs: [IrqInfo; IrqIndex::COUNT],
}

impl RemoteFunction {
    /// What the borrower sees of a function whose BARs have these slices.
    pub fn new(
        info: &FunctionInfo,
        slices: &[Option<WindowOffset>; BAR_COUNT],
        config_len: u16,
    ) -> Self {
        Self {
            config_len,
            regions: std::array::from_fn(|index| RemoteRegion {
                info: info.regions[index].clone(),
                slice: slices.get(index).copied().flatten(),
            }),
            irqs: info.irqs,
        }
    }

    /// As a function's info, and the slice of each BAR. The ids are in config space, not here.
    pub fn into_parts(self) -> (FunctionInfo, [Option<WindowOffset>; BAR_COUNT]) {
        let slices = std::array::from_fn(|bar| self.regions[bar].slice);
        let info = FunctionInfo {
            ids: FunctionIds::default(),
            regions: self.regions.map(|region| region.info),
            irqs: self.irqs,
            // What cannot be reset is not lent.
            resettable: true,
        };
        (info, slices)
    }
}

/// One message.
#[expect(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A request.
    Request(OpId, Request),
    /// What came of the request with this id and op (bit 15 clear).
    Reply(OpId, u16, Result<Reply, Refusal>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_stay_out_of_logs_and_compare() {
        let secret = Secret([0xab; 16]);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        let mut other = secret;
        assert_eq!(secret, other);
        other.0[15] ^= 1;
        assert_ne!(secret, other);
    }
}
