//! What the demonstration's guest does, step by step, as a driver of the device would.
//!
//! It stops before each phase at its gate, a word of its memory that the VMM sets, and marks each
//! phase that it has done in another. Every copy of the device ends with an interrupt, which the
//! guest halts for.

use serde::{Deserialize, Serialize};
use vfio_shim::ntb::soft::{
    ARC_DESTINATION, ARC_DOORBELL, ARC_FLAGS, ARC_FROM_VRAM, ARC_IDENT, ARC_IDENT_VALUE,
    ARC_LENGTH, ARC_MEMIRQ, ARC_MEMIRQ_ENABLE, ARC_MEMIRQ_SOURCE, ARC_MEMIRQ_STATUS, ARC_SCRATCH,
    ARC_SOURCE, ARC_STATUS, ARC_TO_VRAM, STATUS_DONE, STATUS_FAILED, TRANSFER_BYTES_MAX,
};
use vmm_glue::kvm::tiny::{self, Step, Width};

/// The guest's memory.
pub const RAM_BYTES: u64 = 16 << 20;
/// Where the guest finds the function.
pub const CONFIG: u64 = 0xe000_0000;
pub const BAR0: u64 = 0xd000_0000;
pub const BAR2: u64 = 1 << 32;
/// Its MSI capability, where the seed document's lspci shows it.
const MSI: u64 = CONFIG + 0xac;
/// The vector that the MSI raises.
pub const VECTOR: u8 = 0x50;

/// Gate and mark; the memirq page; the data that DMA carries, there and back.
pub const GATE: u64 = tiny::FREE;
pub const MARK: u64 = tiny::FREE + 8;
const MEMIRQ: u64 = tiny::FREE + 0x2000;
const WORD: u64 = tiny::FREE + 0x3000;
pub const SENT: u64 = 4 << 20;
pub const RETURNED: u64 = 8 << 20;
pub const DATA_BYTES: u64 = 1 << 20;
/// Where in the VF's memory the data lies meanwhile, and the words of the interrupts' phase.
pub const VRAM_DATA: u64 = 64 << 20;
pub const VRAM_WORDS: u64 = 32 << 20;
/// What is left in a register and in the VF's memory for the next tenant to look for.
pub const SCRATCH_VALUE: u64 = 0x5ec2_e7da_7a00_4a01;
pub const VRAM_SECRET: u64 = 16 << 20;
/// Outside of the guest's memory.
pub const STRAY: u64 = 0x8000_0000;

/// Rounds of the phase that counts interrupts, and of the one that is never finished.
pub const ROUNDS: u64 = 100;
const BUSY_ROUNDS: u64 = 1000;

/// What the guest does between two gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Decoding, bus mastering, MSI, registers, memory.
    Registers,
    /// Data to the VF and back.
    Dma,
    /// An interrupt behind each of many words.
    Interrupts,
    /// DMA to where there is no memory of its own.
    Stray,
    /// Copies without end.
    Busy,
}

impl Phase {
    pub const ALL: [Self; 5] = [
        Self::Registers,
        Self::Dma,
        Self::Interrupts,
        Self::Stray,
        Self::Busy,
    ];

    /// What gate and mark hold for it.
    pub fn word(self) -> u32 {
        self as u32 + 1
    }
}

/// The program, and where each phase of it begins.
pub struct Program {
    pub steps: Vec<Step>,
    starts: Vec<(usize, Phase)>,
    copies: u64,
}

impl Program {
    pub fn new() -> Self {
        let mut this = Self {
            steps: Vec::new(),
            starts: Vec::new(),
            copies: 0,
        };
        for phase in Phase::ALL {
            this.starts.push((this.steps.len(), phase));
            this.steps.push(Step::Poll {
                address: GATE,
                mask: u32::MAX,
                value: phase.word(),
            });
            match phase {
                Phase::Registers => this.registers(),
                Phase::Dma => this.dma(),
                Phase::Interrupts => this.interrupts(),
                Phase::Stray => this.stray(),
                Phase::Busy => this.busy(),
            }
            this.steps.push(Step::store(MARK, phase.word()));
        }
        this
    }

    /// Which phase a step belongs to.
    pub fn phase_of(&self, step: usize) -> Phase {
        let started = self.starts.iter().rev().find(|(start, _)| *start <= step);
        started.map_or(Phase::Registers, |(_, phase)| *phase)
    }

    /// Interrupts taken at the end of a phase; none is counted in the last.
    pub fn interrupts_after(phase: Phase) -> u64 {
        let dma = 2 * DATA_BYTES / u64::from(TRANSFER_BYTES_MAX);
        match phase {
            Phase::Registers => 0,
            Phase::Dma => dma,
            Phase::Interrupts => dma + ROUNDS,
            Phase::Stray | Phase::Busy => dma + ROUNDS + 1,
        }
    }

    fn registers(&mut self) {
        let message = tiny::message(VECTOR);
        self.steps.extend([
            Step::Store(CONFIG + 4, Width::Two, 6),
            Step::expect(BAR0 + ARC_IDENT, ARC_IDENT_VALUE),
            Step::expect(CONFIG + 0x1c, (BAR2 >> 32) as u32),
            Step::store64(BAR0 + ARC_SCRATCH, SCRATCH_VALUE),
            Step::expect(BAR0 + ARC_SCRATCH, SCRATCH_VALUE as u32),
            Step::expect(BAR0 + ARC_SCRATCH + 4, (SCRATCH_VALUE >> 32) as u32),
            Step::store64(BAR2 + VRAM_SECRET, SCRATCH_VALUE),
            Step::expect(BAR2 + VRAM_SECRET, SCRATCH_VALUE as u32),
            Step::store(MSI + 4, message.address as u32),
            Step::store(MSI + 8, 0),
            Step::Store(MSI + 0xc, Width::Two, message.data.into()),
            Step::Store(MSI + 2, Width::Two, 1),
            Step::store(MEMIRQ + ARC_MEMIRQ_ENABLE, 1),
            Step::store64(BAR0 + ARC_MEMIRQ, MEMIRQ),
        ]);
    }

    /// One copy, and its interrupt.
    fn copy(&mut self, from: u64, to: u64, bytes: u32, flags: u32) {
        self.copies += 1;
        self.steps.extend([
            Step::store64(BAR0 + ARC_SOURCE, from),
            Step::store64(BAR0 + ARC_DESTINATION, to),
            Step::store(BAR0 + ARC_LENGTH, bytes),
            Step::store(BAR0 + ARC_FLAGS, flags),
            Step::store(BAR0 + ARC_DOORBELL, 1),
            Step::Interrupts(VECTOR, self.copies),
        ]);
    }

    fn dma(&mut self) {
        for (from, to, flags) in [
            (SENT, VRAM_DATA, ARC_TO_VRAM),
            (VRAM_DATA, RETURNED, ARC_FROM_VRAM),
        ] {
            for at in (0..DATA_BYTES).step_by(TRANSFER_BYTES_MAX as usize) {
                self.copy(from + at, to + at, TRANSFER_BYTES_MAX, flags);
                self.steps
                    .push(Step::expect(BAR0 + ARC_STATUS, STATUS_DONE));
            }
        }
        self.take_status(false);
    }

    /// Takes the bytes of the memirq page; looks first whether they are there.
    fn take_status(&mut self, look: bool) {
        for at in [ARC_MEMIRQ_SOURCE, ARC_MEMIRQ_STATUS].map(|offset| MEMIRQ + offset) {
            let bits = 0xff << (8 * (at & 3));
            if look {
                self.steps.push(Step::Expect {
                    address: at & !3,
                    mask: bits,
                    value: bits,
                });
            }
            self.steps.push(Step::Store(at, Width::One, 0));
        }
    }

    fn interrupts(&mut self) {
        for round in 1..=ROUNDS {
            let vram = VRAM_WORDS + 8 * round;
            self.steps.push(Step::store64(BAR2 + vram, word(round)));
            self.copy(vram, WORD, 8, ARC_FROM_VRAM);
            // No poll: what the device wrote is there, status and data.
            self.take_status(true);
            self.steps.push(Step::expect(WORD, word(round) as u32));
        }
    }

    fn stray(&mut self) {
        self.copy(VRAM_WORDS + 8, STRAY, 8, ARC_FROM_VRAM);
        self.steps
            .push(Step::expect(BAR0 + ARC_STATUS, STATUS_FAILED));
    }

    fn busy(&mut self) {
        for _ in 0..BUSY_ROUNDS {
            self.copy(VRAM_DATA, RETURNED, TRANSFER_BYTES_MAX, ARC_FROM_VRAM);
        }
    }
}

/// The word of a round of the interrupts' phase.
fn word(round: u64) -> u64 {
    0xc0de_0000 + round
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_fits_and_its_counts_are_those_of_its_copies() {
        let program = Program::new();
        assert!(program.steps.len() < tiny::STEPS_MAX);
        let copies = Program::interrupts_after(Phase::Stray) + BUSY_ROUNDS;
        assert_eq!(program.copies, copies);
        let last = program.steps.len() - 1;
        assert_eq!(program.phase_of(last), Phase::Busy);
        assert_eq!(program.phase_of(0), Phase::Registers);
    }
}
