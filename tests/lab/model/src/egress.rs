//! What one half has under way to its peer, in PCIe order: nothing overtakes a posted write.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::wire::Header;

/// Entries that may wait; beyond that the half's socket is not read until some are done.
pub const EGRESS_MAX: usize = 4096;
/// Pause before a DMA message is sent again.
pub const RETRY_PAUSE: Duration = Duration::from_micros(200);
/// How long the peer's QEMU may take for one DMA message: less than the 5 s after which the
/// client that waits for it gives up its stream.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a device that is busy with its own DMA is asked again.
pub const BUSY_TIMEOUT: Duration = Duration::from_secs(1);
/// How often any other refusal is asked again.
pub const REFUSED_TRIES: u32 = 3;

/// One access on its way to the peer.
#[derive(Debug)]
pub enum Access {
    WindowRead {
        request: Header,
        prefix: [u8; 16],
        window: usize,
        offset: u64,
        count: usize,
    },
    WindowWrite {
        window: usize,
        offset: u64,
        data: Vec<u8>,
    },
    Ring {
        doorbells: u32,
    },
    SpadRead {
        request: Header,
        prefix: [u8; 16],
        offset: u16,
        count: u16,
    },
    SpadWrite {
        offset: u16,
        count: u16,
        value: u64,
    },
}

/// A DMA message that the first access in the queue waits for.
#[derive(Debug)]
pub struct InFlight {
    /// Id of the message on the peer's socket.
    pub id: u16,
    pub address: u64,
    pub started: Instant,
    pub tries: u32,
    /// Set while waiting to send again.
    pub retry_at: Option<Instant>,
}

impl InFlight {
    /// When something has to be done without an answer.
    pub fn deadline(&self) -> Instant {
        self.retry_at.unwrap_or(self.started + REPLY_TIMEOUT)
    }

    /// Whether an error reply is worth another try. QEMU refuses an access to a device that
    /// itself waits for the NTB with EPERM ("Blocked re-entrant IO"); it soon will not.
    pub fn may_retry(&self, errno: u32, now: Instant) -> bool {
        if errno == libc::EPERM.unsigned_abs() {
            now < self.started + BUSY_TIMEOUT
        } else {
            self.tries < REFUSED_TRIES
        }
    }
}

/// The queue.
#[derive(Debug, Default)]
pub struct Egress {
    pub queue: VecDeque<Access>,
    pub in_flight: Option<InFlight>,
}

impl Egress {
    /// True when no more requests should be taken from this half's client.
    pub fn is_full(&self) -> bool {
        self.queue.len() >= EGRESS_MAX
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
