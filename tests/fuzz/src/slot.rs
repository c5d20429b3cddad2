//! Any slot that a peer writes is waited for, passed over, a message that can be sent again, or a violation in words.

use vfio_shim::path::message::Message;
use vfio_shim::path::wire::{
    PAYLOAD_BYTES_MAX, SLOT_BYTES, STATUS_BYTES, SlotFinding, StatusLine, check_slot, encode_slot,
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
    let Some((op, payload)) = bytes.split_first_chunk() else {
        return;
    };
    let payload = &payload[..payload.len().min(PAYLOAD_BYTES_MAX)];
    let whole = encode_slot(SESSION, 1, 0, u16::from_le_bytes(*op), payload);
    slot(&whole.expect("it is no longer than the most"), SESSION);
}
