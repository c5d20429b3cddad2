//! A guest with as many mappings as it may have: each is told once, in full messages, and what is gone is not told.

use super::*;
use crate::path::borrower::MAPS_MAX;
use crate::path::message::RANGES_MAX;

const PAGE: u64 = 4096;
const ROOM: u64 = 1 << 30;

fn page(at: u64) -> Span {
    Span::new(at * PAGE, PAGE).unwrap()
}

#[test]
fn as_many_maps_as_a_guest_may_have_are_told_in_full_messages_and_one_more_is_refused() {
    let mut pair = ready_with(ROOM);
    let lease = pair.borrow_open();
    let free = pair.hosts[1].core.pool().free_bytes();
    let sent = pair.hosts[1].core.mailbox().unwrap().counters().sent;
    let all = maps_of(MAPS_MAX as u64, PAGE);
    pair.ask(Call::Map(lease, all)).unwrap();
    let sent = pair.hosts[1].core.mailbox().unwrap().counters().sent - sent;
    assert!(
        sent <= MAPS_MAX.div_ceil(RANGES_MAX) as u64 + 1,
        "{sent} messages"
    );
    assert_eq!(pair.hosts[0].behind.len(), MAPS_MAX);
    assert_eq!(pair.hosts[1].pinned.len(), MAPS_MAX);

    let mut over = maps_of(1, PAGE);
    over[0].span = page(MAPS_MAX as u64);
    let refused = pair.ask(Call::Map(lease, over.clone())).unwrap_err();
    assert!(
        refused.to_string().contains("at most 65535 mappings"),
        "{refused}"
    );
    pair.ask(Call::Unmap(lease, page(77))).unwrap();
    pair.ask(Call::Map(lease, over)).unwrap();
    assert!(!pair.hosts[0].behind.contains_key(&(77 * PAGE)));

    pair.ask(Call::Return(lease)).unwrap();
    assert!(pair.hosts[0].behind.is_empty() && pair.hosts[1].pinned.is_empty());
    assert_eq!(pair.hosts[1].core.pool().free_bytes(), free);
}

#[test]
fn map_that_is_gone_before_its_message_is_not_told() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let token = pair.call(Call::Map(lease, guest_maps(3 * RANGES_MAX as u64)));
    // The mapper has pinned all, and the first message is under way.
    let event = pair.hosts[1].todo.pop_front().unwrap();
    assert!(matches!(event, Event::Pinned(..)));
    pair.handle(1, event);
    let second = RANGES_MAX as u64 + 5;
    let gone = Span::new(second << 16, 1 << 16).unwrap();
    pair.call(Call::Unmap(lease, gone));
    for _ in 0..20 {
        pair.round();
    }
    assert!(matches!(pair.hosts[1].answers[&token], Ok(Answer::Done)));
    let told = pair.hosts[0].executed.iter().filter_map(|work| match work {
        FunctionWork::Map(ranges) => Some(ranges),
        _ => None,
    });
    assert!(told.flatten().all(|range| range.span != gone));
    assert_eq!(pair.hosts[0].behind.len(), 3 * RANGES_MAX - 1);
}
