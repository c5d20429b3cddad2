//! An endpoint served in a thread, and a client that sends what bytes it likes.

use crate::fake::FakeFunction;
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{MemfdFlags, fstat, ftruncate, major, memfd_create, minor},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use std::{
    fs,
    io::{IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};
use vfio_shim::model::Function;
use vmm_glue::vfio_user::{
    Endpoint, EndpointError, Options, SessionShared, SessionState, wire::Command,
};

/// Longer than anything here takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Rig {
    pub function: Arc<FakeFunction>,
    pub shared: Arc<SessionShared>,
    pub socket: PathBuf,
    dir: tempfile::TempDir,
    stop: Arc<OwnedFd>,
    server: Option<JoinHandle<Result<(), EndpointError>>>,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// Its memory check reads `maps_file`, not this process's own memory map.
    pub fn with(change: impl FnOnce(&mut Options)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let function = FakeFunction::new();
        let shared = Arc::new(SessionShared::default());
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let mut options = Options {
            memory_maps: Arc::new(dir.path().join("proc")),
            ..Options::default()
        };
        change(&mut options);
        let own = dir.path().join("proc").join(std::process::id().to_string());
        fs::create_dir_all(own).unwrap();
        let socket = dir.path().join("vmm.sock");
        let endpoint = Endpoint::bind(&socket).unwrap();
        let server = std::thread::spawn({
            let (function, shared, stop) = (function.clone(), shared.clone(), stop.clone());
            move || {
                let function: Arc<dyn Function> = function;
                endpoint.serve(&function, &options, stop.as_fd(), &shared)
            }
        });
        Self {
            function,
            shared,
            socket,
            dir,
            stop,
            server: Some(server),
        }
    }

    pub fn maps_file(&self) -> PathBuf {
        let pid = std::process::id().to_string();
        self.dir.path().join("proc").join(pid).join("maps")
    }

    /// A memfd that this process seems to map: `s` shared or `p` private.
    pub fn memory(&self, bytes: u64, shared: char) -> OwnedFd {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        self.show(&fd, bytes, shared);
        fd
    }

    pub fn show(&self, fd: &OwnedFd, bytes: u64, shared: char) {
        let stat = fstat(fd).unwrap();
        let (major, minor) = (major(stat.st_dev), minor(stat.st_dev));
        let base = 0x7f00_0000_0000u64;
        let line = format!(
            "{base:x}-{:x} rw-{shared} 00000000 {major:02x}:{minor:02x} {}      /memfd:ram (deleted)\n",
            base + bytes,
            stat.st_ino
        );
        fs::write(self.maps_file(), line).unwrap();
    }

    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client::from(stream)
    }

    /// A client that agreed on minor version 0, as QEMU does.
    pub fn agreed(&self) -> Client {
        let mut client = self.connect();
        client.version(0);
        client
    }

    pub fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < PATIENCE, "{what} did not come about");
            std::thread::yield_now();
        }
    }

    /// Waits until nobody is connected and all is undone.
    pub fn wait_idle(&self) {
        self.wait_for("an idle endpoint", |rig| {
            rig.shared.state() == SessionState::Waiting
        });
    }

    pub fn last_error(&self) -> String {
        self.wait_for("an error", |rig| rig.shared.last_error().is_some());
        self.shared.last_error().unwrap()
    }

    pub fn stop(&mut self) -> Result<(), EndpointError> {
        rustix::io::write(&*self.stop, &1u64.to_ne_bytes()).unwrap();
        self.server.take().unwrap().join().unwrap()
    }

    /// The server's own end, without a stop.
    pub fn ended(&mut self) -> Result<(), EndpointError> {
        self.server.take().unwrap().join().unwrap()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.server.is_some() && !std::thread::panicking() {
            self.stop().unwrap();
            assert!(!self.socket.exists(), "the socket stayed behind");
            assert_eq!(self.shared.state(), SessionState::Closed);
        }
    }
}

#[derive(Debug)]
pub struct Answer {
    pub errno: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Answer {
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.body[at..at + 4].try_into().unwrap())
    }

    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.body[at..at + 8].try_into().unwrap())
    }
}

pub struct Client {
    pub stream: UnixStream,
    next: u16,
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn dma_map(flags: u32, offset: u64, iova: u64, len: u64) -> Vec<u8> {
    let mut body = words(&[32, flags]);
    body.extend(
        [offset, iova, len]
            .iter()
            .flat_map(|long| long.to_le_bytes()),
    );
    body
}

pub fn dma_unmap(flags: u32, iova: u64, len: u64) -> Vec<u8> {
    let mut body = words(&[24, flags]);
    body.extend([iova, len].iter().flat_map(|long| long.to_le_bytes()));
    body
}

pub fn access(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(words(&[region, count]));
    body.extend(data);
    body
}

impl From<UnixStream> for Client {
    fn from(stream: UnixStream) -> Self {
        Self { stream, next: 0 }
    }
}

impl Client {
    /// Sends a header that says what the caller wants, and bytes behind it; returns its id.
    pub fn send_raw(
        &mut self,
        command: u16,
        size: u32,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> u16 {
        self.next += 1;
        let mut bytes = self.next.to_le_bytes().to_vec();
        bytes.extend(command.to_le_bytes());
        bytes.extend(words(&[size, flags, 0]));
        bytes.extend(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let mut sent = 0;
        while sent < bytes.len() {
            // The server may have ended the session before it took all of it.
            let iov = [IoSlice::new(&bytes[sent..])];
            match sendmsg(&self.stream, &iov, &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(_) => break,
            }
            control.clear();
        }
        self.next
    }

    pub fn send(&mut self, command: Command, body: &[u8], fds: &[BorrowedFd<'_>]) -> u16 {
        self.send_raw(command as u16, (16 + body.len()) as u32, 0, body, fds)
    }

    /// Sends and takes the answer, which must be to this request.
    pub fn ask(&mut self, command: Command, body: &[u8], fds: &[BorrowedFd<'_>]) -> Answer {
        let id = self.send(command, body, fds);
        let (got, answer) = self.answer().expect("an answer");
        assert_eq!(got, id);
        answer
    }

    /// The next answer and its id, or `None` at the end of the stream.
    pub fn answer(&mut self) -> Option<(u16, Answer)> {
        let mut header = [0; 16];
        let mut fds = Vec::new();
        let mut got = 0;
        while got < header.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut room = [IoSliceMut::new(&mut header[got..])];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.stream, &mut room, &mut control, flags) {
                Ok(message) if message.bytes == 0 => return None,
                Ok(message) => got += message.bytes,
                Err(rustix::io::Errno::CONNRESET) => return None,
                Err(errno) => panic!("no answer: {errno}"),
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; word(4) as usize - 16];
        self.stream.read_exact(&mut body).unwrap();
        assert_eq!(word(8) & 0xf, 1, "no reply");
        assert_eq!(
            word(8) & 0x20 != 0,
            word(12) != 0,
            "errno without error flag or the reverse"
        );
        let id = u16::from_le_bytes([header[0], header[1]]);
        let errno = word(12);
        Some((id, Answer { errno, body, fds }))
    }

    pub fn version(&mut self, minor: u32) -> Answer {
        let mut body = words(&[minor << 16]);
        body.extend(b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"pgsizes\":4096,\"max_dma_maps\":65535}}\0");
        self.ask(Command::Version, &body, &[])
    }

    pub fn map(&mut self, offset: u64, iova: u64, len: u64, fd: Option<&OwnedFd>) -> Answer {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        self.ask(Command::DmaMap, &dma_map(3, offset, iova, len), &fds)
    }

    pub fn unmap(&mut self, iova: u64, len: u64) -> Answer {
        self.ask(Command::DmaUnmap, &dma_unmap(0, iova, len), &[])
    }

    pub fn read(&mut self, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let answer = self.ask(
            Command::RegionRead,
            &access(region, offset, count, &[]),
            &[],
        );
        assert_eq!(
            (answer.errno, answer.u64(0), answer.u32(8), answer.u32(12)),
            (0, offset, region, count)
        );
        answer.body[16..].to_vec()
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let body = access(region, offset, data.len() as u32, data);
        let answer = self.ask(Command::RegionWrite, &body, &[]);
        assert_eq!((answer.errno, answer.body.len()), (0, 16));
    }

    /// COMMAND with memory decoding and bus mastering.
    pub fn enable_bus_master(&mut self) {
        self.write(7, 4, &[6, 0]);
    }

    pub fn set_irqs(
        &mut self,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Answer {
        let mut body = words(&[20 + data.len() as u32, flags, index, start, count]);
        body.extend(data);
        self.ask(Command::DeviceSetIrqs, &body, fds)
    }

    /// Whether the server ends the session, after at most one error for an answer.
    pub fn is_ended(&mut self) -> bool {
        match self.answer() {
            None => true,
            Some((_, answer)) => {
                assert_ne!(answer.errno, 0, "an answer where the session should end");
                self.answer().is_none()
            }
        }
    }
}
