//! A worker that dies or stands still at the worst moment, one moment each.

use sim_tests::faults::Fabric;
use sim_tests::guest::Life;
use sim_tests::lease::By;
use sim_tests::random::Random;
use sim_tests::schedule::Shape;
use sim_tests::scheduler::Process;
use sim_tests::trace::Trace;
use sim_tests::world::World;

const LENDER: usize = 0;
const BORROWER: usize = 1;
/// The function that is lent.
const FUNCTION: usize = 0;
/// Longer than anything here takes, shorter than a lease lives without a path.
const WHILE_MS: u64 = 3000;

fn two_hosts(dir: &tempfile::TempDir) -> World {
    let shape = Shape {
        fabric: Fabric::Ordered,
        forger: false,
        short_leases: false,
        workers: true,
        apart: false,
        kept: false,
    };
    let mut world = World::new(Random::new(1), shape, Trace::new(true), dir.path());
    go_on(&mut world);
    world
}

fn go_on(world: &mut World) {
    world.run_for(WHILE_MS);
    world.reap();
}

/// A guest at work on the function, served by a process of its own.
fn attach(world: &mut World, by: By) -> usize {
    world.borrow_by((BORROWER, FUNCTION), None, by);
    go_on(world);
    let at = world.held.len() - 1;
    world.connect(at);
    go_on(world);
    let guest = world.held[at].guest().expect("a guest");
    assert_eq!(guest.borrow().life, Life::Running);
    at
}

fn worker(world: &World, at: usize) -> Process {
    world.held[at].worker().expect("a process of its own")
}

fn maps(world: &World) -> usize {
    world.hosts[LENDER].functions[FUNCTION]
        .soft
        .space()
        .maps()
        .len()
}

#[test]
fn store_of_a_worker_that_stood_still_when_its_lease_was_revoked_reaches_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = two_hosts(&dir);
    let at = attach(&mut world, By::Window);
    let worker = worker(&world, at);
    assert!(world.stop_at_store(at));
    go_on(&mut world);
    assert!(world.scheduler.is_stopped(worker), "it is about to store");
    let bdf = world.hosts[LENDER].functions[FUNCTION].bdf;
    let engine = world.hosts[LENDER].engine.clone().unwrap();
    engine.revoke(bdf, "revoked by the operator");
    go_on(&mut world);
    // Another has the same slice now.
    attach(&mut world, By::Thread);
    world.scheduler.freeze(worker, false);
    go_on(&mut world);
    world.check_scratch();
    assert!(world.scheduler.core().is_dead(worker), "it did not let go");
    world.drop_held(|held| held.worker() == Some(worker));
    drop(engine);
    world.end();
}

#[test]
fn worker_that_is_killed_costs_its_lease_and_the_function_is_free_again() {
    for by in [By::Channel, By::Window] {
        let dir = tempfile::tempdir().unwrap();
        let mut world = two_hosts(&dir);
        let at = attach(&mut world, by);
        assert_ne!(maps(&world), 0);
        let worker = worker(&world, at);
        world.scheduler.kill(worker);
        go_on(&mut world);
        let bdf = world.hosts[LENDER].functions[FUNCTION].bdf;
        assert_eq!(
            (maps(&world), world.hosts[LENDER].disk.holder(bdf)),
            (0, None)
        );
        assert!(world.held[at].is_buried() && world.held[at].is_undone());
        world.check_quiet();
        world.end();
    }
}
