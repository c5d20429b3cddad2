//! A VMM's end of a connection, as plain and blocking as can be.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use vfio_shim::model::RegionIndex;
use vmm_glue::vfio_user::wire::{Command, FLAG_REPLY, Header, RegionAccess, Version};
use zerocopy::{FromBytes, IntoBytes};

/// Decoding of memory, in COMMAND.
pub const DECODE: u16 = 2;

/// The connection.
pub struct Vmm {
    /// For whoever knows what he sends.
    pub stream: UnixStream,
}

/// A request's bytes.
pub fn message(command: Command, body: &[u8]) -> Vec<u8> {
    let header = Header {
        id: 1.into(),
        command: (command as u16).into(),
        size: ((size_of::<Header>() + body.len()) as u32).into(),
        flags: 0.into(),
        errno: 0.into(),
    };
    [header.as_bytes(), body].concat()
}

/// The body of a read, and the start of a write's.
pub fn access(region: u32, offset: u64, count: u32) -> RegionAccess {
    RegionAccess {
        offset: offset.into(),
        region: region.into(),
        count: count.into(),
    }
}

impl Vmm {
    /// Nothing is said yet.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("the socket is listened on");
        Self { stream }
    }

    /// With the version agreed on.
    pub fn agreed(socket: &Path) -> Self {
        let mut vmm = Self::connect(socket);
        let version = Version {
            major: 0.into(),
            minor: 0.into(),
        };
        let body = [version.as_bytes(), b"{\"capabilities\":{}}\0"].concat();
        vmm.ask(&message(Command::Version, &body), None);
        vmm
    }

    /// Writes COMMAND in config space.
    pub fn command(&mut self, bits: u16) {
        let config = RegionIndex::CONFIG.0;
        let body = [access(config, 4, 2).as_bytes(), &bits.to_le_bytes()].concat();
        self.ask(&message(Command::RegionWrite, &body), None);
    }

    /// Sends a request, with an fd beside it, and returns the reply's body. The server accepts it.
    pub fn ask(&mut self, request: &[u8], fd: Option<BorrowedFd<'_>>) -> Vec<u8> {
        match fd {
            None => self.stream.write_all(request).expect("the server takes it"),
            Some(fd) => {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let rights = [fd];
                assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
                let parts = [IoSlice::new(request)];
                let flags = SendFlags::empty();
                let sent = sendmsg(self.stream.as_fd(), &parts, &mut control, flags);
                assert_eq!(sent.expect("the server takes it"), request.len());
            }
        }
        let mut head = [0; size_of::<Header>()];
        self.stream.read_exact(&mut head).expect("a reply's header");
        let header = Header::read_from_bytes(&head).expect("a header's bytes");
        assert_eq!(header.flags.get(), FLAG_REPLY, "the server refused");
        let mut body = vec![0; header.size.get() as usize - head.len()];
        self.stream.read_exact(&mut body).expect("a reply's body");
        body
    }
}
