//! The keeper as whoever drives a port sees it: functions opened and given back, memory checked.

use super::message::{FromKeeper, ToKeeper};
use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    ipc::{Channel, Check, PIECES_MAX, Sent},
};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use vfio_shim::{
    model::{Bdf, Span},
    path::words,
    vfio::OpenGroup,
};
use vmm_glue::vfio_user::memory_check::{Inode, MemoryError, MemoryMaps};

/// How long a keeper may take to say that it hears this process.
const ADMIT_WAIT: Duration = Duration::from_secs(5);
/// How long a function's opening and closing may take: a handover, and a driver's own time.
const FUNCTION_WAIT: Duration = Duration::from_secs(30);
/// How long a look at a process's memory may take.
const CHECK_WAIT: Duration = Duration::from_secs(5);

/// Where a keeper is.
#[derive(Clone, Debug)]
pub struct Keeper {
    folder: PathBuf,
}

/// A function that the keeper has bound for this process; dropping this, after the function was
/// closed, has it given back. It outlives the keeper, whose successor knows of it.
#[derive(Debug)]
struct Hold {
    keeper: Keeper,
    bdf: Bdf,
    channel: Channel,
}

fn lost(path: &Path, why: impl std::fmt::Display) -> VerbError {
    let text = format!(
        "no keeper answers at {} ({why}): start `sublet keeper --config FILE` as root, and look at \
         its log",
        path.display()
    );
    VerbError::new(ErrorCode::Kernel, text)
}

impl Keeper {
    /// The keeper whose folder this is.
    pub fn at(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    fn connect(&self, path: &Path) -> Result<Channel, VerbError> {
        let connected = || {
            // A keeper that accepts nobody is no reason to stand still.
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok::<_, Errno>(Channel::of(socket))
        };
        let channel = connected().map_err(|errno| lost(path, io::Error::from(errno)))?;
        match hear(&channel, path, ADMIT_WAIT)? {
            FromKeeper::Done => Ok(channel),
            FromKeeper::Refused(refusal) => Err(refusal),
            FromKeeper::Opened(_) => Err(lost(path, "it answers something else")),
        }
    }

    /// Opens a function of the keeper's allow-list. What is kept with it gives it back, and waits
    /// for that.
    pub fn open(&self, bdf: Bdf) -> Result<OpenGroup, VerbError> {
        let path = super::functions_socket(&self.folder);
        let channel = self.connect(&path)?;
        match ask(&channel, &path, &ToKeeper::Open(bdf), FUNCTION_WAIT)? {
            FromKeeper::Opened(opened) => {
                let keeper = self.clone();
                let hold = Hold {
                    keeper,
                    bdf,
                    channel,
                };
                Ok(OpenGroup {
                    kept: Some(Box::new(hold)),
                    ..opened
                })
            }
            FromKeeper::Done => Err(lost(&path, "it answers something else")),
            FromKeeper::Refused(refusal) => Err(refusal),
        }
    }
}

fn failed(path: &Path, error: impl std::error::Error + 'static) -> VerbError {
    lost(path, words(&error))
}

/// One question, and its answer. Without one in time the connection is of no use any more.
fn ask(
    channel: &Channel,
    path: &Path,
    question: &ToKeeper,
    wait: Duration,
) -> Result<FromKeeper, VerbError> {
    match channel.say(question, false) {
        Ok(Sent::Sent) => hear(channel, path, wait),
        Ok(Sent::Full) => Err(lost(path, "it does not read")),
        Ok(Sent::Closed) => Err(lost(path, "it has ended")),
        Err(error) => Err(failed(path, error)),
    }
}

fn hear(channel: &Channel, path: &Path, wait: Duration) -> Result<FromKeeper, VerbError> {
    match channel.wait(wait) {
        Ok(true) => {}
        Ok(false) => return Err(lost(path, format!("nothing within {wait:?}"))),
        Err(error) => return Err(failed(path, error)),
    }
    let heard = channel.hear().map_err(|error| failed(path, error))?;
    heard.ok_or_else(|| lost(path, "it has ended"))
}

impl Hold {
    /// Gives the function back, by the keeper that is there now.
    fn give_back(&self) -> Result<(), VerbError> {
        let path = super::functions_socket(&self.keeper.folder);
        let close = ToKeeper::Close(self.bdf);
        let answer = match ask(&self.channel, &path, &close, FUNCTION_WAIT) {
            // The keeper that has opened it has ended: another one may be there.
            Err(_) => ask(&self.keeper.connect(&path)?, &path, &close, FUNCTION_WAIT)?,
            Ok(answer) => answer,
        };
        match answer {
            FromKeeper::Done => Ok(()),
            FromKeeper::Refused(refusal) => Err(refusal),
            FromKeeper::Opened(_) => Err(lost(&path, "it answers something else")),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Err(error) = self.give_back() {
            // The connection's end is the same word, and so is the function's being closed.
            tracing::warn!(bdf = %self.bdf, %error, "the keeper gives a function back later");
        }
    }
}

impl MemoryMaps for Keeper {
    /// Each time by a connection of its own: one tenant's process that cannot be looked at does not
    /// hold up another's.
    fn check_shared(&self, pid: i32, ranges: &[(Inode, Span)]) -> Result<(), MemoryError> {
        let told = |error: VerbError| MemoryError::Told(error.text);
        let path = super::checks_socket(&self.folder);
        let channel = self.connect(&path).map_err(told)?;
        for some in ranges.chunks(PIECES_MAX) {
            let range = |(inode, range): &(Inode, Span)| (inode.device, inode.number, *range);
            let check = Check {
                pid,
                ranges: some.iter().map(range).collect(),
            };
            let question = ToKeeper::CheckShared(check);
            match ask(&channel, &path, &question, CHECK_WAIT).map_err(told)? {
                FromKeeper::Done => {}
                FromKeeper::Refused(refusal) => return Err(told(refusal)),
                FromKeeper::Opened(_) => return Err(told(lost(&path, "it answers nonsense"))),
            }
        }
        Ok(())
    }
}
