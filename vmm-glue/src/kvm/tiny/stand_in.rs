//! Does the tiny guest's steps in a thread of this process, where there is no KVM: one step at a time, as its code does.

use super::layout::{
    APIC, COUNTERS, FAULT, FAULT_STEP, MAPPED_BYTES, MISMATCH, RESULTS, STEP_BYTES, STEPS,
};
use super::step::op;
use crate::kvm::memory::Memory;
use crate::kvm::{Bus, Ended, Ram, RunError, VcpuThread};
use rustix::event::Timespec;
use std::sync::atomic::{AtomicBool, Ordering};
use vfio_shim::model::Span;

/// The vector of a page fault.
const PAGE_FAULT: u32 = 14;
const APIC_BYTES: u64 = 4096;
/// How long an interrupt is waited for before the next look at the stop flag.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

struct StandIn {
    memory: Memory,
    span: Span,
    bus: Bus,
    result: u64,
}

/// What a step came to: the next one, the same again, or the end.
enum Next {
    Step,
    Again,
    End(u32),
}

/// Starts the steps that lie in the guest's memory.
pub fn start(ram: &Ram, bus: Bus) -> Result<VcpuThread, RunError> {
    let span = ram.span();
    let memory = Memory::new(ram.fd(), 0, span.len(), span.start())
        .map_err(RunError::kernel("map the guest's memory"))?;
    let mut guest = StandIn {
        memory,
        span,
        bus,
        result: RESULTS,
    };
    VcpuThread::spawn(move |stop| guest.run(stop))
}

impl StandIn {
    fn run(&mut self, stop: &AtomicBool) -> Ended {
        let mut at = STEPS;
        while !stop.load(Ordering::Acquire) {
            self.take_interrupts(None);
            let step = [0, 8, 16, 24].map(|word| self.load(at + word, 8));
            match self.step(step, at) {
                Next::Step => at += STEP_BYTES,
                Next::Again => std::thread::yield_now(),
                Next::End(code) => return Ended::Exit(code),
            }
        }
        Ended::Killed
    }

    fn step(&mut self, [operation, address, value, mask]: [u64; 4], at: u64) -> Next {
        let reaches = matches!(operation, op::LOAD | op::STORE | op::EXPECT | op::POLL);
        if reaches && address >= MAPPED_BYTES {
            return Next::End(FAULT | PAGE_FAULT);
        }
        let is_so = |word: u64| word & mask == value;
        match operation {
            op::LOAD => {
                let loaded = self.load(address, mask as usize);
                self.store(self.result, 8, loaded);
                self.result += 8;
                Next::Step
            }
            op::STORE => {
                self.store(address, mask as usize, value);
                Next::Step
            }
            op::EXPECT if is_so(self.load(address, 4)) => Next::Step,
            op::EXPECT => Next::End(MISMATCH | ((at - STEPS) / STEP_BYTES) as u32),
            op::POLL if is_so(self.load(address, 4)) => Next::Step,
            op::POLL => Next::Again,
            op::INTERRUPTS if self.load(COUNTERS + 8 * address, 8) >= value => Next::Step,
            op::INTERRUPTS => {
                self.take_interrupts(Some(&LOOK));
                Next::Again
            }
            op::EXIT => Next::End(value as u32),
            _ => Next::End(FAULT_STEP),
        }
    }

    /// Counts what is due, as the guest's handler does.
    fn take_interrupts(&self, wait: Option<&Timespec>) {
        for attachment in &self.bus.attachments {
            for message in attachment.take_due(wait) {
                let counter = COUNTERS + 8 * u64::from(message.data as u8);
                let count = self.load(counter, 8);
                self.store(counter, 8, count + 1);
            }
        }
    }

    /// The local APIC has nothing to say here.
    fn is_apic(address: u64) -> bool {
        (APIC..APIC + APIC_BYTES).contains(&address)
    }

    fn load(&self, address: u64, width: usize) -> u64 {
        let mut word = [0; 8];
        let data = &mut word[..width.min(8)];
        let offset = address.wrapping_sub(self.span.start());
        if !self.memory.read(offset, data) && !Self::is_apic(address) {
            let slot = self
                .bus
                .attachments
                .iter()
                .find_map(|one| one.load(address, data.len()));
            match slot {
                Some(loaded) => data.copy_from_slice(&loaded[..data.len()]),
                None => self.bus.read(address, data),
            }
        }
        u64::from_le_bytes(word)
    }

    fn store(&self, address: u64, width: usize, value: u64) {
        let word = value.to_le_bytes();
        let data = &word[..width.min(8)];
        let offset = address.wrapping_sub(self.span.start());
        if !self.memory.write(offset, data) && !Self::is_apic(address) {
            let mut attachments = self.bus.attachments.iter();
            if !attachments.any(|one| one.store(address, data)) {
                self.bus.write(address, data);
            }
        }
    }
}
