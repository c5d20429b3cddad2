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
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};
use vfio_shim::{
    model::{Bdf, OsRuntime, Runtime, Span},
    path::words,
    vfio::OpenGroup,
};
use vmm_glue::vfio_user::memory_check::{Inode, MemoryError, MemoryMaps};

/// How long a keeper may take to say that it hears this process.
const ADMIT_WAIT: Duration = Duration::from_secs(5);
/// How long a function's opening and closing may take: a handover, and a driver's own time.
const FUNCTION_WAIT: Duration = Duration::from_secs(30);
/// How long a function's stop may take, which its lender waits for before it takes it back.
const STOP_WAIT: Duration = Duration::from_secs(5);
/// How long a look at a process's memory may take.
const CHECK_WAIT: Duration = Duration::from_secs(5);

/// Where a keeper is.
#[derive(Clone, Debug)]
pub struct Keeper {
    folder: PathBuf,
    runtime: Arc<dyn Runtime>,
}

/// A function that the keeper has bound for this process; dropping this, after the function was
/// closed, has it given back. It outlives the keeper, whose successor knows of it.
#[derive(Debug)]
struct Hold {
    keeper: Keeper,
    bdf: Bdf,
    line: Arc<Line>,
}

/// The connection of an open function, until an answer does not come in time: what came later
/// would be taken for the next one.
#[derive(Debug)]
struct Line {
    path: PathBuf,
    channel: Mutex<Option<Channel>>,
}

impl Line {
    fn ask(&self, question: &ToKeeper, wait: Duration) -> Result<FromKeeper, VerbError> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match &*channel {
            Some(channel) => ask(channel, &self.path, question, wait),
            None => Err(lost(&self.path, "its connection has ended")),
        };
        if answer.is_err() {
            *channel = None;
        }
        answer
    }
}

/// Stops a function that the keeper has opened for this process, for as long as it is open.
#[derive(Debug)]
pub struct Stopper(Weak<Line>);

impl Stopper {
    /// What it does ends until its next reset, where its PF's driver has a file for that.
    pub fn stop(&self) -> Result<(), VerbError> {
        let Some(line) = self.0.upgrade() else {
            let text = "it is closed already, and its reset has stopped it: nothing is to be done";
            return Err(VerbError::new(ErrorCode::WrongState, text));
        };
        match line.ask(&ToKeeper::Stop, STOP_WAIT)? {
            FromKeeper::Done | FromKeeper::NoFile => Ok(()),
            other => Err(unexpected(&line.path, other)),
        }
    }
}

fn lost(path: &Path, why: impl std::fmt::Display) -> VerbError {
    let text = format!(
        "no keeper answers at {} ({why}): start `sublet keeper --config FILE` as root, and look at \
         its log",
        path.display()
    );
    VerbError::new(ErrorCode::Kernel, text)
}

/// A refusal, or an answer to something else.
fn unexpected(path: &Path, answer: FromKeeper) -> VerbError {
    match answer {
        FromKeeper::Refused(refusal) => refusal,
        _ => lost(path, "it answers something else"),
    }
}

impl Keeper {
    /// The keeper whose folder this is.
    pub fn at(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            runtime: Arc::new(OsRuntime),
        }
    }

    /// The same, for threads that wait on this runtime.
    pub fn on(self, runtime: Arc<dyn Runtime>) -> Self {
        Self { runtime, ..self }
    }

    fn connect(&self, path: &Path) -> Result<Channel, VerbError> {
        let connected = || {
            // A keeper that accepts nobody is no reason to stand still.
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok::<_, Errno>(Channel::of(socket).on(Arc::clone(&self.runtime)))
        };
        let channel = connected().map_err(|errno| lost(path, io::Error::from(errno)))?;
        match hear(&channel, path, ADMIT_WAIT)? {
            FromKeeper::Done => Ok(channel),
            other => Err(unexpected(path, other)),
        }
    }

    /// Opens a function of the keeper's allow-list. What is kept with it gives it back, and waits
    /// for that.
    pub fn open(&self, bdf: Bdf) -> Result<OpenGroup, VerbError> {
        self.open_to_lend(bdf).map(|(opened, _)| opened)
    }

    /// The same, and what stops it.
    pub fn open_to_lend(&self, bdf: Bdf) -> Result<(OpenGroup, Stopper), VerbError> {
        let path = super::functions_socket(&self.folder);
        let channel = self.connect(&path)?;
        let opened = match ask(&channel, &path, &ToKeeper::Open(bdf), FUNCTION_WAIT)? {
            FromKeeper::Opened(opened) => opened,
            other => return Err(unexpected(&path, other)),
        };
        let channel = Mutex::new(Some(channel));
        let line = Arc::new(Line { path, channel });
        let stopper = Stopper(Arc::downgrade(&line));
        let keeper = self.clone();
        let hold = Hold { keeper, bdf, line };
        let opened = OpenGroup {
            kept: Some(Box::new(hold)),
            ..opened
        };
        Ok((opened, stopper))
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
        Ok(false) => {
            let lost = lost(path, format!("nothing within {wait:?}"));
            return Err(VerbError::new(ErrorCode::Timeout, lost.text));
        }
        Err(error) => return Err(failed(path, error)),
    }
    let heard = channel.hear().map_err(|error| failed(path, error))?;
    heard.ok_or_else(|| lost(path, "it has ended"))
}

impl Hold {
    /// Gives the function back, by the keeper that is there now.
    fn give_back(&self) -> Result<(), VerbError> {
        let path = &self.line.path;
        let close = ToKeeper::Close(self.bdf);
        let answer = match self.line.ask(&close, FUNCTION_WAIT) {
            // The keeper that has opened it has ended: another one may be there.
            Err(_) => ask(&self.keeper.connect(path)?, path, &close, FUNCTION_WAIT)?,
            Ok(answer) => answer,
        };
        match answer {
            FromKeeper::Done => Ok(()),
            other => Err(unexpected(path, other)),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.keeper.runtime.is_killed() {
            return;
        }
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
        let told = MemoryError::from;
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
                other => return Err(told(unexpected(&path, other))),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_that_comes_too_late_is_not_taken_for_the_next_one() {
        let (own, keepers) = Channel::pair().unwrap();
        let line = Line {
            path: "/run/keeper".into(),
            channel: Mutex::new(Some(own)),
        };
        let late = line.ask(&ToKeeper::Stop, Duration::ZERO).unwrap_err();
        assert!(late.text.contains("nothing within 0ns"), "{late}");
        let asked: Option<ToKeeper> = keepers.hear().unwrap();
        assert_eq!(asked, Some(ToKeeper::Stop));
        let heard = keepers.say(&FromKeeper::Done, false).unwrap();
        assert_eq!(heard, Sent::Closed, "nobody reads it any more");
        let ended = line.ask(&ToKeeper::Stop, Duration::ZERO).unwrap_err();
        assert!(ended.text.contains("its connection has ended"), "{ended}");
    }
}
