//! One schedule: two hosts, at least 200 steps, faults; the same from the same seed.

use crate::faults::Fabric;
use crate::guest::Tally;
use crate::random::Random;
use crate::table::Table;
use crate::trace::Trace;
use crate::world::World;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// The least steps of a schedule.
pub const STEPS_MIN: usize = 200;
/// Steps from one quiet moment to the next.
const STEPS_TO_QUIET: usize = 50;

/// Of so many schedules one has keepers.
const KEPT_ONCE_IN: u64 = 4;

/// What is special in a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Which stores its fabric can hold back.
    pub fabric: Fabric,
    /// One of its hosts forges.
    pub forger: bool,
    /// Leases live so short that borrowers are often late.
    pub short_leases: bool,
    /// Borrowed functions are served by processes of their own, most of them.
    pub workers: bool,
    /// On both hosts port and daemon are processes of their own, and each may die without the other.
    pub apart: bool,
    /// Functions are opened by keepers, which die and stand still like everybody else.
    pub kept: bool,
}

impl Shape {
    /// By chance.
    fn draw(seed: u64, random: &mut Random) -> Self {
        Self {
            fabric: Fabric::ALL[random.below(Fabric::ALL.len())],
            forger: random.once_in(5),
            short_leases: random.once_in(3),
            workers: random.once_in(3),
            apart: random.once_in(2),
            kept: seed.is_multiple_of(KEPT_ONCE_IN),
        }
    }
}

/// What came of a schedule.
#[derive(Clone, Debug)]
pub struct Report {
    /// The trace's hash.
    pub hash: u64,
    /// Steps of the schedule.
    pub steps: u64,
    /// Steps of threads.
    pub thread_steps: u64,
    /// Operations and the faults that they met.
    pub table: Table,
    /// What guests saw.
    pub tally: Tally,
    /// The story, if it was asked for.
    pub story: Vec<String>,
}

/// An invariant did not hold.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Which, and where.
    pub words: String,
    /// The story until then, if it was asked for.
    pub story: Vec<String>,
}

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics of a schedule are its failures: they are kept, not printed.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("a panic without words");
        let place = info.location().map(ToString::to_string);
        let words = format!("{text} [{}]", place.unwrap_or_default());
        PANIC.with_borrow_mut(|kept| {
            if kept.is_empty() {
                *kept = words;
            }
        });
    }));
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Runs a schedule. `dir` is for sockets, and empty again after it.
pub fn run(seed: u64, story: bool, dir: &Path) -> Result<Report, Failure> {
    let mut random = Random::new(seed);
    let shape = Shape::draw(seed, &mut random);
    run_as(shape, (seed, random), story, dir)
}

/// The same of a given shape.
pub fn run_as(
    shape: Shape,
    (seed, random): (u64, Random),
    story: bool,
    dir: &Path,
) -> Result<Report, Failure> {
    let fds = open_fds();
    let mut world = World::new(random, shape, Trace::new(story), dir);
    world.trace.tell(0, || format!("seed {seed}, {shape:?}"));
    let result = catch_unwind(AssertUnwindSafe(|| drive(&mut world, shape.fabric)));
    let words = PANIC.take();
    if result.is_err() {
        let story = world.trace.story().to_vec();
        // Its threads may be in any state: they are not touched any more.
        std::mem::forget(world);
        return Err(Failure { words, story });
    }
    let report = Report {
        hash: world.trace.hash(),
        steps: STEPS_MIN as u64,
        thread_steps: world.scheduler.steps(),
        table: std::mem::take(&mut world.table),
        tally: world.tally(),
        story: world.trace.story().to_vec(),
    };
    drop(world);
    let left = open_fds();
    match left == fds {
        true => Ok(report),
        false => Err(Failure {
            words: format!("INVARIANT leak: {fds} fds were open before, and {left} are after"),
            story: report.story,
        }),
    }
}

fn drive(world: &mut World, fabric: Fabric) {
    // Time for the first link session.
    world.run_for(1500);
    let failing = world.random.once_in(3);
    for step in 1..=STEPS_MIN {
        if step % 25 == 1 {
            world.plan_link(fabric);
            world.plan_store();
            world.plan_kill();
            if failing {
                world.plan_failures();
            }
        }
        world.act();
        world.act_on_keepers();
        go_on(world);
        world.note_struck();
        world.reap();
        world.check_always();
        if step % STEPS_TO_QUIET == 0 {
            world.settle();
            world.check_quiet();
            world.check_deaths();
            world.clean_up();
        }
    }
    world.end();
}

/// Threads run, or time passes, or neither.
fn go_on(world: &mut World) {
    if std::mem::take(&mut world.refused) && !world.random.once_in(4) {
        let ms = 300 + world.random.below(1200) as u64;
        return world.run_for(ms);
    }
    match world.random.below(12) {
        0 => {}
        1..=6 => {
            let steps = 1 + world.random.below(40) as u64;
            world.run_steps(steps);
        }
        7..=9 => {
            let steps = 1 + world.random.below(300) as u64;
            world.run_steps(steps);
        }
        10 => {
            let ms = 1 + world.random.below(300) as u64;
            world.run_for(ms);
        }
        _ => {
            let ms = 1 + world.random.below(1200) as u64;
            world.run_for(ms);
        }
    }
}
