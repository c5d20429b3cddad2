//! The scenarios, one file each.

mod bad_input;
mod client;
mod contracts;
mod daemon_replaced;
mod flap;
mod heartbeat;
mod hostile_vmm;
mod hosts;
mod isolation;
mod keeper;
mod kill_matrix;
mod late_stores;
mod ntb_drivers;
mod nvme;
mod pf_gone;
mod reboot;
mod refusals;
mod rounds;
mod second;
mod steps;
mod tenant;
mod third;
mod two_tenants;
mod vf;
mod windows;

use crate::check::Checks;
use crate::lab::{Lab, Options};
use anyhow::{Result, bail};
use std::time::Duration;

/// A scenario: what it is called, how many checks it makes, and how long it may take at most.
pub struct Scenario {
    /// As on the command line.
    pub name: &'static str,
    /// Fewer are a failure.
    pub checks: usize,
    /// Which of `tests/run`'s modes have it.
    pub when: When,
    /// Why no other NTB than our model will do, if so: it could not be asked for what is needed.
    pub own_model: Option<&'static str>,
    /// After this it is ended from outside.
    pub deadline: Duration,
    /// Makes the checks.
    pub run: fn(&Lab, &mut Checks) -> Result<()>,
}

impl Scenario {
    /// Refuses what this scenario cannot do with these options, before anything is started.
    pub fn ensure_fits(&self, options: &Options) -> Result<()> {
        match (self.own_model, &options.ntb_sockets) {
            (Some(why), Some(_)) => bail!(
                "{} does not run with --ntb-sockets, as a foreign NTB has no control socket: {why}. \
                 Leave the option out, or take nvme, nvme-mapped, isolation, reboot or heartbeat",
                self.name
            ),
            _ => Ok(()),
        }
    }
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
    contracts::SCENARIO,
    ntb_drivers::SCENARIO,
    nvme::TRAPPED,
    nvme::MAPPED,
    nvme::PROCESSES,
    nvme::PROCESSES_MAPPED,
    daemon_replaced::SCENARIO,
    keeper::SCENARIO,
    isolation::SCENARIO,
    two_tenants::SCENARIO,
    hostile_vmm::SCENARIO,
    reboot::SCENARIO,
    flap::SCENARIO,
    heartbeat::SCENARIO,
    kill_matrix::SCENARIO,
    late_stores::SCENARIO,
    late_stores::MAPPED,
    pf_gone::SCENARIO,
    windows::SCENARIO,
    refusals::SCENARIO,
    nvme::OTHER_NTB,
    bad_input::SCENARIO,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenario_that_asks_something_of_the_model_refuses_a_foreign_ntb_at_once() {
        let foreign = Options {
            ntb_sockets: Some(("a".into(), "b".into())),
            ..Options::default()
        };
        let refused = ALL.iter().filter_map(|scenario| {
            scenario.ensure_fits(&Options::default()).unwrap();
            let error = scenario.ensure_fits(&foreign).err()?.to_string();
            assert!(error.contains(scenario.name) && error.contains("--ntb-sockets"));
            Some(scenario.name)
        });
        let refused: Vec<_> = refused.collect();
        assert_eq!(refused, ["flap", "kill-matrix", "windows", "nvme-0db4"]);
    }
}
