//! The DMA maps of a guest session: recorded at once, programmed at the first bus-master enable.
//!
//! Firmware remaps all of RAM several times before a driver runs, so nothing is programmed until
//! the function may do DMA. From then on a map is a map and an unmap is an unmap: nothing is
//! cached or merged. Maps without an fd are remembered and never programmed.

use super::{
    memory_check::{Inode, MemoryError, MemoryMaps, check_fd},
    options::{MemoryCheck, Options},
    version::MAPS_MAX,
    wire,
};
use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    rc::{Rc, Weak},
    sync::Arc,
};
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
};
use vfio_shim::model::{Access, AddressSpace, DmaMap, MapError, Memory, Span};

/// What maps are made of: 4 KiB.
const PAGE_BYTES: u64 = 4096;
/// The most memory files of a guest; VMMs use one per memory zone.
pub const MEMORY_FILES_MAX: usize = 256;

/// Why guest memory is not mapped or unmapped. Each ends the guest session: a VMM that goes on
/// would believe the opposite.
#[derive(Debug, thiserror::Error)]
pub enum MapRefusal {
    /// Empty or not made of pages.
    #[error("it is empty or not aligned to 4 KiB pages (file offset {0:#x})")]
    Align(u64),
    /// Past the end of the address space, or of the file's.
    #[error("it wraps around the end of the address space")]
    Wraps,
    /// No access at all, or of an unknown kind.
    #[error("its flags {0:#x} are not known; read is 1, write is 2, and one is needed")]
    Flags(u32),
    /// More than one fd.
    #[error("it came with {0} file descriptors; one is the most")]
    Fds(usize),
    /// Something is mapped there.
    #[error("it overlaps the map at {0}; unmap that first")]
    Overlap(Span),
    /// The IOMMU cannot translate these addresses.
    #[error(
        "the IOMMU cannot map those addresses; it can map {0}: give the guest a memory layout inside them"
    )]
    Unusable(String),
    /// Too many maps.
    #[error("the guest has {0} DMA maps already, the most it may have; use larger memory blocks")]
    TooMany(u32),
    /// Too much memory.
    #[error(
        "the guest would have {bytes} bytes of memory mapped, and {max} are the most it may have; give it less memory"
    )]
    TooMuch {
        /// With this map.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// Too many memory files.
    #[error("the guest's memory is in more than {MEMORY_FILES_MAX} files; use fewer memory zones")]
    TooManyFiles,
    /// The memory behind it is not acceptable.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Only a part of a map would go.
    #[error("it would cut the map at {0} in two; unmap whole maps")]
    Bisect(Span),
    /// The address space refused.
    #[error("the device's address space refused it")]
    Program(#[source] MapError),
}

/// A file that guest memory is in, known by its inode and held once however many maps use it.
#[derive(Debug)]
struct MemoryFile {
    fd: OwnedFd,
    inode: Inode,
    access: Access,
}

#[derive(Debug)]
struct Map {
    span: Span,
    access: Access,
    /// The file, and where in it; `None` = remembered only.
    memory: Option<(Rc<MemoryFile>, u64)>,
}

impl Map {
    fn programmable(&self) -> Option<DmaMap<'_>> {
        let (file, offset) = self.memory.as_ref()?;
        Some(DmaMap {
            span: self.span,
            access: self.access,
            memory: Memory::Fd(file.fd.as_fd(), *offset),
        })
    }

    fn file_range(&self) -> Option<(Inode, Span)> {
        let (file, offset) = self.memory.as_ref()?;
        Some((file.inode, Span::new(*offset, self.span.len())?))
    }
}

/// The maps of one guest session and the address space they go into.
pub struct Dma<'f> {
    space: &'f dyn AddressSpace,
    usable: Vec<Span>,
    maps_max: u32,
    bytes_max: u64,
    /// Who tells of which process's memory map; `None` = not checked.
    check: Option<(Arc<dyn MemoryMaps>, i32)>,
    maps: BTreeMap<u64, Map>,
    files: Vec<Weak<MemoryFile>>,
    bytes: u64,
    programmed: bool,
}

impl<'f> Dma<'f> {
    /// No maps yet; `pid` is the VMM.
    pub fn new(space: &'f dyn AddressSpace, options: &Options, pid: i32) -> Self {
        let check = match options.memory_check {
            MemoryCheck::On => Some((Arc::clone(&options.memory_maps), pid)),
            MemoryCheck::Off => None,
        };
        Self {
            space,
            usable: space.usable(),
            maps_max: options.maps_max.min(MAPS_MAX),
            bytes_max: options.bytes_max,
            check,
            maps: BTreeMap::new(),
            files: Vec::new(),
            bytes: 0,
            programmed: false,
        }
    }

    /// How many maps there are, and how many bytes they have.
    pub fn recorded(&self) -> (u64, u64) {
        (self.maps.len() as u64, self.bytes)
    }

    /// Checks and records a map; programs it if the function may do DMA already.
    pub fn map(&mut self, request: &wire::DmaMap, mut fds: Vec<OwnedFd>) -> Result<(), MapRefusal> {
        if fds.len() > 1 {
            return Err(MapRefusal::Fds(fds.len()));
        }
        let span = Span::new(request.iova.get(), request.len.get()).ok_or(MapRefusal::Wraps)?;
        let offset = request.offset.get();
        let range = Span::new(offset, span.len()).ok_or(MapRefusal::Wraps)?;
        if span.is_empty() || !span.is_aligned(PAGE_BYTES) || !range.is_aligned(PAGE_BYTES) {
            return Err(MapRefusal::Align(offset));
        }
        let access = access(request.flags.get())?;
        self.check_room(span)?;
        let memory = match fds.pop() {
            Some(fd) => Some((self.file(fd, span, range, access)?, offset)),
            None => None,
        };
        let map = Map {
            span,
            access,
            memory,
        };
        self.bytes += if map.memory.is_some() { span.len() } else { 0 };
        let map = self.maps.entry(span.start()).or_insert(map);
        match map.programmable() {
            Some(map) if self.programmed => self.space.map(&[map]).map_err(MapRefusal::Program),
            _ => Ok(()),
        }
    }

    fn check_room(&self, span: Span) -> Result<(), MapRefusal> {
        if let Some(other) = self.overlapping(span) {
            return Err(MapRefusal::Overlap(other));
        }
        if self.maps.len() >= self.maps_max as usize {
            return Err(MapRefusal::TooMany(self.maps_max));
        }
        Ok(())
    }

    fn overlapping(&self, span: Span) -> Option<Span> {
        let (_, last) = self.maps.range(..span.end()).next_back()?;
        last.span.overlaps(span).then_some(last.span)
    }

    /// Judges the memory of a map and takes the fd in, or drops it for one held already.
    fn file(
        &mut self,
        fd: OwnedFd,
        span: Span,
        range: Span,
        access: Access,
    ) -> Result<Rc<MemoryFile>, MapRefusal> {
        if !self.usable.iter().any(|usable| usable.contains(span)) {
            return Err(MapRefusal::Unusable(in_words(&self.usable)));
        }
        // Spans do not wrap and do not overlap, so their sum does not wrap either.
        let bytes = self.bytes + span.len();
        if bytes > self.bytes_max {
            let max = self.bytes_max;
            return Err(MapRefusal::TooMuch { bytes, max });
        }
        let inode = check_fd(fd.as_fd(), range, access)?;
        if let Some((maps, pid)) = &self.check {
            maps.check_shared(*pid, &[(inode, range)])?;
        }
        self.files.retain(|file| file.strong_count() != 0);
        let mut held = self.files.iter().filter_map(Weak::upgrade);
        if let Some(file) = held.find(|file| file.inode == inode && file.access == access) {
            return Ok(file);
        }
        if self.files.len() >= MEMORY_FILES_MAX {
            return Err(MapRefusal::TooManyFiles);
        }
        let file = Rc::new(MemoryFile { fd, inode, access });
        self.files.push(Rc::downgrade(&file));
        Ok(file)
    }

    /// Takes maps away; when it returns, the device reaches none of them. Returns their bytes.
    pub fn unmap(&mut self, request: &wire::DmaUnmap) -> Result<u64, MapRefusal> {
        let (first, len) = (request.iova.get(), request.len.get());
        let span = match request.flags.get() {
            0 if len == 0 => return Err(MapRefusal::Align(0)),
            // Up to the last byte of the address space, which VMMs do ask for.
            0 => first
                .checked_add(len - 1)
                .and_then(|last| Span::from_inclusive(first, last))
                .ok_or(MapRefusal::Wraps)?,
            VFIO_DMA_UNMAP_FLAG_ALL if first == 0 && len == 0 => match self.hull() {
                Some(hull) => hull,
                None => return Ok(0),
            },
            VFIO_DMA_UNMAP_FLAG_ALL => return Err(MapRefusal::Align(0)),
            flags => return Err(MapRefusal::Flags(flags)),
        };
        self.check_whole(span)?;
        let inside = || self.maps.range(span.start()..span.end());
        let memory_bytes: u64 = inside()
            .filter(|(_, map)| map.memory.is_some())
            .map(|(_, map)| map.span.len())
            .sum();
        // Forgotten only once the device has lost it: else the undo would not know of it.
        if self.programmed && memory_bytes != 0 {
            self.space.unmap(span).map_err(MapRefusal::Program)?;
        }
        let gone: Vec<(u64, u64)> = inside().map(|(at, map)| (*at, map.span.len())).collect();
        for (at, _) in &gone {
            self.maps.remove(at);
        }
        self.bytes -= memory_bytes;
        Ok(gone.iter().map(|(_, len)| len).sum())
    }

    /// Refuses a span that has only a part of a map in it. Only its ends can.
    fn check_whole(&self, span: Span) -> Result<(), MapRefusal> {
        for end in [span.start(), span.end()] {
            if let Some((_, map)) = self.maps.range(..end).next_back()
                && end < map.span.end()
            {
                return Err(MapRefusal::Bisect(map.span));
            }
        }
        Ok(())
    }

    /// From the first map to the last.
    fn hull(&self) -> Option<Span> {
        let (first, _) = self.maps.first_key_value()?;
        let (_, last) = self.maps.last_key_value()?;
        Span::new(*first, last.span.end() - first)
    }

    /// The function may do DMA from now on: checks all memory again, and programs all maps at once.
    pub fn enable(&mut self) -> Result<(), MapRefusal> {
        if self.programmed {
            return Ok(());
        }
        let maps: Vec<DmaMap<'_>> = self.maps.values().filter_map(Map::programmable).collect();
        if let Some((memory_maps, pid)) = &self.check
            && !maps.is_empty()
        {
            let ranges: Vec<_> = self.maps.values().filter_map(Map::file_range).collect();
            memory_maps.check_shared(*pid, &ranges)?;
        }
        // Also where it fails: what was reached must then be undone.
        self.programmed = true;
        if maps.is_empty() {
            return Ok(());
        }
        self.space.map(&maps).map_err(MapRefusal::Program)
    }

    /// Takes all maps away, and with the last use of a memory file its fd.
    pub fn undo(&mut self) -> Result<(), MapError> {
        let undone = match self.hull() {
            Some(hull) if self.programmed && self.bytes != 0 => self.space.unmap(hull).map(drop),
            _ => Ok(()),
        };
        self.maps.clear();
        self.files.clear();
        self.bytes = 0;
        undone
    }
}

fn access(flags: u32) -> Result<Access, MapRefusal> {
    if flags & !(VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE) != 0 || flags == 0 {
        return Err(MapRefusal::Flags(flags));
    }
    Ok(Access {
        read: flags & VFIO_DMA_MAP_FLAG_READ != 0,
        write: flags & VFIO_DMA_MAP_FLAG_WRITE != 0,
    })
}

fn in_words(spans: &[Span]) -> String {
    let words = |span: &Span| match span.end().checked_sub(1) {
        Some(last) if !span.is_empty() => format!("{:#x}..={last:#x}", span.start()),
        _ => "nothing".to_owned(),
    };
    match spans {
        [] => "nothing".to_owned(),
        spans => spans.iter().map(words).collect::<Vec<_>>().join(" and "),
    }
}
