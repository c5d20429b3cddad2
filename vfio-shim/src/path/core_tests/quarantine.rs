//! What is refused, fails or is a lie on one side: no slice, word or lease of it goes to the next.

use super::*;
use crate::path::borrower::{Borrower, BorrowerAction, CALLS_MAX, Step};
use crate::path::message::{OpId, RANGES_MAX, Reply, Secret};
use crate::path::plan::{Quarantine, SlicePool};
use crate::path::wire::IRQ_WORDS_MAX;

pub(super) fn free(pair: &Pair, at: usize) -> u64 {
    pair.hosts[at].core.pool().free_bytes()
}

/// What `status` tells: slices, bytes, interrupt words.
pub(super) fn held_back(pair: &Pair, at: usize) -> (usize, u64, u32) {
    let Quarantine {
        slices,
        bytes,
        words,
    } = pair.hosts[at].core.quarantine();
    (slices, bytes, words)
}

/// The borrower's worker lets go and its mapper answers, and nothing else happens.
fn let_go_and_unpinned(pair: &mut Pair) {
    let events = [(); 2].map(|()| pair.hosts[1].todo.pop_front().unwrap());
    assert!(matches!(events, [Event::LetGo(_), Event::Pinned(..)]));
    events.into_iter().for_each(|event| pair.handle(1, event));
}

#[test]
fn map_refused_in_its_last_message_leaves_nothing_of_the_first_ones_at_the_lender() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let before = free(&pair, 1);
    pair.hosts[0].maps_left = Some(2);
    let maps = guest_maps(2 * RANGES_MAX as u64 + 22);
    pair.ask(Call::Map(lease, maps)).unwrap_err();
    for _ in 0..8 {
        pair.round();
    }
    assert_eq!(pair.hosts[0].behind.len(), 0, "mapped behind the function");
    assert!(pair.hosts[1].pinned.is_empty());
    assert_eq!(free(&pair, 1), before);
}

#[test]
fn slices_of_a_refused_map_are_free_only_when_the_lender_has_unmapped_them() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    pair.hosts[0].maps_left = Some(1);
    let token = pair.call(Call::Map(lease, guest_maps(RANGES_MAX as u64 + 1)));
    let before = free(&pair, 1);
    for _ in 0..200 {
        if pair.hosts[1].answers.contains_key(&token) {
            break;
        }
        let at = usize::from(!pair.hosts[1].todo.is_empty());
        match pair.hosts[at].todo.pop_front() {
            Some(Event::Bell(_)) => {
                let inbox = pair.hosts[at].inbox();
                pair.handle(at, Event::Bell(inbox));
            }
            Some(event) => pair.handle(at, event),
            None => pair.round(),
        }
    }
    assert!(pair.hosts[1].answers[&token].is_err());
    assert_eq!(pair.hosts[0].behind.len(), RANGES_MAX, "not told yet");
    assert_eq!(free(&pair, 1), before, "the slices are in quarantine");
    let count = RANGES_MAX + 1;
    assert_eq!(held_back(&pair, 1), (count, (count as u64) << 16, 0));
}

#[test]
fn unmap_that_the_lender_refuses_keeps_its_slice_and_lets_later_maps_through() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let before = free(&pair, 1);
    pair.ask(Call::Map(lease, guest_maps(1))).unwrap();
    pair.hosts[0].works = false;
    pair.ask(Call::Unmap(lease, Span::new(0, 1 << 16).unwrap()))
        .unwrap();
    for _ in 0..4 {
        pair.round();
    }
    pair.hosts[0].works = true;
    assert_eq!(free(&pair, 1), before - (1 << 16));
    assert_eq!(held_back(&pair, 1), (1, 1 << 16, 0));
    let later = guest_maps(3).split_off(2);
    pair.ask(Call::Map(lease, later)).unwrap();
    pair.ask(Call::Return(lease)).unwrap();
    assert_eq!(free(&pair, 1), before);
    assert_eq!(held_back(&pair, 1), (0, 0, 0));
}

#[test]
fn return_that_the_lender_refuses_frees_no_slice_before_it_says_revoked() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let before = free(&pair, 1);
    pair.ask(Call::Map(lease, guest_maps(2))).unwrap();
    assert_eq!(held_back(&pair, 1), (0, 0, 0), "what is in use is not");
    let now = pair.now;
    // The lender is at work on a revoke when the return arrives.
    let actions = pair.hosts[0].core.revoke(bdf(), "wanted back", now);
    let returned = pair.call(Call::Return(lease));
    let_go_and_unpinned(&mut pair);
    pair.settle();
    for _ in 0..4 {
        pair.round();
    }
    assert!(pair.hosts[1].answers[&returned].is_err());
    assert_eq!(pair.hosts[0].behind.len(), 2, "the lender has them mapped");
    assert_eq!(free(&pair, 1), before - (2 << 16));
    let words = entry().irq_count;
    assert_eq!(held_back(&pair, 1), (2, 2 << 16, words));
    for action in actions {
        pair.act(0, action);
    }
    for _ in 0..4 {
        pair.round();
    }
    assert_eq!([0, 1].map(|at| held_back(&pair, at)), [(0, 0, 0); 2]);
    assert_eq!((pair.hosts[0].behind.len(), free(&pair, 1)), (0, before));
}

#[test]
fn revoke_is_confirmed_when_nothing_is_pinned_and_a_failed_one_keeps_the_bar_slices() {
    let mut pair = ready();
    let lender_free = free(&pair, 0);
    let lease = pair.borrow_open();
    pair.ask(Call::Map(lease, guest_maps(2))).unwrap();
    pair.hosts[1].unpins = false;
    let now = pair.now;
    let actions = pair.hosts[0].core.revoke(bdf(), "wanted back", now);
    for action in actions {
        pair.act(0, action);
    }
    for _ in 0..4 {
        pair.round();
    }
    assert_eq!(pair.hosts[1].lost, [lease]);
    assert_eq!(free(&pair, 0), lender_free - 0x4000);
    assert_eq!(held_back(&pair, 0), (1, 0x4000, 0));
}

#[test]
fn memory_that_cannot_be_unpinned_keeps_its_slice_and_no_session_opens_over_it() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let before = free(&pair, 1);
    pair.ask(Call::Map(lease, guest_maps(2))).unwrap();
    pair.hosts[1].unpins = false;
    let all = Span::new(0, 2 << 16).unwrap();
    pair.ask(Call::Unmap(lease, all)).unwrap_err();
    pair.ask(Call::Return(lease)).unwrap();
    assert_eq!(free(&pair, 1), before - (2 << 16));
    assert_eq!(held_back(&pair, 1), (2, 2 << 16, 0));
    for up in [false, true] {
        pair.link_up = up;
        for _ in 0..8 {
            pair.round();
        }
    }
    assert!(!pair.hosts[1].open && pair.hosts[1].session.is_none());
    let why = pair.hosts[1].core.over_reason().unwrap().to_owned();
    assert!(why.contains("restart the daemon"), "{why}");
    assert!(pair.hosts[1].core.is_idle(), "it can be stopped");
}

#[test]
fn memory_left_pinned_is_tried_again_at_the_sessions_end() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    pair.ask(Call::Map(lease, guest_maps(2))).unwrap();
    pair.hosts[1].unpins = false;
    let all = Span::new(0, 2 << 16).unwrap();
    pair.ask(Call::Unmap(lease, all)).unwrap_err();
    pair.hosts[1].unpins = true;
    pair.link_up = false;
    pair.round();
    assert!(pair.hosts[1].pinned.is_empty());
    pair.link_up = true;
    pair.wait_session();
}

#[test]
fn unmap_and_return_are_never_refused_for_other_calls_under_way() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    pair.ask(Call::Map(lease, guest_maps(1))).unwrap();
    for _ in 0..=CALLS_MAX {
        pair.call(Call::List);
    }
    let list = pair.call(Call::List);
    let refused = pair.hosts[1].answers.remove(&list);
    assert!(matches!(refused, Some(Err(CallError::Refused(_)))));
    let unmap = pair.call(Call::Unmap(lease, Span::new(0, 1 << 16).unwrap()));
    assert!(!pair.hosts[1].answers.contains_key(&unmap));
    pair.settle();
    assert!(pair.hosts[1].pinned.is_empty());
}

#[test]
fn function_whose_figures_cannot_be_is_refused_at_open() {
    type Lie = fn(&mut FunctionInfo);
    let lies: [Lie; 3] = [
        |info| info.irqs[IrqIndex::Msix as usize].count = u32::MAX,
        |info| info.irqs[IrqIndex::Msi as usize].count = 4,
        |info| info.irqs[IrqIndex::Err as usize].count = 2,
    ];
    for lie in lies {
        let mut pair = Pair::new(7);
        let mut info = function_info();
        lie(&mut info);
        pair.hosts[0].core.lender.offer(entry(), info).unwrap();
        pair.wait_session();
        let Ok(Answer::Borrowed(lease, _)) = pair.ask(Call::Borrow(bdf(), None)) else {
            panic!("borrow was refused")
        };
        let refused = pair.ask(Call::Open(lease)).unwrap_err();
        assert!(refused.to_string().contains("are the most"), "{refused}");
        pair.ask(Call::Return(lease)).unwrap();
        assert!(!pair.hosts[0].path_open);
    }
}

#[test]
fn close_that_failed_keeps_the_bar_slices_and_the_function() {
    let mut pair = ready();
    let before = free(&pair, 0);
    let lease = pair.borrow_open();
    pair.hosts[0].works = false;
    pair.ask(Call::Return(lease)).unwrap_err();
    assert_eq!(free(&pair, 0), before - 0x4000);
    assert_eq!(held_back(&pair, 0), (1, 0x4000, 0));
    let state = &pair.hosts[0].core.lender.status()[0].state;
    assert!(matches!(state, OfferState::Quarantine(_)));
}

#[test]
fn function_that_was_offered_to_be_put_back_is_nobodys_when_it_is() {
    let mut pair = ready();
    let lender = &mut pair.hosts[0].core.lender;
    lender.hold_back(bdf(), (LeaseId(1), "its reset failed".into()));
    let borrow = |pair: &mut Pair| match pair.ask(Call::Borrow(bdf(), None)) {
        Err(CallError::Refused(refusal)) => refusal.code,
        other => panic!("{other:?}"),
    };
    assert_eq!(borrow(&mut pair), RefusalCode::Quarantine);
    let actions = pair.hosts[0].core.retry(bdf(), pair.now).unwrap();
    actions.into_iter().for_each(|action| pair.act(0, action));
    pair.settle();
    let lender = &pair.hosts[0].core.lender;
    assert!(matches!(lender.state(bdf()), Some(OfferState::Gone(_))));
    assert_eq!(borrow(&mut pair), RefusalCode::UnknownFunction);
    pair.hosts[0].core.lender.withdraw(bdf()).unwrap();
}

#[test]
fn answer_without_a_form_on_the_wire_is_one_tenants_refusal_and_no_sessions_end() {
    let mut pair = Pair::new(7);
    let mut info = function_info();
    info.regions[0].size = 64 << 12;
    let areas = (0..20).map(|at| Span::new(at << 13, 1 << 12).unwrap());
    info.regions[0].areas = areas.collect();
    pair.hosts[0].core.lender.offer(entry(), info).unwrap();
    pair.wait_session();
    let session = pair.hosts[1].session;
    let Ok(Answer::Borrowed(lease, _)) = pair.ask(Call::Borrow(bdf(), None)) else {
        panic!("borrow was refused")
    };
    let refused = pair.ask(Call::Open(lease)).unwrap_err();
    assert!(matches!(refused, CallError::Refused(_)), "{refused}");
    assert_eq!(pair.hosts[1].session, session);
    pair.ask(Call::Return(lease)).unwrap();
}

#[test]
fn second_hello_changes_neither_the_peers_node_nor_the_window() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let node = |pair: &Pair| pair.hosts[0].core.session().unwrap().peer_node;
    let before = (node(&pair), pair.hosts[0].core.pool().usable_bytes());
    let request = Request::Hello {
        node: 99,
        window_bytes: 0x20000,
    };
    let _ = pair.ask(Call::Forward(lease, request));
    let after = (node(&pair), pair.hosts[0].core.pool().usable_bytes());
    assert_eq!(before, after);
}

/// A borrower alone, and what its lender answers.
struct Alone {
    borrower: Borrower,
    pool: SlicePool,
    token: u64,
}

impl Alone {
    fn new() -> Self {
        Self {
            borrower: Borrower::default(),
            pool: SlicePool::open(WINDOW),
            token: 0,
        }
    }

    fn ask(&mut self, call: Call, reply: Reply) -> Vec<BorrowerAction> {
        self.token += 1;
        let actions = self.borrower.call(Token(self.token), call, &mut self.pool);
        let step = actions.iter().find_map(|action| match action {
            BorrowerAction::Send(step, _) => Some(*step),
            _ => None,
        });
        self.reply(step.expect("a request"), reply)
    }

    fn reply(&mut self, step: Step, reply: Reply) -> Vec<BorrowerAction> {
        self.borrower.reply(step, Ok(reply), &mut self.pool)
    }

    fn borrow(&mut self, lease: u64, irq_count: u32) -> Vec<BorrowerAction> {
        let entry = PoolEntry {
            irq_count,
            ..entry()
        };
        let reply = Reply::Borrowed {
            lease: LeaseId(lease),
            secret: Secret([0; 16]),
            entry,
        };
        self.ask(Call::Borrow(bdf(), None), reply)
    }

    fn open(&mut self, lease: u64, slice: u64) -> Vec<BorrowerAction> {
        let mut slices = [None; crate::model::BAR_COUNT];
        slices[0] = Some(WindowOffset(slice));
        let function = super::super::message::RemoteFunction::new(&function_info(), &slices, 256);
        self.ask(Call::Open(LeaseId(lease)), Reply::Opened(function))
    }
}

fn refused(actions: &[BorrowerAction]) -> bool {
    let refusal = |action: &BorrowerAction| matches!(action, BorrowerAction::Answer(_, Err(_)));
    actions.iter().any(refusal)
}

#[test]
fn entry_with_more_vectors_than_the_table_is_refused_and_goes_back() {
    let mut alone = Alone::new();
    let actions = alone.borrow(1, IRQ_WORDS_MAX + 1);
    assert!(refused(&actions));
    let back = |action: &BorrowerAction| matches!(action, BorrowerAction::Send(_, Request::Return { lease }) if *lease == LeaseId(1));
    assert!(actions.iter().any(back));
    assert!(!refused(&alone.borrow(2, IRQ_WORDS_MAX)));
}

#[test]
fn lease_given_out_twice_changes_nothing_of_the_first() {
    let mut alone = Alone::new();
    assert!(!refused(&alone.borrow(1, 3)));
    let actions = alone.borrow(1, 3);
    assert!(refused(&actions));
    assert_eq!(
        actions.len(),
        1,
        "the first tenant's lease does not go back"
    );
    assert!(!refused(&alone.open(1, 0x10000)));
}

#[test]
fn lease_whose_worker_has_not_let_go_is_not_given_out_again() {
    let mut alone = Alone::new();
    assert!(!refused(&alone.borrow(1, 3)));
    let why = "wanted back".to_owned();
    let actions = alone
        .borrower
        .revoked(OpId(9), LeaseId(1), why, &mut alone.pool);
    let step = actions.iter().find_map(|action| match action {
        BorrowerAction::Lost(step, ..) => Some(*step),
        _ => None,
    });
    let step = step.expect("a lost lease");
    let unpinned = alone.borrower.pinned(step, Ok(()), &mut alone.pool);
    assert!(unpinned.is_empty(), "{unpinned:?}");
    assert!(refused(&alone.borrow(1, 3)));
    let let_go = alone.borrower.let_go(step, &mut alone.pool);
    assert!(matches!(let_go[..], [BorrowerAction::Confirm(OpId(9), _)]));
    assert!(!refused(&alone.borrow(1, 3)));
}

#[test]
fn lease_whose_return_the_lender_has_not_answered_is_not_given_out_again() {
    let mut alone = Alone::new();
    assert!(!refused(&alone.borrow(1, 3)));
    let give_back = Call::Return(LeaseId(1));
    let actions = (alone.borrower).call(Token(77), give_back, &mut alone.pool);
    let ending = |action: &BorrowerAction| match action {
        BorrowerAction::Lost(step, ..) => Some(*step),
        _ => None,
    };
    let step = actions.iter().find_map(ending).expect("its end");
    alone.borrower.let_go(step, &mut alone.pool);
    let asked = alone.borrower.pinned(step, Ok(()), &mut alone.pool);
    let [BorrowerAction::Send(returned, Request::Return { .. })] = asked[..] else {
        panic!("{asked:?}");
    };
    let why = "wanted back".to_owned();
    let actions = (alone.borrower).revoked(OpId(9), LeaseId(1), why, &mut alone.pool);
    let step = actions.iter().find_map(ending).expect("its end");
    alone.borrower.let_go(step, &mut alone.pool);
    alone.borrower.pinned(step, Ok(()), &mut alone.pool);
    assert!(
        refused(&alone.borrow(1, 3)),
        "its late answer would end the new one"
    );
    alone.reply(returned, Reply::Done);
    assert!(!refused(&alone.borrow(1, 3)));
}

#[test]
fn bar_slice_over_the_mailbox_another_lease_or_the_windows_end_is_refused() {
    let mut alone = Alone::new();
    for lease in 1..=5 {
        assert!(!refused(&alone.borrow(lease, 3)));
    }
    assert!(!refused(&alone.open(1, 0x20000)));
    assert!(refused(&alone.open(2, 0x23000)), "the first lease's BAR");
    assert!(refused(&alone.open(3, 0xf000)), "the mailbox");
    assert!(refused(&alone.open(4, WINDOW - 0x1000)), "the end");
    assert!(refused(&alone.open(5, 0x30800)), "not in pages");
}

#[test]
fn revoke_of_an_unknown_lease_is_confirmed_at_once() {
    let mut alone = Alone::new();
    let why = "over".to_owned();
    let actions = alone
        .borrower
        .revoked(OpId(9), LeaseId(77), why, &mut alone.pool);
    assert!(matches!(
        actions[..],
        [BorrowerAction::Confirm(OpId(9), Ok(()))]
    ));
}
