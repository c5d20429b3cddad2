//! A client's connection: one command, one reply, all bounded; what goes wrong in the stream ends it for good.

use crate::vfio_user::spin::{Pause, Spin, SpinPolicy, spinners_max};
use crate::vfio_user::version::MSG_FDS_MAX;
use crate::vfio_user::wire::{
    Command, FLAG_ERROR, FLAG_REPLY, HEADER_BYTES, Header, MESSAGE_MAX, Version,
};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, Read, Write};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vfio_shim::model::{OsRuntime, Runtime};
use zerocopy::{FromBytes, IntoBytes};

/// How long a reply may take: a reset of the lender's can take 15 s.
const REPLY_WAIT: Duration = Duration::from_secs(30);
/// The version that is asked for: 0.1.
const MINOR: u16 = 1;
/// How many DMA maps a server takes that does not say (vfio-user 0.9.2, section "Version").
const MAPS_DEFAULT: u32 = 65_535;
/// Room for most replies: one look at the socket brings them whole.
const REPLY_BYTES: usize = 512;

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
    /// How long replies usually take, and so whether to wait awake for the next one: a trapped
    /// access holds its vCPU up, and a wake-up is most of what it takes.
    policy: SpinPolicy,
    spinners_max: usize,
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
            policy: SpinPolicy::default(),
            spinners_max: spinners_max(),
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
        let mut room = [0; REPLY_BYTES];
        let mut held = 0;
        while held < HEADER_BYTES {
            held += self.some(&mut room[held..]).map_err(|error| over(&error))?;
        }
        let (header, rest) = Header::ref_from_prefix(&room[..held])
            .map_err(|_| Failed::Gone("a reply without a header".to_owned()))?;
        let bytes = header.size.get() as usize;
        let ours = header.id.get() == id && header.command.get() == command as u16;
        let (flags, errno) = (header.flags.get(), header.errno.get());
        let whole = (HEADER_BYTES..=MESSAGE_MAX).contains(&bytes) && held <= bytes;
        if !ours || flags & FLAG_REPLY == 0 || !whole {
            return Err(Failed::Gone(format!(
                "it answered {command:?} with a message that is no reply to it"
            )));
        }
        let mut body = vec![0; bytes - HEADER_BYTES];
        let (first, last) = body.split_at_mut(rest.len());
        first.copy_from_slice(rest);
        let read = self.stream.read_exact(last);
        read.map_err(|error| over(&error))?;
        match flags & FLAG_ERROR {
            0 => Ok(body),
            _ => Err(Failed::Refused(Errno::from_raw_os_error(
                errno.min(i32::MAX as u32) as i32,
            ))),
        }
    }

    /// Waits for bytes, awake where that pays.
    fn some(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let since = OsRuntime.spin_clock_ns();
        let bytes = match self.some_awake(room, since)? {
            Some(bytes) => bytes,
            None => self.some_asleep(room)?,
        };
        if let Some((since, now)) = since.zip(OsRuntime.spin_clock_ns()) {
            self.policy.gap(now.saturating_sub(since));
        }
        match bytes {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => Ok(bytes),
        }
    }

    fn some_asleep(&mut self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(room) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// None when it is not worth it any longer.
    fn some_awake(&mut self, room: &mut [u8], since: Option<u64>) -> io::Result<Option<usize>> {
        let mut spin = since.and_then(|since| Spin::begin(&self.policy, since, self.spinners_max));
        while let Some(awake) = &mut spin {
            match recv(&self.stream, &mut *room, RecvFlags::DONTWAIT) {
                Ok((bytes, _)) => return Ok(Some(bytes)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            match awake.pause(&OsRuntime) {
                Pause::Again => {}
                Pause::Over => spin = None,
                Pause::Contended => {
                    self.policy.contended();
                    spin = None;
                }
            }
        }
        Ok(None)
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
