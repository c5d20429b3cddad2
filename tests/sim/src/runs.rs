//! Many schedules, shared among processes: one sum of hashes, one table; a failing seed is told as a story.

use crate::guest::Tally;
use crate::schedule::{self, Report};
use crate::steps::Step;
use crate::table::{Op, Table, Trouble};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The last lines of a story that are printed.
const STORY_TAIL: usize = 60;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The first seed.
    pub first: u64,
    /// How many schedules.
    pub schedules: u64,
    /// No new schedule is begun after this time.
    pub limit: Option<Duration>,
    /// How many processes.
    pub jobs: u64,
}

#[derive(Default)]
struct Sum {
    schedules: u64,
    steps: u64,
    thread_steps: u64,
    hash: u64,
    tally: Tally,
    table: Table,
}

impl Sum {
    fn take(&mut self, seed: u64, report: &Report) {
        self.schedules += 1;
        self.steps += report.steps;
        self.thread_steps += report.thread_steps;
        // Whichever process ran it, and whenever.
        let mixed = (report.hash ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.hash = self.hash.wrapping_add(mixed ^ mixed >> 31);
        self.count(report.tally);
        self.table.add(&report.table);
    }

    fn count(&mut self, tally: Tally) {
        self.tally.raises += tally.raises;
        self.tally.signals += tally.signals;
        self.tally.looked += tally.looked;
        self.tally.turns += tally.turns;
    }

    /// One line for the parent.
    fn line(&self) -> String {
        let tally = self.tally;
        let mut words = vec![
            self.schedules,
            self.steps,
            self.thread_steps,
            self.hash,
            tally.raises,
            tally.signals,
            tally.looked,
            tally.turns,
        ];
        words.extend(self.table.cells());
        words.extend(self.table.kills().map(|(_, count)| count));
        let words: Vec<String> = words.iter().map(u64::to_string).collect();
        format!("sum {}", words.join(" "))
    }

    fn add_line(&mut self, line: &str) {
        let numbers = line.split(' ').skip(1);
        let mut numbers = numbers.map(|word| word.parse::<u64>().expect("a number"));
        let mut next = || numbers.next().expect("a number");
        self.schedules += next();
        self.steps += next();
        self.thread_steps += next();
        self.hash = self.hash.wrapping_add(next());
        let tally = Tally {
            raises: next(),
            signals: next(),
            looked: next(),
            turns: next(),
        };
        self.count(tally);
        for (op, _) in Op::ALL {
            for trouble in Trouble::ALL {
                let count = next();
                if count != 0 {
                    self.table.cell(op, trouble, count);
                }
            }
        }
        for step in Step::all() {
            self.table.kill(step, next());
        }
    }
}

/// The child's part: every `stride`-th seed.
pub fn child(wish: Wish, stride: u64) -> ExitCode {
    schedule::keep_panics();
    let dir = folder();
    let started = Instant::now();
    let mut sum = Sum::default();
    let mut at = 0;
    while at < wish.schedules && wish.limit.is_none_or(|limit| started.elapsed() < limit) {
        let seed = wish.first + at;
        match schedule::run(seed, false, dir.path()) {
            Ok(report) => sum.take(seed, &report),
            Err(failure) => {
                println!("fail {seed} {}", failure.words.replace('\n', " "));
                println!("{}", sum.line());
                return ExitCode::FAILURE;
            }
        }
        at += stride;
    }
    println!("{}", sum.line());
    ExitCode::SUCCESS
}

fn start(wish: Wish, job: u64) -> Child {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    let left = wish.schedules.saturating_sub(job);
    let numbers = [wish.first + job, left, wish.jobs].map(|number| number.to_string());
    command.args([
        "--first",
        &numbers[0],
        "--schedules",
        &numbers[1],
        "--stride",
        &numbers[2],
    ]);
    if let Some(limit) = wish.limit {
        command.args(["--seconds", &limit.as_secs().to_string()]);
    }
    command.stdout(Stdio::piped()).spawn().expect("a process")
}

/// All of it. The exit code is a failure for a failed invariant, and for an empty cell where the
/// table has to be full.
pub fn parent(wish: Wish, full: bool) -> ExitCode {
    let started = Instant::now();
    let children: Vec<Child> = (0..wish.jobs).map(|job| start(wish, job)).collect();
    let mut sum = Sum::default();
    let mut failures = Vec::new();
    for mut child in children {
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        let before = sum.schedules;
        let mut told = false;
        for line in out.lines().map_while(Result::ok) {
            match line.split_once(' ') {
                Some(("sum", _)) => {
                    sum.add_line(&line);
                    told = true;
                }
                Some(("fail", failure)) => failures.push(failure.to_owned()),
                _ => println!("{line}"),
            }
        }
        let status = child.wait().expect("its end");
        if !told {
            failures.push(format!(
                "0 a process ended with {status} after {before} schedules"
            ));
        }
    }
    print(&sum, started.elapsed());
    for failure in &failures {
        tell_failure(failure);
    }
    let empty = if full { sum.table.empty() } else { Vec::new() };
    for (op, trouble) in &empty {
        println!("EMPTY: {op:?} never met {trouble:?}");
    }
    let missed = sum.table.kills().filter(|(_, count)| full && *count == 0);
    let missed = missed.inspect(|(step, _)| println!("EMPTY: nobody was killed at {step}"));
    let failed = failures.len() + empty.len() + missed.count();
    let passed = sum.schedules;
    println!("schedules: {passed} passed, {failed} failed");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn print(sum: &Sum, took: Duration) {
    println!("{}", sum.table);
    let tally = sum.tally;
    println!(
        "{} schedules in {:.1} s, {} steps, {} steps of threads, trace hash {:016x}",
        sum.schedules,
        took.as_secs_f64(),
        sum.steps,
        sum.thread_steps,
        sum.hash
    );
    println!(
        "interrupts: {} begun, {} signals, {} looked at with their data; {} masks, unmasks and swaps",
        tally.raises, tally.signals, tally.looked, tally.turns
    );
}

/// The seed alone, as a story.
fn tell_failure(failure: &str) {
    println!("FAIL seed {failure}");
    let Some((seed, _)) = failure.split_once(' ') else {
        return;
    };
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    let replay = command.args(["--seed", seed]).stdout(Stdio::piped());
    let mut replay = replay.spawn().expect("a process");
    let mut story = String::new();
    let mut out = replay.stdout.take().expect("a pipe");
    out.read_to_string(&mut story).expect("a story");
    let _ = replay.wait();
    let lines: Vec<&str> = story.lines().collect();
    let from = lines.len().saturating_sub(STORY_TAIL);
    lines[from..].iter().for_each(|line| println!("  {line}"));
    println!("  (the whole story: sim --seed {seed})");
}

/// One seed, told as a story.
pub fn story(seed: u64) -> ExitCode {
    schedule::keep_panics();
    let dir = folder();
    match schedule::run(seed, true, dir.path()) {
        Ok(report) => {
            report.story.iter().for_each(|line| println!("{line}"));
            println!("seed {seed} passes, trace hash {:016x}", report.hash);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            failure.story.iter().for_each(|line| println!("{line}"));
            println!("seed {seed} fails: {}", failure.words);
            ExitCode::FAILURE
        }
    }
}

/// For sockets and trees of files: in memory, where that is possible.
fn folder() -> tempfile::TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary folder")
}
