//! What every function keeps to, whatever is behind it: generic checks over one fresh function that can copy.
//!
//! Each check takes a function as it is when opened, after its reset: nothing enabled, nothing
//! mapped, no triggers. Other crates have it by the feature `contract`.
#![allow(missing_docs, reason = "what each check is for is its name")]

use super::{
    Access, Aperture, COMMAND, COMMAND_MASTER, COMMAND_MEMORY, DmaMap, Function, FunctionError,
    IrqIndex, Memory, RegionIndex, Span,
};
use crate::vfio::MappedAperture;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};

const RAM_BYTES: u64 = 1 << 21;
const BAR: RegionIndex = RegionIndex(0);
const CONFIG: RegionIndex = RegionIndex::CONFIG;
/// How long an interrupt may take. Nothing takes this long but a failure.
const WAIT_S: i64 = 20;

/// A register of BAR0, and what is stored there.
pub type RegisterStore = (u64, Vec<u8>);

/// How to drive a kind of function.
#[derive(Clone, Copy)]
pub struct Recipe {
    /// The index that has its vectors, and one of them.
    pub vector: (IrqIndex, u32),
    /// A 32-bit register of BAR0 that is stored, and 0 after power-on.
    pub scratch: u64,
    /// The stores to BAR0 that copy so many bytes from one DMA address to another and then
    /// raise the vector.
    pub copy: fn(u64, u64, u32) -> Vec<RegisterStore>,
    /// What the driver puts into memory once, before the first copy.
    pub prepare: fn(&MappedAperture),
}

/// A driver of a function, with its memory.
pub struct Driver<'a> {
    pub function: &'a dyn Function,
    pub recipe: Recipe,
    pub ram: MappedAperture,
    event: OwnedFd,
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

impl<'a> Driver<'a> {
    pub fn new(function: &'a dyn Function, recipe: Recipe) -> Self {
        let fd = memfd_create("contract", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, RAM_BYTES).unwrap();
        let map = DmaMap {
            span: Span::new(0, RAM_BYTES).unwrap(),
            access: Access::READ_WRITE,
            memory: Memory::Fd(fd.as_fd(), 0),
        };
        // First, as whoever maps it for a device may look whether it is shared with the driver.
        let ram = MappedAperture::memory(fd.as_fd(), 0, RAM_BYTES).unwrap();
        function.address_space().map(&[map]).unwrap();
        (recipe.prepare)(&ram);
        Self {
            function,
            recipe,
            ram,
            event: event(),
        }
    }

    pub fn command(&self, value: u16) {
        let bytes = value.to_le_bytes();
        let written = self.function.region_write(CONFIG, COMMAND.into(), &bytes);
        written.unwrap();
    }

    pub fn trigger(&self, event: &OwnedFd) {
        let (index, vector) = self.recipe.vector;
        let trigger = vec![Some(event.try_clone().unwrap())];
        self.function.set_irqs(index, vector, trigger).unwrap();
    }

    pub fn start(&self) {
        self.command(COMMAND_MEMORY | COMMAND_MASTER);
        self.trigger(&self.event);
    }

    pub fn u32(&self, region: RegionIndex, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.function
            .region_read(region, offset, &mut word)
            .unwrap();
        u32::from_le_bytes(word)
    }

    pub fn copy(&self, source: u64, destination: u64, length: u32) {
        for (register, value) in (self.recipe.copy)(source, destination, length) {
            self.function.region_write(BAR, register, &value).unwrap();
        }
    }

    /// Waits for the interrupt.
    pub fn interrupted(&self) -> bool {
        wait(&self.event)
    }

    /// The signals that have come and were not taken.
    pub fn pending(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.event, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    fn quiet(&self) -> bool {
        !taken(&self.event)
    }

    fn mask(&self, masked: bool) -> Result<(), FunctionError> {
        let (index, vector) = self.recipe.vector;
        self.function.mask_irqs(index, vector, 1, masked)
    }

    fn raise(&self) {
        let (index, vector) = self.recipe.vector;
        self.function.raise_irqs(index, vector, 1).unwrap();
    }
}

fn taken(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0u8; 8]).is_ok()
}

fn wait(event: &OwnedFd) -> bool {
    let limit = Timespec {
        tv_sec: WAIT_S,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&limit)).unwrap();
    taken(event)
}

pub fn regions_are_sound_and_end_where_they_say(driver: &Driver<'_>) {
    let info = driver.function.info();
    for index in 0..RegionIndex::COUNT + 2 {
        let region = RegionIndex(index);
        let size = info.region(region).map_or(0, |region| region.size);
        let sound = info.region(region).is_none_or(|r| r.areas_are_sound());
        assert!(sound, "{index}");
        for offset in [size, size.wrapping_sub(3), u64::MAX, u64::MAX - 3] {
            let read = driver.function.region_read(region, offset, &mut [0; 4]);
            assert!(
                matches!(read, Err(FunctionError::OutOfRange { .. })),
                "{index} {offset:#x}"
            );
            let written = driver.function.region_write(region, offset, &[0; 4]);
            assert!(written.is_err(), "{index} {offset:#x}");
        }
        let bar = driver.function.bar(region);
        assert!(bar.is_none_or(|bar| bar.len() == size), "{index}");
    }
}

pub fn config_space_tells_ids_and_sizes(driver: &Driver<'_>) {
    let info = driver.function.info();
    let ids = u32::from(info.ids.device) << 16 | u32::from(info.ids.vendor);
    assert_eq!(driver.u32(CONFIG, 0), ids);
    assert_eq!(driver.u32(CONFIG, 8) >> 8, info.ids.class);
    for bar in [0, 2, 4] {
        let at = 0x10 + 4 * bar as u64;
        driver
            .function
            .region_write(CONFIG, at, &[0xff; 8])
            .unwrap();
        let [low, high] = [at, at + 4].map(|at| u64::from(driver.u32(CONFIG, at)));
        let mask = (high << 32 | low) & !0xf;
        assert_eq!(mask.wrapping_neg(), info.regions[bar].size, "BAR{bar}");
    }
}

pub fn registers_need_decoding_and_are_zero_after_a_reset(driver: &Driver<'_>) {
    let scratch = driver.recipe.scratch;
    driver.start();
    driver
        .function
        .region_write(BAR, scratch, &[7, 0, 0, 0])
        .unwrap();
    assert_eq!(driver.u32(BAR, scratch), 7);
    driver.function.reset().unwrap();
    driver.start();
    assert_eq!(driver.u32(BAR, scratch), 0);
    driver.copy(0, 4096, 8);
    assert!(driver.interrupted(), "maps stay over a reset");
}

pub fn copy_is_there_before_its_interrupt(driver: &Driver<'_>) {
    driver.start();
    for round in 1..=100u8 {
        driver.ram.write(4096, &[round; 600]);
        driver.copy(4096, 8192 - 5, 600);
        assert!(driver.interrupted(), "round {round}");
        let mut copied = [0; 600];
        driver.ram.read(8192 - 5, &mut copied);
        assert_eq!(copied, [round; 600]);
    }
}

pub fn without_bus_mastering_there_is_no_dma_and_no_interrupt(driver: &Driver<'_>) {
    driver.start();
    driver.command(COMMAND_MEMORY);
    driver.ram.write_u64(4096, 1);
    driver.copy(4096, 8192, 8);
    driver.u32(BAR, driver.recipe.scratch);
    assert_eq!(driver.ram.read_u64(8192), 0);
    assert!(driver.quiet());
    driver.start();
    driver.copy(4096, 8192, 8);
    assert!(driver.interrupted());
    assert_eq!(driver.ram.read_u64(8192), 1);
}

pub fn refused_dma_lands_nowhere_and_the_function_goes_on(driver: &Driver<'_>) {
    driver.start();
    driver.ram.write_u64(4096, 1);
    for far in [RAM_BYTES, 0xfee0_0000, u64::MAX - 7] {
        driver.copy(4096, far, 8);
        assert!(driver.interrupted());
    }
    driver.copy(4096, 8192, 8);
    assert!(driver.interrupted());
    assert_eq!(driver.ram.read_u64(8192), 1);
}

pub fn masked_vector_fires_once_at_unmask(driver: &Driver<'_>) {
    driver.start();
    driver.mask(true).unwrap();
    driver.raise();
    driver.raise();
    assert!(driver.quiet());
    driver.mask(false).unwrap();
    assert!(driver.interrupted());
    driver.mask(true).unwrap();
    driver.mask(false).unwrap();
    assert!(driver.quiet(), "once");
}

pub fn new_trigger_takes_over_and_a_disabled_one_is_silent(driver: &Driver<'_>) {
    driver.start();
    let other = event();
    driver.trigger(&other);
    driver.copy(4096, 8192, 8);
    assert!(wait(&other) && driver.quiet());
    let (index, _) = driver.recipe.vector;
    driver.function.disable_irqs(index).unwrap();
    driver.function.disable_irqs(index).unwrap();
    driver.copy(4096, 8192, 8);
    driver.trigger(&driver.event);
    driver.copy(4096, 8192, 8);
    assert!(driver.interrupted());
    assert!(!taken(&other));
}

pub fn vectors_that_do_not_exist_are_refused(driver: &Driver<'_>) {
    for index in IrqIndex::ALL {
        let count = driver.function.info().irqs[index as usize].count;
        for (start, asked) in [(count, 1), (0, count + 1), (u32::MAX, 2)] {
            let refused = |result| matches!(result, Err(FunctionError::NoVector { .. }));
            let triggers = (0..asked).map(|_| None).collect();
            let set = driver.function.set_irqs(index, start, triggers);
            assert!(refused(set), "{index:?} {start}");
            assert!(refused(
                driver.function.mask_irqs(index, start, asked, true)
            ));
            assert!(refused(driver.function.raise_irqs(index, start, asked)));
        }
    }
}

/// The names of all checks, for suites that run them.
#[macro_export]
macro_rules! function_contract {
    ($with:ident) => {
        $with! {
            regions_are_sound_and_end_where_they_say
            config_space_tells_ids_and_sizes
            registers_need_decoding_and_are_zero_after_a_reset
            copy_is_there_before_its_interrupt
            without_bus_mastering_there_is_no_dma_and_no_interrupt
            refused_dma_lands_nowhere_and_the_function_goes_on
            masked_vector_fires_once_at_unmask
            new_trigger_takes_over_and_a_disabled_one_is_silent
            vectors_that_do_not_exist_are_refused
        }
    };
}
pub use crate::function_contract;
