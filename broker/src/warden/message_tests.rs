//! The warden's messages: all of them there and back, with a byte or descriptor less or more, and from any bytes.

use super::message::{Answer, Asked, Question};
use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    ipc::{Check, Datagram, PIECES_MAX},
};
use proptest::{collection::vec, prelude::*};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use vfio_shim::model::Span;

fn fds(count: usize) -> Vec<OwnedFd> {
    let fd = |_| eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    (0..count).map(fd).collect()
}

fn fd() -> OwnedFd {
    fds(1).remove(0)
}

fn questions() -> Vec<(Question, usize)> {
    let range = |at: u64| (1, at, Span::new(at << 12, 4096).unwrap());
    let check = Check {
        pid: 7,
        ranges: (0..PIECES_MAX as u64).map(range).collect(),
    };
    vec![
        (Question::Hello, 1),
        (Question::Start(fd()), 2),
        (Question::Kill(7), 1),
        (Question::Ended(7), 1),
        (Question::MapsDevice(7), 1),
        (Question::CheckShared(check), 1),
        (Question::Begin(7, fd()), 2),
        (Question::End(7, fd()), 2),
        (Question::Forget(7), 1),
        (Question::Listen("/run/a.sock".into(), true), 1),
        (Question::Release("/run/a.sock".into()), 1),
        (Question::KernelLog, 1),
    ]
}

fn answers() -> Vec<(Answer, usize)> {
    let refusal = VerbError::new(ErrorCode::Busy, "it is under way");
    vec![
        (Answer::Done, 0),
        (Answer::Is(true), 0),
        (Answer::Said("signal: 9 (SIGKILL)".into()), 0),
        (Answer::Started(7, fd()), 1),
        (Answer::Opened(fd()), 1),
        (Answer::Refused(refusal), 0),
    ]
}

/// What is read of these bytes is what was written, and nothing is with anything less or more.
fn holds<M: Datagram>(message: &M, takes: usize) {
    let bytes = message.encode().unwrap();
    assert_eq!(message.fds().len(), takes);
    let again = M::decode(&bytes, fds(takes)).unwrap();
    assert_eq!(again.encode().unwrap(), bytes);
    for cut in 0..bytes.len() {
        assert!(M::decode(&bytes[..cut], fds(takes)).is_err(), "{cut}");
    }
    assert!(M::decode(&[&bytes[..], &[0]].concat(), fds(takes)).is_err());
    for other in (0..4).filter(|other| *other != takes) {
        assert!(M::decode(&bytes, fds(other)).is_err(), "{other}");
    }
}

#[test]
fn every_message_is_read_as_it_was_written_and_not_with_a_byte_or_descriptor_less_or_more() {
    for (question, takes) in questions() {
        let reply = fd();
        holds(&Asked { reply, question }, takes);
    }
    for (answer, takes) in answers() {
        holds(&answer, takes);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_refused(
        kind in 0u16..40,
        rest in vec(any::<u8>(), 0..64),
        count in 0usize..4,
    ) {
        let bytes = [&kind.to_le_bytes(), &rest[..]].concat();
        if let Ok(message) = Asked::decode(&bytes, fds(count)) {
            holds(&message, count);
        }
        if let Ok(message) = Answer::decode(&bytes, fds(count)) {
            holds(&message, count);
        }
    }
}
