//! A register read through the vfio-user server, beside a bare blocking echo of the same sizes between two processes.
//!
//! `cargo bench -p vmm-glue --bench register_read -- [--short] [--check] [--baseline SOCKET]`
//!
//! The VMM's end is plain and blocking in all of them, and thinks by sleeping.

mod vmm;

use bench_report::{Child, Paired, Report, Role, Rounds, Switches, cpu_ns, paired, time_ns};
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
use vfio_shim::model::{Function, FunctionIds};
use vfio_shim::ntb::soft::{IDENT_VALUE, SoftFunction};
use vmm::{DECODE, Vmm, access, message};
use vmm_glue::vfio_user::wire::{Command, Header, RegionAccess};
use vmm_glue::vfio_user::{Endpoint, EndpointError, Options, SessionShared};
use zerocopy::IntoBytes;

const REQUEST_BYTES: usize = size_of::<Header>() + size_of::<RegionAccess>();
const REPLY_BYTES: usize = REQUEST_BYTES + 4;
const IDLE_WORKERS: usize = 16;
const MICROSECOND: Duration = Duration::from_micros(1);
/// The most that the ratio to the blocking echo may be.
const LIMIT_BUSY: f64 = 0.4;
const LIMIT_SLOW: f64 = 1.1;
/// The most that the idle workers may use of one core together, percent.
const LIMIT_IDLE: f64 = 1.0;
/// What a worker must have seen before it waits awake, and what its VMM has cached.
const WARM_UP: usize = 16;

/// A VMM that reads one register.
struct Reader {
    vmm: Vmm,
    request: [u8; REQUEST_BYTES],
    reply: [u8; REPLY_BYTES],
}

impl Reader {
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

    fn read(&mut self) {
        let stream = &mut self.vmm.stream;
        stream.write_all(&self.request).expect("a request is sent");
        stream.read_exact(&mut self.reply).expect("a reply comes");
    }

    fn value(&self) -> u32 {
        let data = &self.reply[REQUEST_BYTES..];
        u32::from_le_bytes(data.try_into().expect("four bytes"))
    }

    /// So many reads, each after a think time.
    fn reads(&mut self, count: usize, think: Duration) -> Vec<u64> {
        let mut one = || {
            if !think.is_zero() {
                sleep(think);
            }
            time_ns(|| self.read())
        };
        let all: Vec<u64> = (0..WARM_UP + count).map(|_| one()).collect();
        all[WARM_UP..].to_vec()
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
        "server" => vec![serve(&role.socket)],
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
    vmm: Reader,
    echo: Reader,
    other: Option<Reader>,
    _echo: Child,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(switches: Switches) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (at, beside) = (dir.path().join("server"), dir.path().join("echo"));
        let server = Child::start("server", &at);
        let echo_child = Child::start("echo", &beside);
        let mut vmm = Reader::agreed(&at);
        vmm.read();
        assert_eq!(vmm.value(), IDENT_VALUE, "the register is read");
        let other = switches
            .baseline
            .as_ref()
            .map(|at| Reader::agreed(Path::new(at)));
        Self {
            switches,
            report: Report::default(),
            server,
            vmm,
            echo: Reader::new(Vmm::connect(&beside)),
            other,
            _echo: echo_child,
            dir,
        }
    }

    fn pair(&mut self, rounds: Rounds, think: Duration) -> Paired {
        let (vmm, echo) = (&mut self.vmm, &mut self.echo);
        let figure = |count| vmm.reads(count, think);
        paired(rounds, figure, |count| echo.reads(count, think))
    }

    fn read_after(&mut self, think: Duration, words: &str, limit: f64, full: (usize, usize)) {
        let (rounds, samples) = self.switches.pick(full, (full.0, full.1 / 2));
        let rounds = Rounds { rounds, samples };
        let pair = self.pair(rounds, think);
        let what = format!("register read, {words}");
        self.report.pair(&what, "blocking echo", &pair, Some(limit));
        let before = cpu_ns(self.server.id());
        self.vmm.reads(samples, think);
        let spent = (cpu_ns(self.server.id()) - before) as f64;
        let each = spent / (samples + WARM_UP) as f64;
        let what = format!("CPU of the server for 1,000 reads, {words}");
        self.report.number(&what, each * 1000.0 / 1e6, "ms", None);
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
        let mut vmms: Vec<Reader> = (0..IDLE_WORKERS)
            .map(|nth| Reader::agreed(&numbered(&at, nth)))
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
        self.read_after(Duration::ZERO, &words, LIMIT_BUSY, (7, 2000));
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
    if let Some(role) = Role::mine() {
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
    if !switches.short {
        bench.criterion();
    }
    bench.read_after(Duration::ZERO, "no think time", LIMIT_BUSY, (15, 3000));
    bench.read_after(
        200 * MICROSECOND,
        "200 us think time",
        LIMIT_BUSY,
        (11, 400),
    );
    bench.read_after(
        10_000 * MICROSECOND,
        "10 ms think time",
        LIMIT_SLOW,
        (9, 60),
    );
    bench.idle();
    bench.report.end(&switches)
}
