//! A port with a lent function, whose peer says what it likes: whatever that is, all of it is undone in the end.

use std::collections::VecDeque;
use std::sync::mpsc;
use vfio_shim::model::{Bdf, FunctionIds, FunctionInfo, IrqIndex, IrqInfo, RegionInfo, Span};
use vfio_shim::path::core::{Action, CoreConfig, Event, Inbox, PortCore};
use vfio_shim::path::grant::{Scrub, ToPort};
use vfio_shim::path::limits::Limits;
use vfio_shim::path::message::{Message, OpId, Reply, Request, Secret};
use vfio_shim::path::wire::{
    PAYLOAD_BYTES_MAX, SLOT_BYTES, STATUS_BYTES, ScratchpadSet, SlotFinding, StatusLine,
    check_slot, encode_slot,
};
use vfio_shim::path::work::{FunctionWork, WorkOutcome};
use vfio_shim::path::{
    LeaseId, LeasePool, OfferState, PoolEntry, PoolState, Refusal, RefusalCode, VolatilePool,
};

const NONCE: u64 = 0x0bad_c0de;
const WINDOW_BYTES: u64 = 64 << 20;
const HEARTBEAT_MS: u64 = 250;
/// Steps of one input: as many as it has, and no more than that.
const STEPS_MAX: usize = 256;
/// An honest answer to one event leads to a few more, never to a chain without end.
const CHAIN_MAX: usize = 10_000;

fn bdf() -> Bdf {
    Bdf::new(0, 0x4a, 0, 1).expect("a PCI address")
}

fn function() -> (PoolEntry, FunctionInfo) {
    let mut info = FunctionInfo {
        resettable: true,
        ..FunctionInfo::default()
    };
    let whole = |size, areas| RegionInfo {
        size,
        readable: true,
        writable: true,
        areas,
    };
    info.regions[0] = whole(0x4000, Span::new(0, 0x2000).into_iter().collect());
    info.regions[7] = whole(4096, Vec::new());
    info.irqs[IrqIndex::Msix as usize] = IrqInfo { count: 3 };
    let entry = PoolEntry {
        bdf: bdf(),
        ids: FunctionIds::default(),
        state: PoolState::Available,
        irq_count: 3,
        bar_bytes: 0x4000,
        serial: 0,
    };
    (entry, info)
}

/// The port, and what its peer knows of it.
struct Rig {
    core: PortCore,
    pool: VolatilePool,
    pool_says: mpsc::Receiver<ToPort>,
    now_ms: u64,
    link_up: bool,
    /// Whether the next piece of an executor's work is refused.
    refuses: bool,
    spads: [u32; 6],
    session: u64,
    /// The last message of the peer, and the last of the port.
    seq: u64,
    taken: u64,
    /// The port's last request: its op and the bytes of its id.
    asked: Option<(u16, [u8; 8])>,
    /// The lease that the peer was granted last, and what `open` has to show.
    granted: Option<(LeaseId, Secret)>,
    /// Whether the function's path is open, as its executor knows it; and how often one was.
    path: bool,
    paths: usize,
    todo: VecDeque<Event>,
}

impl Rig {
    fn new() -> Self {
        let config = CoreConfig {
            node: 4,
            window_bytes: WINDOW_BYTES,
            heartbeat_ms: HEARTBEAT_MS,
            lost_after_ms: 6 * HEARTBEAT_MS,
            limits: Limits::default(),
        };
        let mut last = 1;
        let entropy = move || {
            last += 2;
            last
        };
        let (says, pool_says) = mpsc::channel();
        let pool = VolatilePool::default();
        pool.connect(Box::new(move |message| {
            let _ = says.send(message);
        }));
        let mut core = PortCore::new(config, Box::new(entropy));
        let (entry, info) = function();
        core.lender.offer(entry, info).expect("it can be lent");
        Self {
            core,
            pool,
            pool_says,
            now_ms: 0,
            link_up: true,
            refuses: false,
            spads: [0; 6],
            session: 0,
            seq: 0,
            taken: 0,
            asked: None,
            granted: None,
            path: false,
            paths: 0,
            todo: VecDeque::new(),
        }
    }

    fn handle(&mut self, event: Event) {
        self.todo.push_back(event);
        for _ in 0..CHAIN_MAX {
            let Some(event) = self.todo.pop_front() else {
                return;
            };
            for action in self.core.handle(event, self.now_ms) {
                self.act(action);
            }
        }
        panic!("one event led to more than {CHAIN_MAX}");
    }

    /// What an honest driver and an honest kernel do.
    fn act(&mut self, action: Action) {
        match action {
            Action::Post(set) => self.posted(&set),
            Action::SessionOpened { session, .. } => {
                (self.session, self.seq, self.taken) = (session, 0, 0);
                self.asked = None;
            }
            Action::WriteSlot(slot) => self.heard(&slot),
            Action::Work(_, job, work) => {
                let done = self.work(work);
                self.todo.push_back(Event::Worked(job, done));
            }
            Action::Pin(step, ..) | Action::Unpin(step, ..) => {
                self.todo.push_back(Event::Pinned(step, Ok(())));
            }
            Action::Pool(message) => {
                self.pool.tell(message);
                self.todo.extend(self.pool_says.try_iter().map(Event::Pool));
            }
            _ => {}
        }
    }

    fn work(&mut self, work: FunctionWork) -> Result<WorkOutcome, Refusal> {
        if std::mem::take(&mut self.refuses) && work != FunctionWork::Close {
            return Err(Refusal::new(RefusalCode::Kernel, 0, "the kernel says no"));
        }
        Ok(match work {
            FunctionWork::Open(_) => {
                assert!(!self.path, "opened twice");
                (self.path, self.paths) = (true, self.paths + 1);
                WorkOutcome::Opened { config_len: 4096 }
            }
            FunctionWork::Close | FunctionWork::PutBack => {
                self.path = false;
                WorkOutcome::Closed(Scrub::No)
            }
            FunctionWork::Config { len, .. } => WorkOutcome::Bytes(vec![0; len.into()]),
            FunctionWork::Read { len, .. } => WorkOutcome::Bytes(vec![0; len.into()]),
            _ => WorkOutcome::Done,
        })
    }

    /// The peer's scratchpads answer as a peer's do.
    fn posted(&mut self, set: &ScratchpadSet) {
        let answer = ScratchpadSet {
            nonce: NONCE,
            echo: set.nonce,
            ..*set
        };
        for (index, value) in answer.stores() {
            self.spads[index as usize] = value;
        }
    }

    fn heard(&mut self, slot: &[u8; SLOT_BYTES]) {
        if let SlotFinding::Message {
            seq, op, payload, ..
        } = check_slot(slot, self.session)
        {
            self.taken = self.taken.max(seq);
            if let (0, Some(id)) = (op >> 15, payload.first_chunk()) {
                self.asked = Some((op, *id));
            }
            if let Ok(Message::Reply(_, _, Ok(Reply::Borrowed { lease, secret, .. }))) =
                Message::decode(op, payload)
            {
                self.granted = Some((lease, secret));
            }
        }
    }

    fn inbox(&self, slot: Box<[u8; SLOT_BYTES]>, ack: u64) -> Inbox {
        let line = StatusLine {
            session: self.session,
            heartbeat: self.now_ms,
            ack,
        };
        Inbox {
            status: line.encode(),
            slot,
        }
    }

    fn beat(&mut self) {
        self.now_ms += HEARTBEAT_MS;
        let inbox = self.inbox(Box::new([0; SLOT_BYTES]), self.taken);
        let (link_up, spads) = (self.link_up, self.spads);
        self.handle(Event::Beat {
            link_up,
            spads,
            inbox,
        });
    }

    /// A message that is laid out and numbered as an honest one.
    fn message(&mut self, op: u16, payload: &[u8]) {
        let payload = &payload[..payload.len().min(PAYLOAD_BYTES_MAX)];
        self.seq += 1;
        let slot = encode_slot(self.session, self.seq, self.taken, op, payload);
        let inbox = self.inbox(slot.expect("its payload fits"), self.taken);
        self.handle(Event::Bell(inbox));
    }

    fn hello(&mut self) {
        if let Some((op, id)) = self.asked.take() {
            let id = OpId(u64::from_le_bytes(id));
            let reply = Reply::Hello {
                node: 8,
                window_bytes: WINDOW_BYTES,
            };
            let (op, payload) = Message::Reply(id, op, Ok(reply))
                .encode()
                .expect("a reply has a form");
            self.message(op, &payload);
        }
    }

    fn request(&mut self, request: Request) {
        let request = Message::Request(OpId(self.seq), request);
        let (op, payload) = request.encode().expect("a request has a form");
        self.message(op, &payload);
    }

    /// One step: its kind, then what it needs. Returns what is left of the input.
    fn step<'a>(&mut self, kind: u8, rest: &'a [u8]) -> &'a [u8] {
        let len = usize::from(rest.first().copied().unwrap_or(0));
        let rest = rest.get(1..).unwrap_or(&[]);
        let (some, left) = rest.split_at(len.min(rest.len()));
        match kind % 10 {
            // A request or reply of an op of its own.
            0 | 1 => {
                if let Some((op, payload)) = some.split_first_chunk() {
                    self.message(u16::from_le_bytes(*op), payload);
                }
            }
            // A reply to what the port asked last.
            2 => {
                if let Some((op, id)) = self.asked {
                    self.message(op | 1 << 15, &[&id[..], some].concat());
                }
            }
            3 => {
                let mut slot = Box::new([0; SLOT_BYTES]);
                slot[..some.len()].copy_from_slice(some);
                let inbox = self.inbox(slot, self.taken);
                self.handle(Event::Bell(inbox));
            }
            4 => {
                let mut status = [0; STATUS_BYTES];
                let some = &some[..some.len().min(STATUS_BYTES)];
                status[..some.len()].copy_from_slice(some);
                let slot = Box::new([0; SLOT_BYTES]);
                self.handle(Event::Bell(Inbox { status, slot }));
            }
            5 => self.beat(),
            6 => {
                self.link_up = !self.link_up;
                let up = self.link_up;
                self.handle(Event::LinkChange(up));
            }
            7 => self.refuses = true,
            // What no bytes would hit upon.
            8 => self.request(Request::Borrow { bdf: bdf() }),
            _ => {
                if let Some((lease, secret)) = self.granted {
                    self.request(Request::Open {
                        lease,
                        secret,
                        irq_first: some.first().copied().unwrap_or(0).into(),
                        irq_count: some.get(1).copied().unwrap_or(3).into(),
                    });
                }
            }
        }
        left
    }
}

/// Returns how many paths were opened.
fn play(bytes: &[u8]) -> usize {
    let mut rig = Rig::new();
    while rig.session == 0 {
        rig.beat();
        assert!(rig.now_ms < 20 * HEARTBEAT_MS, "no session opens");
    }
    rig.hello();
    let mut rest = bytes;
    for _ in 0..STEPS_MAX {
        let Some((kind, more)) = rest.split_first() else {
            break;
        };
        rest = rig.step(*kind, more);
    }
    rig.refuses = false;
    let now = rig.now_ms;
    for action in rig.core.shut_down(now) {
        rig.act(action);
    }
    rig.link_up = false;
    (0..3).for_each(|_| rig.beat());
    assert!(
        rig.core.is_idle(),
        "something is left of what the peer said"
    );
    assert_eq!(rig.core.quarantine().slices, 0, "a slice is left");
    assert!(!rig.path, "a path is left open");
    let state = rig.core.lender.state(bdf());
    let rests = matches!(
        state,
        Some(OfferState::Available | OfferState::Quarantine(_))
    );
    assert!(rests, "the function is {state:?}");
    rig.paths
}

pub(super) fn target(bytes: &[u8]) {
    play(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that knows what it is told gets as far as an honest one: else the target shows little.
    #[test]
    fn peer_that_borrows_opens_a_path() {
        assert_eq!(play(&[8, 0, 5, 0, 9, 2, 0, 3, 5, 0]), 1);
    }
}
