//! Workers that do not let go of an ended lease: nothing of it is given out again, and nothing else waits for them.

use super::quarantine::{free, held_back};
use super::*;

/// A path with two maps, whose worker will not let go; the bytes that were free before on both
/// sides.
fn held() -> (Pair, LeaseId, [u64; 2]) {
    let mut pair = ready();
    let before = [0, 1].map(|at| free(&pair, at));
    let lease = pair.borrow_open();
    pair.ask(Call::Map(lease, guest_maps(2))).unwrap();
    pair.hosts[1].holding_on = Some(Vec::new());
    (pair, lease, before)
}

fn revoke(pair: &mut Pair) {
    let now = pair.now;
    let actions = pair.hosts[0].core.revoke(bdf(), "wanted back", now);
    actions.into_iter().for_each(|action| pair.act(0, action));
    rounds(pair);
}

fn rounds(pair: &mut Pair) {
    (0..8).for_each(|_| pair.round());
}

/// The worker is gone.
fn let_go(pair: &mut Pair) {
    let steps = pair.hosts[1].holding_on.take().expect("a worker");
    let events = steps.into_iter().map(Event::LetGo);
    pair.hosts[1].todo.extend(events);
    rounds(pair);
}

fn lent(pair: &Pair) -> OfferState {
    pair.hosts[0].core.lender.status()[0].state.clone()
}

#[test]
fn revoke_takes_the_function_back_and_is_confirmed_when_the_worker_has_let_go() {
    let (mut pair, _, before) = held();
    let session = pair.hosts[0].session;
    revoke(&mut pair);
    assert_eq!(lent(&pair), OfferState::Available);
    assert!(
        pair.hosts[1].pinned.is_empty(),
        "the memory is free at once"
    );
    let words = entry().irq_count;
    assert_eq!(held_back(&pair, 0), (1, 0x4000, 0));
    assert_eq!(held_back(&pair, 1), (2, 2 << 16, words));
    // Meanwhile the function is the next tenant's, with other slices.
    let holding_on = pair.hosts[1].holding_on.take();
    let next = pair.borrow_open();
    pair.ask(Call::Return(next)).unwrap();
    assert_eq!(held_back(&pair, 0), (1, 0x4000, 0));
    pair.hosts[1].holding_on = holding_on;
    let_go(&mut pair);
    assert_eq!([0, 1].map(|at| held_back(&pair, at)), [(0, 0, 0); 2]);
    assert_eq!([0, 1].map(|at| free(&pair, at)), before);
    assert_eq!(pair.hosts[0].session, session, "nobody else has noticed");
}

#[test]
fn return_unpins_at_once_and_is_told_to_the_lender_when_the_worker_has_let_go() {
    let (mut pair, lease, before) = held();
    let returned = pair.call(Call::Return(lease));
    rounds(&mut pair);
    assert!(pair.hosts[1].pinned.is_empty());
    assert!(pair.hosts[0].path_open && !pair.hosts[1].answers.contains_key(&returned));
    let_go(&mut pair);
    assert!(pair.hosts[1].answers[&returned].is_ok());
    assert_eq!(lent(&pair), OfferState::Available);
    assert_eq!([0, 1].map(|at| free(&pair, at)), before);
}

#[test]
fn revoke_under_a_return_that_waits_is_confirmed_when_the_worker_has_let_go() {
    let (mut pair, lease, before) = held();
    let returned = pair.call(Call::Return(lease));
    rounds(&mut pair);
    revoke(&mut pair);
    assert_eq!(lent(&pair), OfferState::Available);
    assert_eq!(held_back(&pair, 0), (1, 0x4000, 0), "not confirmed");
    let_go(&mut pair);
    assert!(pair.hosts[1].answers[&returned].is_ok());
    assert_eq!([0, 1].map(|at| free(&pair, at)), before);
}

#[test]
fn no_session_opens_over_slices_that_a_worker_holds() {
    for returns in [false, true] {
        let (mut pair, lease, before) = held();
        if returns {
            pair.call(Call::Return(lease));
            rounds(&mut pair);
        }
        for up in [false, true] {
            pair.link_up = up;
            rounds(&mut pair);
        }
        assert!(pair.hosts[1].session.is_none() && pair.hosts[1].pinned.is_empty());
        assert!(!pair.hosts[1].core.is_idle());
        assert!(pair.hosts[1].core.waits_for_workers_alone(), "it can stop");
        let_go(&mut pair);
        pair.wait_session();
        assert_eq!([0, 1].map(|at| free(&pair, at)), before);
        assert_eq!(lent(&pair), OfferState::Available);
    }
}

#[test]
fn worker_that_lets_go_twice_changes_nothing() {
    let (mut pair, lease, _) = held();
    revoke(&mut pair);
    let steps = pair.hosts[1].holding_on.clone().unwrap();
    assert_eq!((steps.len(), &pair.hosts[1].lost[..]), (1, &[lease][..]));
    let_go(&mut pair);
    pair.hosts[1].holding_on = Some(steps);
    let_go(&mut pair);
    assert_eq!([0, 1].map(|at| held_back(&pair, at)), [(0, 0, 0); 2]);
}
