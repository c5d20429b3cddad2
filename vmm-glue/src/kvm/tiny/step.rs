//! What the tiny guest can do: one step each, as it is told in Rust and as it lies in memory.

use super::layout::{FAULT, FAULT_STEP, MISMATCH, STEP_BYTES};

/// The numbers of the operations in memory.
pub(super) mod op {
    pub const LOAD: u64 = 1;
    pub const STORE: u64 = 2;
    pub const EXPECT: u64 = 3;
    pub const POLL: u64 = 4;
    pub const INTERRUPTS: u64 = 5;
    pub const EXIT: u64 = 6;
}

/// How wide an access is, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    One = 1,
    /// 16 bits.
    Two = 2,
    /// 32 bits.
    Four = 4,
    /// 64 bits.
    Eight = 8,
}

/// A step of the guest's program; addresses are guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// One load. Its value is kept, zero-extended, for `Tiny::results`.
    Load(u64, Width),
    /// One store of the value's low bytes.
    Store(u64, Width, u64),
    /// Goes on if 32 bits at the address are the value under the mask; else the guest ends with
    /// [`Verdict::Mismatch`].
    Expect {
        /// Where.
        address: u64,
        /// Which bits.
        mask: u32,
        /// What they must be.
        value: u32,
    },
    /// Loads 32 bits until they are the value under the mask.
    Poll {
        /// Where.
        address: u64,
        /// Which bits.
        mask: u32,
        /// What they will be.
        value: u32,
    },
    /// Halts until the vector was taken at least so often since the start.
    Interrupts(u8, u64),
    /// Ends with this code, under `0x1000_0000`.
    Exit(u32),
}

/// How the guest itself says that it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All steps done.
    Done,
    /// A [`Step::Exit`] with this code.
    Code(u32),
    /// This step expected something else.
    Mismatch(u32),
    /// This exception.
    Exception(u32),
    /// It met a step that is none: its memory was overwritten.
    NoStep,
}

impl Step {
    /// A 32-bit load.
    pub fn load(address: u64) -> Self {
        Self::Load(address, Width::Four)
    }

    /// A 32-bit store.
    pub fn store(address: u64, value: u32) -> Self {
        Self::Store(address, Width::Four, value.into())
    }

    /// A 64-bit store.
    pub fn store64(address: u64, value: u64) -> Self {
        Self::Store(address, Width::Eight, value)
    }

    /// All 32 bits have to be so.
    pub fn expect(address: u64, value: u32) -> Self {
        Self::Expect {
            address,
            mask: u32::MAX,
            value,
        }
    }

    /// As it lies in memory.
    pub(super) fn bytes(self) -> [u8; STEP_BYTES as usize] {
        let words = match self {
            Self::Load(address, width) => [op::LOAD, address, 0, width as u64],
            Self::Store(address, width, value) => [op::STORE, address, value, width as u64],
            Self::Expect {
                address,
                mask,
                value,
            } => [op::EXPECT, address, value.into(), mask.into()],
            Self::Poll {
                address,
                mask,
                value,
            } => [op::POLL, address, value.into(), mask.into()],
            Self::Interrupts(vector, count) => [op::INTERRUPTS, vector.into(), count, 0],
            Self::Exit(code) => [op::EXIT, 0, code.into(), 0],
        };
        let mut bytes = [0; STEP_BYTES as usize];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

impl Verdict {
    /// From what the guest wrote to its exit port.
    pub fn of(code: u32) -> Self {
        match code {
            0 => Self::Done,
            FAULT_STEP => Self::NoStep,
            code if code & FAULT != 0 => Self::Exception(code & !FAULT),
            code if code & MISMATCH != 0 => Self::Mismatch(code & !MISMATCH),
            code => Self::Code(code),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_lies_in_memory_as_operation_address_value_width() {
        let bytes = Step::Store(0x1234, Width::Two, 0xabcd).bytes();
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| {
                word.iter()
                    .rev()
                    .fold(0, |all, byte| all << 8 | u64::from(*byte))
            })
            .collect();
        assert_eq!(words, [op::STORE, 0x1234, 0xabcd, 2]);
    }

    #[test]
    fn every_exit_code_has_one_meaning() {
        assert_eq!(Verdict::of(0), Verdict::Done);
        assert_eq!(Verdict::of(7), Verdict::Code(7));
        assert_eq!(Verdict::of(MISMATCH), Verdict::Mismatch(0));
        assert_eq!(Verdict::of(MISMATCH | 9), Verdict::Mismatch(9));
        assert_eq!(Verdict::of(FAULT | 14), Verdict::Exception(14));
        assert_eq!(Verdict::of(FAULT_STEP), Verdict::NoStep);
    }
}
