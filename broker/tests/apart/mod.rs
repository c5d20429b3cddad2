//! Two hosts joined by soft NTBs: ports are threads of this process behind their real sockets, daemons the real program.

use crate::soft::{ids, until};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};
use sublet::{
    config::Config,
    daemon::{
        host::{Functions, Machine, OpenFunction, Workers, start_port},
        vocabulary::*,
    },
    jail::{Sandbox, keep_from_children},
    port::Claimed,
    warden::{Programs, Warden},
};
use vfio_shim::{
    model::{Bdf, Fdid, Function, FunctionIds},
    ntb::soft::{SoftFunction, SoftLink, SoftPortConfig},
};

const WINDOW_BYTES: u64 = 512 << 20;
const DEADLINE: Duration = Duration::from_secs(60);

/// The lender's functions.
struct Soft(BTreeMap<Bdf, Arc<SoftFunction>>);

impl Functions for Soft {
    fn check_exists(&self, _: Bdf) -> Result<(), VerbError> {
        Ok(())
    }
    fn ids(&self, _: Bdf) -> Result<FunctionIds, VerbError> {
        Ok(ids())
    }
    fn check_lendable(&self, _: Bdf) -> Result<(), VerbError> {
        Ok(())
    }
    fn open(&self, bdf: Bdf) -> Result<OpenFunction, VerbError> {
        let function: Arc<dyn Function> = self.0[&bdf].clone();
        Ok(OpenFunction {
            function,
            serial: 0,
            keep: vfio_shim::path::Keep::default(),
        })
    }
}

pub fn bdf(at: usize) -> BdfText {
    let bdf = format!("0000:01:{:02x}.{}", at / 8, at % 8);
    bdf.parse::<Bdf>().unwrap().into()
}

pub fn fdid(at: usize) -> FdidText {
    let bdf = bdf(at).0;
    FdidText::from(Fdid { node: 4, bdf })
}

/// Has whoever serves this socket do a verb.
pub fn ask(control: &Path, verb: &Verb) -> std::io::Result<Result<Outcome, VerbError>> {
    let stream = UnixStream::connect(control)?;
    sublet::daemon::ask::ask(&stream, verb, DEADLINE)
}

/// A daemon: the real program. Killed on drop.
pub struct Daemon {
    child: Child,
    control: PathBuf,
    pub file: PathBuf,
}

impl Daemon {
    /// Started, and its control socket there.
    fn start(file: &Path, control: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sublet"));
        command.args(["daemon", "--config"]).arg(file);
        Self::by(command, file, control).expect("a daemon")
    }

    /// The same by this command; none, if it ends before its socket is there.
    pub fn by(mut command: Command, file: &Path, control: &Path) -> Option<Self> {
        // Whatever started this test may have left descriptors open.
        keep_from_children();
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let mut daemon = Self {
            child,
            control: control.to_owned(),
            file: file.to_owned(),
        };
        let there = until("a daemon", || match daemon.child.try_wait().unwrap() {
            Some(_) => Some(false),
            None => UnixStream::connect(control).ok().map(|_| true),
        });
        there.then_some(daemon)
    }

    /// As an operator ends it.
    pub fn stop(mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        self.child.wait().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// As `kill -9` does.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn verb(&self, verb: Verb) -> Result<Outcome, VerbError> {
        ask(&self.control, &verb).unwrap()
    }

    pub fn status(&self) -> HostStatus {
        match self.verb(Verb::Status).unwrap() {
            Outcome::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    pub fn list(&self) -> Vec<ListEntry> {
        match self.verb(Verb::List).unwrap() {
            Outcome::List(list) => list,
            Outcome::PartOfList(part) => part.entries,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            kill_process(Pid::from_child(&self.child), Signal::KILL).unwrap();
            self.child.wait().unwrap();
        }
    }
}

/// A port of a host, in a thread. Stopped on drop.
struct Port {
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Port {
    fn start(file: &Path, name: &'static str, machine: Machine, workers: Workers) -> Self {
        let config = Config::load(file).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let serve = move || {
            let claimed = Claimed::by(&config, name).unwrap();
            let stop = std::os::fd::AsFd::as_fd(&stopped);
            let served = claimed.serve(stop, |config, at, leases| {
                start_port(config, at, machine, (workers, None), leases)
            });
            served.unwrap();
        };
        Self {
            stop: Some(stop),
            thread: Some(std::thread::spawn(serve)),
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.stop.take();
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// Node 4 lends to node 8, through each of these ports. Fields drop in order.
pub struct Rig {
    pub lender: Daemon,
    pub borrower: Daemon,
    ports: BTreeMap<(u16, &'static str), Port>,
    links: BTreeMap<&'static str, SoftLink>,
    functions: BTreeMap<Bdf, Arc<SoftFunction>>,
    workers: Workers,
    heartbeat_ms: u64,
    dir: tempfile::TempDir,
}

fn folder(dir: &Path, node: u16) -> PathBuf {
    dir.join(format!("n{node}"))
}

fn control(dir: &Path, node: u16) -> PathBuf {
    folder(dir, node).join("control.sock")
}

fn write_config(
    dir: &Path,
    node: u16,
    (ports, heartbeat_ms): (&[&str], u64),
    name: &str,
) -> PathBuf {
    let folder = folder(dir, node);
    fs::create_dir_all(&folder).unwrap();
    let peer = 12 - node;
    let port = |(at, port): (usize, &&str)| {
        format!(
            "[[port]]\nname = \"{port}\"\nbdf = \"0000:02:00.{at}\"\npeers = \"cable\"\n\
             peer_node = {peer}\ntrust_domain = \"lab\"\nheartbeat_ms = {heartbeat_ms}\nlost_after_ms = 20000\n"
        )
    };
    let ports: String = ports.iter().enumerate().map(port).collect();
    let at = folder.display();
    let text = format!(
        "[node]\nid = {node}\nname = \"n{node}\"\n[daemon]\ncontrol = \"{at}/{name}.sock\"\n\
         sockets = \"{at}\"\nstate = \"{at}/{name}-state\"\n{ports}\
         [policy]\nallow = [\"0000:01:*\"]\n"
    );
    let file = folder.join(format!("{name}.toml"));
    fs::write(&file, text).unwrap();
    file
}

/// The end of a link that is this node's, and the lender's functions.
pub fn machine(
    link: &SoftLink,
    node: u16,
    functions: &BTreeMap<Bdf, Arc<SoftFunction>>,
) -> Machine {
    Machine {
        ports: vec![link.port(usize::from(node == 8))],
        functions: Arc::new(Soft(functions.clone())),
    }
}

/// A link, and so many functions.
pub fn fabric(functions: usize) -> (SoftLink, BTreeMap<Bdf, Arc<SoftFunction>>) {
    let port = SoftPortConfig {
        window_bytes: [WINDOW_BYTES; 2],
    };
    let function = |at| (bdf(at).0, Arc::new(SoftFunction::new(ids(), 4)));
    let link = SoftLink::new([port; 2]).unwrap();
    (link, (0..functions).map(function).collect())
}

/// Workers as processes.
pub fn processes() -> Workers {
    let sublet = Path::new(env!("CARGO_BIN_EXE_sublet"));
    let programs = Programs {
        warden: sublet,
        worker: sublet,
        sandbox: Sandbox::On,
    };
    Workers::Processes(Warden::start(&programs, None).unwrap())
}

impl Rig {
    /// With workers as processes, three functions, and both daemons.
    pub fn new(names: &[&'static str]) -> Self {
        Self::beating(names, 3, processes(), 50)
    }

    pub fn with_functions(names: &[&'static str], functions: usize, workers: Workers) -> Self {
        Self::beating(names, functions, workers, 50)
    }

    /// Before anything is offered.
    pub fn beating(
        names: &[&'static str],
        functions: usize,
        workers: Workers,
        heartbeat_ms: u64,
    ) -> Self {
        let mut rig = Self::without_ports(names, functions, workers, heartbeat_ms);
        rig.start_ports(names);
        rig
    }

    /// With limits of the borrower's own.
    pub fn limited(names: &[&'static str], limits: &str) -> Self {
        let mut rig = Self::without_ports(names, 3, processes(), 50);
        rig.borrower.kill();
        let file = fs::read_to_string(&rig.borrower.file).unwrap();
        fs::write(&rig.borrower.file, format!("{file}[limits]\n{limits}\n")).unwrap();
        rig.start_borrower();
        rig.start_ports(names);
        rig
    }

    fn start_ports(&mut self, names: &[&'static str]) {
        for name in names {
            self.start_port(4, name);
            self.start_port(8, name);
        }
        self.wait_sessions();
    }

    /// Daemons alone.
    pub fn without_ports(
        names: &[&'static str],
        functions: usize,
        workers: Workers,
        heartbeat_ms: u64,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let links = names.iter().map(|name| (*name, fabric(0).0));
        let files =
            [4, 8].map(|node| write_config(dir.path(), node, (names, heartbeat_ms), "control"));
        let [lender, borrower] = [(4, 0), (8, 1)]
            .map(|(node, at): (u16, usize)| Daemon::start(&files[at], &control(dir.path(), node)));
        Self {
            lender,
            borrower,
            ports: BTreeMap::new(),
            links: links.collect(),
            functions: fabric(functions).1,
            workers,
            heartbeat_ms,
            dir,
        }
    }

    /// Where everything lies, each host's in a folder of its own.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn start_port(&mut self, node: u16, name: &'static str) {
        let machine = machine(&self.links[name], node, &self.functions);
        let file = folder(self.dir.path(), node).join("control.toml");
        let port = Port::start(&file, name, machine, self.workers.clone());
        self.ports.insert((node, name), port);
    }

    pub fn stop_port(&mut self, node: u16, name: &'static str) {
        self.ports.remove(&(node, name));
    }

    /// Both daemons see all ports connected, and these agree on sessions.
    pub fn wait_sessions(&self) {
        until("sessions", || {
            let open =
                |port: &PortStatus| port.session.peer_node.is_some() && port.last_error.is_none();
            let all = |daemon: &Daemon| daemon.status().ports.iter().all(open);
            (all(&self.lender) && all(&self.borrower)).then_some(())
        });
    }

    pub fn lender_config(&self) -> Config {
        Config::load(&self.lender.file).unwrap()
    }

    pub fn start_lender(&self) -> Daemon {
        Daemon::start(&self.lender.file, &self.lender.control)
    }

    /// A lender's daemon by this command; none, if it does not begin to serve.
    pub fn start_lender_by(&self, command: Command) -> Option<Daemon> {
        Daemon::by(command, &self.lender.file, &self.lender.control)
    }

    pub fn start_daemons(&mut self) {
        self.lender = self.start_lender();
        self.start_borrower();
    }

    pub fn start_borrower(&mut self) {
        self.borrower = Daemon::start(&self.borrower.file, &control(self.dir.path(), 8));
    }

    /// A daemon of the lender's with a control socket and a store of its own, and the same ports.
    pub fn start_daemon_beside(&self) -> Daemon {
        let names: Vec<&str> = self.links.keys().copied().collect();
        let file = write_config(self.dir.path(), 4, (&names, self.heartbeat_ms), "second");
        Daemon::start(&file, &folder(self.dir.path(), 4).join("second.sock"))
    }

    pub fn guest_socket(&self, at: usize) -> PathBuf {
        folder(self.dir.path(), 8).join(format!("{at}.vf"))
    }

    /// How many vectors of all functions have a trigger: on this fabric a descriptor each, which
    /// otherwise the kernel holds.
    pub fn triggers(&self) -> usize {
        let functions = self.functions.values();
        functions.map(|function| function.triggers()).sum()
    }

    pub fn function(&self, at: usize) -> &SoftFunction {
        &self.functions[&bdf(at).0]
    }

    pub fn available(&self, at: usize, port: &str) -> Result<Outcome, VerbError> {
        self.lender.verb(Verb::Available {
            bdf: bdf(at),
            port: Some(port.to_owned()),
        })
    }

    pub fn offer(&self, at: usize, port: &str) {
        self.lender.verb(Verb::Add { bdf: bdf(at) }).unwrap();
        self.available(at, port).unwrap();
    }

    pub fn borrow(&self, at: usize) -> Result<BorrowedFunction, VerbError> {
        self.borrow_for(at, None)
    }

    /// For this trust domain; `None` = the port's own.
    pub fn borrow_for(
        &self,
        at: usize,
        domain: Option<&str>,
    ) -> Result<BorrowedFunction, VerbError> {
        let told = self.borrower.verb(Verb::Borrow {
            fdid: fdid(at),
            socket: format!("{at}.vf").into(),
            ram: None,
            bars: None,
            trust_vmm: false,
            trust_domain: domain.map(str::to_owned),
        })?;
        match told {
            Outcome::Borrowed(told) => Ok(*told),
            other => panic!("{other:?}"),
        }
    }

    pub fn give_back(&self, at: usize) -> Result<(), VerbError> {
        let verb = Verb::Return { fdid: fdid(at) };
        self.borrower.verb(verb).map(drop)
    }
}
