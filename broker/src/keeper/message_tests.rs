//! The keeper's messages: all of them there and back, at their limit and over, and from any bytes.

use super::message::{FromKeeper, ToKeeper};
use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    ipc::{Check, Datagram, MessageError, PIECES_MAX},
};
use proptest::{collection::vec, prelude::*};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use vfio_shim::{
    model::{Bdf, Span},
    vfio::OpenGroup,
};

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn check(ranges: usize, pid: i32) -> Check {
    let range = |at: u64| (1, at, Span::new(at << 12, 4096).unwrap());
    Check {
        pid,
        ranges: (0..ranges as u64).map(range).collect(),
    }
}

fn fds(count: usize) -> Vec<OwnedFd> {
    let fd = |_| eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    (0..count).map(fd).collect()
}

fn questions() -> Vec<ToKeeper> {
    vec![
        ToKeeper::Open(bdf("0000:01:00.1")),
        ToKeeper::Stop,
        ToKeeper::Close(bdf("ffff:ff:1f.7")),
        ToKeeper::CheckShared(check(PIECES_MAX, 42)),
    ]
}

fn answers() -> Vec<(FromKeeper, usize)> {
    let [group, container] = <[OwnedFd; 2]>::try_from(fds(2)).unwrap();
    let opened = OpenGroup {
        group,
        container,
        kept: None,
    };
    let refused = VerbError::new(ErrorCode::Busy, "it is under way");
    vec![
        (FromKeeper::Opened(opened), 2),
        (FromKeeper::Done, 0),
        (FromKeeper::NoFile, 0),
        (FromKeeper::Refused(refused), 0),
    ]
}

#[test]
fn every_message_is_read_as_it_was_written_and_not_with_a_byte_or_descriptor_less_or_more() {
    for message in questions() {
        let bytes = message.encode().unwrap();
        assert_eq!(ToKeeper::decode(&bytes, Vec::new()).unwrap(), message);
        for cut in 0..bytes.len() {
            assert!(ToKeeper::decode(&bytes[..cut], Vec::new()).is_err());
        }
        assert!(ToKeeper::decode(&[&bytes[..], &[0]].concat(), Vec::new()).is_err());
        assert!(ToKeeper::decode(&bytes, fds(1)).is_err());
    }
    assert!(
        ToKeeper::CheckShared(check(PIECES_MAX + 1, 42))
            .encode()
            .is_err()
    );
    for (message, count) in answers() {
        let bytes = message.encode().unwrap();
        let again = FromKeeper::decode(&bytes, fds(count)).unwrap();
        assert_eq!(again.encode().unwrap(), bytes);
        assert_eq!(again.fds().len(), count);
        for cut in 0..bytes.len() {
            assert!(FromKeeper::decode(&bytes[..cut], fds(count)).is_err());
        }
        assert!(FromKeeper::decode(&[&bytes[..], &[0]].concat(), fds(count)).is_err());
        for wrong in (0..4).filter(|wrong| *wrong != count) {
            let error = FromKeeper::decode(&bytes, fds(wrong)).unwrap_err();
            assert!(matches!(error, MessageError::Fds { .. }), "{error}");
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_refused(
        kind in 0u16..40,
        rest in vec(any::<u8>(), 0..200),
        count in 0usize..4,
    ) {
        let bytes = [&kind.to_le_bytes(), &rest[..]].concat();
        if let Ok(message) = ToKeeper::decode(&bytes, fds(count)) {
            let again = ToKeeper::decode(&message.encode().unwrap(), Vec::new()).unwrap();
            prop_assert_eq!(again, message);
        }
        if let Ok(message) = FromKeeper::decode(&bytes, fds(count)) {
            let again = FromKeeper::decode(&message.encode().unwrap(), fds(count)).unwrap();
            prop_assert_eq!(again.encode().unwrap(), message.encode().unwrap());
        }
    }
}
