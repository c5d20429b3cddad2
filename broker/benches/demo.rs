//! The demonstration as a newcomer runs it: how long all of it takes, and the memory of its processes.
//!
//! `cargo bench -p sublet --bench demo -- [--short] [--check]`

use bench_report::{Report, Switches, percentile};
use serde_json::Value;
use std::process::{Command, ExitCode};

/// The most that it may take, seconds.
const LIMIT_S: f64 = 5.0;
/// The most anonymous memory of its processes, besides the guest's, MiB.
const LIMIT_MIB: f64 = 64.0;

/// What a run reports of itself. All of its claims held.
fn run() -> Value {
    let demo = Command::new(env!("CARGO_BIN_EXE_sublet"))
        .args(["demo", "--json"])
        .output()
        .expect("the program is started");
    assert!(demo.status.success(), "{demo:?}");
    serde_json::from_slice(&demo.stdout).expect("its report is JSON")
}

fn main() -> ExitCode {
    let switches = match Switches::from_args(std::env::args().skip(1)) {
        Ok(switches) => switches,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::FAILURE;
        }
    };
    let runs: Vec<Value> = (0..switches.pick(15, 5)).map(|_| run()).collect();
    let middle = |figure: &dyn Fn(&Value) -> f64| {
        let mut all: Vec<u64> = runs.iter().map(|run| figure(run) as u64).collect();
        percentile(&mut all, 50) as f64
    };
    let guest = runs[0]["guest"].as_str().unwrap_or("none").to_owned();
    let mut report = Report::default();
    let us = middle(&|run| run["ms"].as_f64().expect("a time") * 1e3);
    let what = format!("demo, all of it, guest {guest}");
    report.number(&what, us / 1e6, "s", Some(LIMIT_S));
    let bytes = middle(&|run| {
        let figures = &run["figures"];
        let of = |name: &str| figures[name].as_f64().expect("a count of bytes");
        of("rss_anon_bytes") + of("vmm_rss_anon_bytes")
    });
    let what = "RssAnon of the demo's processes, besides guest memory";
    report.number(what, bytes / f64::from(1 << 20), "MiB", Some(LIMIT_MIB));
    report.end(&switches)
}
