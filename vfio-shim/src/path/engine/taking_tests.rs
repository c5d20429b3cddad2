//! Leases that are taken back, functions that the kernel takes away, and the ways out of quarantine, over the soft fabric.

use super::soft_tests::{Rig, bdf, until};
use super::*;
use crate::model::{FunctionIds, IrqIndex};
use crate::ntb::soft::{Fault, FaultPlan, SoftFunction};
use crate::path::message::{PoolState, RefusalCode};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::os::fd::{AsFd, OwnedFd};

const WAIT_MS: u64 = 20_000;

fn rig() -> Rig {
    let function = SoftFunction::new(FunctionIds::default(), 4);
    Rig::with(function, FaultPlan::default(), 60_000)
}

fn refused<T: std::fmt::Debug>(result: Result<T, CallError>) -> RefusalCode {
    match result.unwrap_err() {
        CallError::Refused(refusal) => refusal.code,
        other => panic!("{other}"),
    }
}

fn state(rig: &Rig) -> OfferState {
    let status = rig.engines[0].status().unwrap();
    status.lent[0].offer.state.clone()
}

fn fired(fd: &OwnedFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&now)).unwrap() == 1
}

/// The same function, with what comes with it.
fn offer_again(rig: &Rig, keep: Keep) {
    rig.engines[0].withdraw(bdf()).unwrap();
    let entry = PoolEntry {
        bdf: bdf(),
        ids: FunctionIds::default(),
        state: PoolState::Available,
        irq_count: 4,
        bar_bytes: 0,
        serial: 0,
    };
    let offered: Arc<dyn Function> = rig.function.clone();
    rig.engines[0].offer_with(entry, offered, keep).unwrap();
}

fn reset_fails() -> FaultPlan {
    FaultPlan::default().nth(Fault::ResetFails, 1)
}

#[test]
fn revoked_function_is_reset_and_unmapped_when_the_verb_returns_and_the_next_tenant_gets_it() {
    let rig = rig();
    let before = rig.maps();
    let (_, _, held) = rig.engines[1].borrow(bdf(), None).unwrap();
    let resets = rig.function.resets();
    let after = rig.engines[0].revoke_and_wait(bdf(), "wanted back", WAIT_MS);
    assert_eq!(after.unwrap(), OfferState::Available);
    assert_eq!(rig.function.resets(), resets + 1);
    assert_eq!([rig.maps()[0], rig.maps()[2]], [before[0], before[2]]);
    until("the borrower is told", || {
        (held.lost().as_deref() == Some("wanted back")).then_some(())
    });
    let (lease, _, next) = rig.engines[1].borrow(bdf(), None).unwrap();
    assert_eq!(next.lost(), None);
    rig.engines[1].give_back(lease).unwrap();
}

#[test]
fn vmm_is_asked_once_to_let_go_of_a_lost_function_and_one_whose_eventfd_is_full_holds_nobody_up() {
    let rig = rig();
    let (_, _, held) = rig.engines[1].borrow(bdf(), None).unwrap();
    // As a VMM may make it: blocking.
    let event = eventfd(0, EventfdFlags::empty()).unwrap();
    let give = |event: &OwnedFd| vec![Some(event.try_clone().unwrap())];
    held.set_irqs(IrqIndex::Req, 0, give(&event)).unwrap();
    rig.engines[0]
        .revoke_and_wait(bdf(), "wanted back", WAIT_MS)
        .unwrap();
    until("the VMM is asked", || fired(&event).then_some(()));
    let mut value = [0; 8];
    rustix::io::read(&event, &mut value).unwrap();
    assert_eq!(u64::from_ne_bytes(value), 1);
    // One that comes too late is asked at once; here its counter is at its limit.
    rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    held.set_irqs(IrqIndex::Req, 0, give(&event)).unwrap();
    let late = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    until("the full one is passed over, and the next is asked", || {
        held.set_irqs(IrqIndex::Req, 0, give(&late)).unwrap();
        fired(&late).then_some(())
    });
}

#[test]
fn what_is_not_lent_is_not_revoked() {
    let rig = rig();
    let engine = &rig.engines[0];
    let revoke = |bdf| engine.revoke_and_wait(bdf, "wanted back", WAIT_MS);
    assert_eq!(refused(revoke(bdf())), RefusalCode::NoLease);
    let other = "4a:00.2".parse().unwrap();
    assert_eq!(refused(revoke(other)), RefusalCode::UnknownFunction);
    assert_eq!(
        refused(engine.retry(bdf(), WAIT_MS)),
        RefusalCode::WrongState
    );
    assert_eq!(
        engine.clear(bdf(), "user 7").unwrap_err().code,
        RefusalCode::WrongState
    );
}

#[test]
fn quarantine_is_left_by_a_retry_that_works_or_by_a_clear_and_not_otherwise() {
    let rig = rig();
    let engine = &rig.engines[0];
    let quarantine = || {
        rig.engines[1].borrow(bdf(), None).unwrap();
        rig.function.arm(reset_fails());
        let after = engine.revoke_and_wait(bdf(), "wanted back", WAIT_MS);
        assert!(matches!(after.unwrap(), OfferState::Quarantine(_)));
    };
    quarantine();
    let offer = engine.status().unwrap().lent[0].offer.clone();
    assert!(offer.quarantined_ms.is_some());
    let borrowed = rig.engines[1].borrow(bdf(), None);
    assert_eq!(refused(borrowed.map(drop)), RefusalCode::Quarantine);
    rig.function.arm(reset_fails());
    let again = engine.retry(bdf(), WAIT_MS).unwrap();
    assert!(matches!(again, OfferState::Quarantine(_)), "{again:?}");
    let resets = rig.function.resets();
    assert_eq!(engine.retry(bdf(), WAIT_MS).unwrap(), OfferState::Available);
    assert_eq!(rig.function.resets(), resets + 1);
    quarantine();
    let resets = rig.function.resets();
    engine.clear(bdf(), "user 7").unwrap();
    assert_eq!(state(&rig), OfferState::Available);
    assert_eq!(rig.function.resets(), resets, "as it is");
    rig.engines[1].borrow(bdf(), None).unwrap();
}

#[test]
fn slices_behind_a_function_in_quarantine_are_given_out_again_after_the_retry() {
    let rig = rig();
    let engine = &rig.engines[0];
    let free = || engine.status().unwrap().window_free;
    let all = free();
    rig.engines[1].borrow(bdf(), None).unwrap();
    rig.function.arm(reset_fails());
    engine
        .revoke_and_wait(bdf(), "wanted back", WAIT_MS)
        .unwrap();
    until("the borrower has confirmed", || {
        let quarantine = rig.engines[1].status().unwrap().quarantine;
        (quarantine.slices == 0).then_some(())
    });
    assert!(free() < all);
    engine.retry(bdf(), WAIT_MS).unwrap();
    until("all of the window is free", || {
        (free() == all).then_some(())
    });
}

#[test]
fn function_that_the_kernel_wants_back_is_closed_and_its_borrower_is_told_why() {
    let rig = rig();
    until("its requests are heard", || {
        rig.function.hears_requests().then_some(())
    });
    let (_, _, held) = rig.engines[1].borrow(bdf(), None).unwrap();
    rig.function.raise_irqs(IrqIndex::Req, 0, 1).unwrap();
    // Nobody holds it any more but this test: the kernel's unbind would go on.
    until("it is closed", || {
        (Arc::strong_count(&rig.function) == 1).then_some(())
    });
    assert!(!rig.function.hears_requests());
    assert!(matches!(state(&rig), OfferState::Gone(_)));
    let why = until("the borrower is told", || held.lost());
    assert!(why.contains("takes the function away"), "{why}");
    assert!(rig.engines[1].list().unwrap().is_empty());
    let borrowed = rig.engines[1].borrow(bdf(), None);
    assert_eq!(refused(borrowed.map(drop)), RefusalCode::UnknownFunction);
    // When it is there again, it is offered anew.
    rig.engines[0].withdraw(bdf()).unwrap();
    rig.lend(bdf(), &rig.function);
    rig.engines[1].borrow(bdf(), None).unwrap();
}

#[test]
fn borrower_does_not_get_the_interrupts_by_which_the_lenders_kernel_asks() {
    let rig = rig();
    let (lease, ..) = rig.engines[1].borrow(bdf(), None).unwrap();
    for index in [IrqIndex::Req, IrqIndex::Err, IrqIndex::Intx] {
        for enable in [true, false] {
            let request = Request::Irqs {
                lease,
                index,
                enable,
            };
            let answer = rig.engines[1].call(Call::Forward(lease, request), WAIT_MS);
            assert_eq!(refused(answer), RefusalCode::NotAllowed, "{index:?}");
        }
    }
    assert!(rig.function.hears_requests());
    rig.function.raise_irqs(IrqIndex::Req, 0, 1).unwrap();
    until("it is closed", || {
        (Arc::strong_count(&rig.function) == 1).then_some(())
    });
}

#[test]
fn function_that_nobody_has_leaves_at_the_kernels_wish_too_and_so_does_one_in_quarantine() {
    for quarantine in [false, true] {
        let rig = rig();
        if quarantine {
            rig.engines[1].borrow(bdf(), None).unwrap();
            rig.function.arm(reset_fails());
            let engine = &rig.engines[0];
            engine.revoke_and_wait(bdf(), "back", WAIT_MS).unwrap();
        }
        until("its requests are heard", || {
            rig.function.hears_requests().then_some(())
        });
        rig.function.raise_irqs(IrqIndex::Req, 0, 1).unwrap();
        until("it is closed", || {
            (Arc::strong_count(&rig.function) == 1).then_some(())
        });
    }
}

#[test]
fn path_of_a_function_that_reports_an_error_is_lost_and_the_function_is_put_back() {
    let rig = rig();
    let (_, _, held) = rig.engines[1].borrow(bdf(), None).unwrap();
    rig.function.raise_irqs(IrqIndex::Err, 0, 1).unwrap();
    let why = until("the borrower is told", || held.lost());
    assert!(why.contains("error"), "{why}");
    until("it is in the pool again", || {
        (state(&rig) == OfferState::Available).then_some(())
    });
    rig.engines[1].borrow(bdf(), None).unwrap();
}

#[test]
fn what_a_function_does_is_stopped_before_it_is_taken_from_its_guest_and_not_when_it_is_returned() {
    let rig = rig();
    let stopped = Arc::new(AtomicU64::new(u64::MAX));
    let (told, function) = (Arc::clone(&stopped), Arc::clone(&rig.function));
    let keep = Keep {
        // After how many resets.
        stop: Some(Box::new(move || {
            told.store(function.resets(), Ordering::SeqCst);
            Ok(())
        })),
        ..Keep::default()
    };
    offer_again(&rig, keep);
    let (lease, ..) = rig.engines[1].borrow(bdf(), None).unwrap();
    rig.engines[1].give_back(lease).unwrap();
    assert_eq!(stopped.load(Ordering::SeqCst), u64::MAX);
    rig.engines[1].borrow(bdf(), None).unwrap();
    let before = rig.function.resets();
    let revoked = rig.engines[0].revoke_and_wait(bdf(), "wanted back", WAIT_MS);
    revoked.unwrap();
    assert_eq!(stopped.load(Ordering::SeqCst), before);
    assert_eq!(rig.function.resets(), before + 1);
}

#[test]
fn function_whose_maker_lets_go_of_it_without_a_word_ends_its_lease_and_leaves_the_pool() {
    let rig = rig();
    let gone = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&gone);
    let why = "the PF has lost its driver";
    let orphaned = move || told.load(Ordering::SeqCst).then(|| why.to_owned());
    let keep = || Keep {
        orphaned: Some(Box::new(orphaned.clone())),
        ..Keep::default()
    };
    offer_again(&rig, keep());
    let (_, _, held) = rig.engines[1].borrow(bdf(), None).unwrap();
    let resets = rig.function.resets();
    gone.store(true, Ordering::SeqCst);
    assert_eq!(until("the borrower is told", || held.lost()), why);
    until("it has left, reset", || {
        let left = matches!(state(&rig), OfferState::Gone(told) if told == why);
        (left && rig.function.resets() > resets).then_some(())
    });
    // While it is so, an offer does not last; when its maker is back, it does.
    offer_again(&rig, keep());
    until("it leaves again", || {
        matches!(state(&rig), OfferState::Gone(_)).then_some(())
    });
    gone.store(false, Ordering::SeqCst);
    offer_again(&rig, keep());
    rig.engines[1].borrow(bdf(), None).unwrap();
}
