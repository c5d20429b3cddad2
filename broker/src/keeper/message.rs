//! What a keeper is asked and answers: a handful of fixed messages, as values and as bytes.

use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    ipc::{
        Check, Datagram, MessageError, bad, check_fds, get_check, get_text, put_check, put_text,
    },
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vfio_shim::{
    model::Bdf,
    path::wire::{Reader, Writer},
    vfio::OpenGroup,
};

/// To a keeper. Each is answered before the next is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToKeeper {
    /// Bind it to vfio-pci where it is not, and hand its group over. One function for each
    /// connection: what has been bound is undone when the connection ends.
    Open(Bdf),
    /// Stop what the function of this connection does until its next reset, where its PF's driver
    /// has a file for that: xe has one, and its write takes root.
    Stop,
    /// The asker has closed it: give it back to what had it before.
    Close(Bdf),
    /// Whether a process maps these ranges shared; asked at the other socket.
    CheckShared(Check),
}

/// From a keeper.
#[derive(Debug)]
pub enum FromKeeper {
    /// The function's group, and a container for it.
    Opened(OpenGroup),
    /// Done; of a check: it is so.
    Done,
    /// Of a stop: there is no such file, and nothing was done.
    NoFile,
    /// Refused, with cause and mend.
    Refused(VerbError),
}

mod kind {
    pub const OPEN: u16 = 1;
    pub const CLOSE: u16 = 2;
    pub const CHECK_SHARED: u16 = 3;
    pub const STOP: u16 = 4;

    pub const OPENED: u16 = 33;
    pub const DONE: u16 = 34;
    pub const REFUSED: u16 = 35;
    pub const NO_FILE: u16 = 36;
}

fn put_bdf(w: &mut Writer, bdf: Bdf) {
    w.u16(bdf.domain());
    w.u16(bdf.routing_id());
}

fn get_bdf(r: &mut Reader<'_>) -> Result<Bdf, MessageError> {
    Ok(Bdf::from_routing_id(r.u16()?, r.u16()?))
}

pub(crate) fn put_refusal(w: &mut Writer, refusal: &VerbError) -> Result<(), MessageError> {
    put_text(w, refusal.code.word())?;
    put_text(w, &refusal.text)
}

pub(crate) fn get_refusal(r: &mut Reader<'_>) -> Result<VerbError, MessageError> {
    let (word, text) = (get_text(r)?, get_text(r)?);
    let known = ErrorCode::ALL.iter().find(|code| code.word() == word);
    let code = *known.ok_or_else(|| bad("code", word.len() as u64))?;
    Ok(VerbError { code, text })
}

impl Datagram for ToKeeper {
    fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let mut w = Writer::new();
        match self {
            Self::Open(bdf) => {
                w.u16(kind::OPEN);
                put_bdf(&mut w, *bdf);
            }
            Self::Stop => w.u16(kind::STOP),
            Self::Close(bdf) => {
                w.u16(kind::CLOSE);
                put_bdf(&mut w, *bdf);
            }
            Self::CheckShared(check) => {
                w.u16(kind::CHECK_SHARED);
                put_check(&mut w, check)?;
            }
        }
        Ok(w.finish()?)
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        check_fds(fds.len(), 0)?;
        let mut r = Reader::new(bytes);
        let message = match r.u16()? {
            kind::OPEN => Self::Open(get_bdf(&mut r)?),
            kind::STOP => Self::Stop,
            kind::CLOSE => Self::Close(get_bdf(&mut r)?),
            kind::CHECK_SHARED => Self::CheckShared(get_check(&mut r)?),
            other => return Err(bad("kind", other)),
        };
        r.finish()?;
        Ok(message)
    }
}

impl Datagram for FromKeeper {
    fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let mut w = Writer::new();
        match self {
            Self::Opened(_) => w.u16(kind::OPENED),
            Self::Done => w.u16(kind::DONE),
            Self::NoFile => w.u16(kind::NO_FILE),
            Self::Refused(refusal) => {
                w.u16(kind::REFUSED);
                put_refusal(&mut w, refusal)?;
            }
        }
        Ok(w.finish()?)
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Opened(opened) => vec![opened.group.as_fd(), opened.container.as_fd()],
            Self::Done | Self::NoFile | Self::Refused(_) => Vec::new(),
        }
    }

    fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        let mut r = Reader::new(bytes);
        let kind = r.u16()?;
        let message = match (kind, <[OwnedFd; 2]>::try_from(fds)) {
            (kind::OPENED, Ok([group, container])) => Self::Opened(OpenGroup {
                group,
                container,
                kept: None,
            }),
            (kind::OPENED, Err(fds)) => {
                check_fds(fds.len(), 2)?;
                return Err(bad("kind", kind));
            }
            (_, Ok(_)) => return check_fds(2, 0).map(|()| Self::Done),
            (kind, Err(fds)) => {
                check_fds(fds.len(), 0)?;
                match kind {
                    kind::DONE => Self::Done,
                    kind::NO_FILE => Self::NoFile,
                    kind::REFUSED => Self::Refused(get_refusal(&mut r)?),
                    other => return Err(bad("kind", other)),
                }
            }
        };
        r.finish()?;
        Ok(message)
    }
}
