//! Schedules of a given shape: with a peer that forges, with leases that expire under their borrowers, with workers, ports, daemons and keepers that die.

use sim_tests::faults::Fabric;
use sim_tests::random::Random;
use sim_tests::schedule::{self, Shape};
use sim_tests::steps::Step;
use sim_tests::table::{Op, Table, Trouble};
use std::sync::Mutex;

/// Each counts this process's file descriptors.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs so many schedules; what was met in them.
fn passed(many: u64, [forger, short_leases, workers, apart, kept]: [bool; 5]) -> Table {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let mut table = Table::default();
    for seed in 1..=many {
        let shape = Shape {
            fabric: Fabric::ALL[seed as usize % Fabric::ALL.len()],
            forger,
            short_leases,
            workers,
            apart,
            kept,
        };
        schedule::keep_panics();
        let report = schedule::run_as(shape, (seed, Random::new(seed)), false, dir.path());
        let _ = std::panic::take_hook();
        match report {
            Ok(report) => table.add(&report.table),
            Err(failure) => panic!("seed {seed} of {shape:?}: {}", failure.words),
        }
    }
    table
}

#[test]
fn honest_host_keeps_its_invariants_whatever_its_peer_forges() {
    let table = passed(64, [true, false, false, false, false]);
    assert!(table.met(Op::Forge, Trouble::PeerForges) > 0);
    assert!(table.met(Op::Interrupt, Trouble::PeerForges) > 0);
}

#[test]
fn lease_that_nobody_opens_expires_and_one_with_an_open_path_never_does() {
    let table = passed(16, [true, true, false, false, false]);
    let expired: u64 = Op::ALL
        .iter()
        .map(|(op, _)| table.met(*op, Trouble::LeaseExpired))
        .sum();
    assert!(expired > 0, "no lease expired");
    assert!(table.met(Op::Interrupt, Trouble::PeerForges) > 0);
}

#[test]
fn worker_that_dies_or_stands_still_costs_its_own_lease_alone() {
    let table = passed(24, [false, false, true, false, false]);
    for trouble in [Trouble::WorkerDead, Trouble::WorkerFrozen] {
        for op in [Op::Interrupt, Op::Store, Op::Revoke, Op::Return] {
            assert!(table.met(op, trouble) > 0, "{op:?} never met {trouble:?}");
        }
    }
}

#[test]
fn daemon_that_dies_ends_no_path_and_a_port_that_dies_ends_its_own() {
    let table = passed(24, [false, true, true, true, false]);
    for trouble in [Trouble::DaemonDown, Trouble::PortDown, Trouble::HostDown] {
        for op in [Op::Borrow, Op::Return, Op::KillPort, Op::KillDaemon] {
            assert!(table.met(op, trouble) > 0, "{op:?} never met {trouble:?}");
        }
    }
    let expired = table.met(Op::KillDaemon, Trouble::LeaseExpired);
    assert!(expired > 0, "no lease expired near a daemon's death");
}

#[test]
fn keeper_that_dies_costs_nobody_a_path_and_the_next_one_gives_back_what_it_had() {
    let table = passed(48, [false, false, true, true, true]);
    for trouble in [Trouble::KeeperDown, Trouble::KeeperFrozen] {
        assert!(table.met(Op::Lend, trouble) > 0, "{trouble:?}");
        assert!(table.met(Op::Interrupt, trouble) > 0, "{trouble:?}");
    }
    let of_keepers = table
        .kills()
        .filter(|(step, _)| matches!(step, Step::Keeper(_)));
    assert!(of_keepers.map(|(_, count)| count).all(|count| count > 0));
}
