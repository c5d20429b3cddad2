//! The Linux guest's only program: drives the function from user space, as nothing but sysfs and a stock kernel let it.
//!
//! It mounts what it needs, finds the function by its ids, maps its BARs by sysfs and learns the
//! DMA addresses of its own pages from /proc/self/pagemap. No driver binds the function, so its
//! interrupt status is polled, and the MSI itself is seen in the kernel's log, which tells of a
//! vector that nobody handles. Words go over the first serial port, as those of the tiny guest's
//! VMM go over its stdout.

use crate::demo::program::{
    DATA_BYTES, Phase, ROUNDS, SCRATCH_VALUE, STRAY, VRAM_DATA, VRAM_SECRET, VRAM_WORDS,
};
use crate::demo::vmm::{Event, GuestKind};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mount::{MountFlags, mount};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vfio_shim::model::{Aperture, COMMAND, COMMAND_MASTER, COMMAND_MEMORY};
use vfio_shim::ntb::soft::{
    ARC_DESTINATION, ARC_DOORBELL, ARC_FLAGS, ARC_FROM_VRAM, ARC_IDENT, ARC_IDENT_VALUE, ARC_IDS,
    ARC_LENGTH, ARC_MEMIRQ, ARC_MEMIRQ_ENABLE, ARC_MEMIRQ_SOURCE, ARC_MEMIRQ_STATUS, ARC_SCRATCH,
    ARC_SOURCE, ARC_STATUS, ARC_TO_VRAM, STATUS_DONE, STATUS_FAILED,
};
use vfio_shim::vfio::MappedAperture;

const WORDS: &str = "/dev/ttyS0";
const DEVICES: &str = "/sys/bus/pci/devices";
/// The MSI capability, where the seed document's lspci shows it.
const MSI: u64 = 0xac;
/// The local APIC's address, and a vector that a kernel without a driver gives to nobody.
const APIC: u32 = 0xfee0_0000;
const VECTOR: u16 = 0xd0;
const UNHANDLED: &str = "No irq handler for";
const PAGE: u64 = 4096;
const BAR0_BYTES: u64 = PAGE;
/// As much of the function's memory as is used here.
const VRAM_BYTES: u64 = 128 << 20;
/// The pages of this program that the function reaches: data to be sent, data that comes back, the
/// memirq page, a word.
const RETURNED: u64 = DATA_BYTES;
const MEMIRQ: u64 = 2 * DATA_BYTES;
const WORD: u64 = MEMIRQ + PAGE;
const MEMORY_BYTES: u64 = WORD + PAGE;
/// How long an interrupt may take. None takes this long but one that does not come.
const WAIT: Duration = Duration::from_secs(20);
/// Copies of the last phase that are proof of the guest's being at work.
const BUSY_COPIES: u64 = 4;

/// Runs as a guest's first process. When it ends, so does the guest.
pub fn run() -> io::Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        mount(kind, target, kind, MountFlags::empty(), None)?;
    }
    let words = File::options().read(true).write(true).open(WORDS)?;
    let tell = |event: &Event| -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        (&words).write_all(&line)
    };
    let mut driver = match Driver::probe() {
        Ok(driver) => driver,
        Err(error) => {
            let cause = error.to_string();
            return tell(&Event::Failed { cause });
        }
    };
    tell(&Event::Ready {
        guest: GuestKind::Linux,
        why: fs::read_to_string("/proc/version").ok(),
    })?;
    let mut phases = Phase::ALL.into_iter();
    for line in BufReader::new(&words).lines() {
        match line?.trim() {
            "go" => {}
            "leave" => break,
            _ => continue,
        }
        let Some(phase) = phases.next() else { break };
        let event = driver.event(phase);
        tell(&event)?;
        if phase == Phase::Busy {
            // Until it is killed.
            while driver
                .copy(VRAM_DATA, Place::Ram(RETURNED), PAGE as u32)
                .is_ok()
            {}
        }
    }
    Ok(())
}

/// Interrupts taken at the end of a phase; none is counted in the last.
pub(in crate::demo) fn interrupts_after(phase: Phase) -> u64 {
    let dma = 2 * DATA_BYTES / PAGE;
    match phase {
        Phase::Registers => 0,
        Phase::Dma => dma,
        Phase::Interrupts => dma + ROUNDS,
        Phase::Stray | Phase::Busy => dma + ROUNDS + 1,
    }
}

/// What a phase met.
enum Trouble {
    /// What was waited for did not come.
    Missing(String),
    /// Something was not as it must be.
    Wrong(String),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Wrong(error.to_string())
    }
}

/// Where a copy goes.
#[derive(Clone, Copy)]
enum Place {
    /// Into this program's memory, at this offset.
    Ram(u64),
    /// To this DMA address, whatever is there.
    Address(u64),
    /// From this program's memory into the function's.
    FromRam(u64),
}

struct Driver {
    config: File,
    bar0: MappedAperture,
    vram: MappedAperture,
    ram: MappedAperture,
    /// The physical address of each page of `ram`.
    pages: Vec<u64>,
    interrupts: u64,
}

impl Driver {
    fn probe() -> io::Result<Self> {
        let device = find()?;
        let open = |name: &str| {
            let path = device.join(name);
            let opened = File::options().read(true).write(true).open(&path);
            opened.map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
        };
        let bar = |name: &str, bytes| MappedAperture::memory(open(name)?.as_fd(), 0, bytes);
        let fd = memfd_create("dma", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, MEMORY_BYTES)?;
        let ram = MappedAperture::memory(fd.as_fd(), 0, MEMORY_BYTES)?;
        // A page is there once it was stored to.
        (0..MEMORY_BYTES / PAGE).for_each(|page| ram.write_u64(page * PAGE, 0));
        Ok(Self {
            config: open("config")?,
            bar0: bar("resource0", BAR0_BYTES)?,
            vram: bar("resource2", VRAM_BYTES)?,
            pages: physical_pages(&ram)?,
            ram,
            interrupts: 0,
        })
    }

    fn event(&mut self, phase: Phase) -> Event {
        let done = match phase {
            Phase::Registers => self.registers(),
            Phase::Dma => self.dma(),
            Phase::Interrupts => self.interrupts(),
            Phase::Stray => self.stray(),
            Phase::Busy => (0..BUSY_COPIES)
                .try_for_each(|_| self.copy(VRAM_DATA, Place::Ram(RETURNED), PAGE as u32)),
        };
        let interrupts = self.interrupts;
        let (waits, cause) = match done {
            Ok(()) => {
                let checksums = [0, RETURNED].map(|at| self.checksum(at));
                return Event::Done {
                    phase,
                    interrupts,
                    checksums,
                };
            }
            Err(Trouble::Missing(cause)) => (true, cause),
            Err(Trouble::Wrong(cause)) => (false, cause),
        };
        Event::Broken {
            phase,
            interrupts,
            waits,
            cause,
        }
    }

    fn checksum(&self, at: u64) -> u32 {
        let mut data = vec![0; DATA_BYTES as usize];
        self.ram.read(at, &mut data);
        crc32c::crc32c(&data)
    }

    fn registers(&mut self) -> Result<(), Trouble> {
        let command = (COMMAND_MEMORY | COMMAND_MASTER).to_le_bytes();
        self.config.write_all_at(&command, COMMAND.into())?;
        expect(
            "its identity",
            self.bar0.read_u32(ARC_IDENT).into(),
            ARC_IDENT_VALUE.into(),
        )?;
        self.bar0.write_u64(ARC_SCRATCH, SCRATCH_VALUE);
        expect("a register", self.bar0.read_u64(ARC_SCRATCH), SCRATCH_VALUE)?;
        self.vram.write_u64(VRAM_SECRET, SCRATCH_VALUE);
        expect("its memory", self.vram.read_u64(VRAM_SECRET), SCRATCH_VALUE)?;
        self.config.write_all_at(&APIC.to_le_bytes(), MSI + 4)?;
        self.config.write_all_at(&[0; 4], MSI + 8)?;
        self.config.write_all_at(&VECTOR.to_le_bytes(), MSI + 0xc)?;
        self.config.write_all_at(&[1, 0], MSI + 2)?;
        self.ram
            .write(MEMIRQ + ARC_MEMIRQ_ENABLE, &1u32.to_le_bytes());
        self.bar0.write_u64(ARC_MEMIRQ, self.physical(MEMIRQ));
        Ok(())
    }

    fn physical(&self, at: u64) -> u64 {
        self.pages[(at / PAGE) as usize] + at % PAGE
    }

    /// One copy, at most a page, until its status is there.
    fn copy(&mut self, vram: u64, place: Place, bytes: u32) -> Result<(), Trouble> {
        let (source, destination, flags) = match place {
            Place::Ram(at) => (vram, self.physical(at), ARC_FROM_VRAM),
            Place::Address(address) => (vram, address, ARC_FROM_VRAM),
            Place::FromRam(at) => (self.physical(at), vram, ARC_TO_VRAM),
        };
        self.bar0.write_u64(ARC_SOURCE, source);
        self.bar0.write_u64(ARC_DESTINATION, destination);
        self.bar0.write(ARC_LENGTH, &bytes.to_le_bytes());
        self.bar0.write(ARC_FLAGS, &flags.to_le_bytes());
        self.bar0.write(ARC_DOORBELL, &1u32.to_le_bytes());
        let deadline = Instant::now() + WAIT;
        while self.take(ARC_MEMIRQ_SOURCE) != 0xff {
            if Instant::now() >= deadline {
                let seconds = WAIT.as_secs();
                return Err(Trouble::Missing(format!("no status after {seconds} s")));
            }
            std::hint::spin_loop();
        }
        self.interrupts += 1;
        // The source is written behind the status, and that behind the data.
        expect("the status", self.take(ARC_MEMIRQ_STATUS).into(), 0xff)
    }

    /// A byte of the memirq page, cleared where it is set.
    fn take(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.ram.read(MEMIRQ + offset, &mut byte);
        if byte != [0] {
            self.ram.write(MEMIRQ + offset, &[0]);
        }
        byte[0]
    }

    fn dma(&mut self) -> Result<(), Trouble> {
        for at in (0..DATA_BYTES).step_by(8) {
            let word = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.ram.write_u64(at, word);
        }
        for at in (0..DATA_BYTES).step_by(PAGE as usize) {
            self.copy(VRAM_DATA + at, Place::FromRam(at), PAGE as u32)?;
            self.copy(VRAM_DATA + at, Place::Ram(RETURNED + at), PAGE as u32)?;
            expect(
                "its end",
                self.bar0.read_u32(ARC_STATUS).into(),
                STATUS_DONE.into(),
            )?;
        }
        Ok(())
    }

    fn interrupts(&mut self) -> Result<(), Trouble> {
        for round in 1..=ROUNDS {
            let vram = VRAM_WORDS + 8 * round;
            let word = 0xc0de_0000 + round;
            self.vram.write_u64(vram, word);
            self.copy(vram, Place::Ram(WORD), 8)?;
            expect("the data behind a status", self.ram.read_u64(WORD), word)?;
        }
        match unhandled()? {
            (0, last) => {
                let cause = format!("the kernel's log tells of no MSI; it ends with {last:?}");
                Err(Trouble::Missing(cause))
            }
            _ => Ok(()),
        }
    }

    fn stray(&mut self) -> Result<(), Trouble> {
        self.copy(VRAM_WORDS + 8, Place::Address(STRAY), 8)?;
        let status = self.bar0.read_u32(ARC_STATUS).into();
        expect("the end of a stray copy", status, STATUS_FAILED.into())
    }
}

fn expect(what: &str, read: u64, expected: u64) -> Result<(), Trouble> {
    match read == expected {
        true => Ok(()),
        false => Err(Trouble::Wrong(format!(
            "the guest read {read:#x} as {what}, and not {expected:#x}"
        ))),
    }
}

fn find() -> io::Result<PathBuf> {
    let is = |device: &Path, name: &str, id: u16| {
        let told = fs::read_to_string(device.join(name)).unwrap_or_default();
        told.trim() == format!("{id:#06x}")
    };
    for entry in fs::read_dir(DEVICES)? {
        let device = entry?.path();
        if is(&device, "vendor", ARC_IDS.vendor) && is(&device, "device", ARC_IDS.device) {
            return Ok(device);
        }
    }
    Err(io::Error::other("the guest's kernel shows no 8086:e212"))
}

/// Linux's admin-guide/mm/pagemap.rst: 64 bits for each page, bit 63 = present, 0 to 54 its number.
fn physical_pages(ram: &MappedAperture) -> io::Result<Vec<u64>> {
    const PRESENT: u64 = 1 << 63;
    const NUMBER: u64 = (1 << 55) - 1;
    let mapping = ram.mapping().ok_or(io::ErrorKind::Unsupported)?;
    let first = mapping.addr().addr().get() as u64 / PAGE;
    let pagemap = File::open("/proc/self/pagemap")?;
    let page = |index: u64| {
        let mut word = [0; 8];
        pagemap.read_exact_at(&mut word, 8 * (first + index))?;
        let word = u64::from_le_bytes(word);
        match (word & PRESENT != 0, word & NUMBER) {
            (true, number) if number != 0 => Ok(number * PAGE),
            _ => Err(io::Error::other("the kernel does not tell where a page is")),
        }
    };
    (0..ram.len() / PAGE).map(page).collect()
}

/// How many lines of the kernel's log tell of an interrupt that nobody handles, and the last line.
fn unhandled() -> io::Result<(usize, String)> {
    let mut log = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open("/dev/kmsg")?;
    let (mut lines, mut record, mut last) = (0, [0; 8192], String::new());
    loop {
        match log.read(&mut record) {
            Ok(count) => {
                last = String::from_utf8_lossy(&record[..count]).into_owned();
                lines += usize::from(last.contains(UNHANDLED));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok((lines, last)),
            // Older records went while they were read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error),
        }
    }
}
