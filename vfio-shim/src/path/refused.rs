//! What the peer said of one lease and was not done, counted: damaged and foreign messages, and requests that were refused.

use super::message::Message;
use super::plan::Owner;
use super::wire::{PAYLOAD_OFFSET, SLOT_BYTES};

/// Of one lease, since it began. An honest peer's share is small: what it says too late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Looks at a damaged message.
    pub torn: u64,
    /// Looks at a message of another session.
    pub foreign: u64,
    /// Requests refused before anything was done for them.
    pub requests: u64,
}

/// Which of the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedAs {
    /// Damaged.
    Torn,
    /// Of another session.
    Foreign,
    /// A request.
    Request,
}

impl Refused {
    /// One more.
    pub fn count(&mut self, as_what: RefusedAs) {
        let counter = match as_what {
            RefusedAs::Torn => &mut self.torn,
            RefusedAs::Foreign => &mut self.foreign,
            RefusedAs::Request => &mut self.requests,
        };
        *counter = counter.saturating_add(1);
    }
}

/// The lease that a message in the slot names which is not taken. Nothing of it is true: it is
/// counted, and no more.
pub(super) fn named(slot: &[u8; SLOT_BYTES]) -> Option<Owner> {
    // PROTOCOL.md, the slot: op at 24, length at 28.
    let op = u16::from_le_bytes([slot[24], slot[25]]);
    let len = u32::from_le_bytes([slot[28], slot[29], slot[30], slot[31]]) as usize;
    let payload = slot.get(PAYLOAD_OFFSET..PAYLOAD_OFFSET.checked_add(len)?)?;
    let Ok(Message::Request(_, request)) = Message::decode(op, payload) else {
        return None;
    };
    let lease = request.lease()?;
    Some(match request {
        super::message::Request::Revoked { .. } => Owner::Borrowed(lease),
        _ => Owner::Lent(lease),
    })
}
