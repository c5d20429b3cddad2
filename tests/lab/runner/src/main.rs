//! Boots the lab's hosts and runs its scenarios: one line for each check, logs kept on failure.

use anyhow::{Context, Result, bail};
use lab::check::Checks;
use lab::lab::{Lab, Options};
use lab::log::{self, NESTED_FAULTS};
use lab::scenario::{self, Scenario, When};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Instant;
use std::{fs, process, thread};

const USAGE: &str = "usage: lab list [gate|full]
       lab SCENARIO [--ntb-sockets A,B] [--vmm CLOUD-HYPERVISOR] [--keep]";

const TRIES_MAX: usize = 2;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &[String]) -> Result<bool> {
    let (name, rest) = args.split_first().context(USAGE)?;
    if name == "list" {
        let listed = |when| match rest.first().map(String::as_str) {
            Some("gate") => when == When::Gate,
            Some("full") => when != When::Asked,
            _ => true,
        };
        for scenario in scenario::ALL
            .iter()
            .filter(|scenario| listed(scenario.when))
        {
            println!("{}", scenario.name);
        }
        return Ok(true);
    }
    let scenario = scenario::ALL.iter().find(|scenario| scenario.name == name);
    let scenario =
        scenario.with_context(|| format!("no scenario {name}; lab list names them all"))?;
    let options = options(rest)?;
    scenario.ensure_fits(&options)?;
    for attempt in 1..=TRIES_MAX {
        let tried = attempt_once(scenario, &options)?;
        let (passed, failed) = tried.counts;
        if let (Some(fault), true) = (tried.nested_fault, failed > 0 && attempt < TRIES_MAX) {
            println!("retry {attempt} of {name}: the log has `{fault}`");
            continue;
        }
        let retried = attempt - 1;
        println!("scenario {name}: {passed} passed, {failed} failed, {retried} retried");
        return Ok(failed == 0);
    }
    Ok(false)
}

fn options(words: &[String]) -> Result<Options> {
    let mut options = Options::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--keep" => options.keep = true,
            "--vmm" => options.vmm = Some(PathBuf::from(value()?)),
            "--ntb-sockets" => {
                let (a, b) = value()?.split_once(',').context("--ntb-sockets A,B")?;
                options.ntb_sockets = Some((a.into(), b.into()));
            }
            _ => bail!("unknown: {word}\n{USAGE}"),
        }
    }
    Ok(options)
}

/// What came of one try.
struct Try {
    /// Passed and failed.
    counts: (usize, usize),
    /// The known fault of others that was seen.
    nested_fault: Option<&'static str>,
}

fn attempt_once(scenario: &Scenario, options: &Options) -> Result<Try> {
    let lab = Lab::new(options.clone(), scenario.name)?;
    let since = Instant::now();
    let ended = watch(scenario, &lab.dir);
    let mut checks = Checks::new(scenario.checks);
    let outcome = (scenario.run)(&lab, &mut checks);
    drop(ended);
    if let Err(error) = &outcome {
        println!("{} stopped: {error:#}", scenario.name);
    }
    let miscounted = checks.miscounted();
    if miscounted != 0 {
        println!(
            "{}: {} checks declared, {miscounted} not made",
            scenario.name, scenario.checks
        );
    }
    let (passed, failed) = checks.counts();
    // An error outside of every check, or a check too many, is a failure as well.
    let failed = failed.max(usize::from(outcome.is_err() || miscounted < 0));
    let nested_fault = log::first_of(&lab.dir, &NESTED_FAULTS);
    println!(
        "{} took {:.1} s",
        scenario.name,
        since.elapsed().as_secs_f64()
    );
    clean_up(&lab.dir, failed > 0, options.keep);
    Ok(Try {
        counts: (passed, failed),
        nested_fault,
    })
}

/// Ends the whole runner when a scenario overruns: its programs die with it.
fn watch(scenario: &Scenario, dir: &Path) -> mpsc::Sender<()> {
    let (sender, ended) = mpsc::channel::<()>();
    let (dir, name, deadline, checks) = (
        dir.to_owned(),
        scenario.name,
        scenario.deadline,
        scenario.checks,
    );
    thread::spawn(move || {
        if ended.recv_timeout(deadline) == Err(mpsc::RecvTimeoutError::Timeout) {
            println!("FAIL {name} did not end within {deadline:?}");
            clean_up(&dir, true, false);
            println!("scenario {name}: 0 passed, {checks} failed, 0 retried");
            process::exit(1);
        }
    });
    sender
}

fn clean_up(dir: &Path, failed: bool, keep: bool) {
    if failed {
        log::print_tails(dir);
    }
    if failed || keep {
        println!("logs are kept in {}", dir.display());
    } else {
        let _ = fs::remove_dir_all(dir);
    }
}
