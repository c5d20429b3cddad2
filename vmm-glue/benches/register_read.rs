//! A register read through the vfio-user server, beside a bare blocking echo of the same sizes between two processes.
//!
//! `cargo bench -p vmm-glue --bench register_read -- [--short] [--check] [--baseline SOCKET]`
//!
//! Two VMMs read through the server: one on this crate's client, which waits awake for a reply
//! where that pays, as the server does for the next request; and one that sleeps until its reply
//! is there, as QEMU's and cloud-hypervisor's clients do. The second keeps one of the two wake-ups
//! that the echo is made of, whatever the server does. All think by sleeping. VMMs have one core
//! and servers, the echo's too, another.

mod vmm;

use bench_report::{Child, Report, Role, Rounds, Switches, cpu_ns, on_core, paired, time_ns};
use criterion::Criterion;
use rustix::event::{EventfdFlags, eventfd};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;
use vfio_shim::model::{Function, FunctionIds, RegionIndex};
use vfio_shim::ntb::soft::{IDENT_VALUE, SoftFunction};
use vmm::{DECODE, Vmm, access, message};
use vmm_glue::vfio_user::wire::{Command, Header, RegionAccess};
use vmm_glue::vfio_user::{Client, Endpoint, EndpointError, Options, SessionShared};
use zerocopy::IntoBytes;

const REQUEST_BYTES: usize = size_of::<Header>() + size_of::<RegionAccess>();
const REPLY_BYTES: usize = REQUEST_BYTES + 4;
/// The core of all servers, and of the echo.
const SERVER: usize = 0;
/// The core of all VMMs.
const VMM: usize = 1;
const IDLE_WORKERS: usize = 16;
/// The most that the ratio to the blocking echo may be.
const LIMIT_BUSY: f64 = 0.4;
/// The same where the VMM sleeps: half of the echo is left, and what the server does.
const LIMIT_ASLEEP: f64 = 0.75;
const LIMIT_SLOW: f64 = 1.1;
/// The most that the idle workers may use of one core together, percent.
const LIMIT_IDLE: f64 = 1.0;
/// What a worker must have seen before it waits awake, and what its VMM has cached.
const WARM_UP: usize = 16;

/// A VMM that reads one register.
trait Reads {
    fn read(&mut self) -> u32;

    /// So many reads, each after a think time.
    fn reads(&mut self, count: usize, think: Duration) -> Vec<u64> {
        let mut one = || {
            if !think.is_zero() {
                sleep(think);
            }
            time_ns(|| {
                self.read();
            })
        };
        let all: Vec<u64> = (0..WARM_UP + count).map(|_| one()).collect();
        all[WARM_UP..].to_vec()
    }
}

/// One that sleeps until its reply is there.
struct Sleeper {
    vmm: Vmm,
    request: [u8; REQUEST_BYTES],
    reply: [u8; REPLY_BYTES],
}

impl Sleeper {
    fn new(vmm: Vmm) -> Self {
        let request = message(Command::RegionRead, access(0, 0, 4).as_bytes());
        Self {
            vmm,
            request: request.try_into().expect("a read has one size"),
            reply: [0; REPLY_BYTES],
        }
    }

    /// With the version agreed on and the function's memory decoded.
    fn agreed(socket: &Path) -> Self {
        let mut vmm = Vmm::agreed(socket);
        vmm.command(DECODE);
        Self::new(vmm)
    }
}

impl Reads for Sleeper {
    fn read(&mut self) -> u32 {
        let stream = &mut self.vmm.stream;
        stream.write_all(&self.request).expect("a request is sent");
        stream.read_exact(&mut self.reply).expect("a reply comes");
        let data = &self.reply[REQUEST_BYTES..];
        u32::from_le_bytes(data.try_into().expect("four bytes"))
    }
}

/// One on this crate's client.
struct OnClient(Client);

impl OnClient {
    fn connect(socket: &Path) -> Self {
        let client = Client::connect(socket).expect("a server");
        let decode = DECODE.to_le_bytes();
        let written = client.region_write(RegionIndex::CONFIG, 4, &decode);
        written.expect("the function's memory is decoded");
        Self(client)
    }
}

impl Reads for OnClient {
    fn read(&mut self) -> u32 {
        let mut data = [0; 4];
        let read = self.0.region_read(RegionIndex(0), 0, &mut data);
        read.expect("a register is read");
        u32::from_le_bytes(data)
    }
}

type Server = JoinHandle<Result<(), EndpointError>>;

fn serve(socket: &Path) -> Server {
    let endpoint = Endpoint::bind(socket).expect("a socket");
    spawn(move || {
        let ids = FunctionIds {
            vendor: 0x5b1e,
            device: 1,
            ..FunctionIds::default()
        };
        let function: Arc<dyn Function> = Arc::new(SoftFunction::new(ids, 4));
        let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        let shared = SessionShared::default();
        endpoint.serve(&function, &Options::default(), stop.as_fd(), &shared)
    })
}

fn numbered(socket: &Path, at: usize) -> PathBuf {
    socket.with_extension(at.to_string())
}

fn echo(socket: &Path, role: &Role) {
    let listener = UnixListener::bind(socket).expect("a socket");
    role.ready();
    let (mut stream, _) = listener.accept().expect("a client");
    let (mut request, reply) = ([0; REQUEST_BYTES], [0; REPLY_BYTES]);
    while stream.read_exact(&mut request).is_ok() && stream.write_all(&reply).is_ok() {}
}

fn play(role: &Role) {
    let servers: Vec<Server> = match role.name.as_str() {
        "echo" => return echo(&role.socket, role),
        "server" => (0..2)
            .map(|at| serve(&numbered(&role.socket, at)))
            .collect(),
        _ => (0..IDLE_WORKERS)
            .map(|at| serve(&numbered(&role.socket, at)))
            .collect(),
    };
    role.ready();
    for server in servers {
        server.join().expect("a server's thread").expect("a server");
    }
}

/// Both ends of both sides, and what else is measured beside them.
struct Bench {
    switches: Switches,
    report: Report,
    server: Child,
    vmm: OnClient,
    sleeper: Sleeper,
    echo: Sleeper,
    other: Option<OnClient>,
    _echo: Child,
    dir: tempfile::TempDir,
}

/// One of the figures: how long the VMM thinks, in words too, the most that the ratio may be for
/// both VMMs, and how much is measured.
struct Figure<'a> {
    think: Duration,
    words: &'a str,
    limits: (f64, f64),
    rounds: Rounds,
}

impl Bench {
    fn new(switches: Switches) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (at, beside) = (dir.path().join("server"), dir.path().join("echo"));
        let server = Child::start("server", &at);
        let echo_child = Child::start("echo", &beside);
        let mut vmm = OnClient::connect(&numbered(&at, 0));
        let mut sleeper = Sleeper::agreed(&numbered(&at, 1));
        assert_eq!(vmm.read(), IDENT_VALUE, "the register is read");
        assert_eq!(sleeper.read(), IDENT_VALUE, "the register is read");
        let other = switches
            .baseline
            .as_ref()
            .map(|at| OnClient::connect(Path::new(at)));
        Self {
            switches,
            report: Report::default(),
            server,
            vmm,
            sleeper,
            echo: Sleeper::new(Vmm::connect(&beside)),
            other,
            _echo: echo_child,
            dir,
        }
    }

    fn figure<'a>(&self, us: u64, words: &'a str, full: (usize, usize)) -> Figure<'a> {
        let (rounds, samples) = self.switches.pick(full, (full.0, full.1 / 2));
        Figure {
            think: Duration::from_micros(us),
            words,
            limits: match us {
                0..1_000 => (LIMIT_BUSY, LIMIT_ASLEEP),
                _ => (LIMIT_SLOW, LIMIT_SLOW),
            },
            rounds: Rounds { rounds, samples },
        }
    }

    fn measure(&mut self, figure: &Figure<'_>) {
        let (think, words, rounds) = (figure.think, figure.words, figure.rounds);
        let echo = &mut self.echo;
        let mut beside = |vmm: &mut dyn FnMut(usize) -> Vec<u64>| {
            paired(rounds, vmm, |count| echo.reads(count, think))
        };
        let pair = beside(&mut |count| self.vmm.reads(count, think));
        let what = format!("register read, {words}");
        let limit = Some(figure.limits.0);
        self.report.pair(&what, "blocking echo", &pair, limit);
        let pair = beside(&mut |count| self.sleeper.reads(count, think));
        let what = format!("register read by a VMM that sleeps, {words}");
        let limit = Some(figure.limits.1);
        self.report.pair(&what, "blocking echo", &pair, limit);
        let (server, samples) = (self.server.id(), rounds.samples);
        let before = (cpu_ns(server), cpu_ns(std::process::id()));
        self.vmm.reads(samples, think);
        let spent = [
            ("server", cpu_ns(server) - before.0),
            ("VMM", cpu_ns(std::process::id()) - before.1),
        ];
        for (whose, spent) in spent {
            let each = spent as f64 / (samples + WARM_UP) as f64;
            let what = format!("CPU of the {whose} for 1,000 reads, {words}");
            self.report.number(&what, each * 1000.0 / 1e6, "ms", None);
        }
        if let Some(other) = &mut self.other {
            let vmm = &mut self.vmm;
            let figure = |count| vmm.reads(count, think);
            let pair = paired(rounds, figure, |count| other.reads(count, think));
            let what = format!("register read, {words}");
            self.report.pair(&what, "the other server", &pair, None);
        }
    }

    /// Workers whose VMMs were busy once and now say nothing.
    fn idle(&mut self) {
        let at = self.dir.path().join("idle");
        let child = Child::start("idle", &at);
        let mut vmms: Vec<Sleeper> = (0..IDLE_WORKERS)
            .map(|nth| Sleeper::agreed(&numbered(&at, nth)))
            .collect();
        for vmm in &mut vmms {
            vmm.reads(64, Duration::ZERO);
        }
        // Not a wait for a condition: the time over which nothing may be used.
        let watched = Duration::from_secs(self.switches.pick(5, 2));
        let before = cpu_ns(child.id());
        let took = time_ns(|| sleep(watched));
        let used = (cpu_ns(child.id()) - before) as f64;
        let what = format!("{IDLE_WORKERS} idle workers together, of one core");
        self.report
            .number(&what, used * 100.0 / took as f64, "%", Some(LIMIT_IDLE));
        let words = format!("no think time, beside {IDLE_WORKERS} idle workers");
        self.measure(&self.figure(0, &words, (7, 2000)));
    }

    fn criterion(&mut self) {
        let mut criterion = Criterion::default();
        let mut group = criterion.benchmark_group("register read, no think time");
        group.bench_function("server", |bench| bench.iter(|| self.vmm.read()));
        group.bench_function("blocking echo", |bench| bench.iter(|| self.echo.read()));
        group.finish();
    }
}

fn main() -> ExitCode {
    // Before this process is held to a core: whether to wait awake depends on how many there are.
    let _ = Options::default();
    if let Some(role) = Role::mine() {
        on_core(SERVER);
        play(&role);
        return ExitCode::SUCCESS;
    }
    let switches = match Switches::from_args(std::env::args().skip(1)) {
        Ok(switches) => switches,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::FAILURE;
        }
    };
    let mut bench = Bench::new(switches.clone());
    on_core(VMM);
    if !switches.short {
        bench.criterion();
    }
    for (us, words, full) in [
        (0, "no think time", (15, 3000)),
        (200, "200 us think time", (11, 400)),
        (10_000, "10 ms think time", (9, 60)),
    ] {
        bench.measure(&bench.figure(us, words, full));
    }
    bench.idle();
    bench.report.end(&switches)
}
