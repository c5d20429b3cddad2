//! What a warden is asked and answers, as values and as bytes: each question brings the socket of its answer.

use crate::{
    daemon::vocabulary::VerbError,
    ipc::{
        Check, Datagram, MessageError, bad, check_fds, get_check, get_text, put_check, put_text,
    },
    keeper::{get_refusal, put_refusal},
};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};
use vfio_shim::path::wire::{Reader, Writer};

/// A question, and the end of a channel by which it is answered.
#[derive(Debug)]
pub struct Asked {
    /// Answered here, once.
    pub reply: OwnedFd,
    /// What.
    pub question: Question,
}

/// What a port cannot do or see any more.
#[derive(Debug)]
pub enum Question {
    /// Whether it is there.
    Hello,
    /// Start a worker whose channel this is.
    Start(OwnedFd),
    /// Kill this worker.
    Kill(i32),
    /// How this worker has ended, in words.
    Ended(i32),
    /// Whether this worker has a device mapped.
    MapsDevice(i32),
    /// Whether a process maps these ranges shared.
    CheckShared(Check),
    /// A VMM is about to have the window: write it down, if it can be ended.
    Begin(i32, OwnedFd),
    /// End this VMM, unless it has let go of every device.
    End(i32, OwnedFd),
    /// This VMM has the window no more.
    Forget(i32),
    /// Make the socket of a VMM; in a folder of its own, or in one that is there.
    Listen(PathBuf, bool),
    /// Remove that socket, and its own folder.
    Release(PathBuf),
    /// Open the kernel's log.
    KernelLog,
}

/// The answer.
#[derive(Debug)]
pub enum Answer {
    /// Done; of a check: it is so.
    Done,
    /// Yes or no.
    Is(bool),
    /// In words.
    Said(String),
    /// A worker: its number, and its descriptor.
    Started(i32, OwnedFd),
    /// A listening socket, or an open file.
    Opened(OwnedFd),
    /// Refused, with cause and mend.
    Refused(VerbError),
}

mod kind {
    pub const START: u16 = 1;
    pub const KILL: u16 = 2;
    pub const ENDED: u16 = 3;
    pub const MAPS_DEVICE: u16 = 4;
    pub const CHECK_SHARED: u16 = 5;
    pub const BEGIN: u16 = 6;
    pub const END: u16 = 7;
    pub const FORGET: u16 = 8;
    pub const LISTEN: u16 = 9;
    pub const RELEASE: u16 = 10;
    pub const KERNEL_LOG: u16 = 11;
    pub const HELLO: u16 = 12;

    pub const DONE: u16 = 33;
    pub const IS: u16 = 34;
    pub const SAID: u16 = 35;
    pub const STARTED: u16 = 36;
    pub const OPENED: u16 = 37;
    pub const REFUSED: u16 = 38;
}

fn put_path(w: &mut Writer, path: &std::path::Path) -> Result<(), MessageError> {
    put_text(w, &path.to_string_lossy())
}

impl Datagram for Asked {
    fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let mut w = Writer::new();
        let mut of_process = |kind, pid: i32| {
            w.u16(kind);
            w.u32(pid as u32);
        };
        match &self.question {
            Question::Hello => w.u16(kind::HELLO),
            Question::Start(_) => w.u16(kind::START),
            Question::Kill(pid) => of_process(kind::KILL, *pid),
            Question::Ended(pid) => of_process(kind::ENDED, *pid),
            Question::MapsDevice(pid) => of_process(kind::MAPS_DEVICE, *pid),
            Question::Begin(pid, _) => of_process(kind::BEGIN, *pid),
            Question::End(pid, _) => of_process(kind::END, *pid),
            Question::Forget(pid) => of_process(kind::FORGET, *pid),
            Question::CheckShared(check) => {
                w.u16(kind::CHECK_SHARED);
                put_check(&mut w, check)?;
            }
            Question::Listen(path, own_folder) => {
                w.u16(kind::LISTEN);
                put_path(&mut w, path)?;
                w.bool(*own_folder);
            }
            Question::Release(path) => {
                w.u16(kind::RELEASE);
                put_path(&mut w, path)?;
            }
            Question::KernelLog => w.u16(kind::KERNEL_LOG),
        }
        Ok(w.finish()?)
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds = vec![self.reply.as_fd()];
        if let Question::Start(more) | Question::Begin(_, more) | Question::End(_, more) =
            &self.question
        {
            fds.push(more.as_fd());
        }
        fds
    }

    fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        let mut r = Reader::new(bytes);
        let kind = r.u16()?;
        let came = fds.len();
        let mut fds = fds.into_iter();
        let (reply, more) = (fds.next(), fds.next());
        let takes = 1 + usize::from(matches!(kind, kind::START | kind::BEGIN | kind::END));
        check_fds(came, takes)?;
        let missing = MessageError::Fds { came, takes };
        let question = match (kind, more) {
            (kind::START, Some(channel)) => Question::Start(channel),
            (kind::BEGIN, Some(process)) => Question::Begin(r.u32()? as i32, process),
            (kind::END, Some(process)) => Question::End(r.u32()? as i32, process),
            (kind::KILL, _) => Question::Kill(r.u32()? as i32),
            (kind::ENDED, _) => Question::Ended(r.u32()? as i32),
            (kind::MAPS_DEVICE, _) => Question::MapsDevice(r.u32()? as i32),
            (kind::CHECK_SHARED, _) => Question::CheckShared(get_check(&mut r)?),
            (kind::FORGET, _) => Question::Forget(r.u32()? as i32),
            (kind::LISTEN, _) => Question::Listen(get_text(&mut r)?.into(), r.bool("folder")?),
            (kind::RELEASE, _) => Question::Release(get_text(&mut r)?.into()),
            (kind::KERNEL_LOG, _) => Question::KernelLog,
            (kind::HELLO, _) => Question::Hello,
            (other, _) => return Err(bad("kind", other)),
        };
        r.finish()?;
        Ok(Self {
            reply: reply.ok_or(missing)?,
            question,
        })
    }
}

impl Datagram for Answer {
    fn encode(&self) -> Result<Vec<u8>, MessageError> {
        let mut w = Writer::new();
        match self {
            Self::Done => w.u16(kind::DONE),
            Self::Is(so) => {
                w.u16(kind::IS);
                w.bool(*so);
            }
            Self::Said(words) => {
                w.u16(kind::SAID);
                put_text(&mut w, words)?;
            }
            Self::Started(pid, _) => {
                w.u16(kind::STARTED);
                w.u32(*pid as u32);
            }
            Self::Opened(_) => w.u16(kind::OPENED),
            Self::Refused(refusal) => {
                w.u16(kind::REFUSED);
                put_refusal(&mut w, refusal)?;
            }
        }
        Ok(w.finish()?)
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Started(_, fd) | Self::Opened(fd) => vec![fd.as_fd()],
            _ => Vec::new(),
        }
    }

    fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        let mut r = Reader::new(bytes);
        let kind = r.u16()?;
        let takes = usize::from(matches!(kind, kind::STARTED | kind::OPENED));
        check_fds(fds.len(), takes)?;
        let answer = match (kind, fds.into_iter().next()) {
            (kind::STARTED, Some(process)) => Self::Started(r.u32()? as i32, process),
            (kind::OPENED, Some(fd)) => Self::Opened(fd),
            (kind::DONE, _) => Self::Done,
            (kind::IS, _) => Self::Is(r.bool("is")?),
            (kind::SAID, _) => Self::Said(get_text(&mut r)?),
            (kind::REFUSED, _) => Self::Refused(get_refusal(&mut r)?),
            (other, _) => return Err(bad("kind", other)),
        };
        r.finish()?;
        Ok(answer)
    }
}
