//! The wire between two ports: layouts and checks of PROTOCOL.md, bytes in and values out.

use std::ops::RangeInclusive;

/// The versions of the protocol that this code speaks.
pub const VERSIONS: RangeInclusive<u16> = 1..=1;

/// Size of the mailbox, at the start of every inbound window 0.
pub const MAILBOX_BYTES: u64 = 0x1_0000;
/// Mailbox: the owner's nonce, which the peer's fence reads.
pub const NONCE_OFFSET: u64 = 0x0000;
/// Mailbox: the status line.
pub const STATUS_OFFSET: u64 = 0x0040;
/// Mailbox: the slot.
pub const SLOT_OFFSET: u64 = 0x1000;
/// Mailbox: the interrupt table.
pub const IRQ_TABLE_OFFSET: u64 = 0x4000;
/// Words in the interrupt table: vectors of all paths that borrow through a port.
pub const IRQ_WORDS_MAX: u32 = 4096;
/// Mailbox: the reserved tail.
pub const RESERVED_OFFSET: u64 = 0xc000;

/// Size of the status line.
pub const STATUS_BYTES: usize = 32;
/// Size of the slot.
pub const SLOT_BYTES: usize = 4096;
/// Slot: first byte of the payload.
pub const PAYLOAD_OFFSET: usize = 40;
/// Slot: the commit word, the last store.
pub const COMMIT_OFFSET: usize = 4088;
/// The longest payload.
pub const PAYLOAD_BYTES_MAX: usize = COMMIT_OFFSET - PAYLOAD_OFFSET;

/// How many scratchpads the handshake uses.
pub const SPAD_COUNT: usize = 6;

/// Bell 0: look into the mailbox.
pub const BELL_MAILBOX: u64 = 1 << 0;
/// Bell 1: look into the interrupt table.
pub const BELL_IRQ: u64 = 1 << 1;

/// In a slot's op: this is the reply.
pub const OP_REPLY: u16 = 0x8000;

/// The longest text of a person-readable field, in bytes.
pub const TEXT_BYTES_MAX: usize = 400;

/// Why bytes are no message, or a message is no bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The payload ends too early.
    #[error("the payload ends at byte {0}, in the middle of a field")]
    Short(usize),
    /// The payload goes on after the last field.
    #[error("{0} bytes are left over after the last field")]
    Leftover(usize),
    /// A field has a value that it cannot have.
    #[error("field {field} is {value:#x}, which it cannot be")]
    Field {
        /// The field's name in PROTOCOL.md.
        field: &'static str,
        /// What it is.
        value: u64,
    },
    /// A text is not UTF-8.
    #[error("a text is not UTF-8")]
    Utf8,
    /// More of something than fits.
    #[error("{what} has {count} entries or bytes; {max} are the most")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
        /// The most.
        max: usize,
    },
    /// A request with an op that this version does not know: to be answered with error 1.
    #[error("op {op} is unknown")]
    UnknownOp {
        /// The operation's id, for the answer.
        id: u64,
        /// The op.
        op: u16,
    },
    /// The reply is of another kind than its op's.
    #[error("op {0} has no such reply")]
    ReplyKind(u16),
}

const fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// The id of the session of two nonces; the same from either side. Its low 32 bits are never 0,
/// so that a word of the interrupt table is never 0 once it was written.
pub const fn session_id(one: u64, other: u64) -> u64 {
    let (a, b) = if one <= other {
        (one, other)
    } else {
        (other, one)
    };
    let id = mix(a ^ mix(b).rotate_left(32));
    if id as u32 == 0 { id | 1 } else { id }
}

/// Whether a nonce is one: not 0 (nothing posted), not all ones (nobody there).
pub const fn nonce_is_sound(nonce: u64) -> bool {
    nonce != 0 && nonce != u64::MAX
}

/// What a port posts to the peer's scratchpads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchpadSet {
    /// The poster's nonce.
    pub nonce: u64,
    /// The other's nonce as the poster last read it; 0 = none.
    pub echo: u64,
    /// The highest protocol version the poster speaks.
    pub highest: u16,
    /// The lowest.
    pub lowest: u16,
}

impl ScratchpadSet {
    fn words(&self) -> [u32; SPAD_COUNT] {
        let versions = u32::from(self.highest) << 16 | u32::from(self.lowest);
        [
            self.nonce as u32,
            (self.nonce >> 32) as u32,
            self.echo as u32,
            (self.echo >> 32) as u32,
            versions,
            !versions,
        ]
    }

    /// The stores of a post, in order: (scratchpad, value).
    pub fn stores(&self) -> [(u32, u32); SPAD_COUNT + 1] {
        let w = self.words();
        [
            (5, 0),
            (0, w[0]),
            (1, w[1]),
            (2, w[2]),
            (3, w[3]),
            (4, w[4]),
            (5, w[5]),
        ]
    }

    /// From the own scratchpads; `None` when the set is not complete or has no nonce.
    pub fn decode(words: &[u32; SPAD_COUNT]) -> Option<Self> {
        let [n0, n1, e0, e1, versions, complement] = *words;
        let nonce = u64::from(n1) << 32 | u64::from(n0);
        if versions != !complement || !nonce_is_sound(nonce) {
            return None;
        }
        Some(Self {
            nonce,
            echo: u64::from(e1) << 32 | u64::from(e0),
            highest: (versions >> 16) as u16,
            lowest: versions as u16,
        })
    }
}

/// The bytes at an offset that the layouts above keep inside of `bytes`; past the end they are 0.
fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    if let Some(slice) = bytes.get(offset..offset + N) {
        field.copy_from_slice(slice);
    }
    field
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(field(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(field(bytes, offset))
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(field(bytes, offset))
}

/// The line that says that its writer lives and how far it has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusLine {
    /// The session.
    pub session: u64,
    /// Grows by one at each of the writer's heartbeats.
    pub heartbeat: u64,
    /// The highest seq taken from the other side's slot.
    pub ack: u64,
}

impl StatusLine {
    /// The line's bytes.
    pub fn encode(&self) -> [u8; STATUS_BYTES] {
        let mut line = [0; STATUS_BYTES];
        line[0..8].copy_from_slice(&self.session.to_le_bytes());
        line[8..16].copy_from_slice(&self.heartbeat.to_le_bytes());
        line[16..24].copy_from_slice(&self.ack.to_le_bytes());
        let crc = crc32c::crc32c(&line[..24]);
        line[24..28].copy_from_slice(&crc.to_le_bytes());
        line
    }

    /// From a copy of the line; `None` when it is torn or was never written.
    pub fn decode(line: &[u8; STATUS_BYTES]) -> Option<Self> {
        if crc32c::crc32c(&line[..24]) != u32_at(line, 24) || u32_at(line, 28) != 0 {
            return None;
        }
        Some(Self {
            session: u64_at(line, 0),
            heartbeat: u64_at(line, 8),
            ack: u64_at(line, 16),
        })
    }
}

fn slot_crc(slot: &[u8; SLOT_BYTES], length: usize) -> u32 {
    let head = crc32c::crc32c(&slot[..32]);
    crc32c::crc32c_append(head, &slot[PAYLOAD_OFFSET..PAYLOAD_OFFSET + length])
}

/// The whole slot of one message. The driver stores bytes `0..COMMIT_OFFSET` first and the commit
/// word last.
pub fn encode_slot(
    session: u64,
    seq: u64,
    ack: u64,
    op: u16,
    payload: &[u8],
) -> Result<Box<[u8; SLOT_BYTES]>, WireError> {
    let length = payload.len();
    if length > PAYLOAD_BYTES_MAX {
        return Err(WireError::TooMany {
            what: "payload",
            count: length,
            max: PAYLOAD_BYTES_MAX,
        });
    }
    let mut slot = Box::new([0; SLOT_BYTES]);
    slot[0..8].copy_from_slice(&session.to_le_bytes());
    slot[8..16].copy_from_slice(&seq.to_le_bytes());
    slot[16..24].copy_from_slice(&ack.to_le_bytes());
    slot[24..26].copy_from_slice(&op.to_le_bytes());
    slot[28..32].copy_from_slice(&(length as u32).to_le_bytes());
    slot[PAYLOAD_OFFSET..PAYLOAD_OFFSET + length].copy_from_slice(payload);
    let crc = slot_crc(&slot, length);
    slot[32..36].copy_from_slice(&crc.to_le_bytes());
    slot[COMMIT_OFFSET..].copy_from_slice(&(seq ^ session).to_le_bytes());
    Ok(slot)
}

/// How many bytes of an encoded slot the message fills; all from there to the commit word is 0 and
/// need not cross the NTB.
pub fn slot_used_bytes(slot: &[u8; SLOT_BYTES]) -> usize {
    PAYLOAD_OFFSET + (u32_at(slot, 28) as usize).min(PAYLOAD_BYTES_MAX)
}

/// What a copy of the slot turns out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotFinding<'a> {
    /// Nothing there, or half written: wait.
    Nothing,
    /// A message of another session: ignored.
    OtherSession,
    /// Damaged, or not of this protocol's form: ignored, it will be written again.
    Torn,
    /// A whole message of this session.
    Message {
        /// Its number.
        seq: u64,
        /// The highest seq that the sender has taken.
        ack: u64,
        /// The op, with `OP_REPLY` in a reply.
        op: u16,
        /// The payload.
        payload: &'a [u8],
    },
}

/// Checks a copy of the slot. The order is PROTOCOL.md's.
pub fn check_slot(slot: &[u8; SLOT_BYTES], session: u64) -> SlotFinding<'_> {
    let (slot_session, seq) = (u64_at(slot, 0), u64_at(slot, 8));
    let commit = u64_at(slot, COMMIT_OFFSET);
    if commit == 0 || commit != seq ^ slot_session {
        return SlotFinding::Nothing;
    }
    if slot_session != session {
        return SlotFinding::OtherSession;
    }
    let length = u32_at(slot, 28) as usize;
    let reserved = u16_at(slot, 26) != 0 || u32_at(slot, 36) != 0;
    if length > PAYLOAD_BYTES_MAX || reserved || slot_crc(slot, length) != u32_at(slot, 32) {
        return SlotFinding::Torn;
    }
    SlotFinding::Message {
        seq,
        ack: u64_at(slot, 16),
        op: u16_at(slot, 24),
        payload: &slot[PAYLOAD_OFFSET..PAYLOAD_OFFSET + length],
    }
}

/// A word of the interrupt table.
pub const fn irq_word(session: u64, count: u32) -> u64 {
    (count as u64) << 32 | session & 0xffff_ffff
}

/// The count in a word, if it is of this session.
pub const fn irq_count(word: u64, session: u64) -> Option<u32> {
    if word as u32 == session as u32 {
        Some((word >> 32) as u32)
    } else {
        None
    }
}

/// Writes a payload's fields, little endian.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty payload.
    pub fn new() -> Self {
        Self::default()
    }
    /// A byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }
    /// A bool as 0 or 1.
    pub fn bool(&mut self, value: bool) {
        self.u8(value.into());
    }
    /// 16 bits.
    pub fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }
    /// 32 bits.
    pub fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }
    /// 64 bits.
    pub fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }
    /// Bytes without a length.
    pub fn raw(&mut self, value: &[u8]) {
        self.bytes.extend_from_slice(value);
    }
    /// A list's count, of at most `max`.
    pub fn count(&mut self, what: &'static str, count: usize, max: usize) -> Result<(), WireError> {
        match u16::try_from(count) {
            Ok(short) if count <= max => {
                self.u16(short);
                Ok(())
            }
            _ => Err(WireError::TooMany { what, count, max }),
        }
    }
    /// A text; the caller has cut it to `TEXT_BYTES_MAX`.
    pub fn text(&mut self, text: &str) -> Result<(), WireError> {
        self.count("text", text.len(), TEXT_BYTES_MAX)?;
        self.raw(text.as_bytes());
        Ok(())
    }
    /// The payload, if it is not too long.
    pub fn finish(self) -> Result<Vec<u8>, WireError> {
        let count = self.bytes.len();
        if count > PAYLOAD_BYTES_MAX {
            return Err(WireError::TooMany {
                what: "payload",
                count,
                max: PAYLOAD_BYTES_MAX,
            });
        }
        Ok(self.bytes)
    }
}

/// Reads a payload's fields, little endian; total on any bytes.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// From the payload's first byte.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }
    /// The next `count` bytes.
    pub fn raw(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest
            .get(..count)
            .ok_or(WireError::Short(self.bytes.len()))?;
        self.at += count;
        Ok(taken)
    }
    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(N)?);
        Ok(array)
    }
    /// A byte.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }
    /// 0 or 1; nothing else.
    pub fn bool(&mut self, field: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(WireError::Field {
                field,
                value: value.into(),
            }),
        }
    }
    /// 16 bits.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    /// 32 bits.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// 64 bits.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// A list's count, of at most `max`.
    pub fn count(&mut self, what: &'static str, max: usize) -> Result<usize, WireError> {
        let count = usize::from(self.u16()?);
        if count > max {
            return Err(WireError::TooMany { what, count, max });
        }
        Ok(count)
    }
    /// A text, as it came.
    pub fn text(&mut self) -> Result<&'a str, WireError> {
        let length = self.count("text", TEXT_BYTES_MAX)?;
        std::str::from_utf8(self.raw(length)?).map_err(|_| WireError::Utf8)
    }
    /// Whether all was read.
    pub fn finish(self) -> Result<(), WireError> {
        match self.bytes.len().saturating_sub(self.at) {
            0 => Ok(()),
            left => Err(WireError::Leftover(left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layout_fits_the_mailbox_without_overlap() {
        const { assert!(NONCE_OFFSET + 8 <= STATUS_OFFSET) };
        assert!(STATUS_OFFSET + STATUS_BYTES as u64 <= SLOT_OFFSET);
        assert!(SLOT_OFFSET + SLOT_BYTES as u64 <= IRQ_TABLE_OFFSET);
        assert_eq!(
            IRQ_TABLE_OFFSET + 8 * u64::from(IRQ_WORDS_MAX),
            RESERVED_OFFSET
        );
        const { assert!(RESERVED_OFFSET < MAILBOX_BYTES) };
        assert_eq!(PAYLOAD_BYTES_MAX, 4048);
    }

    /// Computed by hand from PROTOCOL.md's formula, outside of this code.
    #[test]
    fn session_id_is_the_pinned_hash() {
        assert_eq!(session_id(1, 2), PINNED_1_2);
        assert_eq!(session_id(2, 1), PINNED_1_2);
        assert_ne!(session_id(1, 3), session_id(1, 2));
    }
    const PINNED_1_2: u64 = 0xa477_f0d1_734b_89fc;

    #[test]
    fn a_post_closes_the_set_first_and_completes_it_last() {
        let set = ScratchpadSet {
            nonce: 0x1_0000_0002,
            echo: 3,
            highest: 2,
            lowest: 1,
        };
        let mut spads = [0; SPAD_COUNT];
        for (i, (index, value)) in set.stores().into_iter().enumerate() {
            spads[index as usize] = value;
            let last = i == SPAD_COUNT;
            assert_eq!(ScratchpadSet::decode(&spads), last.then_some(set), "{i}");
        }
    }

    #[test]
    fn a_set_without_a_nonce_or_from_nobody_is_nothing() {
        for nonce in [0, u64::MAX] {
            let set = ScratchpadSet {
                nonce,
                echo: 1,
                highest: 1,
                lowest: 1,
            };
            assert_eq!(ScratchpadSet::decode(&set.words()), None);
        }
        assert_eq!(ScratchpadSet::decode(&[0; 6]), None);
        assert_eq!(ScratchpadSet::decode(&[u32::MAX; 6]), None);
    }

    #[test]
    fn payload_at_max_fits_and_one_more_byte_is_refused() {
        let at = vec![7; PAYLOAD_BYTES_MAX];
        let slot = encode_slot(9, 1, 0, 3, &at).unwrap();
        assert!(
            matches!(check_slot(&slot, 9), SlotFinding::Message { payload, .. } if payload == at)
        );
        assert_eq!(slot_used_bytes(&slot), COMMIT_OFFSET);
        assert!(encode_slot(9, 1, 0, 3, &vec![7; PAYLOAD_BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn irq_words_of_another_session_count_nothing() {
        let session = session_id(5, 6);
        assert_eq!(irq_count(irq_word(session, 7), session), Some(7));
        assert_eq!(irq_count(0, session), None);
        assert_eq!(irq_count(irq_word(session ^ 1, 7), session), None);
    }

    proptest! {
        #[test]
        fn any_flipped_bit_of_a_slot_is_noticed(payload in prop::collection::vec(any::<u8>(), 0..64), bit in 0usize..(40 + 64) * 8) {
            let slot = encode_slot(0x1234_5678_9abc, 3, 2, 5, &payload).unwrap();
            let mut bad = slot.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let covered = bit / 8 < 40 + payload.len();
            let taken = matches!(check_slot(&bad, 0x1234_5678_9abc), SlotFinding::Message { .. });
            prop_assert_eq!(taken, !covered);
        }

        #[test]
        fn random_lines_and_slots_are_nothing(line in any::<[u8; 32]>(), seed in prop::collection::vec(any::<u8>(), SLOT_BYTES)) {
            prop_assume!(u32_at(&line, 28) != 0);
            prop_assert_eq!(StatusLine::decode(&line), None);
            let mut slot = [0; SLOT_BYTES];
            slot.copy_from_slice(&seed);
            // With a good commit word and session the rest is still refused.
            let session = u64_at(&slot, 0);
            let commit = session ^ u64_at(&slot, 8);
            slot[COMMIT_OFFSET..].copy_from_slice(&commit.to_le_bytes());
            prop_assert_eq!(check_slot(&slot, session), SlotFinding::Torn);
        }
    }
}
