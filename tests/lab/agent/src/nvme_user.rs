//! Drives an NVMe function from user space, as a hostile guest would: any DMA address at all.
//!
//! Only the admin queue is used. Identify makes the controller write 4 KiB to the address given,
//! Set Features (timestamp) makes it read 8 bytes from there. No interrupt: completion is polled.
// Registers of a mapped BAR and a queue in DMA memory are only reachable by volatile accesses.
#![allow(unsafe_code)]

use anyhow::{Context, Result, bail, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// NVMe Base Specification 2.0, 3.1.3: controller properties.
const VS: usize = 0x08;
const INTMS: usize = 0x0c;
const CC: usize = 0x14;
const CSTS: usize = 0x1c;
const AQA: usize = 0x24;
const ASQ: usize = 0x28;
const ACQ: usize = 0x30;
const DOORBELLS: usize = 0x1000;

/// CC: 64-byte submission and 16-byte completion entries, enabled.
const CC_ENABLE: u32 = 6 << 16 | 4 << 20 | 1;
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 2;
const OPCODE_SET_FEATURES: u32 = 0x09;
const OPCODE_IDENTIFY: u32 = 0x06;
const IDENTIFY_CONTROLLER: u32 = 1;
const FEATURE_TIMESTAMP: u32 = 0x0e;

const BAR_BYTES: usize = 0x2000;
const HUGE_BYTES: usize = 2 << 20;
const ENTRIES: u32 = 2;
const COMPLETION_OFFSET: usize = 0x1000;
const BUFFER_OFFSET: usize = 0x2000;
const READY_TIMEOUT: Duration = Duration::from_secs(10);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// PCI 3.0, 6.2.2: memory space, and with it bus mastering.
const COMMAND_MEMORY: u16 = 2;
const COMMAND_MASTER: u16 = 4;
const COMMAND_OFFSET: u64 = 4;
/// After the last page fault and before the first trapped access: without it, TCG's nested SVM
/// may lose its way (`KVM internal error. Suberror: 3`). There is no condition to wait for.
const SETTLE: Duration = Duration::from_millis(2);

/// Which way the data goes, seen from the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The controller writes 4 KiB to the address.
    Write,
    /// The controller reads 8 bytes from the address.
    Read,
}

struct Registers(*mut c_void);

impl Registers {
    fn map(bdf: &str, command: u16) -> Result<Self> {
        let dir = format!("/sys/bus/pci/devices/{bdf}");
        let open = |name: &str| {
            let path = format!("{dir}/{name}");
            let file = OpenOptions::new().read(true).write(true).open(&path);
            file.with_context(|| format!("cannot open {path}"))
        };
        open("config")?.write_all_at(&command.to_le_bytes(), COMMAND_OFFSET)?;
        let (prot, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::POPULATE,
        );
        // SAFETY: the kernel chooses the address; the mapping stays until the process ends.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                BAR_BYTES,
                prot,
                flags,
                &open("resource0")?,
                0,
            )
        }
        .context("cannot map BAR 0")?;
        Ok(Registers(base))
    }

    fn read(&self, offset: usize) -> u32 {
        assert!(offset + 4 <= BAR_BYTES);
        // SAFETY: within the mapping, aligned by the constants.
        unsafe {
            self.0
                .wrapping_byte_add(offset)
                .cast::<u32>()
                .read_volatile()
        }
    }

    fn write(&self, offset: usize, value: u32) {
        assert!(offset + 4 <= BAR_BYTES);
        // SAFETY: within the mapping, aligned by the constants.
        unsafe {
            self.0
                .wrapping_byte_add(offset)
                .cast::<u32>()
                .write_volatile(value)
        }
    }

    fn write_address(&self, offset: usize, address: u64) {
        self.write(offset, address as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }

    fn wait_ready(&self, ready: u32) -> Result<()> {
        let deadline = Instant::now() + READY_TIMEOUT;
        while self.read(CSTS) & CSTS_READY != ready {
            ensure!(
                Instant::now() < deadline,
                "CSTS stays at {:#x}",
                self.read(CSTS)
            );
            std::thread::sleep(SETTLE);
        }
        Ok(())
    }
}

/// One hugepage: contiguous for the device, never moved by the kernel.
struct DmaPage {
    base: *mut c_void,
    address: u64,
}

impl DmaPage {
    fn new() -> Result<Self> {
        let (prot, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::POPULATE,
        );
        // SAFETY: the kernel chooses the address; the mapping stays until the process ends.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), HUGE_BYTES, prot, flags) }
            .context("no hugepage (hugepages= on the kernel's command line)")?;
        let page = DmaPage { base, address: 0 };
        page.write_word(0, 0);
        let address = physical_address(base as u64)?;
        Ok(DmaPage { base, address })
    }

    fn read_word(&self, offset: usize) -> u32 {
        assert!(offset + 4 <= HUGE_BYTES);
        // SAFETY: within the page, aligned by the callers' constants.
        unsafe {
            self.base
                .wrapping_byte_add(offset)
                .cast::<u32>()
                .read_volatile()
        }
    }

    fn write_word(&self, offset: usize, value: u32) {
        assert!(offset + 4 <= HUGE_BYTES);
        // SAFETY: within the page, aligned by the callers' constants.
        unsafe {
            self.base
                .wrapping_byte_add(offset)
                .cast::<u32>()
                .write_volatile(value)
        }
    }
}

/// linux/Documentation/admin-guide/mm/pagemap.rst
fn physical_address(address: u64) -> Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / 4096 * 8)?;
    let entry = u64::from_le_bytes(entry);
    ensure!(
        entry & PRESENT != 0 && entry & FRAME != 0,
        "the kernel tells no physical address"
    );
    Ok((entry & FRAME) * 4096)
}

/// Prints the registers that a reset must have put back, as JSON, without touching the function.
pub fn print_registers(bdf: &str) -> Result<()> {
    let registers = Registers::map(bdf, COMMAND_MEMORY)?;
    std::thread::sleep(SETTLE);
    let word = |offset| registers.read(offset);
    let long = |offset| u64::from(word(offset)) | u64::from(word(offset + 4)) << 32;
    let report = serde_json::json!({
        "vs": word(VS), "intms": word(INTMS), "cc": word(CC), "csts": word(CSTS),
        "aqa": word(AQA), "asq": long(ASQ), "acq": long(ACQ),
    });
    println!("{report}");
    Ok(())
}

/// Leaves the controller enabled, with a pattern in its interrupt mask, for a reset to undo.
pub fn leave_running(bdf: &str, pattern: u32) -> Result<()> {
    let registers = Registers::map(bdf, COMMAND_MEMORY | COMMAND_MASTER)?;
    let page = DmaPage::new()?;
    std::thread::sleep(SETTLE);
    enable(&registers, &page)?;
    registers.write(INTMS, pattern);
    Ok(())
}

fn enable(registers: &Registers, page: &DmaPage) -> Result<()> {
    registers.write(CC, 0);
    registers.wait_ready(0)?;
    registers.write(AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1));
    registers.write_address(ASQ, page.address);
    registers.write_address(ACQ, page.address + COMPLETION_OFFSET as u64);
    registers.write(CC, CC_ENABLE);
    registers.wait_ready(CSTS_READY)
}

/// Has the controller do one DMA at the address (or in our own page when none is given) and prints
/// how the command ended, as JSON.
pub fn dma(bdf: &str, direction: Direction, target: Option<u64>) -> Result<()> {
    let registers = Registers::map(bdf, COMMAND_MEMORY | COMMAND_MASTER)?;
    let page = DmaPage::new()?;
    std::thread::sleep(SETTLE);
    enable(&registers, &page)?;
    let own = page.address + BUFFER_OFFSET as u64;
    let target = target.unwrap_or(own);
    submit(&registers, &page, direction, target);
    let status = complete(&registers, &page);
    let csts = registers.read(CSTS);
    registers.write(CC, 0);
    registers.wait_ready(0)?;
    let report = serde_json::json!({
        "address": format!("{target:#x}"),
        "status": status.as_ref().ok(),
        "error": status.as_ref().err().map(ToString::to_string),
        "csts": csts,
        "own_page": format!("{:#x}", page.address),
        "first_word": page.read_word(BUFFER_OFFSET),
    });
    println!("{report}");
    Ok(())
}

fn submit(registers: &Registers, page: &DmaPage, direction: Direction, target: u64) {
    let (opcode, cdw10) = match direction {
        Direction::Write => (OPCODE_IDENTIFY, IDENTIFY_CONTROLLER),
        Direction::Read => (OPCODE_SET_FEATURES, FEATURE_TIMESTAMP),
    };
    const COMMAND_ID: u32 = 1;
    // Submission queue entry: dword 0 opcode and id, 6 and 7 PRP 1, 10 the command's own.
    page.write_word(0, opcode | COMMAND_ID << 16);
    page.write_word(6 * 4, target as u32);
    page.write_word(7 * 4, (target >> 32) as u32);
    page.write_word(10 * 4, cdw10);
    registers.write(DOORBELLS, 1);
}

/// The status field of the completion, without its phase bit: 0 is success.
fn complete(registers: &Registers, page: &DmaPage) -> Result<u32> {
    const PHASE: u32 = 1 << 16;
    let deadline = Instant::now() + COMMAND_TIMEOUT;
    loop {
        let word = page.read_word(COMPLETION_OFFSET + 12);
        if word & PHASE != 0 {
            return Ok(word >> 17);
        }
        let csts = registers.read(CSTS);
        if csts & CSTS_FATAL != 0 || Instant::now() > deadline {
            bail!("no completion, CSTS {csts:#x}");
        }
        std::thread::sleep(SETTLE);
    }
}
