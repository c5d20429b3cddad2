//! A vfio-user client: the function behind a server's socket, for a VMM in a process of its own.
//!
//! The `vfio_user` crate's client, which cloud-hypervisor embeds, does not look at the errors of
//! replies, so a refused reset or SET_IRQS would look done; tests use it beside this one.

mod connection;

pub use connection::ClientError;

use super::version::MSG_FDS_MAX;
use super::wire::{self, Command, DATA_XFER_MAX};
use connection::{Connection, Failed};
use std::collections::BTreeMap;
use std::mem::size_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_shim::model::{
    AddressSpace, Aperture, DmaMap, Function, FunctionError, FunctionIds, FunctionInfo, IrqIndex,
    IrqInfo, MapError, Memory, RegionIndex, RegionInfo, Span,
};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const PAGE_BYTES: u64 = 4096;
/// The header of config space, as far as the ids are in it.
const IDS_BYTES: usize = 0x30;

/// A connected client. Every access is a message; when it is dropped the server undoes the guest
/// session.
pub struct Client {
    info: FunctionInfo,
    maps_max: u32,
    connection: Mutex<Connection>,
    /// What is mapped: start and length.
    maps: Mutex<BTreeMap<u64, u64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn argsz<T>() -> U32 {
    (size_of::<T>() as u32).into()
}

/// The structure that a reply begins with.
fn structure<T: FromBytes + Immutable + KnownLayout + Unaligned>(
    reply: &[u8],
) -> Result<&T, ClientError> {
    let found = T::ref_from_prefix(reply).map_err(|_| {
        let why = "a reply is shorter than its structure";
        ClientError::Gone(why.to_owned())
    });
    found.map(|(structure, _)| structure)
}

impl Client {
    /// Connects to a server's socket and asks what the function is.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let (mut connection, maps_max) = Connection::open(path)?;
        let info = info(&mut connection)?;
        Ok(Self {
            info,
            maps_max,
            connection: Mutex::new(connection),
            maps: Mutex::default(),
        })
    }

    fn call(
        &self,
        command: Command,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, Failed> {
        lock(&self.connection).call(command, body, fds)
    }

    fn check_region(
        &self,
        region: RegionIndex,
        offset: u64,
        len: usize,
    ) -> Result<(), FunctionError> {
        let len = (len as u64).min(u64::MAX - offset);
        let span = Span::new(offset, len);
        let inside = self.info.region(region).zip(span);
        match inside.filter(|(info, span)| span.end() <= info.size) {
            Some(_) => Ok(()),
            None => Err(FunctionError::OutOfRange {
                region: region.0,
                span: span.unwrap_or(Span::EMPTY),
            }),
        }
    }

    fn check_vectors(
        &self,
        index: IrqIndex,
        start: u32,
        count: usize,
    ) -> Result<(), FunctionError> {
        let there = self.info.irqs[index as usize].count;
        let end = u64::from(start) + count as u64;
        if end <= u64::from(there) {
            return Ok(());
        }
        Err(FunctionError::NoVector {
            index,
            start,
            end,
            count: there,
        })
    }

    fn irqs(
        &self,
        index: IrqIndex,
        (start, count): (u32, u32),
        flags: u32,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FunctionError> {
        let set = wire::IrqSet {
            argsz: argsz::<wire::IrqSet>(),
            flags: flags.into(),
            index: (index as u32).into(),
            start: start.into(),
            count: count.into(),
        };
        let done = self.call(Command::DeviceSetIrqs, &[set.as_bytes()], fds);
        done.map(drop).map_err(refused("set the interrupts"))
    }

    /// One kind of thing done to vectors that exist.
    fn act(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        action: u32,
    ) -> Result<(), FunctionError> {
        self.check_vectors(index, start, count as usize)?;
        // A count of 0 would take all triggers away.
        if count == 0 {
            return Ok(());
        }
        self.irqs(index, (start, count), VFIO_IRQ_SET_DATA_NONE | action, &[])
    }

    fn map_one(&self, map: &DmaMap<'_>) -> Result<(), MapError> {
        let span = map.span;
        let Memory::Fd(fd, offset) = &map.memory else {
            return Err(MapError::NoMapping(span));
        };
        let request = wire::DmaMap {
            argsz: argsz::<wire::DmaMap>(),
            flags: (u32::from(map.access.read) | u32::from(map.access.write) << 1).into(),
            offset: (*offset).into(),
            iova: span.start().into(),
            len: span.len().into(),
        };
        let done = self.call(Command::DmaMap, &[request.as_bytes()], &[*fd]);
        done.map_err(map_refused("map", span))?;
        lock(&self.maps).insert(span.start(), span.len());
        Ok(())
    }

    fn unmap_one(&self, span: Span) -> Result<(), MapError> {
        let request = wire::DmaUnmap {
            argsz: argsz::<wire::DmaUnmap>(),
            flags: 0.into(),
            iova: span.start().into(),
            len: span.len().into(),
        };
        let done = self.call(Command::DmaUnmap, &[request.as_bytes()], &[]);
        done.map_err(map_refused("unmap", span))?;
        lock(&self.maps).remove(&span.start());
        Ok(())
    }

    /// The maps that touch `span`.
    fn touched(&self, span: Span) -> Vec<Span> {
        let maps = lock(&self.maps);
        let below = maps.range(..span.end()).rev();
        let spans = below.filter_map(|(start, len)| Span::new(*start, *len));
        spans.take_while(|held| held.overlaps(span)).collect()
    }
}

fn refused(act: &'static str) -> impl Fn(Failed) -> FunctionError {
    move |failed| match failed {
        Failed::Gone(why) => FunctionError::Gone(why),
        Failed::Refused(errno) => FunctionError::Kernel {
            act,
            source: errno.into(),
        },
    }
}

fn map_refused(act: &'static str, span: Span) -> impl Fn(Failed) -> MapError {
    move |failed| match failed {
        Failed::Gone(why) => MapError::Gone(why),
        Failed::Refused(errno) => MapError::Kernel {
            act,
            span,
            source: errno.into(),
        },
    }
}

/// Asks for all that is fixed.
fn info(connection: &mut Connection) -> Result<FunctionInfo, ClientError> {
    let asked = wire::DeviceInfo {
        argsz: argsz::<wire::DeviceInfo>(),
        flags: 0.into(),
        regions: 0.into(),
        irqs: 0.into(),
    };
    let reply = connection.ask(Command::DeviceGetInfo, &[asked.as_bytes()], &[])?;
    let device = structure::<wire::DeviceInfo>(&reply)?;
    let mut info = FunctionInfo {
        resettable: device.flags.get() & VFIO_DEVICE_FLAGS_RESET != 0,
        ..FunctionInfo::default()
    };
    let regions = device.regions.get().min(RegionIndex::COUNT);
    for (index, region) in (0..regions).zip(&mut info.regions) {
        *region = region_info(connection, index)?;
    }
    let irqs = (device.irqs.get() as usize).min(IrqIndex::COUNT);
    for (index, irq) in IrqIndex::ALL.into_iter().take(irqs).zip(&mut info.irqs) {
        *irq = irq_info(connection, index)?;
    }
    info.ids = ids(connection)?;
    Ok(info)
}

/// Room for the structure alone is told, so no fd comes along: every access is a message.
fn region_info(connection: &mut Connection, index: u32) -> Result<RegionInfo, ClientError> {
    let asked = wire::RegionInfo {
        argsz: argsz::<wire::RegionInfo>(),
        index: index.into(),
        ..wire::RegionInfo::default()
    };
    let reply = connection.ask(Command::DeviceGetRegionInfo, &[asked.as_bytes()], &[])?;
    let told = structure::<wire::RegionInfo>(&reply)?;
    let flags = told.flags.get();
    Ok(RegionInfo {
        size: told.size.get(),
        readable: flags & VFIO_REGION_INFO_FLAG_READ != 0,
        writable: flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        areas: Vec::new(),
    })
}

fn irq_info(connection: &mut Connection, index: IrqIndex) -> Result<IrqInfo, ClientError> {
    let asked = wire::IrqInfo {
        argsz: argsz::<wire::IrqInfo>(),
        flags: 0.into(),
        index: (index as u32).into(),
        count: 0.into(),
    };
    let reply = connection.ask(Command::DeviceGetIrqInfo, &[asked.as_bytes()], &[])?;
    let count = structure::<wire::IrqInfo>(&reply)?.count.get();
    Ok(IrqInfo { count })
}

fn ids(connection: &mut Connection) -> Result<FunctionIds, ClientError> {
    let asked = access(RegionIndex::CONFIG, 0, IDS_BYTES);
    let reply = connection.ask(Command::RegionRead, &[asked.as_bytes()], &[])?;
    let mut config = [0; IDS_BYTES];
    copy_data(&reply, &mut config).map_err(|failed| match failed {
        Failed::Gone(why) => ClientError::Gone(why),
        Failed::Refused(errno) => ClientError::Gone(errno.to_string()),
    })?;
    let word = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    Ok(FunctionIds {
        vendor: word(0),
        device: word(2),
        subsystem_vendor: word(0x2c),
        subsystem_device: word(0x2e),
        class: u32::from_le_bytes([config[9], config[0xa], config[0xb], 0]),
        revision: config[8],
    })
}

fn access(region: RegionIndex, offset: u64, len: usize) -> wire::RegionAccess {
    wire::RegionAccess {
        offset: offset.into(),
        region: region.0.into(),
        count: (len as u32).into(),
    }
}

/// The data behind the structure of a read's reply.
fn copy_data(reply: &[u8], data: &mut [u8]) -> Result<(), Failed> {
    match reply.get(size_of::<wire::RegionAccess>()..) {
        Some(read) if read.len() == data.len() => data.copy_from_slice(read),
        _ => {
            let why = "a read's reply has another length than was asked for";
            return Err(Failed::Gone(why.to_owned()));
        }
    }
    Ok(())
}

impl Function for Client {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        self.check_region(region, offset, data.len())?;
        for (at, part) in (offset..)
            .step_by(DATA_XFER_MAX as usize)
            .zip(data.chunks_mut(DATA_XFER_MAX as usize))
        {
            let asked = access(region, at, part.len());
            let read = self.call(Command::RegionRead, &[asked.as_bytes()], &[]);
            match read.and_then(|reply| copy_data(&reply, part)) {
                Ok(()) => {}
                Err(Failed::Gone(_)) => part.fill(0xff),
                Err(refusal) => return Err(refused("read")(refusal)),
            }
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        self.check_region(region, offset, data.len())?;
        for (at, part) in (offset..)
            .step_by(DATA_XFER_MAX as usize)
            .zip(data.chunks(DATA_XFER_MAX as usize))
        {
            let asked = access(region, at, part.len());
            match self.call(Command::RegionWrite, &[asked.as_bytes(), part], &[]) {
                // What is gone drops writes.
                Ok(_) | Err(Failed::Gone(_)) => {}
                Err(refusal) => return Err(refused("write")(refusal)),
            }
        }
        Ok(())
    }

    fn bar(&self, _region: RegionIndex) -> Option<Arc<dyn Aperture>> {
        None
    }

    fn mmap_fd(&self, _region: RegionIndex) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        self.check_vectors(index, start, triggers.len())?;
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        let mut at = start;
        // A message either gives or takes, and carries so many fds at most.
        for run in triggers.chunk_by(|one, next| one.is_some() == next.is_some()) {
            for part in run.chunks(MSG_FDS_MAX as usize) {
                let fds: Vec<_> = part.iter().flatten().map(AsFd::as_fd).collect();
                let count = part.len() as u32;
                self.irqs(index, (at, count), flags, &fds)?;
                at += count;
            }
        }
        Ok(())
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError> {
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        self.irqs(index, (0, 0), flags, &[])
    }

    fn mask_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        let action = match masked {
            true => VFIO_IRQ_SET_ACTION_MASK,
            false => VFIO_IRQ_SET_ACTION_UNMASK,
        };
        self.act(index, start, count, action)
    }

    fn raise_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError> {
        self.act(index, start, count, VFIO_IRQ_SET_ACTION_TRIGGER)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        if !self.info.resettable {
            return Err(FunctionError::NoReset);
        }
        let done = self.call(Command::DeviceReset, &[], &[]);
        done.map(drop).map_err(refused("reset"))
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self
    }
}

impl AddressSpace for Client {
    /// The server does not tell; it refuses what its function's IOMMU cannot translate.
    fn usable(&self) -> Vec<Span> {
        Span::new(0, u64::MAX - (PAGE_BYTES - 1))
            .into_iter()
            .collect()
    }

    fn available(&self) -> u32 {
        self.maps_max.saturating_sub(lock(&self.maps).len() as u32)
    }

    fn map(&self, maps: &[DmaMap<'_>]) -> Result<(), MapError> {
        for (done, map) in maps.iter().enumerate() {
            let fits = match self.touched(map.span).first() {
                _ if map.span.is_empty() || !map.span.is_aligned(PAGE_BYTES) => {
                    Err(MapError::Align(map.span))
                }
                Some(_) => Err(MapError::Overlap(map.span)),
                None if self.available() == 0 => Err(MapError::TooMany(self.maps_max)),
                None => Ok(()),
            };
            if let Err(error) = fits.and_then(|()| self.map_one(map)) {
                // All or none. Where even that fails the connection is over, and with it all maps.
                for map in &maps[..done] {
                    let _ = self.unmap_one(map.span);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn unmap(&self, span: Span) -> Result<u64, MapError> {
        let touched = self.touched(span);
        if touched.iter().any(|held| !span.contains(*held)) {
            return Err(MapError::Bisect(span));
        }
        for held in &touched {
            self.unmap_one(*held)?;
        }
        Ok(touched.iter().map(|held| held.len()).sum())
    }
}

#[cfg(test)]
mod tests;
