//! SET_IRQS and what is told of interrupts: each new eventfd takes over at once.

use super::wire;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_TYPE_MASK,
};
use vfio_shim::model::{Function, FunctionError, IrqIndex};

/// Why a SET_IRQS message is not followed.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// Not one action and one kind of data.
    #[error("SET_IRQS has flags {0:#x}, which are not one action and one kind of data")]
    Flags(u32),
    /// The data does not fit the count.
    #[error("SET_IRQS names {count} vectors and carries {bytes} bytes of data")]
    Data {
        /// Vectors named.
        count: u32,
        /// Bytes carried.
        bytes: usize,
    },
    /// The fds do not fit the count.
    #[error("SET_IRQS names {count} vectors and carries {fds} file descriptors")]
    Fds {
        /// Vectors named.
        count: u32,
        /// Fds carried.
        fds: usize,
    },
    /// Another kind of fd would block or misuse who signals it.
    #[error("SET_IRQS carries a file descriptor that is no eventfd but {0:?}")]
    NotEventfd(String),
    /// Not refused by the protocol, but by the function.
    #[error("SET_IRQS is refused")]
    Refused(#[source] FunctionError),
    /// No such irq index.
    #[error("there is no irq index {0}")]
    Index(u32),
    /// Masking by eventfd is for INTx alone, which no function has.
    #[error("vectors cannot be masked by an eventfd")]
    MaskByEventfd,
}

impl IrqError {
    /// Whether the message itself is malformed, so that the session cannot go on.
    pub fn is_malformed(&self) -> bool {
        match self {
            Self::Flags(_) | Self::Data { .. } | Self::Fds { .. } | Self::NotEventfd(_) => true,
            Self::Refused(_) | Self::Index(_) | Self::MaskByEventfd => false,
        }
    }
}

/// How many vectors the index has. INTx has none: it cannot cross a bridge, and VFs have none.
fn vectors(function: &dyn Function, index: IrqIndex) -> u32 {
    match index {
        IrqIndex::Intx => 0,
        index => function.info().irqs[index as usize].count,
    }
}

/// What GET_IRQ_INFO tells: `VFIO_IRQ_INFO_*` and the number of vectors; `None` for an index that
/// does not exist.
pub fn info(function: &dyn Function, index: u32) -> Option<(u32, u32)> {
    let index = IrqIndex::from_raw(index)?;
    let count = vectors(function, index);
    let flags = match index {
        _ if count == 0 => 0,
        // A plain MSI has mask bits of its own or is masked by whoever signals it.
        IrqIndex::Msi => VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_NORESIZE,
        _ => VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE,
    };
    Some((flags, count))
}

/// Follows a SET_IRQS message.
pub fn set(
    function: &dyn Function,
    set: &wire::IrqSet,
    data: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<(), IrqError> {
    let (flags, start, count) = (set.flags.get(), set.start.get(), set.count.get());
    let kind = flags & VFIO_IRQ_SET_DATA_TYPE_MASK;
    let action = flags & VFIO_IRQ_SET_ACTION_TYPE_MASK;
    if kind.count_ones() != 1 || action.count_ones() != 1 || flags != kind | action {
        return Err(IrqError::Flags(flags));
    }
    check_data(kind, count, data, &fds)?;
    let raw = set.index.get();
    let index = IrqIndex::from_raw(raw).ok_or(IrqError::Index(raw))?;
    if count == 0 {
        let disable = kind == VFIO_IRQ_SET_DATA_NONE && action == VFIO_IRQ_SET_ACTION_TRIGGER;
        // Fine also where nothing is enabled, as VMMs do it at every turn.
        return match disable && vectors(function, index) != 0 {
            true => function.disable_irqs(index).map_err(IrqError::Refused),
            false => Ok(()),
        };
    }
    check_vectors(function, index, start, count)?;
    match (action, kind) {
        (VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD) => {
            let triggers = match fds.is_empty() {
                true => (0..count).map(|_| None).collect(),
                false => fds.into_iter().map(Some).collect(),
            };
            function.set_irqs(index, start, triggers)
        }
        (_, VFIO_IRQ_SET_DATA_EVENTFD) => return Err(IrqError::MaskByEventfd),
        (_, VFIO_IRQ_SET_DATA_BOOL) => {
            runs(data).try_for_each(|(at, count)| act(function, action, index, start + at, count))
        }
        _ => act(function, action, index, start, count),
    }
    .map_err(IrqError::Refused)
}

fn act(
    function: &dyn Function,
    action: u32,
    index: IrqIndex,
    start: u32,
    count: u32,
) -> Result<(), FunctionError> {
    match action {
        VFIO_IRQ_SET_ACTION_MASK => function.mask_irqs(index, start, count, true),
        VFIO_IRQ_SET_ACTION_UNMASK => function.mask_irqs(index, start, count, false),
        _ => function.raise_irqs(index, start, count),
    }
}

/// Runs of bytes that are not 0: where each starts, and how long it is.
fn runs(data: &[u8]) -> impl Iterator<Item = (u32, u32)> + '_ {
    let mut at = 0;
    data.chunk_by(|a, b| (*a != 0) == (*b != 0))
        .filter_map(move |run| {
            let start = at;
            at += run.len() as u32;
            (run.first() != Some(&0)).then_some((start, run.len() as u32))
        })
}

fn check_data(kind: u32, count: u32, data: &[u8], fds: &[OwnedFd]) -> Result<(), IrqError> {
    let bytes = data.len();
    let expected = match kind {
        VFIO_IRQ_SET_DATA_BOOL => count as usize,
        _ => 0,
    };
    if bytes != expected {
        return Err(IrqError::Data { count, bytes });
    }
    let many = fds.len();
    // With eventfds, none at all takes the triggers of all named vectors away.
    if many != 0 && (kind != VFIO_IRQ_SET_DATA_EVENTFD || many != count as usize) {
        return Err(IrqError::Fds { count, fds: many });
    }
    fds.iter().try_for_each(check_eventfd)
}

/// Where the kernel does not tell what an fd is, as in a sandbox without /proc, it is believed.
fn check_eventfd(fd: &OwnedFd) -> Result<(), IrqError> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    match std::fs::read_link(path) {
        Ok(name) if name.as_os_str() != "anon_inode:[eventfd]" => {
            Err(IrqError::NotEventfd(name.to_string_lossy().into_owned()))
        }
        _ => Ok(()),
    }
}

fn check_vectors(
    function: &dyn Function,
    index: IrqIndex,
    start: u32,
    count: u32,
) -> Result<(), IrqError> {
    let end = u64::from(start) + u64::from(count);
    let there = vectors(function, index);
    if end > u64::from(there) {
        return Err(IrqError::Refused(FunctionError::NoVector {
            index,
            start,
            end,
            count: there,
        }));
    }
    Ok(())
}
