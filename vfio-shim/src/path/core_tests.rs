//! Two cores joined by memory: a whole path without threads, with the link cut at any step.

use super::borrower::{Answer, Call, CallError, GuestMap, Step, Token};
use super::core::{Action, CoreConfig, Event, Inbox, PortCore, REVOKED_MAX};
use super::grant::{LeasePool, ToPort, VolatilePool};
use super::lender::OfferState;
use super::message::{LeaseId, PoolEntry, PoolState, Refusal, RefusalCode, Request};
use super::wire::{SLOT_BYTES, STATUS_BYTES, ScratchpadSet};
use super::work::{FunctionWork, WorkOutcome};
use crate::model::{
    Access, Bdf, FunctionIds, FunctionInfo, IrqIndex, IrqInfo, RegionInfo, Span, WindowOffset,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, mpsc};

mod held;
mod many;
mod quarantine;

const WINDOW: u64 = 64 << 20;

struct Host {
    core: PortCore,
    spads: [u32; 6],
    status: [u8; STATUS_BYTES],
    slot: Box<[u8; SLOT_BYTES]>,
    open: bool,
    todo: VecDeque<Event>,
    answers: BTreeMap<Token, Result<Answer, CallError>>,
    /// Mapped into the lent function: start -> window offset.
    behind: BTreeMap<u64, (u64, WindowOffset)>,
    /// Mapped into the own container: window offset -> bytes.
    pinned: BTreeMap<u64, u64>,
    path_open: bool,
    lost: Vec<LeaseId>,
    /// Workers that do not let go, where there are such.
    holding_on: Option<Vec<Step>>,
    executed: Vec<FunctionWork>,
    session: Option<u64>,
    /// So many more maps are made, and then one is refused.
    maps_left: Option<u32>,
    /// What an executor does is refused.
    works: bool,
    unpins: bool,
    pool: VolatilePool,
    /// What the pool says, and when it may: a disk can be slow.
    pool_says: mpsc::Receiver<ToPort>,
    pool_is_slow: bool,
}

fn function_info() -> FunctionInfo {
    let mut info = FunctionInfo {
        resettable: true,
        ..FunctionInfo::default()
    };
    let areas = vec![Span::new(0, 0x2000).unwrap()];
    info.regions[0] = RegionInfo {
        size: 0x4000,
        readable: true,
        writable: true,
        areas,
    };
    info.regions[7] = RegionInfo {
        size: 4096,
        readable: true,
        writable: true,
        areas: Vec::new(),
    };
    info.irqs[IrqIndex::Msix as usize] = IrqInfo { count: 3 };
    info
}

fn bdf() -> Bdf {
    "01:00.1".parse().unwrap()
}

fn entry() -> PoolEntry {
    PoolEntry {
        bdf: bdf(),
        ids: FunctionIds::default(),
        state: PoolState::Available,
        irq_count: 3,
        bar_bytes: 0x4000,
        serial: 0,
    }
}

impl Host {
    fn new(node: u16, seed: u64, window_bytes: u64) -> Self {
        let mut state = seed;
        let entropy = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695);
            state | 1
        };
        let config = CoreConfig {
            node,
            window_bytes,
            heartbeat_ms: 250,
            lost_after_ms: 1500,
            limits: Default::default(),
        };
        let (says, pool_says) = mpsc::channel();
        let pool = VolatilePool::default();
        pool.connect(Box::new(move |message| says.send(message).unwrap()));
        Self {
            pool,
            pool_says,
            pool_is_slow: false,
            core: PortCore::new(config, Box::new(entropy)),
            spads: [0; 6],
            status: [0; STATUS_BYTES],
            slot: Box::new([0; SLOT_BYTES]),
            open: false,
            todo: VecDeque::new(),
            answers: BTreeMap::new(),
            behind: BTreeMap::new(),
            pinned: BTreeMap::new(),
            path_open: false,
            lost: Vec::new(),
            holding_on: None,
            executed: Vec::new(),
            session: None,
            maps_left: None,
            works: true,
            unpins: true,
        }
    }

    fn inbox(&self) -> Inbox {
        Inbox {
            status: self.status,
            slot: self.slot.clone(),
        }
    }

    fn work(&mut self, work: FunctionWork) -> Result<WorkOutcome, Refusal> {
        self.executed.push(work.clone());
        let refused = Err(Refusal::new(RefusalCode::Kernel, 0, "no"));
        if !self.works {
            return refused;
        }
        match work {
            FunctionWork::Map(_) if self.maps_left == Some(0) => {
                self.maps_left = None;
                return refused;
            }
            FunctionWork::Open(_) => {
                self.path_open = true;
                return Ok(WorkOutcome::Opened { config_len: 4096 });
            }
            FunctionWork::Close => {
                self.path_open = false;
                self.behind.clear();
            }
            FunctionWork::Map(ranges) => {
                self.maps_left = self.maps_left.map(|left| left - 1);
                for range in ranges {
                    let old = self
                        .behind
                        .insert(range.span.start(), (range.span.len(), range.offset));
                    assert!(old.is_none(), "mapped twice");
                }
            }
            FunctionWork::Unmap(spans) => {
                for span in spans {
                    self.behind.remove(&span.start());
                }
            }
            FunctionWork::Config { len, .. } => {
                return Ok(WorkOutcome::Bytes(vec![0; len.into()]));
            }
            _ => {}
        }
        Ok(WorkOutcome::Done)
    }
}

struct Pair {
    hosts: [Host; 2],
    link_up: bool,
    now: u64,
    token: u64,
}

impl Pair {
    fn new(seed: u64) -> Self {
        Self::with_window(seed, WINDOW)
    }

    fn with_window(seed: u64, bytes: u64) -> Self {
        let hosts = [
            Host::new(4, seed, bytes),
            Host::new(8, seed ^ 0x5555, bytes),
        ];
        Self {
            hosts,
            link_up: true,
            now: 0,
            token: 0,
        }
    }

    fn handle(&mut self, at: usize, event: Event) {
        let actions = self.hosts[at].core.handle(event, self.now);
        for action in actions {
            self.act(at, action);
        }
    }

    fn reaches(&self, at: usize) -> bool {
        self.link_up && self.hosts[1 - at].open
    }

    fn act(&mut self, at: usize, action: Action) {
        let reaches = self.reaches(at);
        match action {
            Action::CloseWindow => self.hosts[at].open = false,
            Action::PrepareMailbox(_) => {
                self.hosts[at].status = [0; STATUS_BYTES];
                *self.hosts[at].slot = [0; SLOT_BYTES];
            }
            Action::OpenWindow => self.hosts[at].open = true,
            Action::Post(set) => self.post(at, &set),
            Action::WriteSlot(slot) if reaches => self.hosts[1 - at].slot = slot,
            Action::WriteStatus(status) if reaches => self.hosts[1 - at].status = status,
            Action::RingMailbox if self.link_up => {
                let inbox = self.hosts[1 - at].inbox();
                self.hosts[1 - at].todo.push_back(Event::Bell(inbox));
            }
            Action::SessionOpened { session, .. } => self.hosts[at].session = Some(session),
            Action::SessionOver => self.hosts[at].session = None,
            Action::Work(_, job, work) => {
                let outcome = self.hosts[at].work(work);
                self.hosts[at].todo.push_back(Event::Worked(job, outcome));
            }
            Action::Pin(step, _, pins) => {
                for pin in pins {
                    let old = self.hosts[at]
                        .pinned
                        .insert(pin.offset.0, pin.map.span.len());
                    assert!(old.is_none(), "pinned twice");
                }
                self.hosts[at].todo.push_back(Event::Pinned(step, Ok(())));
            }
            Action::Unpin(step, ..) if !self.hosts[at].unpins => {
                let failed = Err(CallError::Pin("no".into()));
                self.hosts[at].todo.push_back(Event::Pinned(step, failed));
            }
            Action::Unpin(step, _, spans) => {
                for (offset, _) in spans {
                    self.hosts[at].pinned.remove(&offset.0);
                }
                self.hosts[at].todo.push_back(Event::Pinned(step, Ok(())));
            }
            Action::Answer(token, result) => {
                let old = self.hosts[at].answers.insert(token, result);
                assert!(old.is_none(), "answered twice");
            }
            Action::Lost(step, lease, _) => {
                let host = &mut self.hosts[at];
                host.lost.push(lease);
                match &mut host.holding_on {
                    Some(holding_on) => holding_on.push(step),
                    None => host.todo.push_back(Event::LetGo(step)),
                }
            }
            Action::Pool(message) => {
                self.hosts[at].pool.tell(message);
                if !self.hosts[at].pool_is_slow {
                    self.pool_answers(at);
                }
            }
            _ => {}
        }
    }

    fn pool_answers(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        let says = host.pool_says.try_iter().map(Event::Pool);
        host.todo.extend(says);
    }

    fn post(&mut self, at: usize, set: &ScratchpadSet) {
        if !self.link_up {
            return;
        }
        for (index, value) in set.stores() {
            self.hosts[1 - at].spads[index as usize] = value;
        }
    }

    fn beat(&mut self, at: usize) {
        let host = &self.hosts[at];
        let event = Event::Beat {
            link_up: self.link_up,
            spads: host.spads,
            inbox: host.inbox(),
        };
        self.handle(at, event);
    }

    /// One heartbeat of both, and all that follows from it.
    fn round(&mut self) {
        self.now += 250;
        for at in 0..2 {
            self.beat(at);
        }
        self.settle();
    }

    fn settle(&mut self) {
        while let Some(at) = (0..2).find(|at| !self.hosts[*at].todo.is_empty()) {
            let Some(event) = self.hosts[at].todo.pop_front() else {
                return;
            };
            // A bell's inbox is read when it is handled, not when it rang.
            let event = match event {
                Event::Bell(_) => Event::Bell(self.hosts[at].inbox()),
                other => other,
            };
            self.handle(at, event);
        }
    }

    fn call(&mut self, call: Call) -> Token {
        self.token += 1;
        let token = Token(self.token);
        self.handle(1, Event::Call(token, call));
        token
    }

    fn ask(&mut self, call: Call) -> Result<Answer, CallError> {
        let token = self.call(call);
        for _ in 0..40 {
            self.settle();
            if let Some(answer) = self.hosts[1].answers.remove(&token) {
                return answer;
            }
            self.round();
        }
        panic!("a call was never answered");
    }

    fn wait_session(&mut self) {
        for _ in 0..40 {
            self.round();
            let ready = self.hosts.iter().all(|host| {
                host.core
                    .session()
                    .is_some_and(|session| session.peer_node.is_some())
            });
            if ready {
                assert_eq!(self.hosts[0].session, self.hosts[1].session);
                return;
            }
        }
        panic!("no session after 40 heartbeats");
    }

    fn borrow_open(&mut self) -> LeaseId {
        let Ok(Answer::Borrowed(lease, _)) = self.ask(Call::Borrow(bdf(), None)) else {
            panic!("borrow was refused")
        };
        let Ok(Answer::Opened(opened)) = self.ask(Call::Open(lease)) else {
            panic!("open was refused")
        };
        assert_eq!(opened.config.len(), 4096);
        lease
    }
}

fn guest_maps(count: u64) -> Vec<GuestMap> {
    maps_of(count, 1 << 16)
}

fn maps_of(count: u64, bytes: u64) -> Vec<GuestMap> {
    let fd = Arc::new(
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd"),
    );
    let map = |at: u64| GuestMap {
        span: Span::new(at * bytes, bytes).unwrap(),
        access: Access::READ_WRITE,
        fd: Arc::clone(&fd),
        fd_offset: at * bytes,
    };
    (0..count).map(map).collect()
}

fn ready() -> Pair {
    ready_with(WINDOW)
}

fn ready_with(window_bytes: u64) -> Pair {
    let mut pair = Pair::with_window(7, window_bytes);
    pair.hosts[0]
        .core
        .lender
        .offer(entry(), function_info())
        .unwrap();
    pair.wait_session();
    pair
}

#[test]
fn a_path_opens_maps_unmaps_and_closes_without_a_trace() {
    let mut pair = ready();
    let free = [0, 1].map(|at| pair.hosts[at].core.pool().free_bytes());
    let lease = pair.borrow_open();
    // More than fit one message.
    pair.ask(Call::Map(lease, guest_maps(150))).unwrap();
    assert_eq!(pair.hosts[0].behind.len(), 150);
    assert_eq!(pair.hosts[1].pinned.len(), 150);
    let all = Span::new(0, 150 << 16).unwrap();
    let Ok(Answer::Unmapped(bytes)) = pair.ask(Call::Unmap(lease, all)) else {
        panic!("unmap")
    };
    assert_eq!(bytes, 150 << 16);
    assert!(pair.hosts[1].pinned.is_empty());
    pair.ask(Call::Return(lease)).unwrap();
    assert!(!pair.hosts[0].path_open && pair.hosts[0].behind.is_empty());
    assert_eq!(
        free,
        [0, 1].map(|at| pair.hosts[at].core.pool().free_bytes())
    );
    let lent = &pair.hosts[0].core.lender.status()[0];
    assert_eq!(
        (&lent.state, lent.last_end.as_deref()),
        (&OfferState::Available, Some("returned"))
    );
}

#[test]
fn memory_is_unpinned_before_an_unmap_is_answered_and_slices_wait_for_the_lender() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    pair.ask(Call::Map(lease, guest_maps(1))).unwrap();
    let free = pair.hosts[1].core.pool().free_bytes();
    let token = pair.call(Call::Unmap(lease, Span::new(0, 1 << 16).unwrap()));
    let early = pair.hosts[1].answers.contains_key(&token);
    assert!(!early, "answered before the mapper has");
    // Only the mapper has answered; the lender has not been told yet.
    let event = pair.hosts[1].todo.pop_front().unwrap();
    pair.handle(1, event);
    assert!(pair.hosts[1].answers.contains_key(&token));
    assert!(pair.hosts[1].pinned.is_empty());
    assert_eq!(pair.hosts[0].behind.len(), 1);
    assert_eq!(
        pair.hosts[1].core.pool().free_bytes(),
        free,
        "the slice is in quarantine"
    );
    for _ in 0..4 {
        pair.round();
    }
    assert!(pair.hosts[0].behind.is_empty());
    assert_eq!(pair.hosts[1].core.pool().free_bytes(), free + (1 << 16));
}

#[test]
fn a_storm_of_unmaps_is_told_in_batches_and_a_map_after_it_in_order() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let free = pair.hosts[1].core.pool().free_bytes();
    pair.ask(Call::Map(lease, guest_maps(600))).unwrap();
    let sent = pair.hosts[1].core.mailbox().unwrap().counters().sent;
    for at in 0..600 {
        let token = pair.call(Call::Unmap(lease, Span::new(at << 16, 1 << 16).unwrap()));
        let event = pair.hosts[1].todo.pop_front().unwrap();
        pair.handle(1, event);
        assert!(matches!(
            pair.hosts[1].answers.remove(&token),
            Some(Ok(Answer::Unmapped(_)))
        ));
    }
    pair.ask(Call::Map(lease, guest_maps(1))).unwrap();
    assert_eq!(pair.hosts[0].behind.len(), 1);
    assert_eq!(pair.hosts[1].core.pool().free_bytes(), free - (1 << 16));
    let sent = pair.hosts[1].core.mailbox().unwrap().counters().sent - sent;
    assert!(sent <= 12, "{sent} messages");
}

/// Found by the random schedule below: the return freed the slice under a map that the mapper had
/// not answered yet, and the next tenant was pinned over it.
#[test]
fn a_lease_returned_while_a_map_is_under_way_leaves_no_pin() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    pair.call(Call::Map(lease, guest_maps(2)));
    pair.ask(Call::Return(lease)).unwrap();
    assert!(pair.hosts[1].pinned.is_empty() && pair.hosts[0].behind.is_empty());
}

#[test]
fn a_function_taken_unknown_or_withdrawn_is_refused_in_words() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let again = pair.ask(Call::Borrow(bdf(), None)).unwrap_err();
    assert!(again.to_string().contains("in use"), "{again}");
    let other = pair
        .ask(Call::Borrow("02:00.0".parse().unwrap(), None))
        .unwrap_err();
    assert!(
        other.to_string().contains("not in this lender's pool"),
        "{other}"
    );
    assert!(pair.hosts[0].core.lender.withdraw(bdf()).is_err());
    pair.ask(Call::Return(lease)).unwrap();
    pair.hosts[0].core.lender.withdraw(bdf()).unwrap();
}

#[test]
fn a_wrong_secret_opens_nothing() {
    let mut pair = ready();
    let Ok(Answer::Borrowed(lease, _)) = pair.ask(Call::Borrow(bdf(), None)) else {
        panic!()
    };
    let secret = super::message::Secret([9; 16]);
    let request = Request::Open {
        lease,
        secret,
        irq_first: 0,
        irq_count: 3,
    };
    let refused = pair.ask(Call::Forward(lease, request)).unwrap_err();
    assert!(refused.to_string().contains("no such lease"), "{refused}");
    assert!(!pair.hosts[0].path_open);
}

#[test]
fn ram_that_does_not_fit_is_refused_and_the_lease_goes_back() {
    let mut pair = ready();
    let refused = pair.ask(Call::Borrow(bdf(), Some(WINDOW))).unwrap_err();
    assert!(
        refused.to_string().contains("134217728 bytes would do"),
        "{refused}"
    );
    pair.round();
    pair.borrow_open();
}

#[test]
fn the_lenders_mailbox_is_never_mapped_behind_a_function() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    let range = super::message::MapRange {
        span: Span::new(0, 4096).unwrap(),
        offset: WindowOffset(0),
        access: Access::READ_WRITE,
    };
    let request = Request::Map {
        lease,
        ranges: vec![range],
    };
    let refused = pair.ask(Call::Forward(lease, request)).unwrap_err();
    assert!(
        refused.to_string().contains("behind the mailbox"),
        "{refused}"
    );
    assert!(pair.hosts[0].behind.is_empty());
}

#[test]
fn a_link_that_flaps_loses_every_lease_and_leaves_nothing() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    pair.ask(Call::Map(lease, guest_maps(3))).unwrap();
    pair.link_up = false;
    pair.round();
    assert_eq!(pair.hosts[1].lost, [lease]);
    assert!(
        pair.hosts
            .iter()
            .all(|host| host.session.is_none() && !host.open)
    );
    assert!(!pair.hosts[0].path_open && pair.hosts[0].behind.is_empty());
    assert!(pair.hosts[1].pinned.is_empty());
    let gone = pair.ask(Call::List).unwrap_err();
    assert!(
        gone.to_string().contains("no link session is open"),
        "{gone}"
    );
    pair.link_up = true;
    pair.wait_session();
    let lease = pair.borrow_open();
    pair.ask(Call::Map(lease, guest_maps(3))).unwrap();
}

#[test]
fn a_peer_that_stands_still_is_lost_after_its_time() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    for _ in 0..8 {
        pair.now += 250;
        pair.beat(1);
    }
    assert_eq!(pair.hosts[1].lost, [lease]);
    assert!(pair.hosts[1].session.is_none());
}

#[test]
fn a_slow_store_keeps_no_session_from_ending_and_its_late_lease_goes_back() {
    let mut pair = ready();
    pair.hosts[0].pool_is_slow = true;
    let borrow = pair.call(Call::Borrow(bdf(), None));
    pair.settle();
    assert!(!pair.hosts[1].answers.contains_key(&borrow));
    pair.link_up = false;
    pair.round();
    assert!(pair.hosts[0].core.is_idle(), "nothing is waited for");
    pair.link_up = true;
    pair.wait_session();
    let busy = pair.ask(Call::Borrow(bdf(), None)).unwrap_err();
    assert!(busy.to_string().contains("is being written"), "{busy}");
    pair.hosts[0].pool_is_slow = false;
    pair.pool_answers(0);
    pair.settle();
    let lent = &pair.hosts[0].core.lender.status()[0];
    assert_eq!((&lent.state, lent.lease), (&OfferState::Available, None));
    // The pool has it back too, or it would refuse this one.
    pair.borrow_open();
}

#[test]
fn a_revoked_lease_is_lost_on_the_borrower_and_free_on_the_lender() {
    let mut pair = ready();
    let lease = pair.borrow_open();
    pair.ask(Call::Map(lease, guest_maps(3))).unwrap();
    let actions = pair.hosts[0]
        .core
        .revoke(bdf(), "the operator wants it back", pair.now);
    for action in actions {
        pair.act(0, action);
    }
    for _ in 0..4 {
        pair.round();
    }
    assert_eq!(pair.hosts[1].lost, [lease]);
    assert!(pair.hosts[1].pinned.is_empty() && pair.hosts[0].behind.is_empty());
    pair.borrow_open();
}

#[test]
fn a_peer_that_lets_go_of_nothing_loses_its_session_before_the_lender_remembers_too_much() {
    let mut pair = ready();
    pair.hosts[1].holding_on = Some(Vec::new());
    let session = pair.hosts[0].session;
    let revoked = |pair: &mut Pair| {
        pair.ask(Call::Borrow(bdf(), None)).unwrap();
        let actions = pair.hosts[0].core.revoke(bdf(), "wanted", pair.now);
        actions.into_iter().for_each(|action| pair.act(0, action));
        pair.settle();
    };
    for _ in 0..REVOKED_MAX {
        revoked(&mut pair);
    }
    assert_eq!(pair.hosts[0].session, session, "as many are remembered");
    revoked(&mut pair);
    assert_ne!(pair.hosts[0].session, session, "and no more");
}

proptest! {
    #[test]
    fn the_link_cut_at_any_step_leaves_nothing_behind(
        seed in any::<u64>(), steps in proptest::collection::vec(0u8..9, 1..60),
        pool_is_slow in any::<bool>(),
    ) {
        let mut pair = Pair::new(seed);
        pair.hosts[0].pool_is_slow = pool_is_slow;
        pair.hosts[0].core.lender.offer(entry(), function_info()).unwrap();
        let mut lease = LeaseId(0);
        for step in steps {
            match step {
                0 => { pair.call(Call::Borrow(bdf(), None)); }
                1 => { pair.call(Call::Open(lease)); }
                2 => { pair.call(Call::Map(lease, guest_maps(70))); }
                3 => { pair.call(Call::Unmap(lease, Span::new(0, 1 << 40).unwrap())); }
                4 => { pair.call(Call::Return(lease)); }
                5 => pair.link_up = !pair.link_up,
                6 => if let Some(event) = pair.hosts[1].todo.pop_front() {
                    pair.handle(1, event);
                },
                7 => pair.pool_answers(0),
                _ => pair.round(),
            }
            let newest = pair.hosts[0].core.lender.status()[0].lease;
            lease = newest.unwrap_or(lease);
            // What the function can reach is what the borrower has pinned, or the NTB refuses it.
            let both = [0, 1].map(|at| pair.hosts[at].session);
            prop_assert!(both[0].is_none() || both[1].is_none() || both[0] == both[1]);
        }
        pair.link_up = false;
        pair.round();
        pair.hosts[0].pool_is_slow = false;
        pair.pool_answers(0);
        pair.round();
        prop_assert!(pair.hosts[0].behind.is_empty() && !pair.hosts[0].path_open);
        prop_assert!(pair.hosts[1].pinned.is_empty());
        pair.link_up = true;
        pair.wait_session();
        let lease = pair.borrow_open();
        pair.ask(Call::Map(lease, guest_maps(2))).unwrap();
        prop_assert_eq!(pair.hosts[1].pinned.len(), 2);
    }
}
