//! A function that is stopped by the keeper: the file of its own VF is written, and no other.

use super::{
    message::{FromKeeper, ToKeeper},
    tests::*,
    *,
};
use crate::daemon::vocabulary::ErrorCode;
use std::{fs, os::unix::fs::symlink};
use vfio_shim::vfio::OpenGroup;

/// What was written to files of [`PF`]'s own.
fn stops(machine: &Machine) -> Vec<String> {
    let writes = machine.writes.lock().unwrap();
    let of_pf = |write: &&String| write.contains(PF);
    writes.iter().filter(of_pf).cloned().collect()
}

#[test]
fn stop_goes_to_the_vf_that_the_connection_has_open_and_to_no_other() {
    let machine = Machine::new();
    machine.xe_vfs(&[VF, OTHER]);
    let running = Running::of(&machine);
    let path = functions_socket(&machine.folder());
    let [first, second, third] = [(); 3].map(|()| Raw::admitted(&path));
    let opened = [first.opened(bdf(VF)), second.opened(bdf(OTHER))];
    let nothing = third.refused(&ToKeeper::Stop);
    assert_eq!(nothing.code, ErrorCode::BadRequest, "{nothing}");
    assert!(nothing.text.contains("no function open"), "{nothing}");
    assert_eq!(stops(&machine), [""; 0]);
    assert!(matches!(second.ask(&ToKeeper::Stop), FromKeeper::Done));
    let name = |vf| format!("bus/pci/devices/{PF}/sriov_admin/vf{vf}/stop 1");
    assert_eq!(stops(&machine), [name(2)]);
    assert!(matches!(first.ask(&ToKeeper::Stop), FromKeeper::Done));
    assert_eq!(stops(&machine), [name(2), name(1)]);
    // It is still open for its connection, and is stopped no more once it is not.
    assert!(machine.is_bound(VF) && machine.is_bound(OTHER));
    drop(opened);
    let closed = second.ask(&ToKeeper::Close(bdf(OTHER)));
    assert!(matches!(closed, FromKeeper::Done), "{closed:?}");
    second.refused(&ToKeeper::Stop);
    assert_eq!(stops(&machine).len(), 2);
    running.stop();
}

#[test]
fn function_whose_driver_has_no_such_file_is_left_alone_and_goes_on() {
    let machine = Machine::new();
    machine.xe_vfs(&[VF, OTHER]);
    fs::remove_file(machine.xe_stop(1)).unwrap();
    let running = Running::of(&machine);
    let (opened, stopper) = Keeper::at(&machine.folder()).open_to_lend(bdf(VF)).unwrap();
    stopper.stop().unwrap();
    assert_eq!(stops(&machine), [""; 0]);
    let raw = Raw::admitted(&functions_socket(&machine.folder()));
    // One that is no VF at all.
    let pf = raw.opened(bdf("0000:02:00.0"));
    assert!(matches!(raw.ask(&ToKeeper::Stop), FromKeeper::NoFile));
    drop((raw, pf));
    let OpenGroup { group, kept, .. } = opened;
    drop(group);
    drop(kept);
    until("both are given back", || machine.is_as_before(VF));
    let closed = stopper.stop().unwrap_err();
    assert_eq!(closed.code, ErrorCode::WrongState, "{closed}");
    running.stop();
}

#[test]
fn stop_that_the_kernel_refuses_is_told_in_its_words_and_the_connection_goes_on() {
    let machine = Machine::new();
    machine.xe_vfs(&[VF]);
    // A file that nobody can write, not even root.
    fs::remove_file(machine.xe_stop(1)).unwrap();
    symlink("/proc/version", machine.xe_stop(1)).unwrap();
    let running = Running::of(&machine);
    let (opened, stopper) = Keeper::at(&machine.folder()).open_to_lend(bdf(VF)).unwrap();
    let refused = stopper.stop().unwrap_err();
    assert_eq!(refused.code, ErrorCode::Kernel);
    for words in ["could not write", "sriov_admin/vf1/stop", "(os error "] {
        assert!(refused.text.contains(words), "{refused}");
    }
    let OpenGroup { group, kept, .. } = opened;
    drop(group);
    drop(kept);
    assert!(machine.is_as_before(VF));
    running.stop();
}
