//! A peer that forges its mailbox messages: what is damaged is passed over, what breaks the protocol ends the session, in words.

use super::soft_tests::{Rig, bdf, until};
use super::*;
use crate::model::FunctionIds;
use crate::ntb::soft::{FaultPlan, SoftFunction};
use crate::path::message::{Message, OpId, Request};
use crate::path::wire::{
    BELL_MAILBOX, COMMIT_OFFSET, SLOT_BYTES, SLOT_OFFSET, encode_slot, session_id,
};

/// Far behind whatever an honest peer has sent.
const LATE: u64 = 1 << 40;

fn rig() -> Rig {
    let ids = FunctionIds::default();
    Rig::with(SoftFunction::new(ids, 4), FaultPlan::default(), 10_000)
}

/// A whole message of some session, as an honest peer would make it.
fn slot(session: u64, seq: u64, ack: u64) -> Box<[u8; SLOT_BYTES]> {
    let lease = LeaseId(1);
    slot_of(Request::Reset { lease }, session, seq, ack)
}

fn slot_of(request: Request, session: u64, seq: u64, ack: u64) -> Box<[u8; SLOT_BYTES]> {
    let message = Message::Request(OpId(7), request);
    let (op, payload) = message.encode().unwrap();
    encode_slot(session, seq, ack, op, &payload).unwrap()
}

fn forge(rig: &Rig, slot: &[u8; SLOT_BYTES]) {
    forge_at(rig, 0, slot);
}

fn session(rig: &Rig) -> u64 {
    rig.engines[0]
        .status()
        .unwrap()
        .session
        .unwrap()
        .info
        .session
}

#[test]
fn torn_and_foreign_messages_are_counted_and_the_session_and_its_lease_go_on() {
    let rig = rig();
    let (lease, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    let before = session(&rig);
    let counters = || rig.engines[0].status().unwrap().mailbox;
    let mut torn = slot(before, LATE, 0);
    torn[40] ^= 1;
    until("the torn one is counted", || {
        forge(&rig, &torn);
        (counters().torn > 0).then_some(())
    });
    let foreign = slot(session_id(1, 2), LATE, 0);
    until("the foreign one is counted", || {
        forge(&rig, &foreign);
        (counters().foreign > 0).then_some(())
    });
    // One that was taken long ago comes again: acked, and not done again.
    let resets = rig.function.resets();
    let replay = slot(before, 1, 0);
    until("the replay is counted", || {
        forge(&rig, &replay);
        (counters().replays > 0).then_some(())
    });
    assert_eq!(rig.function.resets(), resets);
    assert_eq!(counters().violations, 0);
    assert_eq!((session(&rig), function.lost()), (before, None));
    drop(function);
    rig.engines[1].give_back(lease).unwrap();
}

/// Stores it into this host's mailbox from the far end of the cable, and rings.
fn forge_at(rig: &Rig, at: usize, slot: &[u8; SLOT_BYTES]) {
    let far = rig.link.port(1 - at);
    let window = far.window(0);
    window.write(SLOT_OFFSET, &slot[..COMMIT_OFFSET]);
    window.write(SLOT_OFFSET + COMMIT_OFFSET as u64, &slot[COMMIT_OFFSET..]);
    far.peer_doorbell_ring(BELL_MAILBOX);
}

#[test]
fn messages_that_are_not_taken_are_told_at_the_lease_that_they_name_and_at_no_other() {
    let rig = rig();
    let (lease, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    let session = session(&rig);
    let lent = || rig.engines[0].status().unwrap().lent[0].offer.refused;
    let held = || rig.engines[1].status().unwrap().borrowed[0].refused;
    let damaged = |request: Request| {
        let mut slot = slot_of(request, session, LATE, 0);
        // Its checksum.
        slot[32] ^= 1;
        slot
    };
    let of_none = LeaseId(lease.0 + 7);
    until(
        "damaged ones that name no lease are counted at the port",
        || {
            let torn = || {
                rig.engines
                    .each_ref()
                    .map(|e| e.status().unwrap().mailbox.torn)
            };
            forge_at(&rig, 0, &damaged(Request::Reset { lease: of_none }));
            let text = "over".to_owned();
            let lease = of_none;
            forge_at(&rig, 1, &damaged(Request::Revoked { lease, text }));
            torn().iter().all(|torn| *torn > 0).then_some(())
        },
    );
    assert_eq!((lent(), held()), Default::default());
    let foreign = |request: Request| slot_of(request, session_id(1, 2), LATE, 0);
    until("the lender tells them at the lease", || {
        forge_at(&rig, 0, &damaged(Request::Reset { lease }));
        let torn = lent().torn > 0;
        forge_at(&rig, 0, &foreign(Request::Return { lease }));
        (torn && lent().foreign > 0).then_some(())
    });
    // A lease of that number that the other side lends is none of this.
    assert_eq!(held(), Default::default());
    until("the borrower tells them at the lease", || {
        let revoked = || Request::Revoked {
            lease,
            text: "over".to_owned(),
        };
        forge_at(&rig, 1, &damaged(revoked()));
        let torn = held().torn > 0;
        forge_at(&rig, 1, &foreign(revoked()));
        (torn && held().foreign > 0).then_some(())
    });
    assert_eq!(function.lost(), None);
    drop(function);
    rig.engines[1].give_back(lease).unwrap();
    // What is told of a lease is not told of the next.
    let (lease, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    assert_eq!(lent(), Default::default());
    drop(function);
    rig.engines[1].give_back(lease).unwrap();
}

/// How many messages honest peers have exchanged by then is not known: the number is an N.
fn without_count(text: &str) -> String {
    let words = text.split(' ').map(|word| match word.parse::<u64>() {
        Ok(count) if count != LATE => "N",
        _ => word,
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The session ends with these words and is counted; both hosts undo it, and a new one works.
fn violates(words: &str, forged: impl Fn(u64) -> Box<[u8; SLOT_BYTES]>) {
    let rig = rig();
    let before = rig.maps();
    let (_, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    let old = session(&rig);
    let status = until("the violation ends the session", || {
        let status = rig.engines[0].status()?;
        let open = status.session.as_ref().map(|session| session.info.session);
        if open == Some(old) {
            forge(&rig, &forged(old));
        }
        (status.mailbox.violations > 0).then_some(status)
    });
    let told = status.over_reason.unwrap_or_default();
    assert_eq!(
        without_count(&told),
        format!("the peer broke the protocol: {words}")
    );
    until("the lease is lost", || function.lost());
    drop(function);
    rig.wait_for_pool();
    assert_ne!(session(&rig), old);
    assert_eq!(rig.maps(), before);
    assert_eq!(rig.function.triggers(), 0);
    let status = rig.engines[0].status().unwrap();
    assert_eq!(
        status.mailbox.violations, 1,
        "told of after the session too"
    );
    let (lease, _, function) = rig.engines[1].borrow(bdf(), None).unwrap();
    drop(function);
    rig.engines[1].give_back(lease).unwrap();
}

#[test]
fn message_out_of_sequence_ends_the_session_in_words_and_a_new_one_works() {
    violates("message 1099511627776 came after message N", |session| {
        slot(session, LATE, 0)
    });
}

#[test]
fn ack_of_what_was_never_sent_ends_the_session_in_words_and_a_new_one_works() {
    violates(
        "message 1099511627776 was acked, and N is the last sent",
        |session| slot(session, 1, LATE),
    );
}
