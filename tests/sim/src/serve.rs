//! How borrowed functions are served: by a thread of the port's process, or by a worker's own.

use crate::lease::{Borrow, Borrowed, By, Held, Kind, Outcome, Server, Wish};
use crate::scheduler::{Process, wait_for};
use crate::worker::Launcher;
use crate::world::World;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use sublet::ipc::Start;
use sublet::worker::server::{self, Settings};
use vfio_shim::model::Function;
use vfio_shim::ntb::NtbPort;
use vfio_shim::path::BorrowedFunction;
use vmm_glue::vfio_user::{Endpoint, MemoryCheck, Options, SessionShared};

/// The product's default.
const WORKER_MESSAGES_PER_SECOND: u32 = 50_000;

/// Its own options are the worker's.
fn start(path: &Path) -> Start {
    let options = Options::default();
    Start {
        lease: 0,
        path: path.display().to_string(),
        mapped: false,
        memory_check: false,
        vmm_uids: vec![rustix::process::geteuid().as_raw()],
        vmm_gids: Vec::new(),
        maps_max: options.maps_max,
        bytes_max: options.bytes_max,
        window: None,
    }
}

impl World {
    /// `borrow` of a function of the other host.
    pub fn borrow(&mut self, side: usize, function: usize, ram: Option<u64>) {
        let by = match self.workers {
            true => [By::Thread, By::Channel, By::Window][self.random.below(3)],
            false => By::Thread,
        };
        self.borrow_by((side, function), ram, by);
    }

    /// The same, served so.
    pub fn borrow_by(&mut self, (side, function): (usize, usize), ram: Option<u64>, by: By) {
        let bdf = self.hosts[1 - side].functions[function].bdf;
        self.sockets += 1;
        let socket = self.dir.join(format!("{}.sock", self.sockets));
        let shared = Arc::new(SessionShared::default());
        let near = by == By::Window;
        let launcher = (by != By::Thread).then(|| self.launcher(side, &shared, near));
        let wish = Wish {
            ram,
            socket: socket.clone(),
            shared,
            worker: launcher
                .as_ref()
                .map(|launcher| (launcher.process, Arc::downgrade(&launcher.alive), near)),
        };
        self.verb((side, Kind::Borrow, function), Some(wish), move |engine| {
            let Some(launcher) = launcher else {
                let borrowed = engine.borrow(bdf, ram).map(|(.., function)| function);
                let borrowed = borrowed.map(Borrowed::Function);
                return Outcome::Borrowed(borrowed.map_err(|error| error.to_string()));
            };
            let settings = Settings {
                messages_per_second: WORKER_MESSAGES_PER_SECOND,
                memory_maps: Options::default().memory_maps,
                holders: Default::default(),
            };
            let endpoint = Endpoint::bind(&socket).expect("a socket");
            let by = (Box::new(launcher) as _, &settings);
            let served = server::start(&engine, (bdf, ram), endpoint, start(&socket), by);
            let served = served.map(Borrowed::Served);
            Outcome::Borrowed(served.map_err(|error| vfio_shim::path::words(&error)))
        });
    }

    /// For a process of its own, which reaches BARs by itself or not.
    fn launcher(&mut self, side: usize, shared: &Arc<SessionShared>, near: bool) -> Launcher {
        let process = self.scheduler.process(side);
        let core = Arc::clone(self.scheduler.core());
        self.worker_processes.retain(|other| !core.is_dead(*other));
        self.worker_processes.push(process);
        Launcher {
            core,
            process,
            window: near.then(|| self.hosts[side].port.window(0)),
            shared: Arc::clone(shared),
            alive: Arc::default(),
        }
    }

    /// The workers of a host.
    pub fn workers_of(&self, side: usize) -> Vec<Process> {
        let all = self.worker_processes.iter().copied();
        all.filter(|process| process.side == side).collect()
    }

    /// The answer of a `borrow`.
    pub fn borrowed(&mut self, (side, function): (usize, usize), wish: Wish, result: Borrow) {
        let host = self.hosts[side].name();
        let server = match result {
            Ok(Borrowed::Function(borrowed)) => self.serve(side, &wish, borrowed),
            Ok(Borrowed::Served(server)) => {
                let (process, alive, near) = wish.worker.expect("its process");
                Server::Worker {
                    server,
                    process,
                    alive,
                    near,
                    core: Arc::clone(self.scheduler.core()),
                }
            }
            Err(error) => {
                self.trace
                    .tell(2, || format!("{host}: borrow is refused: {error}"));
                self.refused = true;
                return;
            }
        };
        let held = Held {
            side,
            function,
            lease: server.lease(),
            server,
            socket: wish.socket,
            shared: wish.shared,
            ram: wish.ram,
            vmm: None,
            returning: false,
        };
        self.trace.tell(held.lease.0, || {
            let worker = held.worker().map(|process| process.number);
            let by = worker.map_or("a thread".into(), |number| format!("worker {number}"));
            let lease = held.lease;
            format!("{host}: function {function} is borrowed, lease {lease}, and served by {by}")
        });
        self.held.push(held);
    }

    fn serve(&mut self, side: usize, wish: &Wish, borrowed: Arc<BorrowedFunction>) -> Server {
        let endpoint = Endpoint::bind(&wish.socket).expect("a socket");
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = Arc::new(eventfd(0, flags).expect("an eventfd"));
        let process = self.hosts[side].process;
        let options = Options {
            memory_check: MemoryCheck::Off,
            runtime: self.scheduler.runtime(process),
            ..Options::default()
        };
        let served: Arc<dyn Function> = borrowed.clone();
        let (theirs, stopped) = (Arc::clone(&wish.shared), Arc::clone(&stop));
        let serve = move || {
            // An error means that the function serves nobody else, and none is served here.
            let _ = endpoint.serve(&served, &options, stopped.as_fd(), &theirs);
        };
        let ended = self.scheduler.start(process, "server", Box::new(serve));
        Server::Thread {
            borrowed,
            stop,
            ended,
        }
    }

    /// `return`: ends the guest session, then the lease.
    pub fn give_back(&mut self, at: usize) {
        let held = &mut self.held[at];
        held.returning = true;
        let verb = (held.side, Kind::Return(held.lease), held.function);
        match &held.server {
            Server::Worker { server, .. } => {
                let server = Arc::clone(server);
                let end = move |_| Outcome::Returned(server.end().map_or(Ok(()), Err));
                self.verb(verb, None, end);
            }
            Server::Thread {
                borrowed,
                stop,
                ended,
            } => {
                let (stop, ended) = (Arc::clone(stop), Arc::clone(ended));
                let borrowed = Arc::clone(borrowed);
                self.verb(verb, None, move |engine| {
                    let _ = rustix::io::write(&*stop, &1u64.to_ne_bytes());
                    wait_for(|| ended.load(Ordering::Acquire));
                    let lost = borrowed.lost().is_some();
                    Outcome::Returned(match lost {
                        true => Ok(()),
                        false => engine.give_back_function(&borrowed),
                    })
                });
            }
        }
    }
}
