//! A fake vfio-user client over a socket pair, driven in the thread of the test.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ntb_model::half::Side;
use ntb_model::model::Model;
use ntb_model::options::DeviceOptions;
use ntb_model::wire::{self, HEADER_BYTES, Header};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Where the fake hosts put their BARs.
pub const BAR2: u64 = 0x80_0000_0000;
/// DMA address of the fake hosts' memory.
pub const RAM: u64 = 0x10_0000;
/// Bytes of it.
pub const RAM_BYTES: u64 = 1 << 20;

/// The client of one half.
pub struct Client {
    pub side: Side,
    socket: UnixStream,
    next_id: u16,
}

/// An answer, or a request of the model itself.
#[derive(Debug)]
pub struct Received {
    pub header: Header,
    pub body: Vec<u8>,
}

impl Client {
    /// Connects without agreeing on a version.
    pub fn connect(model: &mut Model, side: Side) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        theirs.set_nonblocking(true).expect("non-blocking");
        ours.set_read_timeout(Some(Duration::from_secs(5)))
            .expect("timeout");
        model.connect(side, theirs);
        Self {
            side,
            socket: ours,
            next_id: 0,
        }
    }

    /// Connects and agrees on a version.
    pub fn open(model: &mut Model, side: Side) -> Self {
        let mut client = Self::connect(model, side);
        let reply = client.call(model, wire::VERSION, &version_body(), &[]);
        assert_eq!(reply.header.flags, wire::FLAG_REPLY);
        client
    }

    /// Sends raw bytes with descriptors and lets the model work.
    pub fn send_raw(&mut self, model: &mut Model, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        );
        assert_eq!(sent, Ok(bytes.len()));
        model.service(self.side, Instant::now());
    }

    /// Sends a request and lets the model work.
    pub fn send(
        &mut self,
        model: &mut Model,
        (command, flags): (u16, u32),
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> u16 {
        self.next_id += 1;
        let header = Header::request(self.next_id, command, flags, body.len());
        self.send_raw(model, &[&header.encode()[..], body].concat(), fds);
        self.next_id
    }

    /// Receives one message.
    pub fn receive(&mut self) -> Received {
        let mut header = [0; HEADER_BYTES];
        self.socket.read_exact(&mut header).expect("a message");
        let header = Header::parse(&header).expect("a header");
        let mut body = vec![0; header.size as usize - HEADER_BYTES];
        self.socket.read_exact(&mut body).expect("its body");
        Received { header, body }
    }

    /// True when the model has closed the connection and nothing more is there to read.
    pub fn is_closed(&mut self) -> bool {
        self.socket.set_nonblocking(true).expect("non-blocking");
        let result = self.socket.read(&mut [0; 1]);
        self.socket.set_nonblocking(false).expect("blocking");
        match result {
            Ok(count) => count == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    /// True when nothing waits to be read.
    pub fn is_silent(&mut self) -> bool {
        self.socket.set_nonblocking(true).expect("non-blocking");
        let result = self.socket.read(&mut [0; 1]);
        self.socket.set_nonblocking(false).expect("blocking");
        result.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }

    /// Sends a request and receives its answer.
    pub fn call(
        &mut self,
        model: &mut Model,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Received {
        let id = self.send(model, (command, 0), body, fds);
        let reply = self.receive();
        assert_eq!((reply.header.id, reply.header.command), (id, command));
        reply
    }

    /// Answers a DMA message of the model.
    pub fn answer(&mut self, model: &mut Model, request: &Received, data: &[u8]) {
        let prefix = &request.body[..16];
        let header = request.header.reply(16 + data.len());
        self.socket
            .write_all(&[&header.encode()[..], prefix, data].concat())
            .expect("sent");
        model.service(self.side, Instant::now());
    }

    /// Refuses a DMA message of the model.
    pub fn refuse(&mut self, model: &mut Model, request: &Received, errno: i32) {
        self.socket
            .write_all(&request.header.refusal(errno).encode())
            .expect("sent");
        model.service(self.side, Instant::now());
    }

    /// Asks for a region read without waiting for the answer.
    pub fn start_read(&mut self, model: &mut Model, region: u32, offset: u64, count: u32) -> u16 {
        let body = region_body(region, offset, count);
        self.send(model, (wire::REGION_READ, 0), &body, &[])
    }

    /// Reads a region.
    pub fn read(&mut self, model: &mut Model, region: u32, offset: u64, count: u32) -> Vec<u8> {
        let reply = self.call(
            model,
            wire::REGION_READ,
            &region_body(region, offset, count),
            &[],
        );
        assert_eq!(
            reply.header.flags,
            wire::FLAG_REPLY,
            "read of {region} at {offset:#x}"
        );
        assert_eq!(reply.body[..16], region_body(region, offset, count));
        reply.body[16..].to_vec()
    }

    /// Reads a register as a number.
    pub fn register(&mut self, model: &mut Model, offset: u64, count: u32) -> u64 {
        let bytes = self.read(model, 0, offset, count);
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// Writes a region as QEMU does: without an answer.
    pub fn write(&mut self, model: &mut Model, region: u32, offset: u64, data: &[u8]) {
        let body = [&region_body(region, offset, data.len() as u32)[..], data].concat();
        self.send(model, (wire::REGION_WRITE, wire::FLAG_NO_REPLY), &body, &[]);
    }

    /// Maps memory for DMA.
    pub fn map(
        &mut self,
        model: &mut Model,
        (iova, size): (u64, u64),
        fd: Option<&OwnedFd>,
    ) -> Header {
        let fds: Vec<BorrowedFd<'_>> = fd.iter().map(|fd| fd.as_fd()).collect();
        self.call(model, wire::DMA_MAP, &map_body(3, 0, iova, size), &fds)
            .header
    }

    /// Gives a run of vectors their triggers.
    pub fn set_irqs(&mut self, model: &mut Model, start: u32, triggers: &[OwnedFd]) {
        let fds: Vec<BorrowedFd<'_>> = triggers.iter().map(AsFd::as_fd).collect();
        let body = irqs_body(0x24, 2, start, fds.len() as u32);
        let reply = self.call(model, wire::DEVICE_SET_IRQS, &body, &fds);
        assert_eq!(reply.header.flags, wire::FLAG_REPLY);
    }

    /// Does what a driver does: BARs, COMMAND, triggers, memory, the window open, the link wanted.
    pub fn bring_up(&mut self, model: &mut Model) -> Host {
        let host = Host::new();
        self.write(model, 7, 0x18, &(BAR2 | 0xC).to_le_bytes());
        self.write(model, 7, 0x04, &6u16.to_le_bytes());
        for start in [0usize, 16, 32] {
            let end = (start + 16).min(host.triggers.len());
            self.set_irqs(model, start as u32, &host.triggers[start..end]);
        }
        self.map(model, (RAM, RAM_BYTES), Some(&host.ram));
        self.write(model, 0, 0x10, &RAM.to_le_bytes());
        self.write(model, 0, 0x18, &(BAR2 + RAM_BYTES).to_le_bytes());
        self.enable_link(model);
        host
    }

    /// Asks for the link.
    pub fn enable_link(&mut self, model: &mut Model) {
        self.write(model, 0, 0xB050, &0u16.to_le_bytes());
        self.write(model, 0, 0xB0D4, &8u32.to_le_bytes());
    }
}

/// What a fake host has.
pub struct Host {
    pub ram: OwnedFd,
    pub triggers: Vec<OwnedFd>,
}

impl Host {
    fn new() -> Self {
        let ram = memfd_create("ram", MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&ram, RAM_BYTES).expect("size");
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let triggers = (0..33)
            .map(|_| eventfd(0, flags).expect("eventfd"))
            .collect();
        Self { ram, triggers }
    }

    /// What lies in the memory at a DMA address.
    pub fn peek(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        rustix::io::pread(&self.ram, &mut data, address - RAM).expect("read");
        data
    }

    /// The vectors that fired since the last call, with how often.
    pub fn fired(&self) -> Vec<(usize, u64)> {
        let count = |fd: &OwnedFd| {
            let mut bytes = [0; 8];
            rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
        };
        let all = self.triggers.iter().map(count).enumerate();
        all.filter(|(_, count)| *count > 0).collect()
    }
}

/// Two clients with a link between them; the interrupts of the link coming up are already taken.
pub fn linked(options: &DeviceOptions) -> (Model, Client, Host, Client, Host) {
    let mut model = Model::new(options);
    let mut a = Client::open(&mut model, Side::A);
    let mut b = Client::open(&mut model, Side::B);
    let host_a = a.bring_up(&mut model);
    let host_b = b.bring_up(&mut model);
    assert!(model.link().is_up());
    for (client, host) in [(&mut a, &host_a), (&mut b, &host_b)] {
        client.write(&mut model, 0, 0x40, &(1u64 << 32).to_le_bytes());
        host.fired();
    }
    (model, a, host_a, b, host_b)
}

pub fn version_body() -> Vec<u8> {
    b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":8}}\0".to_vec()
}

pub fn region_body(region: u32, offset: u64, count: u32) -> [u8; 16] {
    let mut body = [0; 16];
    body[..8].copy_from_slice(&offset.to_le_bytes());
    body[8..12].copy_from_slice(&region.to_le_bytes());
    body[12..].copy_from_slice(&count.to_le_bytes());
    body
}

pub fn map_body(flags: u32, offset: u64, iova: u64, size: u64) -> Vec<u8> {
    let words = [32u32, flags].map(u32::to_le_bytes).concat();
    [words, [offset, iova, size].map(u64::to_le_bytes).concat()].concat()
}

pub fn irqs_body(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    [20, flags, index, start, count]
        .map(u32::to_le_bytes)
        .concat()
}
