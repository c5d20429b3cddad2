//! The simulator: many schedules of two hosts under faults, or one seed as a story.

use clap::Parser;
use sim_tests::runs::{self, Wish};
use std::process::ExitCode;
use std::time::Duration;

/// Schedules of two hosts under faults, deterministic from their seeds.
#[derive(Parser)]
struct Words {
    /// How many schedules.
    #[arg(long, default_value_t = 10_000)]
    schedules: u64,
    /// The first seed; the others follow it.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Replays this seed alone, and tells it as a story.
    #[arg(long, env = "SUBLET_SIM_SEED")]
    seed: Option<u64>,
    /// Begins no schedule after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// How many processes; as many as there are processors, if it is not said.
    #[arg(long)]
    jobs: Option<u64>,
    /// An empty cell of the table is no failure.
    #[arg(long)]
    partial: bool,
    /// Runs every so many-th seed in this process, and prints sums for another.
    #[arg(long, hide = true)]
    stride: Option<u64>,
}

fn main() -> ExitCode {
    let words = Words::parse();
    if let Some(seed) = words.seed {
        return runs::story(seed);
    }
    let processors = std::thread::available_parallelism().map_or(1, |many| many.get() as u64);
    let wish = Wish {
        first: words.first,
        schedules: words.schedules,
        limit: words.seconds.map(Duration::from_secs),
        jobs: words.jobs.unwrap_or(processors).max(1),
    };
    match words.stride {
        Some(stride) => runs::child(wish, stride.max(1)),
        None => runs::parent(wish, !words.partial),
    }
}
