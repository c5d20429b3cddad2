//! Two hosts of this process, joined by a soft NTB; the borrower's workers are processes of their own.

pub mod raw;

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{MemfdFlags, ftruncate, memfd_create},
    process::{Pid, Signal, kill_process},
};
use std::{
    fs,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use sublet::{
    config::Config,
    daemon::{
        Host,
        host::{Functions, Machine, OpenFunction, Workers, start_on},
        vocabulary::*,
    },
    jail::Sandbox,
    warden::{Programs, Warden},
};
use vfio_shim::{
    model::{Aperture, Bdf, Fdid, Function, FunctionIds},
    ntb::soft::{
        COMPLETED, DESTINATION, DOORBELL, IDENT, IDENT_VALUE, LENGTH, SCRATCH, SOURCE,
        SoftFunction, SoftLink, SoftPortConfig, VECTOR,
    },
    vfio::MappedAperture,
};
use vfio_user::Client;

/// Longer than anything here takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const WINDOW_BYTES: u64 = 64 << 20;
pub const VF: &str = "0000:01:00.1";
pub const VF_2: &str = "0000:01:00.2";
pub const RAM_BYTES: u64 = 1 << 20;
const CONFIG: u32 = 7;
const MSIX: u32 = 2;
/// vfio.h: eventfds, as triggers.
const EVENTFDS: u32 = 1 << 2 | 1 << 5;

pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn ids() -> FunctionIds {
    FunctionIds {
        vendor: 0x5b1e,
        device: 1,
        ..FunctionIds::default()
    }
}

/// The two functions of a host, of which a test offers what it needs.
struct Two([Arc<SoftFunction>; 2]);

impl Functions for Two {
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
        let second = bdf == VF_2.parse().unwrap();
        let function: Arc<dyn Function> = self.0[usize::from(second)].clone();
        Ok(OpenFunction {
            function,
            serial: 0,
            keep: vfio_shim::path::Keep::default(),
        })
    }
}

/// Node 4 lends to node 8.
pub struct Rig {
    pub hosts: [Arc<dyn Host>; 2],
    pub link: SoftLink,
    pub function: Arc<SoftFunction>,
    /// Beside each host.
    pub wardens: [Arc<Warden>; 2],
    /// Not offered before [`Rig::offer`].
    pub second: Arc<SoftFunction>,
    pub dir: tempfile::TempDir,
}

fn config(node: u16, dir: &Path, limits: &str) -> Config {
    let dir = dir.display();
    let text = format!(
        r#"
        [node]
        id = {node}
        name = "n{node}"
        [daemon]
        control = "{dir}/control.sock"
        sockets = "{dir}"
        state = "{dir}/state{node}"
        [[port]]
        name = "ntb0"
        bdf = "0000:02:00.0"
        peers = "cable"
        trust_domain = "lab"
        heartbeat_ms = 10
        lost_after_ms = 10000
        [policy]
        allow = ["0000:01:00.*"]
        {limits}
        "#
    );
    Config::parse(Path::new("test.toml"), &text).unwrap()
}

pub fn fdid() -> FdidText {
    fdid_of(VF)
}

pub fn fdid_of(bdf: &str) -> FdidText {
    let bdf = bdf.parse().unwrap();
    FdidText::from(Fdid { node: 4, bdf })
}

impl Rig {
    /// With workers of this program, as far as an offered function.
    pub fn with(program: &Path, sandbox: Sandbox) -> Self {
        Self::limited(program, sandbox, "")
    }

    /// The same, with this section of limits in both configurations.
    pub fn limited(program: &Path, sandbox: Sandbox, limits: &str) -> Self {
        let port = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link = SoftLink::new([port; 2]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let [function, second] = [(); 2].map(|()| Arc::new(SoftFunction::new(ids(), 4)));
        let programs = Programs {
            warden: Path::new(env!("CARGO_BIN_EXE_sublet")),
            worker: program,
            sandbox,
        };
        let wardens = [(); 2].map(|()| Warden::start(&programs, None).unwrap());
        let hosts = [(4, 0), (8, 1)].map(|(node, at): (u16, usize)| {
            let machine = Machine {
                ports: vec![link.port(usize::from(node == 8))],
                functions: Arc::new(Two([Arc::clone(&function), Arc::clone(&second)])),
            };
            let workers = Workers::Processes(Arc::clone(&wardens[at]));
            start_on(&config(node, dir.path(), limits), machine, workers).unwrap()
        });
        let rig = Self {
            hosts,
            wardens,
            link,
            function,
            second,
            dir,
        };
        rig.offer(VF);
        until("a session", || {
            let open = |host: &Arc<dyn Host>| status(host).ports[0].session.peer_node.is_some();
            rig.hosts.iter().all(open).then_some(())
        });
        rig
    }

    pub fn new() -> Self {
        Self::with(Path::new(env!("CARGO_BIN_EXE_sublet")), Sandbox::On)
    }

    /// Takes a function into the pool and offers it.
    pub fn offer(&self, bdf: &str) {
        let bdf = || BdfText::from(bdf.parse::<Bdf>().unwrap());
        let available = Verb::Available {
            bdf: bdf(),
            port: None,
        };
        for verb in [Verb::Add { bdf: bdf() }, available] {
            self.lender().handle(verb).unwrap();
        }
    }

    pub fn lender(&self) -> &Arc<dyn Host> {
        &self.hosts[0]
    }

    pub fn borrower(&self) -> &Arc<dyn Host> {
        &self.hosts[1]
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vf.sock")
    }

    pub fn borrow(&self) -> Result<(), VerbError> {
        self.borrow_as(fdid(), "vf.sock")
    }

    pub fn borrow_as(&self, fdid: FdidText, socket: &str) -> Result<(), VerbError> {
        let borrow = Verb::Borrow {
            fdid,
            socket: socket.into(),
            ram: None,
            bars: None,
            trust_vmm: false,
            trust_domain: None,
        };
        self.borrower().handle(borrow).map(drop)
    }

    pub fn give_back(&self) -> Result<(), VerbError> {
        let verb = Verb::Return { fdid: fdid() };
        self.borrower().handle(verb).map(drop)
    }

    pub fn borrowed(&self) -> BorrowedStatus {
        let mut borrowed = status(self.borrower()).borrowed;
        assert_eq!(borrowed.len(), 1);
        borrowed.remove(0)
    }

    pub fn worker(&self) -> WorkerStatus {
        self.borrowed().worker.expect("a worker process")
    }

    /// Nothing of a guest is left on either host.
    pub fn wait_clean(&self) {
        until("nothing left", || {
            let ports = [self.link.port(0), self.link.port(1)];
            // The mailbox's own map stays.
            let maps: Vec<usize> = ports.iter().map(|p| p.space().maps().len()).collect();
            let function = self.function.space().maps().len() + self.function.triggers();
            (maps == [1, 1] && function == 0).then_some(())
        });
    }

    pub fn end(self) {
        self.hosts.iter().for_each(|host| host.stop());
    }
}

pub fn status(host: &Arc<dyn Host>) -> HostStatus {
    match host.handle(Verb::Status).unwrap() {
        Outcome::Status(status) => *status,
        other => panic!("{other:?}"),
    }
}

/// What each descriptor of a process is; one that is closed meanwhile is none of them.
pub fn descriptors(pid: u32) -> Vec<String> {
    let folder = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = folder.filter_map(|entry| match fs::read_link(entry.unwrap().path()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        target => Some(target.unwrap().to_string_lossy().into_owned()),
    });
    targets.collect()
}

pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Stops the process, and returns when all its threads stand still: until one of them has taken
/// the signal, the others go on.
pub fn freeze(pid: u32) {
    try_freeze(pid).unwrap();
}

/// The same of one that may have ended.
pub fn try_freeze(pid: u32) -> Result<(), &'static str> {
    const ENDED: &str = "the process has ended";
    let of = Pid::from_raw(pid as i32).unwrap();
    kill_process(of, Signal::STOP).map_err(|_| ENDED)?;
    until("a frozen process", || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        let (true, Ok(mut tasks)) = (lives(pid), tasks) else {
            return Some(Err(ENDED));
        };
        let stands = |task: fs::DirEntry| state(&task.path().join("stat")) == Some('T');
        let frozen = tasks.all(|task| task.is_ok_and(stands));
        frozen.then_some(Ok(()))
    })
}

/// The state of a process or thread, as proc(5) tells it.
fn state(stat: &Path) -> Option<char> {
    let stat = fs::read_to_string(stat).unwrap_or_default();
    stat.rsplit(") ").next()?.chars().next()
}

/// Whether the process is there and no zombie.
pub fn lives(pid: u32) -> bool {
    let state = state(Path::new(&format!("/proc/{pid}/stat")));
    state.is_some_and(|state| state != 'Z')
}

/// A VMM with a guest that drives the function: registers, DMA, interrupts.
pub struct Vmm {
    pub client: Client,
    ram: MappedAperture,
    fd: OwnedFd,
    irq: OwnedFd,
    done: u32,
}

type Try<T> = Result<T, String>;

fn said<T, E: std::fmt::Debug>(what: &str, result: Result<T, E>) -> Try<T> {
    result.map_err(|error| format!("{what}: {error:?}"))
}

impl Vmm {
    /// Connects, maps its memory, enables the function and its interrupts.
    pub fn start(rig: &Rig) -> Try<Self> {
        Self::at(&rig.socket())
    }

    /// The same behind this socket.
    pub fn at(socket: &Path) -> Try<Self> {
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, RAM_BYTES).unwrap();
        let ram = MappedAperture::memory(fd.as_fd(), 0, RAM_BYTES).unwrap();
        let irq = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let mut client = said("connect", Client::new(socket))?;
        said("map", client.dma_map(0, 0, RAM_BYTES, fd.as_raw_fd()))?;
        let fds = [irq.as_raw_fd()];
        said("irqs", client.set_irqs(MSIX, EVENTFDS, 0, 1, &fds))?;
        said("enable", client.region_write(CONFIG, 4, &[6, 0]))?;
        Ok(Self {
            client,
            ram,
            fd,
            irq,
            done: 0,
        })
    }

    fn read32(&mut self, register: u64) -> Try<u32> {
        let mut word = [0; 4];
        said("read", self.client.region_read(0, register, &mut word))?;
        Ok(u32::from_le_bytes(word))
    }

    /// One copy by the function, in the guest's memory, with its interrupt.
    pub fn copy(&mut self, seed: u8) -> Try<()> {
        let (from, to, len) = (0x1000u64, 0x8000u64, 0x2000);
        let pattern: Vec<u8> = (0..len)
            .map(|at| (at as u8).wrapping_mul(31) ^ seed)
            .collect();
        self.ram.write(from, &pattern);
        let stores = [
            (SOURCE, from.to_le_bytes().to_vec()),
            (DESTINATION, to.to_le_bytes().to_vec()),
            (LENGTH, (len as u32).to_le_bytes().to_vec()),
            (VECTOR, 0u32.to_le_bytes().to_vec()),
            (DOORBELL, 1u32.to_le_bytes().to_vec()),
        ];
        for (register, bytes) in stores {
            said("write", self.client.region_write(0, register, &bytes))?;
        }
        self.wait_interrupt()?;
        self.done += 1;
        let mut copied = vec![0; len];
        self.ram.read(to, &mut copied);
        match copied == pattern && self.read32(COMPLETED)? == self.done {
            true => Ok(()),
            false => Err("the copy is wrong".into()),
        }
    }

    fn wait_interrupt(&mut self) -> Try<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut fds = [PollFd::from_borrowed_fd(self.irq.as_fd(), PollFlags::IN)];
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: 50_000_000,
            };
            if poll(&mut fds, Some(&tick)).unwrap() == 1 {
                rustix::io::read(&self.irq, &mut [0; 8]).unwrap();
                return Ok(());
            }
            // A worker that is gone sends none; it answers no read either.
            self.read32(IDENT)?;
            if Instant::now() > deadline {
                return Err("no interrupt came".into());
            }
        }
    }

    /// All that a VMM does in its life.
    pub fn work(&mut self) -> Try<()> {
        if self.read32(IDENT)? != IDENT_VALUE {
            return Err("it is another function".into());
        }
        let value = 0x0123_4567_89ab_cdefu64.to_le_bytes();
        said("write", self.client.region_write(0, SCRATCH, &value))?;
        let mut read = [0; 8];
        said("read", self.client.region_read(0, SCRATCH, &mut read))?;
        if read != value {
            return Err(format!("a register reads {read:x?}"));
        }
        self.copy(1)?;
        // Memory that comes and goes while the function is at work.
        let raw = self.fd.as_raw_fd();
        said("map", self.client.dma_map(0x4000, 1 << 32, 0x4000, raw))?;
        said("unmap", self.client.dma_unmap(1 << 32, 0x4000))?;
        self.copy(2)
    }

    /// DMA of a few bytes by the function, between any addresses; done when it has interrupted.
    pub fn dma(&mut self, from: u64, to: u64) -> Try<()> {
        let stores = [
            (SOURCE, from.to_le_bytes().to_vec()),
            (DESTINATION, to.to_le_bytes().to_vec()),
            (LENGTH, 8u32.to_le_bytes().to_vec()),
            (VECTOR, 0u32.to_le_bytes().to_vec()),
            (DOORBELL, 1u32.to_le_bytes().to_vec()),
        ];
        for (register, bytes) in stores {
            said("write", self.client.region_write(0, register, &bytes))?;
        }
        self.wait_interrupt()
    }

    pub fn ident(&mut self) -> Try<u32> {
        self.read32(IDENT)
    }
}
