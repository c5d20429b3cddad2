//! The messages between two ports as values: requests, replies, refusals.

use super::wire::TEXT_BYTES_MAX;
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
    /// The end of a lease.
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
    /// The end of the path; the lease goes on.
    Close {
        /// Of which lease.
        lease: LeaseId,
    },
    /// The lender ended the lease.
    Revoked {
        /// Which.
        lease: LeaseId,
        /// Why, for people.
        text: String,
    },
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
}

/// Why a request was refused, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// The op is not known; figure = op.
    UnknownOp,
    /// No such function in the pool.
    UnknownFunction,
    /// Somebody has it.
    Taken,
    /// Policy says no.
    NotAllowed,
    /// Unknown, over, or wrong secret: told alike.
    NoLease,
    /// Not now.
    WrongState,
    /// The window has no room; figure = bytes that would do.
    WindowFull,
    /// Outside of what there is.
    OutOfRange,
    /// Over a limit; figure = the limit.
    Limit,
    /// The function cannot be reset.
    NoReset,
    /// In use by something else.
    Busy,
    /// The kernel refused; figure = errno.
    Kernel,
    /// The function is in quarantine.
    Quarantine,
    /// A number that this version does not know.
    Other(u16),
}

impl RefusalCode {
    const KNOWN: [Self; 13] = [
        Self::UnknownOp,
        Self::UnknownFunction,
        Self::Taken,
        Self::NotAllowed,
        Self::NoLease,
        Self::WrongState,
        Self::WindowFull,
        Self::OutOfRange,
        Self::Limit,
        Self::NoReset,
        Self::Busy,
        Self::Kernel,
        Self::Quarantine,
    ];

    /// The number on the wire.
    pub fn raw(self) -> u16 {
        match self {
            Self::Other(raw) => raw,
            known => Self::KNOWN
                .iter()
                .position(|code| *code == known)
                .map_or(0, |at| at as u16 + 1),
        }
    }

    /// From the number on the wire; 0 is no refusal.
    pub fn from_raw(raw: u16) -> Option<Self> {
        let at = usize::from(raw.checked_sub(1)?);
        Some(Self::KNOWN.get(at).copied().unwrap_or(Self::Other(raw)))
    }
}

/// A refused request: cause and mend, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// The kind.
    pub code: RefusalCode,
    /// The figure that goes with it.
    pub figure: u64,
    /// For people.
    pub text: String,
}

impl Refusal {
    /// A refusal; the text is made fit for the wire.
    pub fn new(code: RefusalCode, figure: u64, text: impl AsRef<str>) -> Self {
        Self {
            code,
            figure,
            text: clean_text(text.as_ref()),
        }
    }
}

/// A text fit for the wire and for a terminal: at most `TEXT_BYTES_MAX` bytes, control
/// characters replaced.
pub fn clean_text(text: &str) -> String {
    let mut clean = String::new();
    for c in text.chars() {
        let c = if c.is_control() { '\u{fffd}' } else { c };
        if clean.len() + c.len_utf8() > TEXT_BYTES_MAX {
            break;
        }
        clean.push(c);
    }
    clean
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

    #[test]
    fn texts_are_cut_at_a_character_and_hold_no_control_characters() {
        let long = "é".repeat(TEXT_BYTES_MAX);
        assert_eq!(clean_text(&long).len(), TEXT_BYTES_MAX);
        assert_eq!(
            clean_text(&format!("a{long}")).len(),
            TEXT_BYTES_MAX - 1,
            "no half character"
        );
        assert_eq!(clean_text("a\x1b[2J\nb"), "a\u{fffd}[2J\u{fffd}b");
    }

    #[test]
    fn refusal_codes_have_protocol_md_numbers() {
        for raw in 1..=20 {
            assert_eq!(RefusalCode::from_raw(raw).unwrap().raw(), raw);
        }
        assert_eq!(RefusalCode::from_raw(0), None);
        assert_eq!(RefusalCode::UnknownOp.raw(), 1);
        assert_eq!(RefusalCode::WindowFull.raw(), 7);
        assert_eq!(RefusalCode::Quarantine.raw(), 13);
        assert_eq!(RefusalCode::from_raw(14), Some(RefusalCode::Other(14)));
    }
}
