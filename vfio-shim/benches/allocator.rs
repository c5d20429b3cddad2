//! Slices of a window: one more and one less where 100 are live, and where 60,000 are.
//!
//! `cargo bench -p vfio-shim --bench allocator -- [--short] [--check]`

use bench_report::{Report, Rounds, Switches, paired, time_ns};
use criterion::Criterion;
use std::process::ExitCode;
use vfio_shim::iova::SpanAllocator;

const FEW: u64 = 100;
const MANY: u64 = 60_000;
const PAGE: u64 = 4096;
const MODULI: [u64; 3] = [1 << 30, 1 << 21, PAGE];
/// So many in one sample: one alone is not much more than reading the clock.
const BATCH: u64 = 64;

/// A window with so many live slices, and as many holes of all sizes between them.
struct Window {
    spans: SpanAllocator<u8>,
    state: u64,
}

impl Window {
    fn new(live: u64) -> Self {
        let mut window = Self {
            spans: SpanAllocator::new(1 << 40, 1 << 16),
            state: 1,
        };
        let mut starts = Vec::new();
        for _ in 0..2 * live {
            starts.push(window.allocate());
        }
        for start in starts.into_iter().step_by(2) {
            assert!(window.spans.free(1, start));
        }
        assert_eq!(window.spans.live_count() as u64, live);
        window
    }

    /// The same sequence for all: a fixed multiplicative generator.
    fn random(&mut self, below: u64) -> u64 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % below
    }

    fn allocate(&mut self) -> u64 {
        let (len, like) = ((1 + self.random(64)) * PAGE, self.random(1 << 20) * PAGE);
        let span = self.spans.allocate(1, len, like, &MODULI);
        span.expect("there is room").start()
    }

    fn turn(&mut self) {
        let start = self.allocate();
        assert!(self.spans.free(1, start));
    }

    fn samples(&mut self, count: usize) -> Vec<u64> {
        let batch = |window: &mut Self| time_ns(|| (0..BATCH).for_each(|_| window.turn())) / BATCH;
        (0..count).map(|_| batch(self)).collect()
    }
}

fn main() -> ExitCode {
    let switches = match Switches::from_args(std::env::args().skip(1)) {
        Ok(switches) => switches,
        Err(words) => {
            eprintln!("{words}");
            return ExitCode::FAILURE;
        }
    };
    let (mut few, mut many) = (Window::new(FEW), Window::new(MANY));
    if !switches.short {
        let mut criterion = Criterion::default();
        let mut group = criterion.benchmark_group("slice allocated and freed");
        group.bench_function("100 live", |bench| bench.iter(|| few.turn()));
        group.bench_function("60,000 live", |bench| bench.iter(|| many.turn()));
        group.finish();
    }
    let mut report = Report::default();
    let rounds = Rounds {
        rounds: 15,
        samples: switches.pick(400, 100),
    };
    let pair = paired(
        rounds,
        |count| many.samples(count),
        |count| few.samples(count),
    );
    let what = format!("slice allocated and freed, {MANY} live");
    report.pair(&what, &format!("{FEW} live"), &pair, None);
    report.end(&switches)
}
