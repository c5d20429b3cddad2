//! Lender's end tests: every message is of the lease in force, and a grant that comes late leaks nothing.

use super::*;
use crate::model::{Access, RegionInfo, Span};
use crate::path::grant::{Grant, Scrub, ToPort};
use crate::path::message::MapRange;
use crate::path::refused::RefusedAs;

const WINDOW_BYTES: u64 = 1 << 20;
const BAR_BYTES: u64 = 0x4000;
const SECRET: Secret = Secret([7; 16]);

fn bdf() -> Bdf {
    "01:00.1".parse().unwrap()
}

/// A lender's end, the peer's operations and the port's slices.
struct Rig {
    lender: Lender,
    slices: SlicePool,
    op_last: u64,
}

impl Rig {
    fn new() -> Self {
        let mut info = FunctionInfo {
            resettable: true,
            ..FunctionInfo::default()
        };
        info.regions[0] = RegionInfo {
            size: BAR_BYTES,
            ..RegionInfo::default()
        };
        let entry = PoolEntry {
            bdf: bdf(),
            ids: Default::default(),
            state: PoolState::Available,
            irq_count: 1,
            bar_bytes: BAR_BYTES,
            serial: 0,
        };
        let mut lender = Lender::default();
        lender.offer(entry, info).unwrap();
        Self {
            lender,
            slices: SlicePool::open(WINDOW_BYTES),
            op_last: 0,
        }
    }

    fn request(&mut self, request: Request) -> Vec<LenderAction> {
        self.op_last += 1;
        let named = (OpId(self.op_last), request.op());
        let slices = &mut self.slices;
        self.lender
            .request(named, request, slices, Some(8), Secret([1; 16]))
    }

    /// What the peer asks for, and the refusal that it gets at once.
    fn refusal(&mut self, request: Request) -> Refusal {
        let mut actions = self.request(request);
        match actions.pop() {
            Some(LenderAction::Reply(_, _, result)) if actions.is_empty() => result.unwrap_err(),
            other => panic!("not refused: {other:?}"),
        }
    }

    fn ask(&mut self) -> AskId {
        let actions = self.request(Request::Borrow { bdf: bdf() });
        match &actions[..] {
            [LenderAction::Pool(ToPool::Grant { ask, borrower, .. })] => {
                assert_eq!(*borrower, Some(8));
                *ask
            }
            other => panic!("the pool is not asked: {other:?}"),
        }
    }

    fn answer(&mut self, ask: AskId, lease: u64) -> Vec<LenderAction> {
        let lease = LeaseId(lease);
        let secret = SECRET;
        self.lender
            .pool_says(ToPort::Granted(ask, Ok(Grant { lease, secret })))
    }

    fn lease(&mut self, lease: u64) {
        let ask = self.ask();
        let actions = self.answer(ask, lease);
        let [LenderAction::Reply(_, _, reply)] = &actions[..] else {
            panic!("no reply: {actions:?}")
        };
        assert!(matches!(&**reply, Ok(Reply::Borrowed { .. })), "{reply:?}");
    }

    fn open(lease: u64, secret: Secret) -> Request {
        Request::Open {
            lease: LeaseId(lease),
            secret,
            irq_first: 0,
            irq_count: 1,
        }
    }

    fn start(&mut self, request: Request) -> JobId {
        let actions = self.request(request);
        job(&actions)
    }

    fn opened(&mut self, lease: u64) -> Vec<LenderAction> {
        let job = self.start(Self::open(lease, SECRET));
        let outcome = Ok(WorkOutcome::Opened { config_len: 256 });
        self.lender.done(job, outcome, &mut self.slices)
    }

    fn state(&self) -> OfferState {
        self.lender.status()[0].state.clone()
    }
}

fn job(actions: &[LenderAction]) -> JobId {
    match actions {
        [LenderAction::Work(_, job, _)] => *job,
        other => panic!("no work: {other:?}"),
    }
}

fn ends(actions: &[LenderAction]) -> Vec<(LeaseId, LeaseEnd)> {
    let end = |action: &LenderAction| match action {
        LenderAction::Pool(ToPool::Ended { lease, end, .. }) => Some((*lease, end.clone())),
        _ => None,
    };
    actions.iter().filter_map(end).collect()
}

fn no_path(lease: u64, cause: EndCause) -> (LeaseId, LeaseEnd) {
    let undone = Undone::NoPath;
    (LeaseId(lease), LeaseEnd { cause, undone })
}

#[test]
fn message_of_an_older_lease_reaches_nothing_of_the_next() {
    let mut rig = Rig::new();
    rig.lease(1);
    let actions = rig.request(Request::Return { lease: LeaseId(1) });
    assert_eq!(ends(&actions), [no_path(1, EndCause::Returned)]);
    rig.lease(2);
    // With the right secret: the epoch alone has to keep it out.
    let refusal = rig.refusal(Rig::open(1, SECRET));
    assert_eq!(refusal.code, RefusalCode::NoLease);
    rig.opened(2);
    let stale: [Request; 3] = [
        Request::Reset { lease: LeaseId(1) },
        Request::BusMaster {
            lease: LeaseId(1),
            enable: true,
        },
        Request::Return { lease: LeaseId(1) },
    ];
    for request in stale {
        assert_eq!(rig.refusal(request).code, RefusalCode::NoLease);
    }
    assert_eq!(rig.state(), OfferState::Open);
}

#[test]
fn path_opens_only_with_the_secret_of_its_lease() {
    let mut rig = Rig::new();
    rig.lease(1);
    for at in 0..16 {
        let mut wrong = SECRET;
        wrong.0[at] ^= 1;
        assert_eq!(
            rig.refusal(Rig::open(1, wrong)).code,
            RefusalCode::NoLease,
            "byte {at}"
        );
    }
    assert_eq!(rig.state(), OfferState::Leased);
    rig.opened(1);
    assert_eq!(rig.state(), OfferState::Open);
}

#[test]
fn grant_that_comes_after_the_session_goes_back_and_answers_nobody() {
    let mut rig = Rig::new();
    let ask = rig.ask();
    assert!(rig.lender.session_over().is_empty());
    assert!(rig.lender.is_undone(), "a disk is not waited for");
    let busy = rig.refusal(Request::Borrow { bdf: bdf() });
    assert_eq!(busy.code, RefusalCode::Busy);
    let actions = rig.answer(ask, 1);
    assert_eq!(ends(&actions), [no_path(1, EndCause::Reclaimed)]);
    assert_eq!(actions.len(), 1, "no reply into the next session");
    assert_eq!(rig.state(), OfferState::Available);
    rig.lease(2);
}

#[test]
fn grant_that_was_revoked_while_under_way_is_refused_and_goes_back() {
    let mut rig = Rig::new();
    let ask = rig.ask();
    assert!(rig.lender.revoke(bdf(), "wanted").is_empty());
    let actions = rig.answer(ask, 1);
    let revoked = EndCause::Revoked("wanted".into());
    assert_eq!(ends(&actions), [no_path(1, revoked)]);
    assert!(matches!(
        &actions[1],
        LenderAction::Reply(_, _, result) if result.is_err()
    ));
    rig.lease(2);
}

#[test]
fn pool_that_refuses_leaves_the_function_available() {
    let mut rig = Rig::new();
    let ask = rig.ask();
    assert_eq!(
        rig.lender.withdraw(bdf()).unwrap_err().code,
        RefusalCode::Busy
    );
    let refusal = Refusal::new(RefusalCode::Kernel, 28, "the store is full");
    let actions = rig
        .lender
        .pool_says(ToPort::Granted(ask, Err(refusal.clone())));
    let [LenderAction::Reply(_, _, result)] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(**result, Err(refusal));
    assert_eq!(rig.state(), OfferState::Available);
    // An answer to what is answered changes nothing.
    assert!(rig.answer(ask, 1).is_empty());
    rig.lease(2);
}

#[test]
fn grant_of_an_epoch_that_does_not_grow_is_refused_and_goes_back() {
    let mut rig = Rig::new();
    rig.lease(5);
    rig.request(Request::Return { lease: LeaseId(5) });
    for epoch in [4, 5] {
        let ask = rig.ask();
        let actions = rig.answer(ask, epoch);
        assert_eq!(ends(&actions)[0].0, LeaseId(epoch));
        assert_eq!(rig.state(), OfferState::Available);
    }
    rig.lease(6);
}

#[test]
fn lease_without_a_path_expires_and_one_with_a_path_does_not() {
    let mut rig = Rig::new();
    rig.lease(1);
    let expired = |lease| ToPort::Expired(LeaseId(lease));
    assert!(rig.lender.pool_says(expired(7)).is_empty());
    let actions = rig.lender.pool_says(expired(1));
    assert_eq!(ends(&actions), [no_path(1, EndCause::Expired)]);
    assert!(matches!(&actions[1], LenderAction::Revoked(LeaseId(1), _)));
    rig.lease(2);
    let job = rig.start(Rig::open(2, SECRET));
    assert!(rig.lender.pool_says(expired(2)).is_empty(), "opening");
    let outcome = Ok(WorkOutcome::Opened { config_len: 256 });
    let actions = rig.lender.done(job, outcome, &mut rig.slices);
    let opened = |action: &LenderAction| matches!(action, LenderAction::Pool(ToPool::Opened { lease, .. }) if lease.0 == 2);
    assert!(actions.iter().any(opened));
    assert!(rig.lender.pool_says(expired(2)).is_empty(), "open");
}

#[test]
fn bar_slices_of_a_revoked_lease_are_nobodys_until_the_borrower_has_confirmed() {
    let mut rig = Rig::new();
    let free = rig.slices.free_bytes();
    rig.lease(1);
    rig.opened(1);
    let actions = rig.lender.revoke(bdf(), "wanted");
    let job = job(&actions);
    let actions = rig.lender.done(job, Ok(WorkOutcome::Done), &mut rig.slices);
    let end = &ends(&actions)[0].1;
    assert_eq!(end.undone, Undone::Reset(Scrub::No));
    assert_eq!(rig.state(), OfferState::Available);
    assert_eq!(rig.slices.free_bytes(), free - BAR_BYTES, "in quarantine");
    rig.lender.revoke_confirmed(LeaseId(1), &mut rig.slices);
    assert_eq!(rig.slices.free_bytes(), free);
}

#[test]
fn function_that_cannot_be_undone_is_told_to_the_pool_and_stays_in_quarantine() {
    let mut rig = Rig::new();
    rig.lease(1);
    rig.opened(1);
    let actions = rig.lender.session_over();
    let job = job(&actions);
    let failed = Refusal::new(RefusalCode::Kernel, 5, "reset: I/O error");
    let actions = rig.lender.done(job, Err(failed), &mut rig.slices);
    let (_, end) = &ends(&actions)[0];
    assert_eq!(end.undone, Undone::Failed("reset: I/O error".into()));
    assert_eq!(
        rig.refusal(Request::Borrow { bdf: bdf() }).code,
        RefusalCode::Quarantine
    );
}

#[test]
fn requests_that_are_refused_are_told_at_what_they_name_and_the_others_at_the_port() {
    let mut rig = Rig::new();
    let refused = |rig: &Rig| {
        let of_lease = rig.lender.status()[0].refused.requests;
        (of_lease, rig.lender.refused_unnamed())
    };
    rig.lease(1);
    // The function is another's, and the lease exists: its secret is wrong.
    rig.refusal(Request::Borrow { bdf: bdf() });
    rig.refusal(Rig::open(1, Secret([8; 16])));
    assert_eq!(refused(&rig), (2, 0));
    rig.opened(1);
    let outside = MapRange {
        span: Span::new(0, 0x1000).unwrap(),
        offset: WindowOffset(WINDOW_BYTES),
        access: Access::READ_WRITE,
    };
    rig.refusal(Request::Map {
        lease: LeaseId(1),
        ranges: vec![outside],
    });
    assert_eq!(refused(&rig), (3, 0));
    rig.refusal(Request::Reset { lease: LeaseId(2) });
    let nobodys = "4a:00.2".parse().unwrap();
    rig.refusal(Request::Borrow { bdf: nobodys });
    assert_eq!(refused(&rig), (3, 2));
    rig.lender.count_refused(LeaseId(2), RefusedAs::Torn);
    assert_eq!(rig.lender.status()[0].refused.torn, 0);
}
