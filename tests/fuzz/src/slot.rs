//! Any slot that a peer writes is waited for, passed over, a message that can be sent again, or a violation in words.

use vfio_shim::path::message::Message;
use vfio_shim::path::wire::{
    PAYLOAD_BYTES_MAX, SLOT_BYTES, STATUS_BYTES, SlotFinding, StatusLine, check_slot, encode_slot,
    irq_count, irq_word, slot_used_bytes,
};

/// The session of a slot that is laid out as a peer would.
const SESSION: u64 = 0x5e55_1011;

fn message(op: u16, payload: &[u8]) {
    match Message::decode(op, payload) {
        Ok(message) => {
            let (again, bytes) = message.encode().expect("what came can be sent");
            let told = Message::decode(again, &bytes).expect("what was sent is understood");
            assert_eq!(told, message);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn slot(slot: &[u8; SLOT_BYTES], session: u64) {
    if let SlotFinding::Message { op, payload, .. } = check_slot(slot, session) {
        message(op, payload);
    }
}

/// As it stands, and as the payload of a message that is laid out well, whose op comes first.
pub(super) fn target(bytes: &[u8]) {
    let mut raw = [0; SLOT_BYTES];
    let some = bytes.len().min(SLOT_BYTES);
    raw[..some].copy_from_slice(&bytes[..some]);
    let mut session = [0; 8];
    session.copy_from_slice(&raw[..8]);
    slot(&raw, u64::from_le_bytes(session));
    let mut line = [0; STATUS_BYTES];
    line.copy_from_slice(&raw[..STATUS_BYTES]);
    if let Some(read) = StatusLine::decode(&line) {
        assert_eq!(StatusLine::decode(&read.encode()), Some(read));
    }
    assert!(slot_used_bytes(&raw) <= SLOT_BYTES);
    interrupt(u64::from_le_bytes(session), raw[8]);
    if let Some((op, payload)) = bytes.split_first_chunk() {
        laid_out(u16::from_le_bytes(*op), payload);
    }
}

/// A word of the interrupt table counts for its own session alone.
fn interrupt(word: u64, count: u8) {
    if let Some(count) = irq_count(word, SESSION) {
        assert_eq!(irq_word(SESSION, count), word);
    }
    let ours = irq_word(SESSION, count.into());
    assert_eq!(irq_count(ours, SESSION), Some(count.into()));
    assert_eq!(irq_count(ours, SESSION + 1), None);
}

/// A payload that is too long is not sent; one that is, is a message of its session alone, and none
/// where a byte of it came differently.
fn laid_out(op: u16, payload: &[u8]) {
    let mut whole = match encode_slot(SESSION, 1, 0, op, payload) {
        Ok(whole) if payload.len() <= PAYLOAD_BYTES_MAX => whole,
        refused => return assert!(refused.is_err() && payload.len() > PAYLOAD_BYTES_MAX),
    };
    slot(&whole, SESSION);
    let other = check_slot(&whole, SESSION + 1);
    assert!(!matches!(other, SlotFinding::Message { .. }));
    let at = payload.len() % slot_used_bytes(&whole);
    whole[at] ^= op as u8 | 1;
    let torn = check_slot(&whole, SESSION);
    assert!(!matches!(torn, SlotFinding::Message { .. }));
}
