//! The keeper over real sockets, on a tree of files whose kernel is played, and on groups that are pipes.

#[allow(dead_code, reason = "each test program uses a part of it")]
#[path = "../../tests/tree/mod.rs"]
mod tree;

pub(crate) use tree::{NTB, OTHER, PF, VF};

use super::{
    holds::Holds,
    journal::Journal,
    message::{FromKeeper, ToKeeper},
    serve::{self, CONNECTIONS_MAX, Service},
    *,
};
use crate::{
    config::Config,
    daemon::vocabulary::{ErrorCode, VerbError},
    ipc::{Channel, Check, PIECES_MAX},
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    net::{
        AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    },
    pipe::{PipeFlags, pipe_with},
    process::{geteuid, getpid},
};
use std::{
    collections::BTreeMap,
    fs,
    ops::Deref,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::Path,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tree::{FORBIDDEN, Tree, put};
use vfio_shim::{
    model::{Bdf, OsRuntime, Runtime, Span},
    sysfs::{OnWrite, Sysfs},
    vfio::{OpenError, OpenGroup},
};
use vmm_glue::vfio_user::memory_check::{Inode, MemoryMaps};

/// Longer than anything here takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

/// The read ends of all groups that were opened: one is busy until its write end is closed
/// everywhere, as the kernel's is until its last descriptor is.
type Groups = Mutex<BTreeMap<Bdf, OwnedFd>>;

/// A host of files, whose kernel is played. It outlives its keepers, as the kernel does.
pub(crate) struct Machine {
    tree: Tree,
    groups: Arc<Groups>,
    /// What was written, file by file.
    pub(crate) writes: Arc<Mutex<Vec<String>>>,
}

impl Deref for Machine {
    type Target = Tree;
    fn deref(&self) -> &Tree {
        &self.tree
    }
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self {
            tree: Tree::new(),
            groups: Arc::default(),
            writes: Arc::default(),
        }
    }

    pub(crate) fn config(&self) -> Config {
        let text = self.config_text(geteuid().as_raw());
        Config::parse(Path::new("test.toml"), &text).unwrap()
    }

    /// What a kernel does on unbind and probe.
    pub(super) fn kernel(&self) -> Arc<OnWrite> {
        let root = self.sys("");
        let writes = Arc::clone(&self.writes);
        let groups = Arc::clone(&self.groups);
        let kernel = move |path: &Path, text: &str| {
            let name = path.display().to_string();
            writes
                .lock()
                .unwrap()
                .push(format!("{name} {}", text.trim()));
            let driver = |bdf: &str| root.join("bus/pci/devices").join(bdf).join("driver");
            let parts: Vec<_> = name.split('/').collect();
            match parts[..] {
                ["bus", "pci", "drivers_probe"] => {
                    let wanted = fs::read_to_string(driver(text).with_file_name("driver_override"));
                    let wanted = root.join("bus/pci/drivers").join(wanted.unwrap().trim());
                    symlink(wanted, driver(text)).unwrap();
                }
                ["bus", "pci", "drivers", _, "unbind"] => {
                    // A kernel would wait here for as long as somebody has it open.
                    assert!(
                        !is_open(&groups, bdf(text)),
                        "{text} is unbound under its holder"
                    );
                    fs::remove_file(driver(text)).unwrap();
                }
                _ => {}
            }
        };
        Arc::new(kernel)
    }

    pub(crate) fn sysfs(&self) -> Sysfs {
        Sysfs::stand_in(self.sys(""), self.kernel())
    }

    pub(super) fn is_open(&self, name: &str) -> bool {
        is_open(&self.groups, bdf(name))
    }

    pub(super) fn ground(&self) -> Ground {
        let groups = Arc::clone(&self.groups);
        let open = move |bdf: Bdf, sysfs: &Sysfs| {
            let group = sysfs
                .iommu_group(bdf)
                .map_err(|e| OpenError::Sysfs(bdf, e))?;
            let driver = sysfs.driver(bdf).map_err(|e| OpenError::Sysfs(bdf, e))?;
            if driver.as_deref() != Some("vfio-pci") {
                let driver = driver.unwrap_or_default();
                return Err(OpenError::NotVfio { bdf, driver });
            }
            if is_open(&groups, bdf) {
                return Err(OpenError::Busy { bdf, group });
            }
            let (seen, held) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            groups.lock().unwrap().insert(bdf, seen);
            Ok(OpenGroup {
                group: held,
                container: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
                kept: None,
            })
        };
        Ground {
            top: self.top().to_owned(),
            sysfs: self.sysfs(),
            open: Box::new(open),
        }
    }
}

fn is_open(groups: &Groups, bdf: Bdf) -> bool {
    let groups = groups.lock().unwrap();
    let Some(seen) = groups.get(&bdf) else {
        return false;
    };
    let mut fds = [PollFd::from_borrowed_fd(seen.as_fd(), PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).unwrap();
    !fds[0].revents().contains(PollFlags::HUP)
}

pub(super) fn until(what: &str, mut look: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !look() {
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Memory that is shared with one process alone, and a look that can be made to stand still.
#[derive(Debug, Default)]
struct Shared {
    stands: Mutex<bool>,
    moved: Condvar,
}

impl MemoryMaps for Shared {
    fn check_shared(
        &self,
        pid: i32,
        ranges: &[(Inode, Span)],
    ) -> Result<(), vmm_glue::vfio_user::memory_check::MemoryError> {
        let stands = self.stands.lock().unwrap();
        drop(
            self.moved
                .wait_while(stands, |stands| *stands && pid == 7)
                .unwrap(),
        );
        match (pid, ranges.first()) {
            (42 | 7, _) => Ok(()),
            (pid, Some((_, range))) => {
                let range = *range;
                Err(vmm_glue::vfio_user::memory_check::MemoryError::Private { pid, range })
            }
            (_, None) => Ok(()),
        }
    }
}

/// A keeper in threads of this process: all of it but its sandbox.
pub(crate) struct Running {
    stop: OwnedFd,
    threads: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

const SHORT: Waits = Waits {
    handover: Duration::from_millis(300),
    release: Duration::from_millis(100),
    step: Duration::from_millis(1),
    idle_step: Duration::from_millis(5),
};

impl Running {
    fn start(machine: &Machine, uid: u32, waits: Waits, tended: bool) -> Self {
        Self::on(machine, machine.ground(), uid, waits, tended)
    }

    fn on(machine: &Machine, ground: Ground, uid: u32, waits: Waits, tended: bool) -> Self {
        let folder = machine.folder();
        let config = machine.config();
        socket::claim_folder(&folder).unwrap();
        let journal = Journal::open(&journal_folder(&folder)).unwrap();
        let holds = Holds::new(config, ground, journal, waits, Arc::new(OsRuntime)).unwrap();
        let holds = Arc::new(holds);
        let shared = Arc::new(Shared::default());
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let services = [
            (
                functions_socket(&folder),
                Service::Functions(Arc::clone(&holds)),
            ),
            (checks_socket(&folder), Service::Checks(shared.clone())),
        ];
        let own = geteuid().as_raw();
        let serving = services.map(|(path, service)| {
            let listener = socket::listen_at(&path, own).unwrap();
            let stop = stop.try_clone().unwrap();
            std::thread::spawn(move || {
                let runtime: Arc<dyn Runtime> = Arc::new(OsRuntime);
                let ends = [stop.as_fd()];
                serve::serve(listener.as_fd(), uid, &service, &ends, &runtime).unwrap();
            })
        });
        if tended {
            std::thread::spawn(move || holds.tend_orphans());
        }
        Self {
            stop,
            threads: serving.into(),
            shared,
        }
    }

    pub(crate) fn of(machine: &Machine) -> Self {
        Self::start(machine, geteuid().as_raw(), SHORT, true)
    }

    /// Listens no more. Its connections are as they were: the test ends them where it wants to.
    pub(crate) fn stop(self) {
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).unwrap();
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

/// A client that says what it likes.
pub(crate) struct Raw(Channel);

impl Raw {
    fn connect(path: &Path) -> Self {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        Self(Channel::of(socket))
    }

    fn hear(&self) -> Option<FromKeeper> {
        self.0.hear().unwrap()
    }

    pub(crate) fn admitted(path: &Path) -> Self {
        let this = Self::connect(path);
        assert!(matches!(this.hear(), Some(FromKeeper::Done)));
        this
    }

    pub(crate) fn ask(&self, question: &ToKeeper) -> FromKeeper {
        self.0.say(question, true).unwrap();
        self.hear().expect("an answer")
    }

    pub(crate) fn refused(&self, question: &ToKeeper) -> VerbError {
        match self.ask(question) {
            FromKeeper::Refused(refusal) => refusal,
            other => panic!("not refused: {other:?}"),
        }
    }

    pub(crate) fn opened(&self, bdf: Bdf) -> OpenGroup {
        match self.ask(&ToKeeper::Open(bdf)) {
            FromKeeper::Opened(opened) => opened,
            other => panic!("not opened: {other:?}"),
        }
    }
}

#[test]
fn function_of_the_list_is_bound_handed_over_and_given_back() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let keeper = Keeper::at(&machine.folder());
    for name in [NTB, VF] {
        let opened = keeper.open(bdf(name)).unwrap();
        assert!(machine.is_bound(name), "{:?}", machine.binding(name));
        assert_eq!(machine.records(), [name]);
        assert!(machine.is_open(name));
        let OpenGroup {
            group,
            container,
            kept,
        } = opened;
        drop((group, container));
        drop(kept);
        assert!(machine.is_as_before(name), "{:?}", machine.binding(name));
    }
    running.stop();
}

#[test]
fn function_that_the_configuration_does_not_name_is_refused_and_not_touched() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let keeper = Keeper::at(&machine.folder());
    let refused = keeper.open(bdf(FORBIDDEN)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotAllowed);
    for word in [FORBIDDEN, "policy.allow", "restart the keeper"] {
        assert!(refused.text.contains(word), "{refused}");
    }
    let unknown = keeper.open(bdf("0000:01:00.7")).unwrap_err();
    assert_eq!(unknown.code, ErrorCode::UnknownFunction, "{unknown}");
    machine.bind_to(OTHER, "nvme");
    let driven = keeper.open(bdf(OTHER)).unwrap_err();
    assert_eq!(driven.code, ErrorCode::DriverBound, "{driven}");
    assert!(machine.writes.lock().unwrap().is_empty());
    assert!(machine.records().is_empty());
    running.stop();
}

#[test]
fn what_a_killed_client_had_bound_is_undone_after_its_descriptors_are_gone() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let client = Raw::admitted(&functions_socket(&machine.folder()));
    let opened = client.opened(bdf(VF));
    // As a process that dies: the connection ends first, its descriptors a moment later.
    drop(client);
    let early = Instant::now() + 3 * SHORT.release;
    while Instant::now() < early {
        assert!(machine.is_bound(VF), "unbound while it is open");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(opened);
    until("the function is given back", || machine.is_as_before(VF));
    running.stop();
}

#[test]
fn binding_that_was_there_before_is_there_afterwards() {
    let machine = Machine::new();
    machine.bind_to(NTB, "vfio-pci");
    let before = machine.binding(NTB);
    let running = Running::of(&machine);
    drop(Keeper::at(&machine.folder()).open(bdf(NTB)).unwrap());
    until("its record is gone", || machine.records().is_empty());
    assert_eq!(machine.binding(NTB), before);
    running.stop();
}

#[test]
fn close_of_what_is_still_open_is_refused_and_works_afterwards() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let client = Raw::admitted(&functions_socket(&machine.folder()));
    let opened = client.opened(bdf(VF));
    let refused = client.refused(&ToKeeper::Close(bdf(VF)));
    assert_eq!(refused.code, ErrorCode::Busy);
    assert!(refused.text.contains("fuser -v /dev/vfio/1"), "{refused}");
    assert!(machine.is_bound(VF));
    drop(opened);
    assert!(matches!(
        client.ask(&ToKeeper::Close(bdf(VF))),
        FromKeeper::Done
    ));
    assert!(machine.is_as_before(VF));
    // What is closed already stays so.
    assert!(matches!(
        client.ask(&ToKeeper::Close(bdf(VF))),
        FromKeeper::Done
    ));
    running.stop();
}

#[test]
fn function_of_another_connection_is_neither_opened_nor_closed() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let path = functions_socket(&machine.folder());
    let (first, second) = (Raw::admitted(&path), Raw::admitted(&path));
    let opened = first.opened(bdf(VF));
    let refused = second.refused(&ToKeeper::Open(bdf(VF)));
    assert_eq!(refused.code, ErrorCode::Busy);
    let holder = format!("process {}", getpid().as_raw_nonzero());
    assert!(refused.text.contains(&holder), "{refused}");
    let refused = second.refused(&ToKeeper::Close(bdf(VF)));
    assert_eq!(refused.code, ErrorCode::WrongState, "{refused}");
    let two = first.refused(&ToKeeper::Open(bdf(OTHER)));
    assert_eq!(two.code, ErrorCode::BadRequest, "{two}");
    assert!(machine.is_bound(VF) && !machine.is_bound(OTHER));
    drop(opened);
    running.stop();
}

#[test]
fn client_that_comes_back_at_once_gets_what_its_dead_self_had() {
    let machine = Machine::new();
    let waits = Waits {
        handover: PATIENCE,
        ..SHORT
    };
    let running = Running::start(&machine, geteuid().as_raw(), waits, true);
    let path = functions_socket(&machine.folder());
    for _ in 0..20 {
        let client = Raw::admitted(&path);
        let opened = client.opened(bdf(VF));
        drop(client);
        let next = Raw::admitted(&path);
        next.0.say(&ToKeeper::Open(bdf(VF)), true).unwrap();
        drop(opened);
        assert!(matches!(next.hear(), Some(FromKeeper::Opened(_))));
        drop(next);
    }
    until("the function is given back", || machine.is_as_before(VF));
    running.stop();
}

/// What a killed keeper leaves: a function bound, its record, a client that goes on.
fn orphan(machine: &Machine) -> OpenGroup {
    let opened = (machine.ground().open)(bdf(VF), &machine.sysfs());
    opened.expect_err("not bound yet");
    machine.orphan(VF);
    (machine.ground().open)(bdf(VF), &machine.sysfs()).unwrap()
}

#[test]
fn next_keeper_gives_back_what_the_killed_one_had_bound_when_its_client_has_gone() {
    let machine = Machine::new();
    let opened = orphan(&machine);
    let running = Running::of(&machine);
    let early = Instant::now() + 20 * SHORT.idle_step;
    while Instant::now() < early {
        assert!(machine.is_bound(VF), "taken from a client that lives");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(opened);
    until("the function is given back", || machine.is_as_before(VF));
    running.stop();
}

#[test]
fn function_of_a_killed_keepers_client_is_not_taken_from_it_by_anothers_open() {
    let machine = Machine::new();
    let opened = orphan(&machine);
    let running = Running::of(&machine);
    let other = Raw::admitted(&functions_socket(&machine.folder()));
    for _ in 0..3 {
        let refused = other.refused(&ToKeeper::Open(bdf(VF)));
        assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
        assert!(machine.is_bound(VF), "unbound under its holder");
    }
    drop(opened);
    until("the function is given back", || machine.is_as_before(VF));
    running.stop();
}

#[test]
fn function_is_not_unbound_by_a_keeper_that_cannot_look_whether_it_is_open() {
    let machine = Machine::new();
    let blind = Arc::new(AtomicBool::new(false));
    let (mut ground, is_blind) = (machine.ground(), Arc::clone(&blind));
    let open = ground.open;
    ground.open = Box::new(move |bdf, sysfs| match is_blind.load(Ordering::Relaxed) {
        true => Err(OpenError::Kernel {
            act: "open",
            object: "/dev/vfio/1".into(),
            source: std::io::Error::from_raw_os_error(libc::EMFILE),
        }),
        false => open(bdf, sysfs),
    });
    let running = Running::on(&machine, ground, geteuid().as_raw(), SHORT, true);
    let client = Raw::admitted(&functions_socket(&machine.folder()));
    let opened = client.opened(bdf(VF));
    blind.store(true, Ordering::Relaxed);
    let refused = client.refused(&ToKeeper::Close(bdf(VF)));
    assert!(refused.text.contains("/dev/vfio/1"), "{refused}");
    assert!(machine.is_bound(VF), "unbound under its holder");
    blind.store(false, Ordering::Relaxed);
    drop(opened);
    let closed = client.ask(&ToKeeper::Close(bdf(VF)));
    assert!(matches!(closed, FromKeeper::Done), "{closed:?}");
    assert!(machine.is_as_before(VF));
    running.stop();
}

#[test]
fn client_of_the_killed_keeper_closes_by_the_next_one() {
    let machine = Machine::new();
    let first = Running::of(&machine);
    let keeper = Keeper::at(&machine.folder());
    let OpenGroup {
        group,
        container,
        kept,
    } = keeper.open(bdf(VF)).unwrap();
    let path = functions_socket(&machine.folder());
    first.stop();
    fs::remove_file(&path).unwrap();
    fs::remove_file(checks_socket(&machine.folder())).unwrap();
    // Threads of the first one go on: its connection is not told to end, so the next keeper alone
    // is asked by a connection of its own, as a client does when the first is gone.
    let second = Running::start(&machine, geteuid().as_raw(), SHORT, false);
    assert!(machine.is_bound(VF));
    drop((group, container));
    until("the second one gives it back", || {
        let client = Raw::admitted(&path);
        matches!(client.ask(&ToKeeper::Close(bdf(VF))), FromKeeper::Done)
    });
    assert!(machine.is_as_before(VF));
    std::mem::forget(kept);
    second.stop();
}

#[test]
fn function_of_the_last_keeper_that_is_opened_again_gets_back_what_it_had_before_both() {
    let machine = Machine::new();
    drop(orphan(&machine));
    let running = Running::start(&machine, geteuid().as_raw(), SHORT, false);
    let opened = Keeper::at(&machine.folder()).open(bdf(VF)).unwrap();
    assert!(machine.is_bound(VF));
    let OpenGroup {
        group,
        container,
        kept,
    } = opened;
    drop((group, container));
    drop(kept);
    assert!(machine.is_as_before(VF), "{:?}", machine.binding(VF));
    running.stop();
}

#[test]
fn damaged_record_is_told_and_left_alone() {
    let machine = Machine::new();
    put(&machine.folder().join("bound").join(VF), "{\"driver\":");
    put(
        &machine.folder().join("bound").join("0000:09:00.0"),
        r#"{"driver":null,"driver_override":null}"#,
    );
    let running = Running::of(&machine);
    // Of a function that has gone there is nothing to undo.
    until("the other record is gone", || machine.records() == [VF]);
    assert!(machine.writes.lock().unwrap().is_empty());
    running.stop();
}

#[test]
fn another_user_is_refused_in_words_before_it_says_anything() {
    let machine = Machine::new();
    let own = geteuid().as_raw();
    let running = Running::start(&machine, own + 1, SHORT, true);
    let refused = Keeper::at(&machine.folder()).open(bdf(VF)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotAllowed);
    let words = format!(
        "runs as user {own}, and the keeper serves user {} alone",
        own + 1
    );
    assert!(refused.text.contains(&words), "{refused}");
    let client = Raw::connect(&functions_socket(&machine.folder()));
    assert!(matches!(client.hear(), Some(FromKeeper::Refused(_))));
    assert!(client.hear().is_none());
    assert!(machine.writes.lock().unwrap().is_empty());
    running.stop();
}

#[test]
fn connections_up_to_the_limit_are_served_and_one_more_is_refused() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let path = functions_socket(&machine.folder());
    let mut clients: Vec<Raw> = (0..CONNECTIONS_MAX).map(|_| Raw::admitted(&path)).collect();
    let over = Keeper::at(&machine.folder()).open(bdf(VF)).unwrap_err();
    assert_eq!(over.code, ErrorCode::TooManyClients);
    assert!(over.text.contains(&CONNECTIONS_MAX.to_string()), "{over}");
    // One that is there is served all the same, and one that goes makes room.
    drop(clients[0].opened(bdf(VF)));
    clients.pop();
    until("there is room again", || {
        let next = Raw::connect(&path);
        matches!(next.hear(), Some(FromKeeper::Done))
    });
    running.stop();
}

#[test]
fn bytes_that_are_no_message_end_the_connection_and_nothing_else() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let path = functions_socket(&machine.folder());
    let other = Raw::admitted(&path);
    let opened = other.opened(bdf(VF));
    for bytes in [&[0xff; 300][..], &[1], &[1, 0, 0, 0, 8, 1, 9], &[3, 0]] {
        let client = Raw::admitted(&path);
        rustix::net::send(client.0.as_fd(), bytes, SendFlags::empty()).unwrap();
        match client.hear() {
            Some(FromKeeper::Refused(refusal)) => assert_eq!(refusal.code, ErrorCode::BadRequest),
            other => panic!("{other:?}"),
        }
        assert!(client.hear().is_none());
    }
    let wrong = other.refused(&ToKeeper::CheckShared(check(1, 42)));
    assert_eq!(wrong.code, ErrorCode::BadRequest, "{wrong}");
    assert!(machine.is_bound(VF));
    drop(opened);
    running.stop();
}

#[test]
fn client_that_asks_and_does_not_read_holds_up_nobody_else() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let path = functions_socket(&machine.folder());
    let flood = Raw::admitted(&path);
    let close = ToKeeper::Close(bdf(OTHER));
    until("the flood is full", || {
        flood.0.say(&close, false).unwrap() == crate::ipc::Sent::Full
    });
    let opened = Keeper::at(&machine.folder()).open(bdf(VF)).unwrap();
    drop(opened);
    assert!(machine.is_as_before(VF));
    running.stop();
}

fn check(ranges: usize, pid: i32) -> Check {
    let range = |at: u64| (1, at, Span::new(at << 12, 4096).unwrap());
    Check {
        pid,
        ranges: (0..ranges as u64).map(range).collect(),
    }
}

#[test]
fn memory_is_looked_at_and_one_look_that_stands_still_holds_up_no_other() {
    let machine = Machine::new();
    let running = Running::of(&machine);
    let keeper = Keeper::at(&machine.folder());
    let range = |number| {
        let inode = Inode { device: 1, number };
        (inode, Span::new(0, 4096).unwrap())
    };
    let ranges: Vec<_> = (0..2 * PIECES_MAX as u64 + 1).map(range).collect();
    keeper.check_shared(42, &ranges).unwrap();
    let private = keeper.check_shared(43, &ranges).unwrap_err().to_string();
    assert!(
        private.contains("process 43") && private.contains("share=on"),
        "{private}"
    );
    *running.shared.stands.lock().unwrap() = true;
    let standing = keeper.clone();
    let waiting = ranges.clone();
    let stands = std::thread::spawn(move || standing.check_shared(7, &waiting));
    keeper.check_shared(42, &ranges).unwrap();
    *running.shared.stands.lock().unwrap() = false;
    running.shared.moved.notify_all();
    stands.join().unwrap().unwrap();
    running.stop();
}

#[test]
fn folder_that_others_can_write_and_a_second_keeper_are_refused() {
    use std::os::unix::fs::PermissionsExt;
    let machine = Machine::new();
    let running = Running::of(&machine);
    let path = functions_socket(&machine.folder());
    let second = socket::listen_at(&path, geteuid().as_raw()).unwrap_err();
    assert!(matches!(second, SocketError::Running(_)), "{second}");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    running.stop();
    // Stale: nobody listens there any more.
    drop(socket::listen_at(&path, geteuid().as_raw()).unwrap());
    fs::set_permissions(machine.folder(), fs::Permissions::from_mode(0o775)).unwrap();
    let refused = socket::claim_folder(&machine.folder())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("mode 0755"), "{refused}");
}
