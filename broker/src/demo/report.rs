//! What the demonstration reports: steps with times, figures, and which claim broke.

use super::claim::{Claim, DemoError};
use super::vmm::GuestKind;
use serde::Serialize;

/// A claim that held.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Which.
    pub claim: Claim,
    /// What it says.
    pub says: &'static str,
    /// How long it took, milliseconds.
    pub ms: f64,
    /// What was seen, line by line.
    pub shown: Vec<String>,
}

/// A claim that did not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Broken {
    /// Which; none where it could not get so far.
    pub claim: Option<Claim>,
    /// In words.
    pub cause: String,
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// VFs made.
    pub vfs: usize,
    /// Bytes that DMA carried to the VF and back.
    pub dma_bytes: u64,
    /// Interrupts that the guest took until it was let loose.
    pub interrupts: u64,
    /// Stores of the VF that the fabric held back meanwhile.
    pub stores_held: u64,
    /// Loads and stores of the guest to BARs, each a message.
    pub register_accesses: u64,
    /// Where the refused DMA aimed.
    pub refused_address: Option<u64>,
    /// The most anonymous memory seen in this process, bytes.
    pub rss_anon_bytes: u64,
    /// The same of the VMM.
    pub vmm_rss_anon_bytes: u64,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Whether every claim holds.
    pub holds: bool,
    /// What ran the guest, once one ran.
    pub guest: Option<GuestKind>,
    /// Why it was no VM, if so.
    pub guest_why: Option<String>,
    /// QEMU's version, where it runs a Linux guest.
    pub qemu: Option<String>,
    /// What held, in order.
    pub steps: Vec<Step>,
    /// What did not.
    pub broken: Option<Broken>,
    /// What was counted.
    pub figures: Figures,
    /// How long all of it took, milliseconds.
    pub ms: f64,
}

impl From<&DemoError> for Broken {
    fn from(error: &DemoError) -> Self {
        match error {
            DemoError::Broken { claim, cause } => Self {
                claim: Some(*claim),
                cause: cause.clone(),
            },
            other => Self {
                claim: None,
                cause: other.to_string(),
            },
        }
    }
}
