//! A vfio-user client without a VMM: what a good one says, and what a bad one does.
//!
//! Each case ends in one JSON line: the process, and what the server did. A server that goes on
//! where it must end the session is an error.
// Guest memory has to be mapped, shared or private, for the server to see.
#![allow(unsafe_code)]

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::ffi::c_void;
use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// vfio-user specification 0.9.1: commands.
const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const DMA_UNMAP: u16 = 3;
pub(crate) const DEVICE_GET_INFO: u16 = 4;
pub(crate) const SET_IRQS: u16 = 8;
pub(crate) const REGION_READ: u16 = 9;
pub(crate) const REGION_WRITE: u16 = 10;
pub(crate) const DEVICE_RESET: u16 = 13;
pub(crate) const HEADER_BYTES: usize = 16;
/// Above the largest message that any server takes.
const OVERSIZED: u32 = 1 << 30;
const MESSAGE_BYTES_MAX: usize = 1 << 20;
const READ_WRITE: u32 = 3;
pub(crate) const BAR0: u32 = 0;
const CONFIG: u32 = 7;
/// PCI 3.0, 6.2.2: memory space and bus mastering.
const COMMAND_OFFSET: u64 = 4;
const COMMAND_ENABLE: u16 = 6;
/// NVMe Base Specification 2.0, 3.1.3: the version's property.
const VS_OFFSET: u64 = 8;
pub(crate) const RAM_BYTES: u64 = 2 << 20;
/// More than the lab's windows hold; none of it is ever touched.
const RAM_TOO_LARGE: u64 = 4 << 30;
/// Where x86 devices write to raise an interrupt: no IOMMU maps it.
const MSI_ADDRESS: u64 = 0xfee0_0000;
/// Regions and offsets that no NVMe function has: behind its BAR 0, and behind all BARs.
const BEYOND: [(u32, u64); 6] = [
    (BAR0, 1 << 20),
    (BAR0, 1 << 32),
    (BAR0, u64::MAX - 3),
    (2, 0),
    (8, 0),
    (99, 0),
];
/// Longer than any answer takes: a reset of the function is among them.
const PATIENCE: Duration = Duration::from_secs(20);

/// Memory as a VMM has it: a memfd, mapped.
pub(crate) struct Memory {
    /// The memfd.
    pub(crate) fd: OwnedFd,
    base: *mut c_void,
    bytes: u64,
}

impl Memory {
    pub(crate) fn new(bytes: u64, sharing: MapFlags) -> Result<Self> {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, bytes)?;
        let base = map(&fd, bytes, sharing)?;
        Ok(Memory { fd, base, bytes })
    }

    /// The same of huge pages, all of them taken.
    pub(crate) fn huge(mib: u64) -> Result<Self> {
        let bytes = mib << 20;
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)?;
        let taken = fallocate(&fd, FallocateFlags::empty(), 0, bytes);
        taken.with_context(|| format!("no {mib} MiB of huge pages are free"))?;
        let base = map(&fd, bytes, MapFlags::SHARED)?;
        Ok(Memory { fd, base, bytes })
    }

    /// Writes this all over it: a file of huge pages is written by nothing but a mapping.
    pub(crate) fn fill(&mut self, piece: &[u8]) {
        let (base, bytes) = (self.base.cast::<u8>(), self.bytes as usize);
        for at in (0..bytes).step_by(piece.len()) {
            let count = piece.len().min(bytes - at);
            // SAFETY: within the mapping, which this value has to itself and which is as long as
            // its file; no reference leads into it.
            unsafe { base.add(at).copy_from_nonoverlapping(piece.as_ptr(), count) };
        }
    }

    /// Maps it anew, private: what the device writes is seen by nobody from now on.
    fn make_private(&mut self) -> Result<()> {
        // SAFETY: the mapping is this value's own, and nobody has a reference into it.
        unsafe { munmap(self.base, self.bytes as usize) }?;
        self.base = map(&self.fd, self.bytes, MapFlags::PRIVATE)?;
        Ok(())
    }
}

pub(crate) fn map(fd: &OwnedFd, bytes: u64, sharing: MapFlags) -> Result<*mut c_void> {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, sharing);
    // SAFETY: the kernel chooses the address, where nothing else is.
    let base = unsafe {
        mmap(
            std::ptr::null_mut(),
            bytes as usize,
            prot,
            flags | MapFlags::NORESERVE,
            fd,
            0,
        )
    };
    base.context("cannot map a memfd")
}

/// A connection to a server.
pub(crate) struct Client {
    stream: UnixStream,
    id: u16,
}

impl Client {
    pub(crate) fn connect(socket: &str) -> Result<Self> {
        let stream = UnixStream::connect(socket);
        let stream = stream.with_context(|| format!("cannot connect to {socket}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Client { stream, id: 0 })
    }

    /// A header whose size need not be that of the message.
    fn send_sized(
        &mut self,
        command: u16,
        size: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.id = self.id.wrapping_add(1);
        let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
        message.extend(self.id.to_le_bytes());
        message.extend(command.to_le_bytes());
        message.extend(size.to_le_bytes());
        message.extend([0; 8]);
        message.extend(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ensure!(
                ancillary.push(SendAncillaryMessage::ScmRights(fds)),
                "too many fds"
            );
        }
        let slices = [IoSlice::new(&message)];
        let sent = sendmsg(&self.stream, &slices, &mut ancillary, SendFlags::NOSIGNAL)?;
        ensure!(sent == message.len(), "the socket took {sent} bytes only");
        Ok(())
    }

    pub(crate) fn send(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_sized(command, (HEADER_BYTES + body.len()) as u32, body, fds)
    }

    /// The body of a reply that must be there and tell no error.
    pub(crate) fn ask(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>> {
        self.send(command, body, fds)?;
        self.answer(command)
    }

    /// The same of a reply to what was sent before.
    pub(crate) fn answer(&mut self, command: u16) -> Result<Vec<u8>> {
        let mut header = [0; HEADER_BYTES];
        self.stream
            .read_exact(&mut header)
            .with_context(|| format!("no answer to command {command}"))?;
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
        ensure!(
            word(12) == 0,
            "command {command} is answered with errno {}",
            word(12)
        );
        let size = word(4) as usize;
        ensure!(
            (HEADER_BYTES..=MESSAGE_BYTES_MAX).contains(&size),
            "a reply of {size} bytes"
        );
        let mut body = vec![0; size - HEADER_BYTES];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }

    pub(crate) fn agree(&mut self) -> Result<()> {
        let mut body = [0; 4].to_vec();
        body.extend(b"{\"capabilities\":{\"max_msg_fds\":8}}\0");
        self.ask(VERSION, &body, &[]).map(drop)
    }

    pub(crate) fn enable(&mut self, ask: bool) -> Result<()> {
        let body = access(
            CONFIG,
            COMMAND_OFFSET,
            2,
            Some(&COMMAND_ENABLE.to_le_bytes()),
        );
        match ask {
            true => self.ask(REGION_WRITE, &body, &[]).map(drop),
            false => self.send(REGION_WRITE, &body, &[]),
        }
    }

    /// What the server does not take within this time, it does not take.
    pub(crate) fn send_within(&self, patience: Duration) -> Result<()> {
        Ok(self.stream.set_write_timeout(Some(patience))?)
    }

    /// The server must end the session, whatever it answers before.
    pub(crate) fn wait_end(&mut self) -> Result<()> {
        let mut answer = Vec::new();
        match (&self.stream)
            .take(MESSAGE_BYTES_MAX as u64)
            .read_to_end(&mut answer)
        {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            Err(error) => bail!("the session goes on after {} bytes: {error}", answer.len()),
        }
    }
}

pub(crate) fn device_info() -> Vec<u8> {
    [16, 0, 0, 0].map(u32::to_le_bytes).concat()
}

pub(crate) fn dma_map(address: u64, bytes: u64) -> Vec<u8> {
    dma_map_of(0, address, bytes)
}

/// The same of a memory fd's bytes from `offset` on.
pub(crate) fn dma_map_of(offset: u64, address: u64, bytes: u64) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend([32, READ_WRITE].map(u32::to_le_bytes).concat());
    body.extend([offset, address, bytes].map(u64::to_le_bytes).concat());
    body
}

pub(crate) fn dma_unmap(address: u64, bytes: u64) -> Vec<u8> {
    let mut body = [24, 0].map(u32::to_le_bytes).concat();
    body.extend([address, bytes].map(u64::to_le_bytes).concat());
    body
}

pub(crate) fn access(region: u32, offset: u64, count: u32, data: Option<&[u8]>) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend([region, count].map(u32::to_le_bytes).concat());
    body.extend(data.unwrap_or_default());
    body
}

const MSIX: u32 = 2;

/// One eventfd as the trigger of the first MSI-X vector.
pub(crate) fn trigger() -> Vec<u8> {
    const EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;
    [20, EVENTFD_TRIGGER, MSIX, 0, 1]
        .map(u32::to_le_bytes)
        .concat()
}

/// No trigger for any MSI-X vector.
pub(crate) fn no_triggers() -> Vec<u8> {
    const NONE_TRIGGER: u32 = 1 | 1 << 5;
    [20, NONE_TRIGGER, MSIX, 0, 0]
        .map(u32::to_le_bytes)
        .concat()
}

/// Runs one case against the server at `socket`.
pub fn run(socket: &str, case: &str) -> Result<()> {
    let mut client = Client::connect(socket)?;
    let report = match case {
        "good" => good(&mut client)?,
        "beyond" => beyond(socket, client)?,
        _ => {
            bad(&mut client, case)?;
            client.wait_end()?;
            serde_json::json!({"pid": std::process::id(), "ended": true})
        }
    };
    println!("{report}");
    Ok(())
}

/// Accesses of BARs and regions that the function does not have, each by a session of its own, as
/// some end it. None may give anything but ones.
fn beyond(socket: &str, first: Client) -> Result<serde_json::Value> {
    drop(first);
    let (mut refused, mut ones, mut ended) = (0, 0, 0);
    for (region, offset) in BEYOND {
        for write in [false, true] {
            let mut client = Client::connect(socket)?;
            client.agree()?;
            let (command, data) = match write {
                true => (REGION_WRITE, Some(&[0x5a; 4][..])),
                false => (REGION_READ, None),
            };
            client.send(command, &access(region, offset, 4, data), &[])?;
            let mut header = [0; HEADER_BYTES];
            if client.stream.read_exact(&mut header).is_err() {
                ended += 1;
                continue;
            }
            let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
            let mut body = vec![0; (word(4) as usize).saturating_sub(HEADER_BYTES)];
            client.stream.read_exact(&mut body)?;
            if word(12) != 0 {
                refused += 1;
                continue;
            }
            let data = body.get(HEADER_BYTES..).unwrap_or_default();
            ensure!(
                data.iter().all(|byte| *byte == 0xff),
                "region {region} at {offset:#x} reads {data:x?}"
            );
            ones += 1;
        }
    }
    Ok(serde_json::json!({
        "pid": std::process::id(), "refused": refused, "ones": ones, "ended": ended,
    }))
}

/// As far as a VMM goes before its guest runs a driver.
fn good(client: &mut Client) -> Result<serde_json::Value> {
    let ram = Memory::new(RAM_BYTES, MapFlags::SHARED)?;
    client.agree()?;
    let info = client.ask(DEVICE_GET_INFO, &device_info(), &[])?;
    client.ask(DMA_MAP, &dma_map(0, ram.bytes), &[ram.fd.as_fd()])?;
    client.enable(true)?;
    let answer = client.ask(REGION_READ, &access(BAR0, VS_OFFSET, 4, None), &[])?;
    let value = answer.get(HEADER_BYTES..).context("a read without data")?;
    Ok(serde_json::json!({
        "pid": std::process::id(),
        "info_bytes": info.len(),
        "vs": u32::from_le_bytes(value.try_into().context("not 4 bytes")?),
    }))
}

fn bad(client: &mut Client, case: &str) -> Result<()> {
    match case {
        "version" => return client.send(VERSION, b"\0\0\0\0{\"capabilities\": 7}\0", &[]),
        "early" => return client.send(DEVICE_GET_INFO, &device_info(), &[]),
        _ => client.agree()?,
    }
    let mut ram = Memory::new(RAM_BYTES, MapFlags::SHARED)?;
    match case {
        "oversized" => return client.send_sized(REGION_WRITE, OVERSIZED, &[0; 64], &[]),
        "became-private" => {
            client.ask(DMA_MAP, &dma_map(0, RAM_BYTES), &[ram.fd.as_fd()])?;
            ram.make_private()?;
            return client.enable(false);
        }
        "window" => {
            let large = Memory::new(RAM_TOO_LARGE, MapFlags::SHARED)?;
            let at = 1 << 32;
            client.ask(DMA_MAP, &dma_map(at, large.bytes), &[large.fd.as_fd()])?;
            return client.enable(false);
        }
        _ => {}
    }
    let path = format!("/proc/self/fd/{}", ram.fd.as_raw_fd());
    let (fd, address, bytes) = match case {
        "private" => {
            ram.make_private()?;
            (ram.fd.try_clone()?, 0, RAM_BYTES)
        }
        "file" => (File::open("/proc/self/maps")?.into(), 0, 4096),
        "short" => (ram.fd.try_clone()?, 0, 2 * RAM_BYTES),
        "read-only" => (File::open(path)?.into(), 0, RAM_BYTES),
        "reserved" => (ram.fd.try_clone()?, MSI_ADDRESS, 4096),
        _ => bail!("no case {case}"),
    };
    client.send(DMA_MAP, &dma_map(address, bytes), &[fd.as_fd()])
}
