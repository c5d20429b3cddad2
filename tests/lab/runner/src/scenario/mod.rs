//! The scenarios, one file each.

mod bad_input;
mod flap;
mod heartbeat;
mod hosts;
mod isolation;
mod ntb_drivers;
mod nvme;
mod reboot;
mod refusals;
mod steps;
mod tenant;
mod windows;

use crate::check::Checks;
use crate::lab::Lab;
use anyhow::Result;
use std::time::Duration;

/// A scenario: what it is called, how many checks it makes, and how long it may take at most.
pub struct Scenario {
    /// As on the command line.
    pub name: &'static str,
    /// Fewer are a failure.
    pub checks: usize,
    /// Which of `tests/run`'s modes have it.
    pub when: When,
    /// After this it is ended from outside.
    pub deadline: Duration,
    /// Makes the checks.
    pub run: fn(&Lab, &mut Checks) -> Result<()>,
}

/// Which runs have a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// All.
    Gate,
    /// `tests/run full`.
    Full,
    /// Only when it is named.
    Asked,
}

/// In the order in which the gate runs them.
pub const ALL: &[Scenario] = &[
    hosts::SCENARIO,
    ntb_drivers::SCENARIO,
    nvme::TRAPPED,
    nvme::MAPPED,
    isolation::SCENARIO,
    reboot::SCENARIO,
    flap::SCENARIO,
    heartbeat::SCENARIO,
    windows::SCENARIO,
    refusals::SCENARIO,
    nvme::OTHER_NTB,
    bad_input::SCENARIO,
];
