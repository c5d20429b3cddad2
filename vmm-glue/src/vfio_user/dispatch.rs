//! What each request of a VMM does to the function, and what it is answered.
//!
//! Two kinds of client shape the answers. QEMU takes an error with the header alone.
//! cloud-hypervisor reads the full answer whatever the header says, and waits for ever where it
//! does not come. So an error carries the full answer too, a read that fails is all ones, a write
//! that fails is dropped, and where the VMM must not go on the session ends.

use super::{
    dma::Dma,
    error::SessionError,
    irqs,
    options::Options,
    regions::{Dropped, Regions, enables_bus_master, touches},
    shared::SessionCounters,
    version,
    wire::{self, Command, Envelope, Reply, Request},
};
use rustix::io::Errno;
use std::{
    mem::size_of,
    os::fd::{BorrowedFd, OwnedFd},
};
use vfio_bindings::bindings::vfio::{VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET};
use vfio_shim::model::{Function, IrqIndex, RegionIndex};

/// One guest: a function, its maps, and what was agreed with the VMM.
pub struct Guest<'f> {
    function: &'f dyn Function,
    counters: &'f SessionCounters,
    maps_max: u32,
    /// The minor version, once agreed.
    minor: Option<u16>,
    /// Whether the function's state can have changed since its last reset.
    touched: bool,
    regions: Regions<'f>,
    dma: Dma<'f>,
}

fn errno(errno: Errno) -> u32 {
    errno.raw_os_error() as u32
}

impl<'f> Guest<'f> {
    /// A guest that has not said anything yet. The function was reset before.
    pub fn new(
        function: &'f dyn Function,
        options: &Options,
        counters: &'f SessionCounters,
        pid: i32,
    ) -> Self {
        Self {
            function,
            counters,
            maps_max: options.maps_max,
            minor: None,
            touched: false,
            regions: Regions::new(function, options.bars),
            dma: Dma::new(function.address_space(), options, pid),
        }
    }

    /// The maps, to be undone.
    pub fn dma(&mut self) -> &mut Dma<'f> {
        &mut self.dma
    }

    /// Does what the request says and fills in the answer; returns the fd that goes with it. An
    /// error ends the session.
    pub fn handle(
        &mut self,
        envelope: &Envelope,
        body: &[u8],
        fds: Vec<OwnedFd>,
        reply: &mut Reply,
    ) -> Result<Option<BorrowedFd<'f>>, SessionError> {
        let command = envelope.command;
        let request = wire::parse(envelope, body)?;
        if (command == Command::Version) != self.minor.is_none() {
            return Err(SessionError::OutOfTurn(command));
        }
        let takes_fds = matches!(command, Command::DmaMap | Command::DeviceSetIrqs);
        if !fds.is_empty() && !takes_fds {
            let fds = fds.len();
            return Err(SessionError::UnexpectedFds { command, fds });
        }
        let mut fd = None;
        match request {
            Request::RegionRead(access) => self.region_read(access, reply),
            Request::RegionWrite(access, data) => self.region_write(access, data, reply)?,
            Request::Version(asked, json) => self.version(envelope, asked, json, reply)?,
            Request::DmaMap(map) => self.dma_map(map, fds)?,
            Request::DmaUnmap(unmap) => self.dma_unmap(unmap, reply)?,
            Request::DeviceGetInfo => self.device_info(reply),
            Request::DeviceGetRegionInfo(info) => fd = self.regions.info(info, reply),
            Request::DeviceGetRegionIoFds(wanted) => region_io_fds(wanted, reply),
            Request::DeviceGetIrqInfo(wanted) => self.irq_info(wanted, reply),
            Request::DeviceSetIrqs(set, data) => self.set_irqs(set, data, fds, reply)?,
            Request::DeviceReset => self.reset(reply),
            Request::Unsupported(command) => self.unsupported(command, reply)?,
        }
        if reply.failed() {
            self.counters.refused.count();
        }
        Ok(fd)
    }

    fn version(
        &mut self,
        envelope: &Envelope,
        asked: &wire::Version,
        json: &[u8],
        reply: &mut Reply,
    ) -> Result<(), SessionError> {
        if envelope.no_reply {
            return Err(version::VersionError::NoReply.into());
        }
        let minor = version::agree(asked, json)?;
        self.minor = Some(minor);
        reply.push(&wire::Version {
            major: 0.into(),
            minor: minor.into(),
        });
        reply.push_bytes(&version::capabilities(self.maps_max));
        Ok(())
    }

    fn region_read(&mut self, access: &wire::RegionAccess, reply: &mut Reply) {
        // Registers can have side effects when read; config space and ROM have none.
        self.touched |= RegionIndex(access.region.get()).bar().is_some();
        reply.push(access);
        let data = reply.data(access.count.get() as usize);
        if !self.regions.read(access, data, self.counters) {
            self.counters.refused.count();
        }
    }

    fn region_write(
        &mut self,
        access: &wire::RegionAccess,
        data: &[u8],
        reply: &mut Reply,
    ) -> Result<(), SessionError> {
        let enables = enables_bus_master(access, data);
        if enables {
            self.dma.enable().map_err(SessionError::Enable)?;
        }
        self.touched |= touches(access, data);
        match self.regions.write(access, data, self.counters) {
            Ok(()) => {}
            // The guest believes that its device does DMA now: nothing else it does would work.
            Err(Dropped::Refused(source)) if enables => {
                return Err(SessionError::BusMaster(source));
            }
            Err(_) => self.counters.refused.count(),
        }
        reply.push(access);
        Ok(())
    }

    fn dma_map(&mut self, map: &wire::DmaMap, fds: Vec<OwnedFd>) -> Result<(), SessionError> {
        let result = self.dma.map(map, fds);
        self.tell_maps();
        result.map_err(|source| SessionError::Map {
            iova: map.iova.get(),
            len: map.len.get(),
            source,
        })?;
        self.counters.dma_maps.count();
        Ok(())
    }

    fn dma_unmap(&mut self, unmap: &wire::DmaUnmap, reply: &mut Reply) -> Result<(), SessionError> {
        let result = self.dma.unmap(unmap);
        self.tell_maps();
        let bytes = result.map_err(|source| SessionError::Unmap {
            iova: unmap.iova.get(),
            len: unmap.len.get(),
            source,
        })?;
        self.counters.dma_unmaps.count();
        reply.push(&wire::DmaUnmap {
            len: bytes.into(),
            ..*unmap
        });
        Ok(())
    }

    /// Tells how much is mapped now.
    pub fn tell_maps(&self) {
        let (maps, bytes) = self.dma.recorded();
        self.counters.maps_now.set(maps);
        self.counters.bytes_now.set(bytes);
    }

    fn device_info(&self, reply: &mut Reply) {
        let resettable = match self.function.info().resettable {
            true => VFIO_DEVICE_FLAGS_RESET,
            false => 0,
        };
        reply.push(&wire::DeviceInfo {
            argsz: (size_of::<wire::DeviceInfo>() as u32).into(),
            flags: (VFIO_DEVICE_FLAGS_PCI | resettable).into(),
            regions: RegionIndex::COUNT.into(),
            irqs: (IrqIndex::COUNT as u32).into(),
        });
    }

    fn irq_info(&self, wanted: &wire::IrqInfo, reply: &mut Reply) {
        let info = irqs::info(self.function, wanted.index.get());
        let (flags, count) = info.unwrap_or_default();
        reply.push(&wire::IrqInfo {
            argsz: (size_of::<wire::IrqInfo>() as u32).into(),
            flags: flags.into(),
            index: wanted.index,
            count: count.into(),
        });
        if info.is_none() {
            reply.fail(errno(Errno::INVAL));
        }
    }

    fn set_irqs(
        &mut self,
        set: &wire::IrqSet,
        data: &[u8],
        fds: Vec<OwnedFd>,
        reply: &mut Reply,
    ) -> Result<(), SessionError> {
        // The triggers of errors and requests are not the function's state: QEMU sets them before
        // its first reset.
        let vectors = [IrqIndex::Msi as u32, IrqIndex::Msix as u32];
        self.touched |= !fds.is_empty() && vectors.contains(&set.index.get());
        match irqs::set(self.function, set, data, fds) {
            Ok(()) => Ok(()),
            Err(error) if error.is_malformed() => Err(SessionError::Irqs(error)),
            Err(error) => {
                tracing::debug!(error = super::error::words(&error), "SET_IRQS refused");
                reply.fail(errno(Errno::INVAL));
                Ok(())
            }
        }
    }

    /// Maps stay as they are: the VMM takes them away itself where it wants to.
    fn reset(&mut self, reply: &mut Reply) {
        if !self.touched {
            return;
        }
        match self.function.reset() {
            Ok(()) => {
                self.touched = false;
                self.counters.resets.count();
            }
            Err(error) => {
                tracing::warn!(
                    error = super::error::words(&error),
                    "the VMM's reset failed"
                );
                reply.fail(errno(Errno::IO));
            }
        }
    }

    fn unsupported(&self, command: Command, reply: &mut Reply) -> Result<(), SessionError> {
        // How long the full answer would be is not known, so only QEMU (0.0) can be refused.
        match self.minor {
            Some(0) => {
                reply.fail(errno(Errno::OPNOTSUPP));
                Ok(())
            }
            _ => Err(SessionError::Unsupported(command)),
        }
    }
}

/// There are none: every access goes through a message or a mapping.
fn region_io_fds(wanted: &wire::RegionIoFds, reply: &mut Reply) {
    reply.push(&wire::RegionIoFds {
        argsz: (size_of::<wire::RegionIoFds>() as u32).into(),
        flags: 0.into(),
        index: wanted.index,
        count: 0.into(),
    });
    if wanted.index.get() >= RegionIndex::COUNT {
        reply.fail(errno(Errno::INVAL));
    }
}
