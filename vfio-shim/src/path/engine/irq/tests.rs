//! What the irq thread watches, looked at without its thread.

use super::*;
use crate::model::OsRuntime;
use crate::ntb::soft::{SoftLink, SoftPortConfig};
use rustix::io::Errno;

fn thread() -> IrqThread {
    let config = SoftPortConfig {
        window_bytes: [64 << 20; 2],
    };
    let link = SoftLink::new([config; 2]).unwrap();
    let (_, mailbox) = super::super::control::mailbox_memory().unwrap();
    let (inbox, _) = mpsc::channel();
    let door: (_, Arc<dyn Runtime>) = (inbox, Arc::new(OsRuntime));
    IrqThread::new(link.port(0), mailbox, 1_000_000, door)
        .unwrap()
        .0
}

/// How many vectors would have it go on now.
fn ready(thread: &IrqThread) -> usize {
    let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS_MAX);
    let room = rustix::buffer::spare_capacity(&mut events);
    epoll::wait(&thread.epoll, room, Some(&Default::default())).unwrap();
    let of_vectors = events
        .iter()
        .filter(|event| event.data.u64() & KEY_RELAY != 0);
    of_vectors.count()
}

#[test]
fn relay_of_which_one_vector_cannot_be_watched_is_refused_and_watches_none() {
    let mut thread = thread();
    let raised = || eventfd(1, EventfdFlags::NONBLOCK).unwrap();
    let first = raised();
    let relay = |second: OwnedFd| Relay {
        lease: LeaseId(1),
        first: 0,
        eventfds: vec![first.try_clone().unwrap(), second],
        counters: [(); 2].map(|()| VectorCounters::default()).into(),
    };
    // What epoll cannot watch, as it is always ready.
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    assert_eq!(thread.arm(relay(file)), Err(Errno::PERM));
    assert_eq!(ready(&thread), 0);
    assert_eq!(thread.arm(relay(raised())), Ok(()));
    assert_eq!(ready(&thread), 2);
}
