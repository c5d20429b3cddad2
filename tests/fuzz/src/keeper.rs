//! Any bytes between a keeper or a warden and whoever asks it are a message, which can be sent again and is the same then, or refused; as many descriptors come as each says.

use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use sublet::ipc::Datagram;
use sublet::keeper::{FromKeeper, ToKeeper};
use sublet::warden::{Answer, Asked};

/// One more than any message brings.
const FDS: usize = 3;

fn brought(count: usize) -> Vec<OwnedFd> {
    let fd = || eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    (0..count).map(|_| fd()).collect()
}

/// What `bytes` are with so many descriptors, if they are a message; it has come and gone once more.
fn heard<M: Datagram>(bytes: &[u8], fds: usize) -> Option<M> {
    let message = M::decode(bytes, brought(fds)).ok()?;
    assert_eq!(
        message.fds().len(),
        fds,
        "each descriptor is of the message"
    );
    let again = message.encode().expect("what came can be sent");
    let told = M::decode(&again, brought(fds)).expect("what was sent is understood");
    assert_eq!(told.encode().expect("the same once more"), again);
    Some(message)
}

pub(super) fn target(bytes: &[u8]) {
    for fds in 0..=FDS {
        if let Some(asked) = heard::<ToKeeper>(bytes, fds) {
            // Root does what this says: nothing of the bytes is left out of it.
            assert_eq!(asked.encode().expect("what came can be sent"), bytes);
            assert_eq!(fds, 0, "nobody hands a keeper anything");
        }
        match heard::<FromKeeper>(bytes, fds) {
            Some(FromKeeper::Opened(_)) => assert_eq!(fds, 2, "a group and a container"),
            Some(_) => assert_eq!(fds, 0, "words bring nothing"),
            None => {}
        }
        heard::<Asked>(bytes, fds);
        heard::<Answer>(bytes, fds);
    }
}
