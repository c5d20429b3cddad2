//! Any bytes between a port and a worker are a message, which can be sent again and is the same then, or refused.

use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use sublet::ipc::{ToPort, ToWorker};

/// The most descriptors that come along.
const FDS: usize = 5;

fn brought(count: usize) -> Vec<OwnedFd> {
    let fd = || eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    (0..count).map(|_| fd()).collect()
}

pub(super) fn target(bytes: &[u8]) {
    for fds in 0..FDS {
        if let Ok(message) = ToPort::decode(bytes, brought(fds)) {
            let again = message.encode().expect("what came can be sent");
            let told = ToPort::decode(&again, brought(message.fds().len()));
            let told = told.expect("what was sent is understood");
            assert_eq!(told.encode().expect("the same once more"), again);
        }
        if let Ok(message) = ToWorker::decode(bytes, brought(fds)) {
            let again = message.encode().expect("what came can be sent");
            let told = ToWorker::decode(&again, brought(message.fds().len()));
            let told = told.expect("what was sent is understood");
            assert_eq!(told.encode().expect("the same once more"), again);
        }
    }
}
