//! Bytes for a session of its own, with fds where a request can take them.

use crate::fake::FakeFunction;
use rustix::{
    event::{EventfdFlags, eventfd},
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
};
use vmm_glue::vfio_user::{MemoryCheck, Options, SessionShared, serve_connection};

/// The most eventfds that go with one request.
const EVENTS_MAX: usize = 4;

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
fn fds<'a>(message: &[u8], memory: &'a OwnedFd, event: &'a OwnedFd) -> Vec<BorrowedFd<'a>> {
    let command = message.get(2).copied();
    let iova = word(message, 32).unwrap_or(0);
    let count = word(message, 32).unwrap_or(0);
    let eventfd = word(message, 20).is_some_and(|flags| flags & 4 != 0);
    match command {
        Some(2) if iova & 0xffff != 0 => vec![memory.as_fd()],
        Some(8) if eventfd && count <= EVENTS_MAX => vec![event.as_fd(); count],
        _ => Vec::new(),
    }
}

fn send_all(near: &UnixStream, mut bytes: &[u8]) {
    let memory = memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, 1 << 20).expect("memory");
    let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    while !bytes.is_empty() {
        let (message, rest) = cut(bytes);
        let fds = fds(message, &memory, &event);
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
pub fn feed(bytes: &[u8]) -> Vec<String> {
    let (near, far) = UnixStream::pair().expect("a socket pair");
    far.set_nonblocking(true).expect("a socket");
    let mut reader = near.try_clone().expect("an fd");
    let function = FakeFunction::new();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let shared = SessionShared::default();
    let options = Options {
        memory_check: MemoryCheck::Off,
        ..Options::default()
    };
    std::thread::scope(|scope| {
        // From threads of their own: the server may stop reading, or fill the way back.
        let writer = scope.spawn(|| send_all(&near, bytes));
        let drain = scope.spawn(move || {
            let _ = reader.read_to_end(&mut Vec::new());
        });
        let socket = OwnedFd::from(far);
        let served = serve_connection(socket, &*function, &options, stop.as_fd(), &shared);
        served.expect("the undo of a session");
        writer.join().expect("a writer");
        drain.join().expect("a reader");
    });
    assert!(function.mapped().is_empty(), "guest memory stayed mapped");
    assert_eq!(function.triggers(), 0, "a trigger stayed behind");
    assert_eq!(shared.counters.bytes_now.get(), 0);
    let journal = function.journal();
    let undo = journal.iter().rposition(|line| line == "reset");
    let undo = &journal[undo.expect("a reset")..];
    assert!(!undo.iter().any(|line| line.starts_with("map")));
    journal
}
