//! Bytes for a session of its own, with fds where a request can take them.

use crate::fake::{FakeFunction, Faults};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{MemfdFlags, ftruncate, memfd_create},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use std::{
    io::{IoSlice, Read},
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
    time::Duration,
};
use vmm_glue::vfio_user::{
    BarMode, Holders, MemoryCheck, Options, Peers, SessionShared, Vmm, serve_connection,
};

/// The most eventfds that go with one request.
const EVENTS_MAX: usize = 4;
/// A session whose VMM reads nothing stands in its answer by then.
const STOPS_AFTER: Duration = Duration::from_millis(200);

/// What a session meets beside its bytes: each bit is one thing.
#[derive(Clone, Copy, Default)]
pub struct Scene(pub u8);

impl Scene {
    const MAP_FAILS: u8 = 1;
    const RESET_FAILS: u8 = 2;
    const REGION_FAILS: u8 = 4;
    const STRANGER: u8 = 8;
    const MAPPED: u8 = 16;
    const NO_HOLDER: u8 = 32;
    const STOPPED: u8 = 64;
    const FDS_WITH_ALL: u8 = 128;

    fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }

    /// Whether the VMM is let in.
    fn admits(self) -> bool {
        let uncounted = self.has(Self::MAPPED) && self.has(Self::NO_HOLDER);
        !self.has(Self::STRANGER) && !uncounted
    }

    /// Whether the VMM reads nothing. It goes as soon as all is sent, or it stays, and the session
    /// is to stop then.
    fn is_deaf(self) -> bool {
        self.has(Self::NO_HOLDER) && !self.has(Self::MAPPED)
    }

    /// Each of them strikes once.
    fn faults(self) -> Faults {
        Faults {
            map: self.has(Self::MAP_FAILS),
            reset: self.has(Self::RESET_FAILS),
            region: self.has(Self::REGION_FAILS),
            ..Faults::default()
        }
    }

    fn options(self) -> Options {
        let peers = match self.has(Self::STRANGER) {
            true => Peers::Only {
                uids: Vec::new(),
                gids: Vec::new(),
            },
            false => Peers::Any,
        };
        let bars = match self.has(Self::MAPPED) {
            true => BarMode::Mapped,
            false => BarMode::Trapped,
        };
        Options {
            memory_check: MemoryCheck::Off,
            peers,
            bars,
            holders: Some(Arc::new(Account(!self.has(Self::NO_HOLDER)))),
            ..Options::default()
        }
    }
}

/// Takes every VMM, or none.
struct Account(bool);

impl Holders for Account {
    fn begins(&self, _: Vmm) -> Result<(), String> {
        self.0.then_some(()).ok_or("no more of them".into())
    }
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let word = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(word.try_into().ok()?) as usize)
}

/// The first message of `bytes`, as far as its header is to be believed, and the rest.
fn cut(bytes: &[u8]) -> (&[u8], &[u8]) {
    let size = word(bytes, 4).unwrap_or(bytes.len());
    bytes.split_at(size.clamp(1, bytes.len()))
}

/// How many of which fds: one memory for a DMA_MAP of a page address that is no multiple of
/// 64 KiB, eventfds for a SET_IRQS that names few.
fn fds<'a>(
    message: &[u8],
    scene: Scene,
    memory: &'a OwnedFd,
    event: &'a OwnedFd,
) -> Vec<BorrowedFd<'a>> {
    let command = message.get(2).copied();
    let iova = word(message, 32).unwrap_or(0);
    let count = word(message, 32).unwrap_or(0);
    let eventfd = word(message, 20).is_some_and(|flags| flags & 4 != 0);
    match command {
        Some(2) if iova & 0xffff != 0 => vec![memory.as_fd()],
        Some(8) if eventfd && count <= EVENTS_MAX => vec![event.as_fd(); count],
        _ if scene.has(Scene::FDS_WITH_ALL) => vec![event.as_fd()],
        _ => Vec::new(),
    }
}

fn send_all(near: &UnixStream, scene: Scene, mut bytes: &[u8]) {
    let memory = memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, 1 << 20).expect("memory");
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    while !bytes.is_empty() {
        let (message, rest) = cut(bytes);
        let fds = fds(message, scene, &memory, &event);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(EVENTS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let iov = [IoSlice::new(message)];
        // Refused once the session has ended.
        if sendmsg(near, &iov, &mut control, SendFlags::NOSIGNAL).is_err() {
            break;
        }
        bytes = rest;
    }
    let _ = near.shutdown(Shutdown::Write);
}

/// Sends the bytes to a session and waits for it to end by itself. Nothing may be left of it.
pub fn feed(bytes: &[u8], scene: Scene) -> Vec<String> {
    let (near, far) = UnixStream::pair().expect("a socket pair");
    far.set_nonblocking(true).expect("a socket");
    let reader = near.try_clone().expect("an fd");
    let reader = (!scene.is_deaf()).then_some(reader);
    near.set_nonblocking(scene.is_deaf()).expect("a socket");
    let function = FakeFunction::new();
    *function.faults.lock().unwrap() = scene.faults();
    let stops_late = scene.is_deaf() && scene.has(Scene::STOPPED);
    let stopped = u32::from(scene.has(Scene::STOPPED) && !stops_late);
    let stop = eventfd(stopped, EventfdFlags::CLOEXEC).expect("an eventfd");
    let shared = SessionShared::default();
    let options = scene.options();
    std::thread::scope(|scope| {
        // From threads of their own: the server may stop reading, or fill the way back.
        let stop = &stop;
        let writer = scope.spawn(move || {
            send_all(&near, scene, bytes);
            if !stops_late {
                return None;
            }
            // Where it has ended by itself there is nothing to stop.
            let mut ended = [PollFd::new(&near, PollFlags::HUP)];
            let wait = Timespec::try_from(STOPS_AFTER).expect("a time");
            let _ = poll(&mut ended, Some(&wait));
            rustix::io::write(stop, &1u64.to_ne_bytes()).expect("an eventfd");
            Some(near)
        });
        let drain = scope.spawn(move || {
            let read = reader.map(|mut reader| reader.read_to_end(&mut Vec::new()));
            drop(read);
        });
        let socket = OwnedFd::from(far);
        let served = serve_connection(socket, &*function, &options, stop.as_fd(), &shared);
        // Where the VMM asked for no reset the fault strikes the undo, which says so.
        if !scene.has(Scene::RESET_FAILS) {
            served.expect("the undo of a session");
        }
        drop(writer.join().expect("a writer"));
        drain.join().expect("a reader");
    });
    assert!(function.mapped().is_empty(), "guest memory stayed mapped");
    assert_eq!(function.triggers(), 0, "a trigger stayed behind");
    assert_eq!(shared.counters.bytes_now.get(), 0);
    let journal = function.journal();
    if !scene.admits() {
        assert!(journal.is_empty(), "a stranger reached the function");
        return journal;
    }
    let undo = journal.iter().rposition(|line| line == "reset");
    let undo = &journal[undo.expect("a reset")..];
    assert!(!undo.iter().any(|line| line.starts_with("map")));
    journal
}
