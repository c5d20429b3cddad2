//! Leases that are taken back, and functions in quarantine, by the verbs of two hosts joined by a soft NTB.

use super::lend::{Lent, Offer};
use super::tests::{Rig, VF, bdf, fdid, until};
use super::*;
use crate::daemon::vocabulary::{
    Availability, BdfText, QuarantineList, QuarantinedPort, UndoneFunction,
};
use crate::pool::{Cause, FunctionKey, Move, Scrubbed};
use vfio_shim::model::{Function, IrqIndex};
use vfio_shim::ntb::soft::{Fault, FaultPlan};

const WHY: &str = "revoked by the lender's operator";

/// As if the function had been offered by the verbs.
fn rig() -> Rig {
    let rig = Rig::new();
    let lent = Lent {
        offer: Some(Offer { port: 0 }),
    };
    rig.hosts[0].state().lent.insert(bdf(VF), lent);
    rig
}

fn vf() -> BdfText {
    bdf(VF).into()
}

fn revoke(rig: &Rig, deadline_s: Option<u32>) -> Result<Outcome, VerbError> {
    let verb = Verb::Revoke {
        bdf: vf(),
        deadline_s,
    };
    rig.hosts[0].handle(verb)
}

fn retry(rig: &Rig) -> Result<Outcome, VerbError> {
    rig.hosts[0].handle(Verb::QuarantineRetry {
        bdf: vf(),
        held: None,
    })
}

fn clear(rig: &Rig, i_know: bool) -> Result<Outcome, VerbError> {
    let by = Some("user 7".to_owned());
    let verb = Verb::QuarantineClear {
        bdf: vf(),
        i_know,
        by,
    };
    rig.hosts[0].handle(verb)
}

fn quarantine(rig: &Rig) -> QuarantineList {
    match rig.hosts[0].handle(Verb::Quarantine).unwrap() {
        Outcome::Quarantine(list) => list,
        other => panic!("{other:?}"),
    }
}

fn undone(result: Result<Outcome, VerbError>) -> UndoneFunction {
    match result.unwrap() {
        Outcome::Undone(undone) => undone,
        other => panic!("{other:?}"),
    }
}

fn available() -> UndoneFunction {
    UndoneFunction {
        fdid: fdid("40101"),
        available: Availability::Available,
        reason: None,
    }
}

fn next_reset_fails(rig: &Rig) {
    let plan = FaultPlan::default().nth(Fault::ResetFails, 1);
    rig.function.arm(plan);
}

/// Its last tenant could not be reset out of it.
fn quarantined() -> Rig {
    let rig = rig();
    rig.borrow(|_| {}).unwrap();
    next_reset_fails(&rig);
    let after = undone(revoke(&rig, None));
    assert_eq!(after.available, Availability::Quarantine);
    // Its borrower is told by a message of its own.
    until("the borrower is told", || {
        let held = rig.hosts[1].report().borrowed.pop()?;
        (held.state == "lost").then_some(())
    });
    rig
}

#[test]
fn revoke_undoes_both_sides_resets_the_function_and_offers_it_again() {
    let rig = rig();
    rig.borrow(|_| {}).unwrap();
    let resets = rig.function.resets();
    assert_eq!(undone(revoke(&rig, None)), available());
    assert_eq!(rig.function.resets(), resets + 1);
    assert_eq!(rig.function.space().maps().len(), 0);
    let lent = rig.hosts[0].report().lent.remove(0);
    assert_eq!((lent.lease, lent.last_end.as_deref()), (None, Some(WHY)));
    let newest = until("the end is written down", || {
        let newest = rig.hosts[0]
            .pool
            .as_ref()
            .unwrap()
            .journal(1)
            .unwrap()
            .remove(0);
        match newest.moved {
            Move::Ended(end) => Some(end),
            _ => None,
        }
    });
    assert_eq!(newest.cause, Cause::Revoked(WHY.into()));
    assert_eq!(newest.scrubbed, Scrubbed::Reset);
    until("the borrower's status tells why", || {
        let held = rig.hosts[1].report().borrowed.pop()?;
        let lost = held.state == "lost" && held.last_error.as_deref() == Some(WHY);
        lost.then_some(())
    });
    rig.borrow(|_| {}).unwrap();
}

#[test]
fn revoke_is_refused_in_words_where_there_is_nothing_to_revoke() {
    let rig = rig();
    let refused = |code, text: &str| {
        assert_eq!(revoke(&rig, None).unwrap_err(), VerbError::new(code, text));
    };
    refused(
        ErrorCode::NoLease,
        "nobody has 0000:01:00.1: there is no lease to revoke",
    );
    rig.borrow(|_| {}).unwrap();
    let claim = rig.hosts[0].claim(claim::Named::Local(bdf(VF))).unwrap();
    refused(
        ErrorCode::Busy,
        "another verb is at work on 0000:01:00.1: try again in a moment",
    );
    drop(claim);
    rig.hosts[0].state().lent.insert(bdf(VF), Lent::default());
    refused(
        ErrorCode::WrongState,
        "0000:01:00.1 is not offered, so nobody has it: see `sublet list`",
    );
    rig.hosts[0].state().lent.clear();
    refused(
        ErrorCode::UnknownFunction,
        "0000:01:00.1 is not in the pool: `sublet add 0000:01:00.1` first",
    );
    assert!(rig.hosts[1].report().borrowed[0].last_error.is_none());
}

#[test]
fn revoke_past_its_deadline_is_told_and_goes_on() {
    let rig = rig();
    rig.borrow(|_| {}).unwrap();
    // The lender's host stands still in whatever it does to the port.
    rig.link.host(0).freeze();
    let refusal = revoke(&rig, Some(0)).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::Timeout);
    rig.link.host(0).thaw();
    until("it is in the pool again", || {
        let lent = rig.hosts[0].report().lent.remove(0);
        (lent.state == Availability::Available && lent.last_end.as_deref() == Some(WHY))
            .then_some(())
    });
}

#[test]
fn function_that_is_not_reset_is_listed_with_its_reason_until_a_retry_works() {
    let rig = quarantined();
    let list = quarantine(&rig);
    assert_eq!(list.functions.len(), 1);
    let function = &list.functions[0];
    assert_eq!(function.fdid, fdid("40101"));
    assert!(function.reason.contains("reset the function"), "{list:?}");
    assert!(function.for_ms.is_some());
    assert!(matches!(&list.ports[..], [QuarantinedPort { port, .. }] if port == "ntb0"));
    let status = rig.hosts[0].report();
    assert_eq!(status.quarantine.functions.len(), 1);
    until("the reset is told as failed in the journal", || {
        let newest = rig.hosts[0]
            .pool
            .as_ref()
            .unwrap()
            .journal(1)
            .unwrap()
            .remove(0)
            .moved;
        matches!(newest, Move::Ended(end) if matches!(end.scrubbed, Scrubbed::Failed(_)))
            .then_some(())
    });
    assert_eq!(rig.borrow(|_| {}).unwrap_err().code, ErrorCode::Quarantine);
    assert_eq!(revoke(&rig, None).unwrap_err().code, ErrorCode::NoLease);
    next_reset_fails(&rig);
    let refusal = retry(&rig).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::Quarantine);
    assert!(refusal.text.contains("stays in quarantine"), "{refusal}");
    assert_eq!(quarantine(&rig).functions.len(), 1);
    assert_eq!(undone(retry(&rig)), available());
    assert_eq!(quarantine(&rig).functions, []);
    rig.borrow(|_| {}).unwrap();
}

#[test]
fn clear_gives_a_function_out_as_it_is_and_only_to_who_knows() {
    let rig = quarantined();
    let refusal = clear(&rig, false).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::NotAllowed);
    assert!(refusal.text.contains("--i-know"), "{refusal}");
    assert_eq!(quarantine(&rig).functions.len(), 1);
    let resets = rig.function.resets();
    assert_eq!(clear(&rig, true).unwrap(), Outcome::Done);
    assert_eq!(rig.function.resets(), resets);
    let lent = rig.hosts[0].report().lent.remove(0);
    assert_eq!(lent.state, Availability::Available);
    let last_end = lent.last_end.unwrap_or_default();
    assert!(last_end.contains("cleared from quarantine"), "{last_end}");
    for refusal in [clear(&rig, true), retry(&rig)].map(Result::unwrap_err) {
        let text = "0000:01:00.1 is not in quarantine: see `sublet quarantine list`";
        assert_eq!(refusal, VerbError::new(ErrorCode::WrongState, text));
    }
    rig.borrow(|_| {}).unwrap();
}

#[test]
fn function_that_the_kernel_takes_away_leaves_the_pool_and_status_tells_why_on_both_hosts() {
    let rig = rig();
    rig.borrow(|_| {}).unwrap();
    until("its requests are heard", || {
        rig.function.hears_requests().then_some(())
    });
    rig.function.raise_irqs(IrqIndex::Req, 0, 1).unwrap();
    until("it is closed", || {
        (Arc::strong_count(&rig.function) == 1).then_some(())
    });
    let lent = rig.hosts[0].report().lent.remove(0);
    assert_eq!(lent.state, Availability::Unavailable);
    let why = lent.last_error.unwrap_or_default();
    assert!(why.contains("taken away"), "{why}");
    until("the borrower's status tells why", || {
        let held = rig.hosts[1].report().borrowed.pop()?;
        held.last_error?
            .contains("takes the function away")
            .then_some(())
    });
    let gone = revoke(&rig, None).unwrap_err();
    assert_eq!(gone.code, ErrorCode::NoLease);
    // It can leave the pool as if it had never been offered.
    rig.hosts[0].handle(Verb::Remove { bdf: vf() }).unwrap();
    assert!(rig.hosts[0].report().lent.is_empty());
}

fn newest_move(rig: &Rig) -> Move {
    let pool = rig.hosts[0].pool.as_ref().unwrap();
    pool.journal(1).unwrap().remove(0).moved
}

fn lender(rig: &Rig, verb: Verb) -> Result<Outcome, VerbError> {
    rig.hosts[0].handle(verb)
}

fn available_again(rig: &Rig) -> Result<Outcome, VerbError> {
    lender(
        rig,
        Verb::Available {
            bdf: vf(),
            port: None,
        },
    )
}

#[test]
fn clear_and_a_retry_that_works_are_in_the_journal_with_the_operator_and_the_scrub() {
    let rig = quarantined();
    clear(&rig, true).unwrap();
    let cleared = Move::Mended(Scrubbed::Cleared("user 7".into()));
    until("the clear is written down", || {
        (newest_move(&rig) == cleared).then_some(())
    });
    let pool = rig.hosts[0].pool.as_ref().unwrap();
    let entry = pool.journal(1).unwrap().remove(0);
    assert_eq!(entry.function, FunctionKey::from(bdf(VF)));
    assert!(entry.unix_ms > 0);
    rig.borrow(|_| {}).unwrap();

    let rig = quarantined();
    undone(retry(&rig));
    until("the retry is written down", || {
        (newest_move(&rig) == Move::Mended(Scrubbed::Reset)).then_some(())
    });
}

#[test]
fn function_that_is_not_offered_stays_in_quarantine_and_cannot_be_offered() {
    let rig = quarantined();
    let unavailable = Verb::Unavailable { bdf: vf() };
    lender(&rig, unavailable).unwrap();
    for _ in 0..2 {
        let refusal = available_again(&rig).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Quarantine);
        assert!(
            refusal.text.contains("reset the function") && refusal.text.contains("retry"),
            "{refusal}"
        );
        let refusal = lender(&rig, Verb::Add { bdf: vf() }).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Quarantine);
        let list = quarantine(&rig);
        assert_eq!(list.functions.len(), 1, "{list:?}");
        assert!(list.functions[0].reason.contains("reset the function"));
        // In the pool or not.
        let _ = lender(&rig, Verb::Remove { bdf: vf() });
    }
    let refusal = clear(&rig, false).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::NotAllowed);
    assert_eq!(clear(&rig, true).unwrap(), Outcome::Done);
    assert_eq!(quarantine(&rig).functions, []);
    let cleared = Move::Mended(Scrubbed::Cleared("user 7".into()));
    assert_eq!(newest_move(&rig), cleared);
}
