//! A host without hardware for the tests of control socket and command line.

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
};
use sublet::daemon::{
    Host,
    control::{self, Deadlines},
    socket::ControlSocket,
    vocabulary::*,
};
use vfio_shim::model::FunctionIds;

/// Answers `list`, `status` and `borrow` with the seed document's functions; records all verbs.
#[derive(Default)]
pub struct FakeHost {
    pub verbs: Mutex<Vec<Verb>>,
    pub stopped: Mutex<bool>,
    pub changed: Condvar,
}

impl Host for FakeHost {
    fn handle(&self, verb: Verb) -> Result<Outcome, VerbError> {
        self.verbs.lock().unwrap().push(verb.clone());
        self.changed.notify_all();
        match verb {
            Verb::List => Ok(Outcome::List(vec![entry()])),
            Verb::Status => Ok(Outcome::Status(Box::new(status()))),
            Verb::Borrow { fdid, socket, .. } if fdid == entry().fdid => {
                Ok(Outcome::Borrowed(Box::new(borrowed(socket))))
            }
            Verb::Borrow { fdid, .. } => Err(VerbError::new(
                ErrorCode::UnknownFunction,
                format!("nobody lends {fdid}; see `sublet list`"),
            )),
            // Stands for a verb that waits for the other host until the host stops.
            Verb::Return { .. } => {
                let stopped = self.stopped.lock().unwrap();
                drop(self.changed.wait_while(stopped, |stopped| !*stopped));
                Err(VerbError::new(ErrorCode::Stopping, "the host has stopped"))
            }
            _ => Ok(Outcome::Done),
        }
    }

    fn stop(&self) {
        *self.stopped.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl FakeHost {
    /// Returns once `count` verbs have come.
    pub fn wait_for_verbs(&self, count: usize) {
        let verbs = self.verbs.lock().unwrap();
        drop(self.changed.wait_while(verbs, |verbs| verbs.len() < count));
    }
}

/// One of the functions of the seed document.
pub fn description() -> FunctionDescription {
    FunctionDescription {
        name: "VGA compatible controller Intel Corporation Device e212".to_owned(),
        ..FunctionDescription::from(&FunctionIds {
            vendor: 0x8086,
            device: 0xe212,
            subsystem_vendor: 0x8086,
            subsystem_device: 0x1114,
            class: 0x03_0000,
            revision: 0,
        })
    }
}

pub fn entry() -> ListEntry {
    ListEntry {
        fdid: fdid("44a01"),
        location: Location::Remote,
        available: Availability::Available,
        function: description(),
    }
}

pub fn fdid(text: &str) -> FdidText {
    FdidText::from(text.parse::<vfio_shim::model::Fdid>().unwrap())
}

pub fn bdf(text: &str) -> BdfText {
    BdfText::from(text.parse::<vfio_shim::model::Bdf>().unwrap())
}

fn borrowed(socket: PathBuf) -> BorrowedFunction {
    BorrowedFunction {
        fdid: fdid("44a01"),
        function: description(),
        available: Availability::InUse,
        location: Location::Remote,
        adapter: 0,
        node_id: 4,
        remote_bdf: bdf("4a:00.1"),
        physical_slot: None,
        serial: Some(Hex64(0)),
        uuid: None,
        local_users: 1,
        local_virtual_device: None,
        driver: None,
        lease: Hex64(0x2a),
        socket,
        bars: BarMode::Trapped,
    }
}

pub fn status() -> HostStatus {
    HostStatus {
        node: NodeStatus {
            id: 8,
            name: "b".to_owned(),
            version: "0.1.0".to_owned(),
            pid: 812,
            uptime_ms: 11_520_000,
            sandbox: None,
        },
        ports: vec![port()],
        lent: Vec::new(),
        borrowed: vec![BorrowedStatus {
            fdid: fdid("44a01"),
            lease: Hex64(0x2a),
            trust_domain: "lab".to_owned(),
            socket: "/run/sublet/vm.sock".into(),
            state: "attached".to_owned(),
            vmm_pid: Some(901),
            bars: BarMode::Trapped,
            ram_bytes: Some(128 << 20),
            counters: GuestCounters {
                trapped_reads: 40,
                trapped_writes: 2,
                dma_maps: 3,
                mapped_bytes: 128 << 20,
                ..GuestCounters::default()
            },
            refused: RefusedCounters::default(),
            worker: None,
            vectors: vec![
                BorrowedVector {
                    index: 0,
                    scanned: 5,
                    signals: 5,
                },
                BorrowedVector {
                    index: 1,
                    scanned: 7,
                    signals: 6,
                },
            ],
            way: "doorbell".to_owned(),
            last_error: None,
        }],
        quarantine: QuarantineStatus::default(),
        store: StoreStatus::default(),
    }
}

fn port() -> PortStatus {
    PortStatus {
        name: "ntb0".to_owned(),
        bdf: bdf("02:00.0"),
        chip: Some("Intel SPR".to_owned()),
        link: LinkState::Up,
        session: SessionStatus {
            state: "open".to_owned(),
            id: Some(Hex64(0xabcd)),
            version: Some(1),
            own_versions: Some([1, 1]),
            peer_versions: Some([1, 1]),
            peer_node: Some(4),
            since_ms: Some(250),
            over_reason: Some("the peer's heartbeat stood still for 1500 ms".to_owned()),
        },
        window: WindowStatus {
            bytes: 1 << 30,
            usable: Some(1 << 30),
            free: Some(512 << 20),
        },
        mailbox: MailboxCounters {
            sent: 12,
            received: 11,
            heartbeat_age_ms: Some(120),
            ..MailboxCounters::default()
        },
        doorbells: DoorbellCounters {
            rung: 12,
            taken: 30,
        },
        quarantine: PortQuarantine {
            slices: 3,
            bytes: 12 << 20,
            vectors: 9,
        },
        process: None,
        last_error: None,
    }
}

/// A server on a thread, stopped when dropped.
pub struct Server {
    pub host: Arc<FakeHost>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(control: &Path, deadlines: Deadlines) -> Self {
        let socket = ControlSocket::claim(control).unwrap();
        let host = Arc::new(FakeHost::default());
        let (stop, stopped) = UnixStream::pair().unwrap();
        let served: Arc<dyn Host> = host.clone();
        let thread = thread::spawn(move || {
            control::serve(&socket, &served, stopped.as_fd(), deadlines).unwrap();
        });
        Self {
            host,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The other end becomes readable.
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let served = thread.join();
            assert!(served.is_ok() || thread::panicking());
        }
    }
}
