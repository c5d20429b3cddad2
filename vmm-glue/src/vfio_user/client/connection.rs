//! A client's connection: one command, one reply, all bounded; what goes wrong in the stream ends it for good.

use crate::vfio_user::version::MSG_FDS_MAX;
use crate::vfio_user::wire::{
    Command, FLAG_ERROR, FLAG_REPLY, HEADER_BYTES, Header, MESSAGE_MAX, Version,
};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, Read, Write};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// How long a reply may take: a reset of the lender's can take 15 s.
const REPLY_WAIT: Duration = Duration::from_secs(30);
/// The version that is asked for: 0.1.
const MINOR: u16 = 1;
/// How many DMA maps a server takes that does not say (vfio-user 0.9.2, section "Version").
const MAPS_DEFAULT: u32 = 65_535;

/// Why a client could not connect to a server.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("cannot connect to {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The server closed the socket, or does not keep to the protocol.
    #[error("the vfio-user server is gone: {0}")]
    Gone(String),
    /// The server refused what every client needs.
    #[error("the vfio-user server refused {command:?}")]
    Refused {
        /// The command.
        command: Command,
        /// Its errno.
        #[source]
        source: io::Error,
    },
}

/// What came of a command that brought no answer.
#[derive(Debug)]
pub(super) enum Failed {
    /// The connection is over.
    Gone(String),
    /// The server says no.
    Refused(Errno),
}

#[derive(Serialize, Deserialize)]
struct Told {
    capabilities: Capabilities,
}

#[derive(Default, Serialize, Deserialize)]
struct Capabilities {
    max_msg_fds: Option<u32>,
    max_data_xfer_size: Option<u32>,
    max_dma_maps: Option<u32>,
}

/// A connected socket.
pub(super) struct Connection {
    stream: UnixStream,
    next_id: u16,
    /// Why it is over.
    over: Option<String>,
}

impl Connection {
    /// Connects and agrees on a version; tells how many DMA maps the server takes.
    pub(super) fn open(path: &Path) -> Result<(Self, u32), ClientError> {
        let failed = |source| ClientError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(REPLY_WAIT)).map_err(failed)?;
        stream.set_write_timeout(Some(REPLY_WAIT)).map_err(failed)?;
        let mut this = Self {
            stream,
            next_id: 0,
            over: None,
        };
        let maps_max = this.agree()?;
        Ok((this, maps_max))
    }

    fn agree(&mut self) -> Result<u32, ClientError> {
        let gone = |why: &str| ClientError::Gone(why.to_owned());
        let asked = Version {
            major: 0.into(),
            minor: MINOR.into(),
        };
        let told = Told {
            capabilities: Capabilities {
                max_msg_fds: Some(MSG_FDS_MAX),
                ..Capabilities::default()
            },
        };
        let mut json = serde_json::to_vec(&told).map_err(|error| gone(&error.to_string()))?;
        json.push(0);
        let reply = self.ask(Command::Version, &[asked.as_bytes(), &json], &[])?;
        let (version, json) =
            Version::ref_from_prefix(&reply).map_err(|_| gone("its VERSION has no version"))?;
        if version.major.get() != 0 || version.minor.get() > MINOR {
            return Err(gone("it speaks another version than the one asked for"));
        }
        let json = json.strip_suffix(&[0]).unwrap_or(json);
        let told: Told = serde_json::from_slice(json)
            .map_err(|error| gone(&format!("its capabilities are not understood: {error}")))?;
        Ok(told.capabilities.max_dma_maps.unwrap_or(MAPS_DEFAULT))
    }

    /// The same as [`Self::call`], for what every server answers.
    pub(super) fn ask(
        &mut self,
        command: Command,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, ClientError> {
        self.call(command, body, fds)
            .map_err(|failed| match failed {
                Failed::Gone(why) => ClientError::Gone(why),
                Failed::Refused(errno) => ClientError::Refused {
                    command,
                    source: errno.into(),
                },
            })
    }

    /// Sends a command and returns what is behind the header of its reply. At most
    /// [`MSG_FDS_MAX`] fds.
    pub(super) fn call(
        &mut self,
        command: Command,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, Failed> {
        if let Some(why) = &self.over {
            return Err(Failed::Gone(why.clone()));
        }
        let result = self.exchange(command, body, fds);
        if let Err(Failed::Gone(why)) = &result {
            self.over = Some(why.clone());
        }
        result
    }

    fn exchange(
        &mut self,
        command: Command,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, Failed> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let bytes = HEADER_BYTES + body.iter().map(|part| part.len()).sum::<usize>();
        let header = Header {
            id: id.into(),
            command: (command as u16).into(),
            size: (bytes as u32).into(),
            flags: 0.into(),
            errno: 0.into(),
        };
        let mut message = header.as_bytes().to_vec();
        body.iter().for_each(|part| message.extend_from_slice(part));
        self.send(&message, fds).map_err(|error| over(&error))?;
        self.receive(id, command)
    }

    fn send(&mut self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MSG_FDS_MAX as usize))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other(
                "too many file descriptors for one message",
            ));
        }
        let parts = [IoSlice::new(message)];
        let sent = sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
        self.stream.write_all(&message[sent..])
    }

    fn receive(&mut self, id: u16, command: Command) -> Result<Vec<u8>, Failed> {
        let mut header = Header::new_zeroed();
        let read = self.stream.read_exact(header.as_mut_bytes());
        read.map_err(|error| over(&error))?;
        let bytes = header.size.get() as usize;
        let ours = header.id.get() == id && header.command.get() == command as u16;
        let flags = header.flags.get();
        if !ours || flags & FLAG_REPLY == 0 || !(HEADER_BYTES..=MESSAGE_MAX).contains(&bytes) {
            return Err(Failed::Gone(format!(
                "it answered {command:?} with a message that is no reply to it"
            )));
        }
        let mut body = vec![0; bytes - HEADER_BYTES];
        let read = self.stream.read_exact(&mut body);
        read.map_err(|error| over(&error))?;
        match flags & FLAG_ERROR {
            0 => Ok(body),
            _ => Err(Failed::Refused(Errno::from_raw_os_error(
                header.errno.get().min(i32::MAX as u32) as i32,
            ))),
        }
    }
}

const _: () = assert!(HEADER_BYTES == size_of::<Header>());

fn over(error: &io::Error) -> Failed {
    Failed::Gone(match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => "it closed the socket".to_owned(),
        io::ErrorKind::WouldBlock => {
            format!("it did not answer within {} s", REPLY_WAIT.as_secs())
        }
        _ => error.to_string(),
    })
}
