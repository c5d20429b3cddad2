//! An interrupt from the function's trigger to the guest's eventfd, and a mailbox round trip, each beside as many chained eventfds.
//!
//! Each host has a core of its own, and so have the hops in the same order.
//!
//! `cargo bench -p vfio-shim --bench path -- [--short] [--check]`

mod rig;

use bench_report::{Hops, Report, Rounds, Switches, paired, time_ns};
use criterion::Criterion;
use rig::{BORROWER, LENDER, Rig};
use std::process::ExitCode;

/// Whoever wakes between the trigger and the guest, by the core of its host: the lender's irq
/// thread, the borrower's, the thread that signals the guest. The guest itself is the fourth.
const INTERRUPT: [usize; 3] = [LENDER, BORROWER, BORROWER];
/// Between a borrower's call and its answer: control, then irq and control of the lender, irq and
/// control of this side. The caller is the sixth.
const MAILBOX: [usize; 5] = [BORROWER, LENDER, LENDER, BORROWER, BORROWER];
/// The most that the ratio of an interrupt to its hops may be.
const LIMIT_INTERRUPT: f64 = 1.2;

fn many(count: usize, mut act: impl FnMut()) -> Vec<u64> {
    (0..16).for_each(|_| act());
    (0..count).map(|_| time_ns(&mut act)).collect()
}

fn main() -> ExitCode {
    let switches = match Switches::from_args(std::env::args().skip(1)) {
        Ok(switches) => switches,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::FAILURE;
        }
    };
    let rig = Rig::new();
    let hops = [Hops::new(&INTERRUPT), Hops::new(&MAILBOX)];
    let list = || drop(rig.engines[1].list().expect("the peer's pool"));
    if !switches.short {
        let mut criterion = Criterion::default();
        let mut group = criterion.benchmark_group("path");
        group.bench_function("interrupt", |bench| bench.iter(|| rig.interrupt()));
        group.bench_function("its hops", |bench| bench.iter(|| hops[0].signal()));
        group.bench_function("mailbox round trip", |bench| bench.iter(list));
        group.finish();
    }
    let mut report = Report::default();
    let rounds = Rounds {
        rounds: 15,
        samples: switches.pick(2000, 600),
    };
    let pair = paired(
        rounds,
        |count| many(count, || rig.interrupt()),
        |count| many(count, || hops[0].signal()),
    );
    let what = "interrupt by doorbell, trigger to the guest's eventfd";
    let hops_of = |threads: usize| format!("{} chained eventfd hops", threads + 1);
    let beside = hops_of(INTERRUPT.len());
    report.pair(what, &beside, &pair, Some(LIMIT_INTERRUPT));
    let pair = paired(
        rounds,
        |count| many(count, list),
        |count| many(count, || hops[1].signal()),
    );
    let beside = hops_of(MAILBOX.len());
    report.pair("mailbox round trip", &beside, &pair, None);
    report.end(&switches)
}
