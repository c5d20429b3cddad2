//! What 16 attached functions take of a host: memory, threads, descriptors and wake-ups of its processes; and how soon a function or a daemon is back.
//!
//! `cargo bench -p sublet --bench attached -- [--short] [--check]`
//!
//! Daemons and workers are processes as an operator has them. The soft fabric is one process, so
//! that this one is the port of both hosts, the device and the measurement: what is told of it is
//! more than a port of one host takes. The guests' VMMs are one more process, and not counted.

#[allow(dead_code, reason = "each program uses a part of it")]
#[path = "../../tests/apart/mod.rs"]
mod apart;
mod process;
#[allow(dead_code, reason = "each program uses a part of it")]
#[path = "../../tests/soft/mod.rs"]
mod soft;

use apart::{Rig, bdf, processes};
use bench_report::{Child, Report, Role, Switches, percentile};
use process::{Thread, anonymous_mib, descriptors, threads};
use soft::{Vmm, until};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use sublet::daemon::{host::Workers, vocabulary::*};

/// How many functions are attached.
const FUNCTIONS: usize = 16;
/// How many leases a daemon finds again.
const LEASES: usize = 64;
/// Of each function.
const VECTORS: usize = 4;
/// How many of them a guest has an eventfd for.
const ARMED: usize = 1;
const PORT: &str = "ntb0";
/// Threads that both ports have, one each.
const TWICE: [&str; 4] = ["ntb0-ctl", "ntb0-irq", "ntb0-map", "leases"];
/// Of a configuration that does not say.
const HEARTBEAT_MS: u64 = 250;

const WORKER_MIB: f64 = 6.0;
const PORT_MIB: f64 = 12.0;
const DAEMON_MIB: f64 = 32.0;
const THREADS: f64 = 2.0;
/// Those of verbs and lines, which are few: not one for each function.
const OTHER_THREADS: f64 = 0.5;
const DESCRIPTORS: f64 = 12.0;
const WAKE_UPS_PER_SECOND: f64 = 5.0;
const NEXT_TENANT_MS: f64 = 100.0;
const RESTART_MS: f64 = 1000.0;

/// The process of all VMMs: each attaches and drives its function, and then all rest.
fn serve_guests(role: &Role) -> ! {
    let attach = |at: usize| {
        let mut vmm = Vmm::at(&role.socket.join(format!("{at}.vf"))).expect("a VMM attaches");
        vmm.work().expect("the function works");
        vmm
    };
    let _attached: Vec<Vmm> = (0..FUNCTIONS).map(attach).collect();
    role.ready();
    loop {
        std::thread::park();
    }
}

fn rig(functions: usize, workers: Workers) -> Rig {
    Rig::beating(&[PORT], functions, workers, HEARTBEAT_MS)
}

/// Each function is lent to the other host.
fn lend(rig: &Rig, functions: usize) {
    for at in 0..functions {
        rig.offer(at, PORT);
        rig.borrow(at).expect("it is lent");
    }
}

/// What the process of the ports takes.
struct Ports {
    mib: f64,
    /// Its threads by the ends of a path that they are one of.
    lender: usize,
    borrower: usize,
    /// All of its threads, whatever they are called.
    threads: usize,
    descriptors: usize,
}

impl Ports {
    fn look() -> Self {
        let process = std::process::id();
        let threads = threads(process);
        let count = |start: &str| {
            let named = |thread: &&Thread| thread.name.starts_with(start);
            threads.values().filter(named).count()
        };
        Self {
            mib: anonymous_mib(process),
            lender: count("ntb0-0000:"),
            borrower: count("worker-") + count("let-go-"),
            threads: threads.len(),
            descriptors: descriptors(process),
        }
    }
}

/// Each has a worker of its own.
fn workers(rig: &Rig) -> Vec<u32> {
    let borrowed = rig.borrower.status().borrowed.into_iter();
    let pids: Vec<u32> = borrowed.filter_map(|b| Some(b.worker?.pid)).collect();
    assert_eq!(pids.len(), FUNCTIONS);
    pids
}

fn most(workers: &[u32], figure: impl Fn(u32) -> f64) -> f64 {
    workers.iter().map(|pid| figure(*pid)).fold(0.0, f64::max)
}

fn memory(report: &mut Report, rig: &Rig, workers: &[u32], (before, now): (&Ports, &Ports)) {
    let mut mib = |what: &str, value, limit| report.number(what, value, "MiB", limit);
    let worker = most(workers, anonymous_mib);
    mib("RssAnon of the largest worker", worker, Some(WORKER_MIB));
    let what = "RssAnon of the process of both hosts' ports, device and measurement included";
    mib(what, now.mib, Some(PORT_MIB));
    let each = (now.mib - before.mib) / FUNCTIONS as f64;
    mib("of that for each attached function", each, None);
    for (whose, daemon) in [("lender", &rig.lender), ("borrower", &rig.borrower)] {
        let what = format!("RssAnon of the {whose}'s daemon");
        mib(&what, anonymous_mib(daemon.pid()), Some(DAEMON_MIB));
    }
}

/// `device` = what the soft functions hold of it.
fn threads_and_descriptors(
    report: &mut Report,
    workers: &[u32],
    (before, now): (&Ports, &Ports),
    device: usize,
) {
    let each = |before: usize, now: usize| (now - before) as f64 / FUNCTIONS as f64;
    let mut number = |what: &str, value, limit| report.number(what, value, "a function", limit);
    let worker = most(workers, |pid| threads(pid).len() as f64);
    number("threads of a worker", worker, Some(THREADS));
    let lender = each(before.lender, now.lender);
    number("threads of the lender's port", lender, Some(THREADS));
    let borrower = each(before.borrower, now.borrower);
    number("threads of the borrower's port", borrower, Some(THREADS));
    // A thread by another name would be none of either.
    let all = (now.threads as f64 - before.threads as f64) / FUNCTIONS as f64;
    let what = "threads of both hosts' ports by any other name";
    number(what, all - lender - borrower, Some(OTHER_THREADS));
    let both = worker + borrower;
    number(
        "threads of the borrower's port and worker together",
        both,
        None,
    );
    let worker = most(workers, |pid| descriptors(pid) as f64) - ARMED as f64;
    let what = "fds of a worker, besides its vectors' eventfds";
    number(what, worker, Some(DESCRIPTORS));
    let armed = VECTORS as f64 + device as f64 / FUNCTIONS as f64;
    let ports = each(before.descriptors, now.descriptors) - armed;
    let what = "fds of both hosts' ports together, besides the lender's eventfd of each vector";
    number(what, ports, Some(DESCRIPTORS));
}

/// How often all threads of a host have gone on, so far. Of the threads that each port has one of,
/// the busier counts; those of the functions count at both ends.
struct WakeUps {
    ports: BTreeMap<u32, Thread>,
    workers: u64,
    daemons: [u64; 2],
}

impl WakeUps {
    fn look(rig: &Rig, workers: &[u32]) -> Self {
        let of = |pid: u32| -> u64 { threads(pid).values().map(|t| t.switches).sum() };
        let own = std::process::id();
        let mut ports = threads(own);
        // This thread measures.
        ports.remove(&own);
        Self {
            ports,
            workers: workers.iter().map(|pid| of(*pid)).sum(),
            daemons: [&rig.lender, &rig.borrower].map(|daemon| of(daemon.pid())),
        }
    }

    /// Of port, workers and daemon.
    fn since(&self, before: &Self) -> [u64; 3] {
        let mut busiest = BTreeMap::<&str, u64>::new();
        let mut others = 0;
        for (id, thread) in &self.ports {
            let before = before.ports.get(id).map_or(0, |thread| thread.switches);
            let switches = thread.switches - before;
            match TWICE.contains(&&*thread.name) {
                true => {
                    let most = busiest.entry(&thread.name).or_default();
                    *most = (*most).max(switches);
                }
                false => others += switches,
            }
        }
        let daemon = |at: usize| self.daemons[at] - before.daemons[at];
        [
            busiest.values().sum::<u64>() + others,
            self.workers - before.workers,
            daemon(0).max(daemon(1)),
        ]
    }
}

/// The median of several spans, each by itself of many heartbeats.
fn idle(report: &mut Report, rig: &Rig, workers: &[u32], spans: usize) {
    const SPAN_S: u64 = 4;
    let mut all = Vec::new();
    for _ in 0..spans {
        let before = WakeUps::look(rig, workers);
        std::thread::sleep(Duration::from_secs(SPAN_S));
        all.push(WakeUps::look(rig, workers).since(&before));
    }
    let rate = |parts: &dyn Fn(&[u64; 3]) -> u64| {
        let mut counts: Vec<u64> = all.iter().map(parts).collect();
        percentile(&mut counts, 50) as f64 / SPAN_S as f64
    };
    let mut number = |what: &str, value, limit| report.number(what, value, "a second", limit);
    let whole = rate(&|parts| parts.iter().sum());
    let what = "idle wake-ups of a host: daemon, one port, 16 workers with guests at rest";
    number(what, whole, Some(WAKE_UPS_PER_SECOND));
    for (at, what) in ["its port's", "its workers'", "its daemon's"]
        .iter()
        .enumerate()
    {
        number(what, rate(&|parts| parts[at]), None);
    }
}

fn ms(took: &[Duration]) -> f64 {
    let mut us: Vec<u64> = took.iter().map(|took| took.as_micros() as u64).collect();
    percentile(&mut us, 50) as f64 / 1e3
}

/// From the verb to the answer of the function to the next tenant's VMM, on the other host. The
/// reset between them takes no time on this fabric.
fn next_tenant(report: &mut Report, times: usize) {
    let rig = rig(1, processes());
    lend(&rig, 1);
    let attach = || {
        let mut vmm = Vmm::at(&rig.guest_socket(0)).expect("a VMM attaches");
        vmm.ident().expect("the function answers");
        vmm
    };
    let mut held = attach();
    let mut took = Vec::new();
    for _ in 0..times {
        let began = Instant::now();
        let revoke = Verb::Revoke {
            bdf: bdf(0),
            deadline_s: None,
        };
        rig.lender.verb(revoke).expect("it is taken back");
        rig.give_back(0).expect("what is lost is put away");
        rig.borrow(0).expect("it is lent on");
        held = {
            let next = attach();
            took.push(began.elapsed());
            drop(held);
            next
        };
    }
    let what = "revoke to the next tenant's first register, new worker included";
    report.number(what, ms(&took), "ms", Some(NEXT_TENANT_MS));
}

/// From its start until it tells all leases as its port and its store have them.
fn restart(report: &mut Report, times: usize) {
    let mut rig = rig(LEASES, Workers::Threads);
    lend(&rig, LEASES);
    let mut took = Vec::new();
    for _ in 0..times {
        rig.lender.kill();
        let began = Instant::now();
        rig.lender = rig.start_lender();
        until("all leases", || {
            let status = rig.lender.status();
            let told = |lent: &&LentStatus| {
                lent.age_ms.is_some() && lent.epoch == lent.lease.map(|lease| lease.0)
            };
            let known = status.lent.iter().filter(told).count();
            (known == LEASES && status.ports[0].last_error.is_none()).then_some(())
        });
        took.push(began.elapsed());
    }
    let what = "a killed daemon with 64 leases is back";
    report.number(what, ms(&took), "ms", Some(RESTART_MS));
}

fn main() -> ExitCode {
    if let Some(role) = Role::mine() {
        serve_guests(&role);
    }
    let switches = match Switches::from_args(std::env::args().skip(1)) {
        Ok(switches) => switches,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::FAILURE;
        }
    };
    let mut report = Report::default();
    let rig = rig(FUNCTIONS, processes());
    let before = Ports::look();
    lend(&rig, FUNCTIONS);
    let socket = rig.guest_socket(0);
    let guests = Child::start("guests", socket.parent().expect("its folder"));
    let workers = workers(&rig);
    // A verb's clients and what attaching has begun end within two heartbeats.
    std::thread::sleep(Duration::from_millis(2 * HEARTBEAT_MS));
    let now = Ports::look();
    memory(&mut report, &rig, &workers, (&before, &now));
    threads_and_descriptors(&mut report, &workers, (&before, &now), rig.triggers());
    idle(&mut report, &rig, &workers, switches.pick(5, 3));
    drop(guests);
    drop(rig);
    next_tenant(&mut report, switches.pick(21, 7));
    restart(&mut report, switches.pick(9, 3));
    report.end(&switches)
}
