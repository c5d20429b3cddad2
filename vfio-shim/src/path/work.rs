//! What an executor does to one lent function, one piece after the other, and what it answers.

use super::grant::Scrub;
use super::message::{LeaseId, MapRange, Request};
use crate::model::{BAR_COUNT, IrqIndex, RegionIndex, Span, WindowOffset};

/// What `Open` needs: where the BARs go, and which words of the peer's interrupt table are the path's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenPlan {
    /// The lease.
    pub lease: LeaseId,
    /// Window offset of each BAR's first byte.
    pub slices: [Option<WindowOffset>; BAR_COUNT],
    /// The first word.
    pub irq_first: u32,
    /// How many words.
    pub irq_count: u32,
}

/// One piece of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FunctionWork {
    /// Reset, then map the BAR slices. All or nothing.
    Open(OpenPlan),
    /// Undo all of the path, in the one order of undoing, ending with a reset.
    Close,
    /// Stop what the function does, where its driver can, before it is taken from its guest.
    Stop,
    /// To power-on state, with whatever an undoing has left: for a function in quarantine.
    PutBack,
    /// Map guest RAM behind the window into the function's container. All or none.
    Map(Vec<MapRange>),
    /// Unmap guest RAM.
    Unmap(Vec<Span>),
    /// All vectors of an index on or off.
    Irqs(IrqIndex, bool),
    /// Mask or unmask vectors.
    Mask {
        /// The index.
        index: IrqIndex,
        /// The first vector.
        start: u32,
        /// How many.
        count: u32,
        /// Masked or not.
        masked: bool,
    },
    /// Bus mastering on or off.
    BusMaster(bool),
    /// Undo interrupts, bus mastering and slices, reset, slices back.
    Reset,
    /// Read config space as VFIO shows it.
    Config {
        /// Offset in bytes.
        offset: u16,
        /// Length in bytes.
        len: u16,
    },
    /// Read what no slice covers.
    Read {
        /// The region.
        region: RegionIndex,
        /// Offset in bytes.
        offset: u64,
        /// 1, 2, 4 or 8.
        len: u8,
    },
    /// Write what no slice covers.
    Write {
        /// The region.
        region: RegionIndex,
        /// Offset in bytes.
        offset: u64,
        /// 1, 2, 4 or 8 bytes.
        data: Vec<u8>,
    },
}

/// What a piece of work gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkOutcome {
    /// Done.
    Done,
    /// Done, with bytes.
    Bytes(Vec<u8>),
    /// The path is undone; what was done about the function's own memory.
    Closed(Scrub),
    /// The path is open; the size of its config space in bytes.
    Opened {
        /// 256 or 4096.
        config_len: u16,
    },
}

impl FunctionWork {
    /// The work that a request of the peer asks for, and on whose lease; `None` for requests that
    /// are not work on an open path.
    pub fn from_request(request: Request) -> Option<(LeaseId, Self)> {
        Some(match request {
            Request::Config { lease, offset, len } => (lease, Self::Config { offset, len }),
            Request::Map { lease, ranges } => (lease, Self::Map(ranges)),
            Request::Unmap { lease, spans } => (lease, Self::Unmap(spans)),
            Request::Irqs {
                lease,
                index,
                enable,
            } => (lease, Self::Irqs(index, enable)),
            Request::Mask {
                lease,
                index,
                start,
                count,
                masked,
            } => (
                lease,
                Self::Mask {
                    index,
                    start,
                    count,
                    masked,
                },
            ),
            Request::BusMaster { lease, enable } => (lease, Self::BusMaster(enable)),
            Request::Reset { lease } => (lease, Self::Reset),
            Request::RegionRead {
                lease,
                region,
                offset,
                len,
            } => (
                lease,
                Self::Read {
                    region: RegionIndex(region.into()),
                    offset,
                    len,
                },
            ),
            Request::RegionWrite {
                lease,
                region,
                offset,
                data,
            } => (
                lease,
                Self::Write {
                    region: RegionIndex(region.into()),
                    offset,
                    data,
                },
            ),
            _ => return None,
        })
    }
}
