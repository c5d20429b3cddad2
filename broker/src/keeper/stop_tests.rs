//! A function that is stopped by the keeper: the file of its own VF is written, in the keeper's sandbox too, and no other.

use super::{
    holds::Holds,
    journal::Journal,
    message::{FromKeeper, ToKeeper},
    serve::{self, Service},
    tests::*,
    *,
};
use crate::{daemon::vocabulary::ErrorCode, jail::keep_from_children};
use rustix::{
    event::{EventfdFlags, eventfd},
    process::geteuid,
};
use std::{
    env, fs,
    os::unix::fs::symlink,
    process::{Child, Command, Stdio, exit},
    sync::Mutex,
};
use vfio_shim::{
    sysfs::Sysfs,
    vfio::{OpenError, OpenGroup},
};

/// Where the tree is of which a child of this program is the keeper.
const TREE: &str = "SUBLET_KEEPER_TEST_TREE";

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

/// A keeper of a tree, as a process in the sandbox of the real one.
fn keeper_of(tree: &Path) -> ! {
    let machine = Machine::at(tree);
    let folder = machine.folder();
    // Made here: a sealed keeper only opens what is there.
    let group = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let function = Mutex::new(Some(OpenGroup {
        group: group(),
        container: group(),
        kept: None,
    }));
    let open = move |bdf, _: &Sysfs| {
        let driver = "no driver".to_owned();
        let once = function.lock().unwrap().take();
        once.ok_or(OpenError::NotVfio { bdf, driver })
    };
    let ground = Ground {
        sysfs: machine.sysfs(),
        open: Box::new(open),
    };
    let journal = Journal::open(&journal_folder(&folder)).unwrap();
    let uid = geteuid().as_raw();
    let listener = socket::listen_at(&functions_socket(&folder), uid).unwrap();
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let number = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
    let own: Vec<i32> = open
        .map(|fd| number(fd).unwrap().parse().unwrap())
        .collect();
    let confined = confine_but(&ROLE, Sandbox::On, &own, &kept(&folder, tree)).unwrap();
    let holds = Holds::new(machine.config(), ground, journal, Waits::default()).unwrap();
    confined.seal_before_threads().unwrap();
    fs::File::create(tree.join("not-a-keepers")).unwrap_err();
    serve::serve(
        listener.as_fd(),
        uid,
        &Service::Functions(Arc::new(holds)),
        &[],
    )
    .unwrap();
    exit(0);
}

/// Killed when it goes.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn keeper_in_its_sandbox_stops_a_vf() {
    if let Some(tree) = env::var_os(TREE) {
        keeper_of(Path::new(&tree));
    }
    let machine = Machine::new();
    machine.xe_vfs(&[VF, OTHER]);
    // The stand-in for the kernel makes links when it binds, which is nothing that a keeper may.
    machine.bind_to(OTHER, "vfio-pci");
    socket::claim_folder(&machine.folder()).unwrap();
    keep_from_children();
    let mut command = Command::new(env::current_exe().unwrap());
    let name = "keeper::stop_tests::keeper_in_its_sandbox_stops_a_vf";
    command.args(["--exact", name, "--nocapture"]);
    command.env(TREE, machine.top()).stdin(Stdio::null());
    let mut keeper = Process(command.spawn().unwrap());
    let path = functions_socket(&machine.folder());
    until("it serves", || {
        assert_eq!(keeper.0.try_wait().unwrap(), None, "it has ended");
        path.exists()
    });
    let (_opened, stopper) = Keeper::at(&machine.folder())
        .open_to_lend(bdf(OTHER))
        .unwrap();
    stopper.stop().unwrap();
    let written = [1, 2].map(|vf| fs::read_to_string(machine.xe_stop(vf)).unwrap());
    assert_eq!(written, ["", "1"]);
}
