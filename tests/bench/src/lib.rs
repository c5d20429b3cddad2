//! Figures beside their baselines: both measured in turns in one run, told as a ratio with its limit.
//!
//! A machine is faster now and slower later, and so are both sides of a pair. A figure is the
//! median of the rounds' ratios, and one noisy round decides nothing.

mod child;
mod cores;
mod hops;
mod paired;
mod report;

pub use child::{Child, Role, cpu_ns};
pub use cores::on_core;
pub use hops::Hops;
pub use paired::{Paired, Rounds, paired, percentile, time_ns};
pub use report::{Report, Switches};
