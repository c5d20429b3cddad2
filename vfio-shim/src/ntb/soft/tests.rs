//! Soft fabric tests: the port contract, the soft IOMMU, and a function's DMA across two hosts.

use super::*;
use crate::model::{
    Access, AddressSpace, Aperture, DmaMap, Function, FunctionError, FunctionIds, IrqIndex,
    MapError, Memory, PortIova, RegionIndex, Span,
};
use crate::ntb::{NtbPort, contract};
use crate::vfio::MappedAperture;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const CONFIG: SoftPortConfig = SoftPortConfig {
    window_bytes: [16 * MIB, MIB],
};

macro_rules! contract_tests {
    ($($name:ident)*) => {
        $(#[test] fn $name() {
            let link = SoftLink::new([CONFIG; 2]).unwrap();
            contract::$name((&*link.port(0), &*link.port(1)));
        })*
    };
}

crate::port_contract!(contract_tests);

mod soft_space_keeps_the_contract {
    use crate::model::space_contract;
    use crate::ntb::soft::SoftSpace;

    macro_rules! with_soft_space {
        ($($name:ident)*) => {
            $(#[test] fn $name() { space_contract::$name(&SoftSpace::new()); })*
        };
    }
    crate::space_contract!(with_soft_space);
}

fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("soft", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn span(start: u64, len: u64) -> Span {
    Span::new(start, len).unwrap()
}

fn fd_map(fd: &OwnedFd, start: u64, len: u64) -> DmaMap<'_> {
    DmaMap {
        span: span(start, len),
        access: Access::READ_WRITE,
        memory: Memory::Fd(fd.as_fd(), 0),
    }
}

#[test]
fn pulled_cable_is_a_change_of_link_on_both_ends_even_when_back_at_once() {
    let link = SoftLink::new([CONFIG; 2]).unwrap();
    let ports = [link.port(0), link.port(1)];
    for port in &ports {
        port.link_enable(true);
        port.doorbell_unmask_only(0);
        port.doorbell_take();
    }
    for port in &ports {
        port.doorbell_take();
    }
    link.cut();
    assert!(!ports[0].link_is_up());
    link.plug();
    for port in &ports {
        assert!(port.link_is_up());
        assert_eq!(port.doorbell_take(), 1 << port.info().doorbell_count);
    }
}

#[test]
fn reset_port_is_closed_masked_and_off() {
    let link = SoftLink::new([CONFIG; 2]).unwrap();
    let port = link.port(0);
    port.link_enable(true);
    link.port(1).link_enable(true);
    port.spad_write(3, 3);
    port.window_open(0, PortIova(0), PAGE).unwrap();
    port.reset();
    assert!(!link.port(1).link_is_up());
    assert_eq!(port.spad_read(3), 0);
    assert_eq!(port.doorbell_take(), 0);
}

#[test]
fn maps_are_all_or_none_and_each_refusal_has_its_error() {
    let space = SoftSpace::new();
    let fd = memfd(16 * PAGE);
    space.map(&[fd_map(&fd, 4 * PAGE, 4 * PAGE)]).unwrap();
    let refuse = |start, len| {
        let maps = [fd_map(&fd, 0, PAGE), fd_map(&fd, start, len)];
        let error = space.map(&maps).unwrap_err();
        assert_eq!(space.maps().len(), 1, "{error}");
        error
    };
    assert!(matches!(refuse(7 * PAGE, PAGE), MapError::Overlap(_)));
    assert!(matches!(refuse(2 * PAGE, 9 * PAGE), MapError::Overlap(_)));
    assert!(
        matches!(refuse(0, PAGE), MapError::Overlap(_)),
        "each other"
    );
    assert!(matches!(refuse(9 * PAGE, 0), MapError::Align(_)));
    assert!(matches!(refuse(9 * PAGE + 1, PAGE), MapError::Align(_)));
    let msi = refuse(0xfee0_0000, PAGE);
    assert!(matches!(msi, MapError::Unusable { .. }), "{msi}");
    assert!(matches!(
        space.unmap(span(5 * PAGE, PAGE)),
        Err(MapError::Bisect(_))
    ));
    assert_eq!(space.unmap(span(0, PAGE)).unwrap(), 0);
    space.map(&[fd_map(&fd, 8 * PAGE, PAGE)]).unwrap();
    assert_eq!(space.unmap(span(0, 64 * PAGE)).unwrap(), 5 * PAGE);
    assert_eq!(space.maps(), []);
}

#[test]
fn aperture_that_is_too_short_is_refused() {
    let space = SoftSpace::new();
    let fd = memfd(2 * PAGE);
    let memory: Arc<dyn Aperture> =
        Arc::new(MappedAperture::memory(fd.as_fd(), 0, 2 * PAGE).unwrap());
    for offset in [PAGE, u64::MAX - PAGE + 1] {
        let map = DmaMap {
            span: span(0, 2 * PAGE),
            access: Access::READ,
            memory: Memory::Aperture(Arc::clone(&memory), offset),
        };
        assert!(matches!(space.map(&[map]), Err(MapError::Kernel { .. })));
    }
}

#[test]
fn refused_access_is_a_fault_with_its_address_and_the_rest_goes_through() {
    let space = SoftSpace::new();
    let fd = memfd(PAGE);
    space.map(&[fd_map(&fd, PAGE, PAGE)]).unwrap();
    assert!(!space.write(2 * PAGE - 4, &[1; 8]));
    let fault = SoftFault {
        address: 2 * PAGE,
        write: true,
    };
    assert_eq!(space.faults(), [fault]);
    let mut read = [0; 8];
    assert!(!space.read(2 * PAGE - 4, &mut read));
    assert_eq!(read, [1, 1, 1, 1, 0xff, 0xff, 0xff, 0xff]);
    assert!(!space.read(u64::MAX, &mut read));
    for _ in 0..FAULTS_MAX {
        space.read(0, &mut read);
    }
    assert_eq!(space.faults().len(), FAULTS_MAX);
    // The access at the end of the address space counts twice: its last byte, and what wraps.
    assert_eq!(space.fault_count(), 4 + FAULTS_MAX as u64);
}

/// Host A lends a function through port 0 to host B, whose guest RAM lies behind port 1.
struct Lent {
    link: SoftLink,
    function: SoftFunction,
    ram: OwnedFd,
    event: OwnedFd,
    /// The function's BAR as host B reaches it.
    bar: Arc<dyn Aperture>,
}

const RAM_BYTES: u64 = 4 * PAGE;
const BAR_SLICE: u64 = 0x2_0000;
const RAM_SLICE: u64 = 0x4_0000;
const VECTOR_USED: u32 = 2;

impl Lent {
    fn new() -> Self {
        let link = SoftLink::new([CONFIG; 2]).unwrap();
        let function = SoftFunction::new(FunctionIds::default(), 4);
        let ram = memfd(RAM_BYTES);
        for side in 0..2 {
            let port = link.port(side);
            port.link_enable(true);
            port.window_open(0, PortIova(1 << 32), MIB).unwrap();
        }
        let memory = Memory::Aperture(function.bar(RegionIndex(0)).unwrap(), 0);
        let area = function.info().regions[0].areas[0];
        let bar_map = DmaMap {
            span: span((1 << 32) + BAR_SLICE, area.len()),
            access: Access::READ_WRITE,
            memory,
        };
        link.port(0).address_space().map(&[bar_map]).unwrap();
        let ram_map = fd_map(&ram, (1 << 32) + RAM_SLICE, RAM_BYTES);
        link.port(1).address_space().map(&[ram_map]).unwrap();
        let guest = DmaMap {
            span: span(0, RAM_BYTES),
            access: Access::READ_WRITE,
            memory: Memory::Aperture(link.port(0).window(0), RAM_SLICE),
        };
        function.address_space().map(&[guest]).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let trigger = Some(event.try_clone().unwrap());
        function
            .set_irqs(IrqIndex::Msix, VECTOR_USED, vec![trigger])
            .unwrap();
        let bar = link.port(1).window(0);
        Self {
            link,
            function,
            ram,
            event,
            bar,
        }
    }

    fn command(&self, value: u16) {
        let config = RegionIndex::CONFIG;
        let bytes = value.to_le_bytes();
        self.function.region_write(config, 4, &bytes).unwrap();
    }

    fn register(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.bar.read(BAR_SLICE + register, &mut word);
        u32::from_le_bytes(word)
    }

    fn copy(&self, source: u64, destination: u64, length: u32) {
        let at = |register| BAR_SLICE + register;
        self.bar.write(at(SOURCE), &source.to_le_bytes());
        self.bar.write(at(DESTINATION), &destination.to_le_bytes());
        self.bar.write(at(LENGTH), &length.to_le_bytes());
        self.bar.write(at(VECTOR), &VECTOR_USED.to_le_bytes());
        self.bar.write(at(DOORBELL), &1u32.to_le_bytes());
    }

    fn raised(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.event, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    fn memory(&self) -> MappedAperture {
        MappedAperture::memory(self.ram.as_fd(), 0, RAM_BYTES).unwrap()
    }
}

#[test]
fn lent_function_copies_in_the_borrowers_memory_and_raises_its_vector() {
    let lent = Lent::new();
    lent.command(0b110);
    assert_eq!(lent.register(IDENT), IDENT_VALUE);
    let memory = lent.memory();
    let data: Vec<u8> = (0..PAGE).map(|at| at as u8 ^ 0x5a).collect();
    memory.write(100, &data);
    lent.copy(100, 2 * PAGE - 7, PAGE as u32);
    assert_eq!(lent.register(STATUS), STATUS_DONE);
    let mut copied = vec![0; PAGE as usize];
    memory.read(2 * PAGE - 7, &mut copied);
    assert!(copied == data);
    assert_eq!(lent.raised(), 1);
    assert_eq!(lent.function.space().fault_count(), 0);
}

#[test]
fn dma_past_the_guests_memory_faults_at_the_functions_own_iommu() {
    let lent = Lent::new();
    lent.command(0b110);
    lent.copy(0, RAM_BYTES - 4, 8);
    assert_eq!(lent.register(STATUS), STATUS_FAILED);
    let fault = SoftFault {
        address: RAM_BYTES,
        write: true,
    };
    assert_eq!(lent.function.space().faults(), [fault]);
    assert_eq!(lent.link.port(1).space().fault_count(), 0);
}

#[test]
fn without_bus_mastering_or_decoding_there_is_no_dma_no_interrupt_and_no_register() {
    let lent = Lent::new();
    assert_eq!(lent.register(IDENT), u32::MAX, "no decoding yet");
    lent.command(0b010);
    lent.memory().write(0, &[7; 8]);
    lent.copy(0, PAGE, 8);
    assert_eq!(lent.register(STATUS), STATUS_FAILED);
    let mut read = [0; 8];
    lent.memory().read(PAGE, &mut read);
    assert_eq!((read, lent.raised()), ([0; 8], 0));
}

#[test]
fn unmapped_slice_or_pulled_cable_takes_the_registers_away() {
    let lent = Lent::new();
    lent.command(0b110);
    lent.link.cut();
    assert_eq!(lent.register(IDENT), u32::MAX);
    lent.link.plug();
    assert_eq!(lent.register(IDENT), IDENT_VALUE);
    let slice = span((1 << 32) + BAR_SLICE, PAGE);
    lent.link.port(0).address_space().unmap(slice).unwrap();
    assert_eq!(lent.register(IDENT), u32::MAX);
    assert_eq!(lent.link.port(0).space().fault_count(), 1);
}

#[test]
fn reset_brings_registers_to_power_on_and_leaves_triggers_and_maps() {
    let lent = Lent::new();
    lent.command(0b110);
    lent.bar.write(BAR_SLICE + SCRATCH, &[1; 8]);
    lent.copy(0, PAGE, 8);
    lent.function.reset().unwrap();
    assert_eq!(lent.register(SCRATCH), 0);
    assert_eq!(lent.register(STATUS), STATUS_IDLE);
    assert_eq!((lent.function.resets(), lent.function.triggers()), (1, 1));
    assert_eq!(lent.function.space().maps().len(), 1);
    let mut command = [0; 2];
    let config = RegionIndex::CONFIG;
    lent.function.region_read(config, 4, &mut command).unwrap();
    assert_eq!(command, [0b010, 0], "bus mastering off, decoding as it was");
    let stubborn = SoftFunction::without_reset(FunctionIds::default(), 1);
    assert!(matches!(stubborn.reset(), Err(FunctionError::NoReset)));
}

#[test]
fn masked_vector_fires_once_at_unmask() {
    let lent = Lent::new();
    let function = &lent.function;
    let msix = IrqIndex::Msix;
    function.mask_irqs(msix, VECTOR_USED, 1, true).unwrap();
    function.raise_irqs(msix, VECTOR_USED, 1).unwrap();
    function.raise_irqs(msix, VECTOR_USED, 1).unwrap();
    assert_eq!(lent.raised(), 0);
    function.mask_irqs(msix, VECTOR_USED, 1, false).unwrap();
    assert_eq!(lent.raised(), 1);
    assert!(function.raise_irqs(msix, 3, 2).is_err());
    assert!(function.raise_irqs(msix, u32::MAX, u32::MAX).is_err());
    assert!(function.raise_irqs(IrqIndex::Msi, 0, 1).is_err());
    function.disable_irqs(msix).unwrap();
    assert_eq!(function.triggers(), 0);
}

#[test]
fn accesses_past_a_region_are_errors_and_the_table_page_reads_ones() {
    let function = SoftFunction::new(FunctionIds::default(), 4);
    let mut data = [0; 8];
    let bad = [(0, 8185), (0, u64::MAX), (7, 250), (1, 0), (8, 0), (99, 0)];
    for (region, offset) in bad {
        let read = function.region_read(RegionIndex(region), offset, &mut data);
        assert!(read.is_err(), "{region} {offset}");
        let write = function.region_write(RegionIndex(region), offset, &data);
        assert!(write.is_err(), "{region} {offset}");
    }
    let config = RegionIndex::CONFIG;
    function.region_write(config, 4, &[0b110]).unwrap();
    let table = function.region_read(RegionIndex(0), PAGE, &mut data);
    assert!(table.is_ok());
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn config_space_tells_bar_size_and_msix_vectors() {
    let function = SoftFunction::new(FunctionIds::default(), 4);
    let config = RegionIndex::CONFIG;
    function.region_write(config, 0x10, &[0xff; 8]).unwrap();
    let mut bars = [0; 8];
    function.region_read(config, 0x10, &mut bars).unwrap();
    let size = !(u64::from_le_bytes(bars) & !0xf) + 1;
    assert_eq!(size, function.info().regions[0].size);
    let mut msix = [0; 4];
    function.region_read(config, 0x40, &mut msix).unwrap();
    assert_eq!((msix[0], msix[2]), (0x11, 3));
}

#[test]
fn one_file_in_as_many_maps_as_a_space_holds_is_one_mapping_of_this_process() {
    const MAPS: u64 = 65_535;
    let space = SoftSpace::new();
    let fd = memfd(MAPS * PAGE);
    let map = |at: u64| DmaMap {
        span: span(at * 2 * PAGE, PAGE),
        access: Access::READ_WRITE,
        memory: Memory::Fd(fd.as_fd(), (MAPS - 1 - at) * PAGE),
    };
    let maps: Vec<_> = (0..MAPS).map(map).collect();
    space.map(&maps).unwrap();
    assert_eq!(space.available(), 0);
    let over = [fd_map(&fd, PAGE, PAGE)];
    assert!(matches!(space.map(&over), Err(MapError::TooMany(65_535))));
    assert!(space.write(6 * PAGE, &[7]));
    let mut last = [0];
    rustix::io::pread(&fd, &mut last, (MAPS - 4) * PAGE).unwrap();
    assert_eq!(last, [7]);
    assert_eq!(space.unmap(span(2 * PAGE, PAGE)).unwrap(), PAGE);
    space.map(&over).unwrap();
}

#[test]
fn memory_past_the_files_end_is_refused_until_the_file_has_grown() {
    let space = SoftSpace::new();
    let fd = memfd(2 * PAGE);
    space.map(&[fd_map(&fd, 0, 2 * PAGE)]).unwrap();
    let longer = [fd_map(&fd, 8 * PAGE, 4 * PAGE)];
    assert!(matches!(space.map(&longer), Err(MapError::Kernel { .. })));
    ftruncate(&fd, 4 * PAGE).unwrap();
    space.map(&longer).unwrap();
    assert!(space.write(11 * PAGE, &[9]));
    let mut seen = [0];
    rustix::io::pread(&fd, &mut seen, 3 * PAGE).unwrap();
    assert_eq!(seen, [9]);
    let twice = [fd_map(&fd, 16 * PAGE, PAGE), fd_map(&fd, 16 * PAGE, PAGE)];
    assert!(matches!(space.map(&twice), Err(MapError::Overlap(_))));
    assert_eq!(space.maps().len(), 2);
}
