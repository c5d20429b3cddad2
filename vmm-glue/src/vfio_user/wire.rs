//! The layouts of vfio-user messages: bytes in, requests out; no I/O, total and bounded.
//!
//! Numbers are little endian. Every command has a largest size, known from the header alone, so a
//! message that is too large is refused before its body is read.

use std::mem::size_of;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// The most bytes that one REGION_READ or REGION_WRITE may carry (`max_data_xfer_size`).
pub const DATA_XFER_MAX: u32 = 1 << 20;
/// The most bytes of JSON in a VERSION message.
pub const CAPABILITIES_MAX: u32 = 4096;
/// The most vectors that one SET_IRQS may name: MSI-X has no more.
pub const VECTORS_MAX: u32 = 2048;
/// Size of [`Header`] in bytes.
pub const HEADER_BYTES: usize = size_of::<Header>();
/// The largest message that any command allows.
pub const MESSAGE_MAX: usize = HEADER_BYTES + size_of::<RegionAccess>() + DATA_XFER_MAX as usize;

/// Flag of a header: the message is a reply.
pub const FLAG_REPLY: u32 = 1;
/// Flag of a header: the sender wants no reply.
pub const FLAG_NO_REPLY: u32 = 1 << 4;
/// Flag of a reply's header: `errno` says why the request failed.
pub const FLAG_ERROR: u32 = 1 << 5;

/// What a client may ask for, by the protocol's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
#[expect(missing_docs, reason = "the protocol's own names")]
pub enum Command {
    Version = 1,
    DmaMap = 2,
    DmaUnmap = 3,
    DeviceGetInfo = 4,
    DeviceGetRegionInfo = 5,
    DeviceGetRegionIoFds = 6,
    DeviceGetIrqInfo = 7,
    DeviceSetIrqs = 8,
    RegionRead = 9,
    RegionWrite = 10,
    DmaRead = 11,
    DmaWrite = 12,
    DeviceReset = 13,
    DirtyPages = 14,
    RegionWriteMulti = 15,
    DeviceFeature = 16,
    MigDataRead = 17,
    MigDataWrite = 18,
}

impl Command {
    /// All of them, in order of their numbers.
    pub const ALL: [Self; 18] = [
        Self::Version,
        Self::DmaMap,
        Self::DmaUnmap,
        Self::DeviceGetInfo,
        Self::DeviceGetRegionInfo,
        Self::DeviceGetRegionIoFds,
        Self::DeviceGetIrqInfo,
        Self::DeviceSetIrqs,
        Self::RegionRead,
        Self::RegionWrite,
        Self::DmaRead,
        Self::DmaWrite,
        Self::DeviceReset,
        Self::DirtyPages,
        Self::RegionWriteMulti,
        Self::DeviceFeature,
        Self::MigDataRead,
        Self::MigDataWrite,
    ];

    /// From the protocol's number.
    pub fn from_raw(raw: u16) -> Option<Self> {
        Self::ALL.get(usize::from(raw).checked_sub(1)?).copied()
    }

    /// The least and the most bytes that may follow the header.
    pub fn body_bytes(self) -> (usize, usize) {
        let fixed = |bytes| (bytes, bytes);
        match self {
            Self::Version => (VERSION_BYTES, VERSION_BYTES + CAPABILITIES_MAX as usize),
            Self::DmaMap => fixed(size_of::<DmaMap>()),
            Self::DmaUnmap => fixed(size_of::<DmaUnmap>()),
            Self::DeviceGetInfo => fixed(size_of::<DeviceInfo>()),
            Self::DeviceGetRegionInfo => fixed(size_of::<RegionInfo>()),
            Self::DeviceGetRegionIoFds => fixed(size_of::<RegionIoFds>()),
            Self::DeviceGetIrqInfo => fixed(size_of::<IrqInfo>()),
            Self::DeviceSetIrqs => {
                let least = size_of::<IrqSet>();
                (least, least + VECTORS_MAX as usize)
            }
            Self::RegionRead => fixed(size_of::<RegionAccess>()),
            Self::RegionWrite => {
                let least = size_of::<RegionAccess>();
                (least, least + DATA_XFER_MAX as usize)
            }
            Self::DeviceReset => fixed(0),
            // Never offered; the bound only keeps the stream in step until the refusal.
            Self::DmaRead
            | Self::DmaWrite
            | Self::DirtyPages
            | Self::RegionWriteMulti
            | Self::DeviceFeature
            | Self::MigDataRead
            | Self::MigDataWrite => (0, UNSUPPORTED_MAX),
        }
    }
}

const VERSION_BYTES: usize = size_of::<Version>();
/// The most bytes that a command which is never offered may have behind its header.
const UNSUPPORTED_MAX: usize = 4096;

/// Why a message is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// No such command.
    #[error("command {0} is unknown")]
    UnknownCommand(u16),
    /// A reply, where only commands are expected, or flags that do not exist.
    #[error("the header's flags {0:#x} are not those of a command")]
    Flags(u32),
    /// Shorter or longer than the command allows.
    #[error(
        "the {command:?} message has {bytes} bytes; it must have {least} to {most}, header included"
    )]
    Size {
        /// The command.
        command: Command,
        /// The size that the header tells.
        bytes: u32,
        /// The least possible.
        least: usize,
        /// The most possible.
        most: usize,
    },
    /// `argsz` is too small for the command's structure.
    #[error("the {command:?} message has argsz {argsz}, which is under {least}")]
    Argsz {
        /// The command.
        command: Command,
        /// What it says.
        argsz: u32,
        /// The least possible.
        least: u32,
    },
    /// The data has another length than the count beside it.
    #[error("the {command:?} message counts {count} bytes of data and carries {bytes}")]
    Count {
        /// The command.
        command: Command,
        /// What it counts.
        count: u32,
        /// What it carries.
        bytes: usize,
    },
    /// More bytes asked for than one message may carry.
    #[error("the RegionRead message asks for {0} bytes; {DATA_XFER_MAX} are the most")]
    ReadSize(u32),
}

/// What every message starts with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender of a command, repeated in its reply.
    pub id: U16,
    /// The command's number.
    pub command: U16,
    /// Size of the message, header included.
    pub size: U32,
    /// `FLAG_*`.
    pub flags: U32,
    /// The errno of a reply with `FLAG_ERROR`.
    pub errno: U32,
}

/// A command's header that passed all checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// To be repeated in the reply.
    pub id: u16,
    /// The command.
    pub command: Command,
    /// Bytes behind the header.
    pub body_bytes: usize,
    /// No reply must be sent.
    pub no_reply: bool,
}

impl Header {
    /// Checks all that a header alone can tell.
    pub fn envelope(&self) -> Result<Envelope, WireError> {
        let raw = self.command.get();
        let command = Command::from_raw(raw).ok_or(WireError::UnknownCommand(raw))?;
        let flags = self.flags.get();
        if flags & !FLAG_NO_REPLY != 0 {
            return Err(WireError::Flags(flags));
        }
        let (least, most) = command.body_bytes();
        let (least, most) = (HEADER_BYTES + least, HEADER_BYTES + most);
        let bytes = self.size.get();
        if !(least..=most).contains(&(bytes as usize)) {
            return Err(WireError::Size {
                command,
                bytes,
                least,
                most,
            });
        }
        Ok(Envelope {
            id: self.id.get(),
            command,
            body_bytes: bytes as usize - HEADER_BYTES,
            no_reply: flags & FLAG_NO_REPLY != 0,
        })
    }
}

/// VERSION: JSON follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Version {
    /// 0.
    pub major: U16,
    /// 0 or 1.
    pub minor: U16,
}

/// DMA_MAP. The memory's fd travels beside it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DmaMap {
    /// Size of this structure.
    pub argsz: U32,
    /// 1 = the device may read, 2 = it may write.
    pub flags: U32,
    /// Where in the fd the memory starts.
    pub offset: U64,
    /// Guest-physical address.
    pub iova: U64,
    /// Length in bytes.
    pub len: U64,
}

/// DMA_UNMAP, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DmaUnmap {
    /// Size of this structure.
    pub argsz: U32,
    /// 1 = dirty bitmap wanted, 2 = all maps.
    pub flags: U32,
    /// Guest-physical address.
    pub iova: U64,
    /// Length in bytes; in the reply what was unmapped.
    pub len: U64,
}

/// DEVICE_GET_INFO, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DeviceInfo {
    /// Size of this structure.
    pub argsz: U32,
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: U32,
    /// How many region indices.
    pub regions: U32,
    /// How many irq indices.
    pub irqs: U32,
}

/// DEVICE_GET_REGION_INFO, request and reply; capabilities follow in the reply.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionInfo {
    /// In the request what the client has room for, in the reply what it needs.
    pub argsz: U32,
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: U32,
    /// Which region.
    pub index: U32,
    /// Where in this structure capabilities start; 0 = none.
    pub cap_offset: U32,
    /// Size in bytes.
    pub size: U64,
    /// Where the region starts in its fd.
    pub offset: U64,
}

/// The sparse mmap capability of a region, version 1; areas follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SparseMmap {
    /// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
    pub id: U16,
    /// 1.
    pub version: U16,
    /// Offset of the next capability; 0 = none.
    pub next: U32,
    /// How many areas follow.
    pub areas: U32,
    /// 0.
    pub reserved: U32,
}

/// One area of [`SparseMmap`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SparseArea {
    /// Offset in the region.
    pub offset: U64,
    /// Length in bytes.
    pub len: U64,
}

/// DEVICE_GET_REGION_IO_FDS, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionIoFds {
    /// Size of this structure.
    pub argsz: U32,
    /// 0.
    pub flags: U32,
    /// Which region.
    pub index: U32,
    /// How many fds.
    pub count: U32,
}

/// DEVICE_GET_IRQ_INFO, request and reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IrqInfo {
    /// Size of this structure.
    pub argsz: U32,
    /// `VFIO_IRQ_INFO_*`.
    pub flags: U32,
    /// Which irq index.
    pub index: U32,
    /// How many vectors.
    pub count: U32,
}

/// DEVICE_SET_IRQS; with the BOOL data type one byte per vector follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IrqSet {
    /// Size of this structure and of the data behind it.
    pub argsz: U32,
    /// `VFIO_IRQ_SET_*`.
    pub flags: U32,
    /// Which irq index.
    pub index: U32,
    /// First vector.
    pub start: U32,
    /// How many vectors.
    pub count: U32,
}

/// REGION_READ and REGION_WRITE, requests and replies; data follows where there is any.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionAccess {
    /// Offset in the region.
    pub offset: U64,
    /// Which region.
    pub region: U32,
    /// How many bytes.
    pub count: U32,
}

/// A well-formed request; what it says is still to be judged.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the protocol's own names")]
pub enum Request<'a> {
    Version(&'a Version, &'a [u8]),
    DmaMap(&'a DmaMap),
    DmaUnmap(&'a DmaUnmap),
    DeviceGetInfo,
    DeviceGetRegionInfo(&'a RegionInfo),
    DeviceGetRegionIoFds(&'a RegionIoFds),
    DeviceGetIrqInfo(&'a IrqInfo),
    DeviceSetIrqs(&'a IrqSet, &'a [u8]),
    RegionRead(&'a RegionAccess),
    RegionWrite(&'a RegionAccess, &'a [u8]),
    DeviceReset,
    /// A command of the protocol that is never offered.
    Unsupported(Command),
}

fn argsz(command: Command, argsz: U32, least: usize) -> Result<(), WireError> {
    let (argsz, least) = (argsz.get(), least as u32);
    if argsz < least {
        return Err(WireError::Argsz {
            command,
            argsz,
            least,
        });
    }
    Ok(())
}

/// The structure at the start of the body, and what follows it.
fn split<'a, T: FromBytes + Immutable + KnownLayout + Unaligned>(
    envelope: &Envelope,
    body: &'a [u8],
) -> Result<(&'a T, &'a [u8]), WireError> {
    T::ref_from_prefix(body).map_err(|_| {
        let (least, most) = envelope.command.body_bytes();
        WireError::Size {
            command: envelope.command,
            bytes: (HEADER_BYTES + body.len()) as u32,
            least: HEADER_BYTES + least,
            most: HEADER_BYTES + most,
        }
    })
}

macro_rules! fixed {
    ($envelope:expr, $body:expr, $kind:ident, $structure:ty) => {{
        let (request, _) = split::<$structure>($envelope, $body)?;
        argsz($envelope.command, request.argsz, size_of::<$structure>())?;
        Ok(Request::$kind(request))
    }};
}

/// The request behind a checked header.
pub fn parse<'a>(envelope: &Envelope, body: &'a [u8]) -> Result<Request<'a>, WireError> {
    match envelope.command {
        Command::Version => {
            let (version, json) = split(envelope, body)?;
            Ok(Request::Version(version, json))
        }
        Command::DmaMap => fixed!(envelope, body, DmaMap, DmaMap),
        Command::DmaUnmap => fixed!(envelope, body, DmaUnmap, DmaUnmap),
        Command::DeviceGetInfo => {
            let (info, _) = split::<DeviceInfo>(envelope, body)?;
            argsz(envelope.command, info.argsz, size_of::<DeviceInfo>())?;
            Ok(Request::DeviceGetInfo)
        }
        Command::DeviceGetRegionInfo => fixed!(envelope, body, DeviceGetRegionInfo, RegionInfo),
        Command::DeviceGetRegionIoFds => fixed!(envelope, body, DeviceGetRegionIoFds, RegionIoFds),
        Command::DeviceGetIrqInfo => fixed!(envelope, body, DeviceGetIrqInfo, IrqInfo),
        Command::DeviceSetIrqs => {
            let (set, data) = split::<IrqSet>(envelope, body)?;
            argsz(envelope.command, set.argsz, size_of::<IrqSet>())?;
            Ok(Request::DeviceSetIrqs(set, data))
        }
        Command::RegionRead => {
            let (access, _) = split::<RegionAccess>(envelope, body)?;
            if access.count.get() > DATA_XFER_MAX {
                return Err(WireError::ReadSize(access.count.get()));
            }
            Ok(Request::RegionRead(access))
        }
        Command::RegionWrite => {
            let (access, data) = split::<RegionAccess>(envelope, body)?;
            if access.count.get() as usize != data.len() {
                return Err(WireError::Count {
                    command: envelope.command,
                    count: access.count.get(),
                    bytes: data.len(),
                });
            }
            Ok(Request::RegionWrite(access, data))
        }
        Command::DeviceReset => Ok(Request::DeviceReset),
        command => Ok(Request::Unsupported(command)),
    }
}

/// The bytes of a reply, built in place and used again for the next one.
#[derive(Debug, Default)]
pub struct Reply {
    bytes: Vec<u8>,
    errno: u32,
}

impl Reply {
    /// Starts over: a reply of the header alone.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.resize(HEADER_BYTES, 0);
        self.errno = 0;
    }

    /// Appends a structure.
    pub fn push<T: IntoBytes + Immutable>(&mut self, structure: &T) {
        self.bytes.extend_from_slice(structure.as_bytes());
    }

    /// Appends text or other bytes.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends room for data, to be filled in by the caller.
    pub fn data(&mut self, bytes: usize) -> &mut [u8] {
        let start = self.bytes.len();
        self.bytes.resize(start + bytes, 0);
        &mut self.bytes[start..]
    }

    /// Marks it as failed. What was pushed stays: a client that reads the full reply whatever the
    /// header says (cloud-hypervisor's does) then stays in step with the stream.
    pub fn fail(&mut self, errno: u32) {
        self.errno = errno;
    }

    /// Whether `fail` was called since `clear`.
    pub fn failed(&self) -> bool {
        self.errno != 0
    }

    /// Fills in the header; these bytes go to the client.
    pub fn finish(&mut self, id: u16, command: u16) -> &[u8] {
        let error = if self.errno != 0 { FLAG_ERROR } else { 0 };
        let header = Header {
            id: id.into(),
            command: command.into(),
            size: (self.bytes.len() as u32).into(),
            flags: (FLAG_REPLY | error).into(),
            errno: self.errno.into(),
        };
        if let Some(room) = self.bytes.first_chunk_mut::<HEADER_BYTES>() {
            room.copy_from_slice(header.as_bytes());
        }
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(command: u16, size: u32, flags: u32) -> Header {
        Header {
            id: 7.into(),
            command: command.into(),
            size: size.into(),
            flags: flags.into(),
            errno: 0.into(),
        }
    }

    #[test]
    fn every_command_is_taken_at_its_bounds_and_refused_one_past_them() {
        for command in Command::ALL {
            let (least, most) = command.body_bytes();
            let at =
                |body: usize| header(command as u16, (HEADER_BYTES + body) as u32, 0).envelope();
            assert_eq!(at(least).unwrap().body_bytes, least);
            assert_eq!(at(most).unwrap().body_bytes, most);
            assert!(
                matches!(at(most + 1), Err(WireError::Size { .. })),
                "{command:?}"
            );
            let under = header(command as u16, (HEADER_BYTES + least - 1) as u32, 0);
            assert!(
                matches!(under.envelope(), Err(WireError::Size { .. })),
                "{command:?}"
            );
            assert!(HEADER_BYTES + most <= MESSAGE_MAX);
        }
    }

    #[test]
    fn replies_and_unknown_flags_and_commands_are_refused() {
        assert_eq!(header(13, 16, 1).envelope(), Err(WireError::Flags(1)));
        assert_eq!(header(13, 16, 0x20).envelope(), Err(WireError::Flags(0x20)));
        assert_eq!(
            header(0, 16, 0).envelope(),
            Err(WireError::UnknownCommand(0))
        );
        assert_eq!(
            header(19, 16, 0).envelope(),
            Err(WireError::UnknownCommand(19))
        );
        assert!(header(13, 16, FLAG_NO_REPLY).envelope().unwrap().no_reply);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..128), command in 0u16..20) {
            let size = (HEADER_BYTES + bytes.len()) as u32;
            if let Ok(envelope) = header(command, size, 0).envelope() {
                let _ = parse(&envelope, &bytes);
                // Also with a body that does not fit the header.
                let _ = parse(&envelope, &bytes[..bytes.len() / 2]);
            }
        }
    }
}
