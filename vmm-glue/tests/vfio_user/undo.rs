//! The end of a guest session: what is undone, in which order, and who may come next.

use crate::{
    fake::span,
    rig::{Client, Rig, access},
};
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{MemfdFlags, fstat, memfd_create, stat},
};
use std::{
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixListener},
    },
};
use vmm_glue::vfio_user::{Endpoint, EndpointError, Peers, SessionState, wire::Command, words};

const DISABLED: [&str; 5] = [
    "disable Intx",
    "disable Msi",
    "disable Msix",
    "disable Err",
    "disable Req",
];

/// How many fds of this process are the same file.
fn holders(fd: &OwnedFd) -> usize {
    let own = fstat(fd).unwrap();
    let entries = fs::read_dir("/proc/self/fd").unwrap();
    let same = entries.filter(|entry| {
        let path = entry.as_ref().unwrap().path();
        stat(&path).is_ok_and(|other| (other.st_dev, other.st_ino) == (own.st_dev, own.st_ino))
    });
    same.count()
}

/// A client with memory mapped, interrupts and bus mastering on.
fn busy(rig: &Rig) -> (Client, OwnedFd) {
    let mut client = rig.agreed();
    let ram = rig.memory(0x40_0000, 's');
    assert_eq!(client.map(0, 0, 0x20_0000, Some(&ram)).errno, 0);
    assert_eq!(
        client.map(0x20_0000, 1 << 32, 0x20_0000, Some(&ram)).errno,
        0
    );
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    assert_eq!(client.set_irqs(36, 2, 0, 1, &[], &[event.as_fd()]).errno, 0);
    client.enable_bus_master();
    rig.function.journal();
    (client, ram)
}

fn undone() -> Vec<&'static str> {
    [&["reset", "unmap 0x0+0x100200000"][..], &DISABLED].concat()
}

#[test]
fn a_vmm_that_goes_is_undone_dma_first_and_its_fds_last() {
    let rig = Rig::new();
    let (client, ram) = busy(&rig);
    assert_eq!(holders(&ram), 2);
    drop(client);
    rig.wait_idle();
    assert_eq!(rig.function.journal(), undone());
    assert_eq!(holders(&ram), 1);
    assert!(rig.function.mapped().is_empty());
    assert_eq!(rig.shared.last_error(), None);
    assert_eq!(rig.shared.counters.maps_now.get(), 0);
    assert_eq!(rig.shared.counters.bytes_now.get(), 0);
}

#[test]
fn the_next_vmm_is_served_only_after_the_undo() {
    let rig = Rig::new();
    let (client, _ram) = busy(&rig);
    // cloud-hypervisor's next connection, before this end has seen the end of the last one.
    let mut next = rig.connect();
    drop(client);
    next.version(1);
    assert_eq!(rig.function.journal(), undone());
    assert_eq!(next.read(7, 0, 1), [0]);
    // Nothing of the first guest is there for it.
    next.enable_bus_master();
    assert!(rig.function.mapped().is_empty());
    assert_eq!(rig.shared.counters.sessions.get(), 2);
}

#[test]
fn a_session_that_never_mapped_unmaps_nothing() {
    let rig = Rig::new();
    drop(rig.agreed());
    rig.wait_idle();
    assert_eq!(rig.function.journal(), [&["reset"][..], &DISABLED].concat());
}

#[test]
fn a_stop_ends_the_session_and_undoes_it() {
    let mut rig = Rig::new();
    let (mut client, ram) = busy(&rig);
    rig.stop().unwrap();
    assert_eq!(rig.function.journal(), undone());
    assert!(client.answer().is_none());
    assert_eq!(holders(&ram), 1);
    assert_eq!(rig.shared.state(), SessionState::Closed);
    assert!(!rig.socket.exists());
}

#[test]
fn a_function_that_does_not_reset_is_given_to_nobody_else() {
    let mut rig = Rig::new();
    let (client, ram) = busy(&rig);
    rig.function.faults.lock().unwrap().reset = true;
    drop(client);
    let error = rig.ended().unwrap_err();
    assert!(matches!(error, EndpointError::Reset(_)));
    let expected = "the function could not be reset after its guest: the function has no reset method, so it cannot be lent: its state would leak to the next tenant";
    assert_eq!(words(&error), expected);
    assert_eq!(rig.shared.last_error().unwrap(), expected);
    // All the rest was undone.
    assert_eq!(rig.function.journal(), undone());
    assert_eq!(holders(&ram), 1);
}

#[test]
fn a_function_that_keeps_guest_memory_is_given_to_nobody_else() {
    let mut rig = Rig::new();
    let (client, _ram) = busy(&rig);
    rig.function.faults.lock().unwrap().unmap = true;
    drop(client);
    let error = rig.ended().unwrap_err();
    assert_eq!(
        words(&error),
        "the guest's memory could not be taken away from the function: the path to the function has ended: for the test"
    );
    assert_eq!(rig.function.journal(), undone());
    assert_eq!(
        rig.function.mapped(),
        [span(0, 0x20_0000), span(1 << 32, 0x20_0000)]
    );
}

#[test]
fn status_tells_the_vmm_and_its_end() {
    let rig = Rig::new();
    assert_eq!(rig.connect().version(0).errno, 0);
    let client = rig.agreed();
    let pid = std::process::id() as i32;
    assert_eq!(rig.shared.state(), SessionState::Connected { pid });
    drop(client);
    rig.wait_idle();
}

#[test]
fn vmm_of_a_user_that_may_not_attach_is_sent_away_in_words_and_touches_nothing() {
    let me = rustix::process::geteuid().as_raw();
    let rig = Rig::with(|options| {
        options.peers = Peers::Only {
            uids: vec![me + 1],
            gids: Vec::new(),
        };
    });
    for count in 1..=2 {
        // Nothing is read of it: the connection is closed, whatever it may send.
        assert!(rig.connect().is_ended());
        let (pid, gid) = (std::process::id(), rustix::process::getegid().as_raw());
        let words = format!(
            "a process of user {me}, group {gid} (process {pid}) may not attach here: start the \
             VMM as a user that may, or name it in policy.vmm_uids or policy.vmm_gids"
        );
        assert_eq!(rig.shared.last_error(), Some(words));
        assert_eq!(rig.shared.counters.refused.get(), count);
    }
    assert_eq!(rig.shared.counters.sessions.get(), 0);
    assert!(rig.function.journal().is_empty());
}

#[test]
fn the_socket_is_for_its_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm.sock");
    let endpoint = Endpoint::bind(&path).unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(endpoint.path(), path);
}

#[test]
fn only_a_socket_that_nobody_listens_on_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm.sock");
    let bind = || {
        Endpoint::bind(&path)
            .map(drop)
            .map_err(|error| words(&error))
    };
    let shown = path.display();

    let listener = UnixListener::bind(&path).unwrap();
    assert_eq!(
        bind().unwrap_err(),
        format!("another process listens on {shown}; choose another path")
    );
    drop(listener);
    bind().unwrap();
    fs::write(&path, "data").unwrap();
    assert_eq!(
        bind().unwrap_err(),
        format!("{shown} exists and is no socket; choose another path")
    );
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn what_another_put_at_the_path_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm.sock");
    let endpoint = Endpoint::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "data").unwrap();
    drop(endpoint);
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn a_memory_file_is_held_once_however_many_maps_use_it() {
    let rig = Rig::new();
    let mut client = rig.agreed();
    let ram = rig.memory(0x40_0000, 's');
    for page in 0..200 {
        client.map(page << 12, page << 12, 1 << 12, Some(&ram));
    }
    assert_eq!(holders(&ram), 2);
    client.unmap(0, 200 << 12);
    assert_eq!(holders(&ram), 1);
    let other = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(holders(&other), 1);
}

#[test]
fn a_bus_master_enable_that_the_function_refuses_ends_the_session_in_words() {
    let mut rig = Rig::new();
    let mut client = rig.agreed();
    rig.function.faults.lock().unwrap().region = true;
    client.send(Command::RegionWrite, &access(7, 4, 2, &[6, 0]), &[]);
    assert!(client.is_ended());
    rig.wait_idle();
    assert_eq!(
        rig.last_error(),
        "the function's bus mastering could not be turned on for the guest: the path to the function has ended: for the test"
    );
    rig.stop().unwrap();
}
