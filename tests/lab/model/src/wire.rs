//! The vfio-user wire format: bytes in, requests out, bounded and total.
//!
//! Written from the vfio-user specification (version 0.0 is what QEMU's client speaks). All
//! fields are little endian here: the lab runs on x86 only.

use thiserror::Error;

/// Bytes of the header that every message starts with.
pub const HEADER_BYTES: usize = 16;
/// Largest data part of a region or DMA message; told to the client as `max_data_xfer_size`.
pub const TRANSFER_BYTES_MAX: usize = 1 << 20;
/// Largest whole message that is accepted.
pub const MESSAGE_BYTES_MAX: usize = TRANSFER_BYTES_MAX + 4096;
/// Most file descriptors in one message; more than 16 is refused by QEMU's client.
pub const MESSAGE_FDS_MAX: usize = 16;
/// Most DMA maps of one client; QEMU's client refuses any larger answer.
pub const DMA_MAPS_MAX: usize = 65_535;

pub const FLAG_TYPE_MASK: u32 = 0xF;
pub const FLAG_REPLY: u32 = 0x1;
pub const FLAG_NO_REPLY: u32 = 0x10;
pub const FLAG_ERROR: u32 = 0x20;

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const DEVICE_GET_INFO: u16 = 4;
pub const DEVICE_GET_REGION_INFO: u16 = 5;
pub const DEVICE_GET_IRQ_INFO: u16 = 7;
pub const DEVICE_SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const DEVICE_RESET: u16 = 13;

/// Bytes before the data in DMA_READ and DMA_WRITE, requests and replies: address, count.
pub const DMA_PREFIX_BYTES: usize = 16;
/// Bytes before the data in REGION_READ and REGION_WRITE: offset, region, count.
pub const REGION_PREFIX_BYTES: usize = 16;

/// What makes a stream worthless: the half's socket is closed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WireError {
    #[error("message {command} claims {size} bytes")]
    Size { command: u16, size: u32 },
    #[error("message {command} has flags {flags:#x}")]
    Flags { command: u16, flags: u32 },
    #[error("message {command} has a body of {bytes} bytes, which is too short or inconsistent")]
    Body { command: u16, bytes: usize },
    #[error("message {command} came with {fds} file descriptors")]
    Fds { command: u16, fds: usize },
    #[error("more than {MESSAGE_FDS_MAX} file descriptors in one message")]
    FdsTruncated,
    #[error("message {command} before the version was agreed, or a second version message")]
    Order { command: u16 },
    #[error("client version {major} is not 0")]
    Version { major: u16 },
    #[error("a client may not send command {command}")]
    Direction { command: u16 },
}

/// The header of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub id: u16,
    pub command: u16,
    pub size: u32,
    pub flags: u32,
    pub error: u32,
}

impl Header {
    /// Reads a header and checks its size and type.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let header = Self {
            id: u16_at(bytes, 0),
            command: u16_at(bytes, 2),
            size: u32_at(bytes, 4),
            flags: u32_at(bytes, 8),
            error: u32_at(bytes, 12),
        };
        let (command, size, flags) = (header.command, header.size, header.flags);
        if (size as usize) < HEADER_BYTES || size as usize > MESSAGE_BYTES_MAX {
            return Err(WireError::Size { command, size });
        }
        if flags & FLAG_TYPE_MASK > FLAG_REPLY {
            return Err(WireError::Flags { command, flags });
        }
        Ok(header)
    }

    /// True for an answer to one of the model's own DMA messages.
    pub fn is_reply(&self) -> bool {
        self.flags & FLAG_TYPE_MASK == FLAG_REPLY
    }

    /// True when the client waits for an answer.
    pub fn wants_reply(&self) -> bool {
        self.flags & FLAG_NO_REPLY == 0
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&self.id.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.command.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.size.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.error.to_le_bytes());
        bytes
    }

    /// The header of the answer to this request, with `body` bytes behind it.
    pub fn reply(&self, body: usize) -> Self {
        Self {
            size: (HEADER_BYTES + body) as u32,
            flags: FLAG_REPLY,
            error: 0,
            ..*self
        }
    }

    /// The header of a refusal of this request.
    pub fn refusal(&self, errno: i32) -> Self {
        Self {
            size: HEADER_BYTES as u32,
            flags: FLAG_REPLY | FLAG_ERROR,
            error: errno.unsigned_abs(),
            ..*self
        }
    }

    /// The header of a request of the model itself.
    pub fn request(id: u16, command: u16, flags: u32, body: usize) -> Self {
        Self {
            id,
            command,
            size: (HEADER_BYTES + body) as u32,
            flags,
            error: 0,
        }
    }
}

/// A request of the client, its body taken apart.
#[derive(Debug, PartialEq, Eq)]
pub enum Request<'a> {
    Version {
        major: u16,
    },
    DmaMap {
        flags: u32,
        offset: u64,
        iova: u64,
        size: u64,
    },
    DmaUnmap {
        flags: u32,
        iova: u64,
        size: u64,
    },
    GetInfo,
    GetRegionInfo {
        index: u32,
    },
    GetIrqInfo {
        index: u32,
    },
    SetIrqs {
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        data: &'a [u8],
    },
    RegionRead {
        offset: u64,
        region: u32,
        count: usize,
    },
    RegionWrite {
        offset: u64,
        region: u32,
        data: &'a [u8],
    },
    Reset,
    /// A command that this server does not have: refused by a reply, the stream goes on.
    Unknown,
}

/// Takes the body of a request apart; `fds` is how many file descriptors came with it.
pub fn decode<'a>(header: &Header, body: &'a [u8], fds: usize) -> Result<Request<'a>, WireError> {
    let command = header.command;
    let short = WireError::Body {
        command,
        bytes: body.len(),
    };
    let needs = |bytes: usize| {
        if body.len() >= bytes {
            Ok(())
        } else {
            Err(short)
        }
    };
    let fds_max = match command {
        DMA_MAP => 1,
        DEVICE_SET_IRQS => MESSAGE_FDS_MAX,
        _ => 0,
    };
    if fds > fds_max {
        return Err(WireError::Fds { command, fds });
    }
    match command {
        VERSION => {
            needs(4)?;
            Ok(Request::Version {
                major: u16_at(body, 0),
            })
        }
        DMA_MAP => {
            needs(32)?;
            Ok(Request::DmaMap {
                flags: u32_at(body, 4),
                offset: u64_at(body, 8),
                iova: u64_at(body, 16),
                size: u64_at(body, 24),
            })
        }
        DMA_UNMAP => {
            needs(24)?;
            Ok(Request::DmaUnmap {
                flags: u32_at(body, 4),
                iova: u64_at(body, 8),
                size: u64_at(body, 16),
            })
        }
        DEVICE_GET_INFO => needs(16).map(|()| Request::GetInfo),
        DEVICE_GET_REGION_INFO => {
            needs(32)?;
            Ok(Request::GetRegionInfo {
                index: u32_at(body, 8),
            })
        }
        DEVICE_GET_IRQ_INFO => {
            needs(16)?;
            Ok(Request::GetIrqInfo {
                index: u32_at(body, 8),
            })
        }
        DEVICE_SET_IRQS => {
            needs(20)?;
            Ok(Request::SetIrqs {
                flags: u32_at(body, 4),
                index: u32_at(body, 8),
                start: u32_at(body, 12),
                count: u32_at(body, 16),
                data: &body[20..],
            })
        }
        REGION_READ | REGION_WRITE => decode_region(header, body),
        DMA_READ | DMA_WRITE => Err(WireError::Direction { command }),
        DEVICE_RESET => Ok(Request::Reset),
        _ => Ok(Request::Unknown),
    }
}

fn decode_region<'a>(header: &Header, body: &'a [u8]) -> Result<Request<'a>, WireError> {
    let short = WireError::Body {
        command: header.command,
        bytes: body.len(),
    };
    if body.len() < REGION_PREFIX_BYTES {
        return Err(short);
    }
    let (offset, region, count) = (u64_at(body, 0), u32_at(body, 8), u32_at(body, 12) as usize);
    let data = &body[REGION_PREFIX_BYTES..];
    if count == 0 || count > TRANSFER_BYTES_MAX {
        return Err(short);
    }
    if header.command == REGION_READ {
        return Ok(Request::RegionRead {
            offset,
            region,
            count,
        });
    }
    if data.len() != count {
        return Err(short);
    }
    Ok(Request::RegionWrite {
        offset,
        region,
        data,
    })
}

/// Little-endian field at `at`; the caller has checked the length.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Little-endian field at `at`; the caller has checked the length.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

/// Little-endian field at `at`; the caller has checked the length.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u16, body: usize) -> Header {
        Header::request(7, command, 0, body)
    }

    #[test]
    fn header_size_outside_the_bounds_is_an_error() {
        for (size, ok) in [
            (15, false),
            (16, true),
            (MESSAGE_BYTES_MAX as u32, true),
            (MESSAGE_BYTES_MAX as u32 + 1, false),
            (u32::MAX, false),
        ] {
            let bytes = Header {
                size,
                ..header(REGION_READ, 0)
            }
            .encode();
            assert_eq!(Header::parse(&bytes).is_ok(), ok, "{size}");
        }
    }

    #[test]
    fn every_command_with_a_short_body_is_an_error_and_never_a_panic() {
        let body = [0u8; 64];
        for command in 0..=u8::MAX.into() {
            for bytes in 0..=body.len() {
                let _ = decode(&header(command, bytes), &body[..bytes], 0);
            }
        }
        assert!(decode(&header(DMA_MAP, 31), &body[..31], 0).is_err());
        assert!(decode(&header(DEVICE_SET_IRQS, 19), &body[..19], 0).is_err());
    }

    #[test]
    fn region_write_whose_count_is_not_its_data_is_an_error() {
        let mut body = [0u8; 24];
        body[12] = 8;
        assert!(decode(&header(REGION_WRITE, 24), &body, 0).is_ok());
        body[12] = 9;
        assert!(decode(&header(REGION_WRITE, 24), &body, 0).is_err());
        body[12] = 0;
        assert!(decode(&header(REGION_WRITE, 24), &body, 0).is_err());
    }

    #[test]
    fn descriptors_where_none_belong_are_an_error() {
        assert!(decode(&header(REGION_READ, 16), &[0; 16], 1).is_err());
        assert!(decode(&header(DMA_MAP, 32), &[0; 32], 2).is_err());
    }
}
