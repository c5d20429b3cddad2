//! Mailbox tests: each kind of bad input by name, and two mailboxes over a channel that loses, repeats and reorders.

use super::*;
use crate::path::message::{LeaseId, Request};
use crate::path::wire::{COMMIT_OFFSET, PAYLOAD_BYTES_MAX};
use proptest::prelude::*;

const SESSION: u64 = 0x1122_3344_5566_7788;

fn message(id: u64) -> Message {
    let lease = LeaseId(id);
    Message::Request(OpId(id), Request::Reset { lease })
}

fn slot(seq: u64, ack: u64) -> Box<[u8; SLOT_BYTES]> {
    let (op, payload) = message(seq).encode().unwrap();
    encode_slot(SESSION, seq, ack, op, &payload).unwrap()
}

/// Message 1 is not taken, and nothing of it but the lease that it names is told.
fn refused(as_what: RefusedAs) -> Actions {
    vec![MailboxAction::Refused(Owner::Lent(LeaseId(1)), as_what)]
}

fn delivered(actions: &Actions) -> Vec<u64> {
    let id = |action: &MailboxAction| match action {
        MailboxAction::Deliver(Message::Request(id, _)) => Some(id.0),
        _ => None,
    };
    actions.iter().filter_map(id).collect()
}

fn acked(actions: &Actions) -> Option<u64> {
    actions.iter().find_map(|action| match action {
        MailboxAction::WriteStatus(line) => Some(StatusLine::decode(line)?.ack),
        _ => None,
    })
}

fn violates(mailbox: &mut Mailbox, actions: &Actions) {
    assert!(
        matches!(actions.last(), Some(MailboxAction::Violation(_))),
        "{actions:?}"
    );
    assert_eq!(mailbox.counters().violations, 1);
    // The session is over; nothing of it is done any more.
    assert_eq!(mailbox.on_slot(&slot(1, 0)), []);
    assert_eq!(mailbox.beat(), []);
    assert_eq!(mailbox.send(&message(1)), Ok(Vec::new()));
}

fn with_crc(mut slot: Box<[u8; SLOT_BYTES]>, length: usize) -> Box<[u8; SLOT_BYTES]> {
    let head = crc32c::crc32c(&slot[..32]);
    let crc = crc32c::crc32c_append(head, &slot[40..40 + length]);
    slot[32..36].copy_from_slice(&crc.to_le_bytes());
    slot
}

#[test]
fn first_message_is_taken_acked_and_the_sender_told_by_bell() {
    let mut mailbox = Mailbox::new(SESSION);
    let actions = mailbox.on_slot(&slot(1, 0));
    assert_eq!(acked(&actions), Some(1));
    assert!(actions.contains(&MailboxAction::RingMailbox));
    assert_eq!(delivered(&actions), [1]);
}

#[test]
fn empty_or_half_written_slot_is_waited_for() {
    let mut mailbox = Mailbox::new(SESSION);
    assert_eq!(mailbox.on_slot(&[0; SLOT_BYTES]), []);
    let mut half = slot(1, 0);
    half[COMMIT_OFFSET..].fill(0);
    assert_eq!(mailbox.on_slot(&half), []);
    half[COMMIT_OFFSET..].copy_from_slice(&(2 ^ SESSION).to_le_bytes());
    assert_eq!(mailbox.on_slot(&half), []);
    assert_eq!(mailbox.counters(), &MailboxCounters::default());
}

#[test]
fn torn_slot_is_counted_ignored_and_taken_once_it_is_whole() {
    let mut mailbox = Mailbox::new(SESSION);
    let mut torn = slot(1, 0);
    torn[44] ^= 1;
    assert_eq!(mailbox.on_slot(&torn), refused(RefusedAs::Torn));
    assert_eq!(mailbox.counters().torn, 1);
    assert_eq!(delivered(&mailbox.on_slot(&slot(1, 0))), [1]);
}

#[test]
fn replayed_message_is_counted_acked_again_and_not_executed() {
    let mut mailbox = Mailbox::new(SESSION);
    mailbox.on_slot(&slot(1, 0));
    mailbox.on_slot(&slot(2, 0));
    let actions = mailbox.on_slot(&slot(1, 0));
    assert_eq!(delivered(&actions), [0; 0]);
    assert_eq!(acked(&actions), Some(2));
    assert_eq!(mailbox.counters().replays, 1);
}

#[test]
fn message_that_still_stands_there_is_no_replay_and_the_heartbeat_acks_it() {
    let mut mailbox = Mailbox::new(SESSION);
    mailbox.on_slot(&slot(1, 0));
    assert_eq!(mailbox.on_slot(&slot(1, 0)), []);
    assert_eq!(mailbox.counters().replays, 0);
    assert_eq!(acked(&mailbox.beat()), Some(1));
}

#[test]
fn message_out_of_sequence_ends_the_session() {
    for seq in [2, 3, u64::MAX] {
        let mut mailbox = Mailbox::new(SESSION);
        let actions = mailbox.on_slot(&slot(seq, 0));
        violates(&mut mailbox, &actions);
    }
}

#[test]
fn message_of_another_session_is_ignored_and_counted() {
    let mut mailbox = Mailbox::new(SESSION + 1);
    assert_eq!(mailbox.on_slot(&slot(1, 9)), refused(RefusedAs::Foreign));
    assert_eq!(mailbox.counters().foreign, 1);
}

#[test]
fn ack_of_what_was_never_sent_ends_the_session_in_slot_and_status_line() {
    let mut mailbox = Mailbox::new(SESSION);
    let actions = mailbox.on_slot(&slot(1, 1));
    assert_eq!(delivered(&actions), [0; 0]);
    violates(&mut mailbox, &actions);

    let mut mailbox = Mailbox::new(SESSION);
    mailbox.send(&message(1)).unwrap();
    let line = |ack| StatusLine {
        session: SESSION,
        heartbeat: 1,
        ack,
    };
    assert_eq!(
        mailbox.on_status(&line(1).encode()),
        [MailboxAction::Heartbeat(1)]
    );
    let actions = mailbox.on_status(&line(2).encode());
    violates(&mut mailbox, &actions);
}

#[test]
fn oversized_length_is_torn_even_with_a_good_crc() {
    let mut mailbox = Mailbox::new(SESSION);
    for length in [PAYLOAD_BYTES_MAX as u32 + 1, u32::MAX] {
        let mut bad = slot(1, 0);
        bad[28..32].copy_from_slice(&length.to_le_bytes());
        let bad = with_crc(bad, PAYLOAD_BYTES_MAX);
        assert_eq!(mailbox.on_slot(&bad), []);
    }
    assert_eq!(mailbox.counters().torn, 2);
}

#[test]
fn reserved_bits_that_are_set_are_torn_even_with_a_good_crc() {
    let mut mailbox = Mailbox::new(SESSION);
    for at in [26, 27, 36, 37, 38, 39] {
        let mut bad = slot(1, 0);
        bad[at] = 0x80;
        let actions = mailbox.on_slot(&with_crc(bad, 16));
        assert_eq!(actions, refused(RefusedAs::Torn), "byte {at}");
    }
    assert_eq!(mailbox.counters().torn, 6);
}

#[test]
fn payload_that_does_not_parse_ends_the_session() {
    let (op, mut payload) = message(1).encode().unwrap();
    payload.push(0);
    for payload in [&payload[..], &payload[..9], &[]] {
        let mut mailbox = Mailbox::new(SESSION);
        let bad = encode_slot(SESSION, 1, 0, op, payload).unwrap();
        let actions = mailbox.on_slot(&bad);
        violates(&mut mailbox, &actions);
    }
}

#[test]
fn unknown_op_is_taken_and_told_for_an_answer() {
    let mut mailbox = Mailbox::new(SESSION);
    let strange = encode_slot(SESSION, 1, 0, 77, &9u64.to_le_bytes()).unwrap();
    let actions = mailbox.on_slot(&strange);
    assert_eq!(acked(&actions), Some(1));
    let (op, code) = (OpId(9), 77);
    let told = MailboxAction::UnknownOp { op, code };
    assert_eq!(actions.last(), Some(&told));
}

#[test]
fn damaged_or_foreign_status_line_is_ignored() {
    let mut mailbox = Mailbox::new(SESSION);
    let line = |session| {
        StatusLine {
            session,
            heartbeat: 3,
            ack: 7,
        }
        .encode()
    };
    let mut damaged = line(SESSION);
    damaged[9] ^= 1;
    for line in [damaged, line(SESSION ^ 1), [0; STATUS_BYTES]] {
        assert_eq!(mailbox.on_status(&line), []);
    }
}

#[test]
fn unacked_message_is_written_again_with_the_same_bytes_after_two_heartbeats() {
    let mut mailbox = Mailbox::new(SESSION);
    let first = mailbox.send(&message(1)).unwrap();
    // A message taken meanwhile changes our ack, and must not change the bytes.
    mailbox.on_slot(&slot(1, 0));
    assert_eq!(mailbox.beat().len(), 1);
    let again = mailbox.beat();
    assert_eq!(again[1..], first[..]);
    assert_eq!(mailbox.counters().resent, 1);
    assert_eq!(mailbox.counters().sent, 1);
}

#[test]
fn queue_holds_max_messages_and_refuses_one_more() {
    let mut mailbox = Mailbox::new(SESSION);
    for id in 0..=QUEUE_MAX as u64 {
        mailbox.send(&message(id)).unwrap();
    }
    assert_eq!(mailbox.queued(), QUEUE_MAX, "and one in the slot");
    assert_eq!(mailbox.send(&message(0)), Err(MailboxError::Full));
}

/// One direction of a channel: the memory that the writer's stores reach, sooner, later or never.
#[derive(Default)]
struct Wire {
    slots: Vec<Box<[u8; SLOT_BYTES]>>,
    lines: Vec<[u8; STATUS_BYTES]>,
}

struct Side {
    mailbox: Mailbox,
    to_send: u64,
    got: Vec<u64>,
}

impl Side {
    fn apply(&mut self, actions: Actions, out: &mut Wire) {
        for action in actions {
            match action {
                MailboxAction::WriteSlot(slot) => out.slots.push(slot),
                MailboxAction::WriteStatus(line) => out.lines.push(line),
                MailboxAction::Deliver(Message::Request(id, _)) => self.got.push(id.0),
                MailboxAction::Violation(text) => panic!("{text}"),
                _ => {}
            }
        }
    }
}

fn step(sides: &mut [Side; 2], wires: &mut [Wire; 2], (who, act, pick): (usize, u8, u16)) {
    let (side, from) = (&mut sides[who], &mut wires[1 - who]);
    let pick = usize::from(pick);
    let actions = match act {
        // A store is seen, now and maybe again later, in any order.
        0 | 1 if !from.slots.is_empty() => {
            let at = pick % from.slots.len();
            let slot = if act == 0 {
                from.slots.remove(at)
            } else {
                from.slots[at].clone()
            };
            side.mailbox.on_slot(&slot)
        }
        2 | 3 if !from.lines.is_empty() => {
            let at = pick % from.lines.len();
            let line = if act == 2 {
                from.lines.remove(at)
            } else {
                from.lines[at]
            };
            side.mailbox.on_status(&line)
        }
        4 if !from.slots.is_empty() => {
            let at = pick % from.slots.len();
            from.slots.remove(at);
            Vec::new()
        }
        5 if !from.lines.is_empty() => {
            let at = pick % from.lines.len();
            from.lines.remove(at);
            Vec::new()
        }
        6 if side.to_send < 30 => {
            side.to_send += 1;
            side.mailbox.send(&message(side.to_send)).unwrap()
        }
        7 => side.mailbox.beat(),
        _ => Vec::new(),
    };
    side.apply(actions, &mut wires[who]);
}

proptest! {
    #[test]
    fn each_message_arrives_once_and_in_order_over_a_channel_that_loses_repeats_and_reorders(
        acts in prop::collection::vec((0usize..2, 0u8..8, any::<u16>()), 0..800)
    ) {
        let side = || Side { mailbox: Mailbox::new(SESSION), to_send: 0, got: Vec::new() };
        let mut sides = [side(), side()];
        let mut wires = [Wire::default(), Wire::default()];
        for act in acts {
            step(&mut sides, &mut wires, act);
            for who in 0..2 {
                let sent = sides[1 - who].to_send;
                prop_assert!(sides[who].got.iter().copied().eq(1..=sides[who].got.len() as u64));
                prop_assert!(sides[who].got.len() as u64 <= sent);
            }
        }
        // A channel that is whole again carries the rest.
        for _ in 0..200 {
            for who in 0..2 {
                step(&mut sides, &mut wires, (who, 7, 0));
                while !wires[1 - who].slots.is_empty() {
                    step(&mut sides, &mut wires, (who, 0, 0));
                }
                while !wires[1 - who].lines.is_empty() {
                    step(&mut sides, &mut wires, (who, 2, 0));
                }
            }
        }
        for who in 0..2 {
            prop_assert_eq!(sides[who].got.len() as u64, sides[1 - who].to_send);
        }
    }

    #[test]
    fn random_slots_never_panic(bytes in prop::collection::vec(any::<u8>(), SLOT_BYTES), op in any::<u16>(), payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut mailbox = Mailbox::new(SESSION);
        let mut random = [0; SLOT_BYTES];
        random.copy_from_slice(&bytes);
        mailbox.on_slot(&random);
        let framed = encode_slot(SESSION, 1, 0, op, &payload).unwrap();
        mailbox.on_slot(&framed);
    }
}
