//! A VMM that sends what bytes and descriptors it likes, and need not read the answers.

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::{
    io::{self, IoSlice, Read},
    mem::MaybeUninit,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
const HEADER: usize = 16;

pub struct Raw {
    stream: UnixStream,
    id: u16,
}

/// Errno and body of an answer.
pub type Answer = (u32, Vec<u8>);

impl Raw {
    /// Connected, and agreed on a version.
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(super::PATIENCE)).unwrap();
        let mut raw = Self { stream, id: 0 };
        let mut body = vec![0; 4];
        body.extend(b"{\"capabilities\":{}}\0");
        assert_eq!(
            raw.ask(VERSION, &body, &[]).map(|(errno, _)| errno),
            Some(0)
        );
        raw
    }

    /// Writes that the other end does not take in time fail.
    pub fn patience(&self, wait: Duration) {
        self.stream.set_write_timeout(Some(wait)).unwrap();
    }

    pub fn send(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.id = self.id.wrapping_add(1);
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.extend(command.to_le_bytes());
        bytes.extend(((HEADER + body.len()) as u32).to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let mut sent = 0;
        while sent < bytes.len() {
            let part = [IoSlice::new(&bytes[sent..])];
            sent += sendmsg(&self.stream, &part, &mut control, SendFlags::NOSIGNAL)?;
            control.clear();
        }
        Ok(())
    }

    /// The next answer, or `None` where the server has ended the session.
    pub fn answer(&mut self) -> Option<Answer> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(4) as usize - HEADER];
        self.stream.read_exact(&mut body).ok()?;
        Some((word(12), body))
    }

    pub fn ask(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Option<Answer> {
        self.send(command, body, fds).ok()?;
        self.answer()
    }

    /// Whether the server ends the session, after at most one answer.
    pub fn is_ended(&mut self) -> bool {
        self.answer().is_none() || self.answer().is_none()
    }
}

/// A DMA_MAP's body: read and write, memory that is shared.
pub fn map(offset: u64, iova: u64, len: u64) -> Vec<u8> {
    let mut body = [32u32.to_le_bytes(), 3u32.to_le_bytes()].concat();
    body.extend([offset, iova, len].map(u64::to_le_bytes).concat());
    body
}

/// A DMA_UNMAP's body.
pub fn unmap(iova: u64, len: u64) -> Vec<u8> {
    let mut body = [24u32.to_le_bytes(), 0u32.to_le_bytes()].concat();
    body.extend([iova, len].map(u64::to_le_bytes).concat());
    body
}

/// An access's body.
pub fn access(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend([region, count].map(u32::to_le_bytes).concat());
    body.extend(data);
    body
}

/// A SET_IRQS body: one eventfd as the trigger of one MSI-X vector.
pub fn trigger(vector: u32) -> Vec<u8> {
    [20, 1 << 2 | 1 << 5, 2, vector, 1]
        .map(u32::to_le_bytes)
        .concat()
}
