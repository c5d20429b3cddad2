//! Rounds in which a figure and its baseline are measured in turns.

use std::time::Instant;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Rounds {
    /// How often each side has its turn.
    pub rounds: usize,
    /// How many times each side acts in one turn.
    pub samples: usize,
}

/// What two sides took, nanoseconds at the median.
#[derive(Clone, Debug)]
pub struct Paired {
    /// The figure: the median of its rounds' medians.
    pub figure_ns: u64,
    /// The baseline: likewise.
    pub baseline_ns: u64,
    /// The rounds' ratios, sorted.
    pub ratios: Vec<f64>,
}

impl Paired {
    /// The median of the rounds' ratios.
    pub fn ratio(&self) -> f64 {
        self.ratios[self.ratios.len() / 2]
    }
}

/// The time that it takes.
pub fn time_ns(act: impl FnOnce()) -> u64 {
    let start = Instant::now();
    act();
    start.elapsed().as_nanos() as u64
}

/// One of the sorted samples.
pub fn percentile(samples: &mut [u64], percent: usize) -> u64 {
    samples.sort_unstable();
    let at = samples.len() * percent / 100;
    samples[at.min(samples.len() - 1)]
}

/// Measures both sides in turns, each first in every other round. A side is given how many samples
/// to take, and returns them.
pub fn paired(
    rounds: Rounds,
    mut figure: impl FnMut(usize) -> Vec<u64>,
    mut baseline: impl FnMut(usize) -> Vec<u64>,
) -> Paired {
    assert!(rounds.rounds > 0 && rounds.samples > 0);
    let (mut figures, mut baselines, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds.rounds {
        let turn =
            |side: &mut dyn FnMut(usize) -> Vec<u64>| percentile(&mut side(rounds.samples), 50);
        let (one, other) = match round % 2 {
            0 => {
                let one = turn(&mut figure);
                (one, turn(&mut baseline))
            }
            _ => {
                let other = turn(&mut baseline);
                (turn(&mut figure), other)
            }
        };
        figures.push(one);
        baselines.push(other);
        ratios.push(one as f64 / other.max(1) as f64);
    }
    ratios.sort_by(f64::total_cmp);
    Paired {
        figure_ns: percentile(&mut figures, 50),
        baseline_ns: percentile(&mut baselines, 50),
        ratios,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_noisy_round_decides_nothing() {
        let rounds = Rounds {
            rounds: 5,
            samples: 3,
        };
        let mut turn = 0;
        let figure = |samples: usize| {
            turn += 1;
            vec![if turn == 3 { 90_000 } else { 50 }; samples]
        };
        let pair = paired(rounds, figure, |samples| vec![100; samples]);
        assert_eq!((pair.figure_ns, pair.baseline_ns), (50, 100));
        assert!((pair.ratio() - 0.5).abs() < 1e-9);
        assert!(pair.ratios[4] > 100.0);
    }

    #[test]
    fn percentiles_are_of_the_sorted_samples() {
        let mut samples = [5, 1, 4, 2, 3];
        assert_eq!(percentile(&mut samples, 50), 3);
        assert_eq!(percentile(&mut samples, 99), 5);
        assert_eq!(percentile(&mut samples, 100), 5);
    }
}
