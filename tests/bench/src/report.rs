//! The report: one line for each figure, and in `--check` an exit code that counts those over their limits.

use super::Paired;
use std::process::ExitCode;

/// What a benchmark was asked for.
#[derive(Clone, Debug, Default)]
pub struct Switches {
    /// Only the figures, in short rounds.
    pub short: bool,
    /// A figure over its limit makes it fail.
    pub check: bool,
    /// Another server to measure beside.
    pub baseline: Option<String>,
}

impl Switches {
    /// From the command line; what cargo adds by itself is passed over.
    pub fn from_args(args: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut switches = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => {}
                "--short" => switches.short = true,
                "--check" => switches.check = true,
                "--baseline" => match args.next() {
                    Some(socket) => switches.baseline = Some(socket),
                    None => return Err("--baseline wants a vfio-user server's socket".to_owned()),
                },
                other => {
                    return Err(format!(
                        "{other} is not known: --short, --check, --baseline SOCKET are"
                    ));
                }
            }
        }
        Ok(switches)
    }

    /// So many, or in short rounds fewer.
    pub fn pick<T>(&self, full: T, short: T) -> T {
        match self.short {
            true => short,
            false => full,
        }
    }
}

/// Figures as they come, and how many were over their limits.
#[derive(Debug, Default)]
pub struct Report {
    over: usize,
    judged: usize,
}

fn time(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns} ns"),
        10_000..10_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

impl Report {
    /// A pair, with the most that its ratio may be.
    pub fn pair(&mut self, what: &str, baseline: &str, pair: &Paired, limit: Option<f64>) {
        let (least, most) = (pair.ratios[0], pair.ratios[pair.ratios.len() - 1]);
        let words = format!(
            "{what}: {}, {baseline} {}, ratio {:.2} ({least:.2} to {most:.2})",
            time(pair.figure_ns),
            time(pair.baseline_ns),
            pair.ratio()
        );
        self.judge(&words, pair.ratio(), limit);
    }

    /// A number by itself, with the most that it may be.
    pub fn number(&mut self, what: &str, value: f64, unit: &str, limit: Option<f64>) {
        self.judge(&format!("{what}: {value:.2} {unit}"), value, limit);
    }

    /// A time by itself.
    pub fn time(&mut self, what: &str, ns: u64) {
        self.judge(&format!("{what}: {}", time(ns)), 0.0, None);
    }

    fn judge(&mut self, words: &str, value: f64, limit: Option<f64>) {
        let Some(limit) = limit else {
            println!("     {words}");
            return;
        };
        self.judged += 1;
        let over = value > limit;
        self.over += usize::from(over);
        let verdict = if over { "over" } else { "ok  " };
        println!("{verdict} {words}, limit {limit:.2}");
    }

    /// The last line, and the exit code.
    pub fn end(self, switches: &Switches) -> ExitCode {
        let within = self.judged - self.over;
        println!("figures: {within} within their limits, {} over", self.over);
        match switches.check && self.over != 0 {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switches(args: &[&str]) -> Result<Switches, String> {
        Switches::from_args(args.iter().map(|arg| (*arg).to_owned()))
    }

    #[test]
    fn switches_are_read_and_unknown_ones_refused() {
        let read = switches(&["--bench", "--short", "--baseline", "/run/x", "--check"]).unwrap();
        assert!(read.short && read.check);
        assert_eq!(read.baseline.as_deref(), Some("/run/x"));
        assert!(switches(&["--baseline"]).unwrap_err().contains("socket"));
        assert!(switches(&["--wrong"]).unwrap_err().contains("--wrong"));
    }

    #[test]
    fn a_figure_over_its_limit_fails_a_check_and_only_that() {
        let pair = Paired {
            figure_ns: 50,
            baseline_ns: 100,
            ratios: vec![0.4, 0.5, 9.0],
        };
        let report = |limit| {
            let mut report = Report::default();
            report.pair("a figure", "its baseline", &pair, limit);
            report
        };
        assert_eq!((report(Some(0.5)).over, report(Some(0.5)).judged), (0, 1));
        assert_eq!(report(Some(0.49)).over, 1);
        assert_eq!((report(None).over, report(None).judged), (0, 0));
    }
}
