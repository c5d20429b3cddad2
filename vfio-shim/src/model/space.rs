//! The address space that a function's DMA goes through, and what may lie behind it.

use super::Span;
use std::{fmt, io, os::fd::BorrowedFd, ptr::NonNull, sync::Arc};

/// What a device may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl Access {
    /// Read and write.
    pub const READ_WRITE: Self = Self {
        read: true,
        write: true,
    };
    /// Read only.
    pub const READ: Self = Self {
        read: true,
        write: false,
    };
}

/// Memory of this process, mapped as long as the value lives.
///
/// # Safety
/// The implementor promises that `len()` bytes at `addr()` stay mapped, readable and writable, as
/// long as the value lives.
#[expect(unsafe_code, reason = "the promise is made once, by the implementor")]
pub unsafe trait Mapping: Send + Sync {
    /// Where it is mapped.
    fn addr(&self) -> NonNull<u8>;
    /// How many bytes.
    fn len(&self) -> u64;
    /// True for zero bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Something in the physical address space that takes loads and stores: an NTB's outbound window,
/// a BAR of a function, RAM behind a soft IOMMU.
pub trait Aperture: Send + Sync {
    /// Size in bytes.
    fn len(&self) -> u64;
    /// True for zero bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Loads. Lengths 1, 2, 4, 8 at a natural alignment are one access of that width; all else
    /// is split. What nobody answers, and what lies past the end, reads as ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Stores, posted; split as in `read`. What lies past the end is dropped.
    fn write(&self, offset: u64, data: &[u8]);
    /// One 32-bit load, little endian.
    fn read_u32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    /// One 64-bit load, little endian.
    fn read_u64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }
    /// One 64-bit store, little endian.
    fn write_u64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }
    /// Where it is mapped into this process, for an IOMMU of the kernel; `None` for the soft
    /// fabric, whose IOMMU goes through `read` and `write`.
    fn mapping(&self) -> Option<&dyn Mapping>;
}

/// What lies behind a DMA mapping.
#[derive(Clone)]
pub enum Memory<'a> {
    /// Pages of a memory fd, from this offset on. They are pinned; the fd is not needed after.
    Fd(BorrowedFd<'a>, u64),
    /// A part of an aperture, from this offset on.
    Aperture(Arc<dyn Aperture>, u64),
}

impl fmt::Debug for Memory<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fd(fd, offset) => write!(f, "Fd({fd:?}, {offset:#x})"),
            Self::Aperture(aperture, offset) => {
                write!(f, "Aperture({:#x} bytes, {offset:#x})", aperture.len())
            }
        }
    }
}

/// One mapping to be made.
#[derive(Clone, Debug)]
pub struct DmaMap<'a> {
    /// Addresses that the device emits.
    pub span: Span,
    /// What the device may do.
    pub access: Access,
    /// What lies behind.
    pub memory: Memory<'a>,
}

/// Why a mapping could not be made or taken away.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The addresses are not what the IOMMU can translate.
    #[error(
        "DMA addresses {span} are outside the ranges the IOMMU can map ({usable}); choose addresses inside them"
    )]
    Unusable {
        /// The refused addresses.
        span: Span,
        /// The usable ranges, in words.
        usable: String,
    },
    /// Another mapping is there.
    #[error("DMA addresses {0} are mapped already; unmap them first")]
    Overlap(Span),
    /// An unmap would cut a mapping in two.
    #[error("unmapping {0} would cut a mapping in two; unmap whole mappings")]
    Bisect(Span),
    /// Not page aligned, or empty.
    #[error("DMA mapping {0} is empty or not aligned to 4 KiB pages")]
    Align(Span),
    /// Too many mappings.
    #[error("{0} DMA mappings are the most that fit; give the guest larger pages or less memory")]
    TooMany(u32),
    /// The window has no room left for guest memory.
    #[error(
        "the NTB window has {free} bytes free and {wanted} are needed; a window of {enough} bytes would do (a power of two, set in firmware), or give the guest less memory"
    )]
    WindowFull {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes free.
        free: u64,
        /// The window size that would do.
        enough: u64,
    },
    /// Both hosts did not map in time.
    #[error("the mapping of {0} was not confirmed by both hosts within {1} ms")]
    Timeout(Span, u64),
    /// The aperture cannot be mapped by a kernel's IOMMU.
    #[error("the memory behind {0} is not mapped into this process")]
    NoMapping(Span),
    /// A file that was handed over as memory has nothing there, or not any more.
    #[error(
        "there are no pages behind {0}: the file was cut, or never was so long, or its file system is full; what a guest was given as its memory has to stay for as long as it runs"
    )]
    NoPages(Span),
    /// The kernel does not pin so much.
    #[error(
        "no memory could be locked for {0}: start the port with LimitMEMLOCK=infinity (`ulimit -l unlimited`), or give the guest less memory"
    )]
    NotLocked(Span),
    /// The path to the function is gone.
    #[error("the path to the function has ended: {0}")]
    Gone(String),
    /// This host's end of a path refused: its own window is full, or pinning failed.
    #[error("{0}")]
    Here(String),
    /// The other host refused.
    #[error("the other host refused to map {span}: {cause}")]
    Peer {
        /// The addresses.
        span: Span,
        /// Its words.
        cause: String,
    },
    /// The kernel refused.
    #[error("the kernel refused to {act} {span}")]
    Kernel {
        /// `map` or `unmap`.
        act: &'static str,
        /// The addresses.
        span: Span,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

/// A DMA address space: a type1 container, a soft IOMMU, the guest's RAM as a borrowed function
/// sees it.
pub trait AddressSpace: Send + Sync {
    /// The address ranges that can be mapped, sorted, apart.
    fn usable(&self) -> Vec<Span>;
    /// How many more mappings fit.
    fn available(&self) -> u32;
    /// Makes all of them or none; returns when the device can use them.
    fn map(&self, maps: &[DmaMap<'_>]) -> Result<(), MapError>;
    /// Takes away all mappings that lie whole within `span`; cutting one is an error. Returns the
    /// number of bytes that were mapped. When it returns, the device reaches none of them.
    fn unmap(&self, span: Span) -> Result<u64, MapError>;
}
