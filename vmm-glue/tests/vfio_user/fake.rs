//! A function in this process that writes down in order all that is done to it.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
};
use vfio_shim::model::{
    AddressSpace, Aperture, DmaMap, Function, FunctionError, FunctionInfo, IrqIndex, IrqInfo,
    MapError, Mapping, Memory, RegionIndex, RegionInfo, Span,
};

pub const BAR_BYTES: u64 = 0x4000;
/// Where BAR 0 starts in its mmap fd.
pub const BAR_FD_OFFSET: u64 = 0x20_0000;
/// The MSI-X page, outside the areas.
pub const MSIX_PAGE: u64 = 0x2000;
pub const VECTORS: u32 = 64;

pub fn span(start: u64, len: u64) -> Span {
    Span::new(start, len).unwrap()
}

pub type Journal = Arc<Mutex<Vec<String>>>;

pub struct FakeBar {
    journal: Journal,
    bytes: Mutex<Vec<u8>>,
}

impl Aperture for FakeBar {
    fn len(&self) -> u64 {
        BAR_BYTES
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        note(&self.journal, format!("load {offset:#x} {}", data.len()));
        let bytes = self.bytes.lock().unwrap();
        data.copy_from_slice(&bytes[offset as usize..][..data.len()]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        note(&self.journal, format!("store {offset:#x} {}", data.len()));
        self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

/// What the next call of its kind answers with an error.
#[derive(Default)]
pub struct Faults {
    pub map: bool,
    pub unmap: bool,
    pub reset: bool,
    pub region: bool,
}

pub struct FakeFunction {
    info: FunctionInfo,
    journal: Journal,
    bar: Arc<FakeBar>,
    bar_fd: OwnedFd,
    config: Mutex<Vec<u8>>,
    mapped: Mutex<Vec<Span>>,
    triggers: Mutex<Vec<(IrqIndex, u32, OwnedFd)>>,
    pub faults: Mutex<Faults>,
}

fn note(journal: &Journal, line: String) {
    journal.lock().unwrap().push(line);
}

fn info() -> FunctionInfo {
    let mut info = FunctionInfo {
        resettable: true,
        ..FunctionInfo::default()
    };
    info.regions[0] = RegionInfo {
        size: BAR_BYTES,
        readable: true,
        writable: true,
        areas: vec![span(0, MSIX_PAGE), span(0x3000, 0x1000)],
    };
    info.regions[7] = RegionInfo {
        size: 4096,
        readable: true,
        writable: true,
        areas: Vec::new(),
    };
    // INTx must not be offered whatever the function says.
    info.irqs = [1, 1, VECTORS, 1, 1].map(|count| IrqInfo { count });
    info
}

impl FakeFunction {
    pub fn new() -> Arc<Self> {
        let journal = Journal::default();
        let bar_fd = memfd_create("bar", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&bar_fd, BAR_FD_OFFSET + BAR_BYTES).unwrap();
        let bytes = (0..BAR_BYTES).map(|at| at as u8).collect();
        Arc::new(Self {
            info: info(),
            bar: Arc::new(FakeBar {
                journal: journal.clone(),
                bytes: Mutex::new(bytes),
            }),
            journal,
            bar_fd,
            config: Mutex::new((0..4096u32).map(|at| at as u8).collect()),
            mapped: Mutex::default(),
            triggers: Mutex::default(),
            faults: Mutex::default(),
        })
    }

    /// Takes what was written down.
    pub fn journal(&self) -> Vec<String> {
        std::mem::take(&mut *self.journal.lock().unwrap())
    }

    pub fn mapped(&self) -> Vec<Span> {
        self.mapped.lock().unwrap().clone()
    }

    /// Fires the eventfds of a vector; how many there are.
    pub fn fire(&self, index: IrqIndex, vector: u32) -> usize {
        let triggers = self.triggers.lock().unwrap();
        let mut count = 0;
        for (.., fd) in triggers
            .iter()
            .filter(|(i, v, _)| (*i, *v) == (index, vector))
        {
            rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
            count += 1;
        }
        count
    }

    /// How many vectors have a trigger.
    pub fn triggers(&self) -> usize {
        self.triggers.lock().unwrap().len()
    }

    fn check(&self, region: RegionIndex, offset: u64, len: usize) -> Result<(), FunctionError> {
        if std::mem::take(&mut self.faults.lock().unwrap().region) {
            return Err(FunctionError::Gone("for the test".into()));
        }
        let span = Span::new(offset, len as u64);
        let size = self.info.region(region).map_or(0, |region| region.size);
        match span {
            Some(span) if span.end() <= size => Ok(()),
            _ => panic!(
                "the server let through an access to region {} at {offset:#x}",
                region.0
            ),
        }
    }
}

impl Function for FakeFunction {
    fn info(&self) -> &FunctionInfo {
        &self.info
    }

    fn region_read(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), FunctionError> {
        note(
            &self.journal,
            format!("read {} {offset:#x} {}", region.0, data.len()),
        );
        self.check(region, offset, data.len())?;
        let config = self.config.lock().unwrap();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = config[at % config.len()];
        }
        Ok(())
    }

    fn region_write(
        &self,
        region: RegionIndex,
        offset: u64,
        data: &[u8],
    ) -> Result<(), FunctionError> {
        note(
            &self.journal,
            format!("write {} {offset:#x} {}", region.0, data.len()),
        );
        self.check(region, offset, data.len())
    }

    fn bar(&self, region: RegionIndex) -> Option<Arc<dyn Aperture>> {
        (region.0 == 0).then(|| self.bar.clone() as Arc<dyn Aperture>)
    }

    fn mmap_fd(&self, region: RegionIndex) -> Option<(BorrowedFd<'_>, u64)> {
        (region.0 == 0).then(|| (self.bar_fd.as_fd(), BAR_FD_OFFSET))
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        let fds = triggers.iter().flatten().count();
        note(
            &self.journal,
            format!("triggers {index:?} {start}+{} fds {fds}", triggers.len()),
        );
        let mut held = self.triggers.lock().unwrap();
        for (vector, trigger) in (start..).zip(triggers) {
            held.retain(|(i, v, _)| (*i, *v) != (index, vector));
            held.extend(trigger.map(|fd| (index, vector, fd)));
        }
        Ok(())
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError> {
        note(&self.journal, format!("disable {index:?}"));
        self.triggers.lock().unwrap().retain(|(i, ..)| *i != index);
        Ok(())
    }

    fn mask_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        masked: bool,
    ) -> Result<(), FunctionError> {
        let word = if masked { "mask" } else { "unmask" };
        note(&self.journal, format!("{word} {index:?} {start}+{count}"));
        Ok(())
    }

    fn raise_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError> {
        note(&self.journal, format!("raise {index:?} {start}+{count}"));
        Ok(())
    }

    fn reset(&self) -> Result<(), FunctionError> {
        note(&self.journal, "reset".into());
        match std::mem::take(&mut self.faults.lock().unwrap().reset) {
            true => Err(FunctionError::NoReset),
            false => Ok(()),
        }
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self
    }
}

impl AddressSpace for FakeFunction {
    fn usable(&self) -> Vec<Span> {
        vec![
            span(0, 0xfee0_0000),
            span(0xfef0_0000, (1 << 47) - 0xfef0_0000),
        ]
    }

    fn available(&self) -> u32 {
        65535
    }

    fn map(&self, maps: &[DmaMap<'_>]) -> Result<(), MapError> {
        let words = maps.iter().map(|map| {
            let Memory::Fd(_, offset) = &map.memory else {
                panic!("guest memory is always an fd");
            };
            let access = if map.access.write { "rw" } else { "r" };
            format!("{} @{offset:#x} {access}", map.span)
        });
        note(
            &self.journal,
            format!("map {}", words.collect::<Vec<_>>().join(", ")),
        );
        if std::mem::take(&mut self.faults.lock().unwrap().map) {
            return Err(MapError::WindowFull {
                wanted: 1 << 20,
                free: 0,
                enough: 1 << 21,
            });
        }
        self.mapped
            .lock()
            .unwrap()
            .extend(maps.iter().map(|map| map.span));
        Ok(())
    }

    fn unmap(&self, gone: Span) -> Result<u64, MapError> {
        note(&self.journal, format!("unmap {gone}"));
        if std::mem::take(&mut self.faults.lock().unwrap().unmap) {
            return Err(MapError::Gone("for the test".into()));
        }
        let mut mapped = self.mapped.lock().unwrap();
        let bytes = mapped
            .iter()
            .filter(|map| gone.contains(**map))
            .map(|map| map.len())
            .sum();
        mapped.retain(|map| !gone.contains(*map));
        assert!(
            !mapped.iter().any(|map| map.overlaps(gone)),
            "an unmap cut a map in two"
        );
        Ok(bytes)
    }
}
