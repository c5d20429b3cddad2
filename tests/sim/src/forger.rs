//! A host whose port writes whatever it likes into its peer's mailbox, interrupt table and scratchpads.

use crate::forged::{Known, number};
use crate::host::{Host, WINDOW_BASE};
use crate::random::Random;
use crate::world::World;
use std::collections::VecDeque;
use vfio_shim::model::Function;
use vfio_shim::ntb::NtbPort;
use vfio_shim::ntb::soft::SoftPort;
use vfio_shim::path::message::{Message, Reply};
use vfio_shim::path::wire::{
    BELL_IRQ, BELL_MAILBOX, COMMIT_OFFSET, IRQ_TABLE_OFFSET, IRQ_WORDS_MAX, MAILBOX_BYTES,
    NONCE_OFFSET, OP_REPLY, PAYLOAD_BYTES_MAX, PAYLOAD_OFFSET, SLOT_BYTES, SLOT_OFFSET, SPAD_COUNT,
    STATUS_BYTES, STATUS_OFFSET, StatusLine, encode_slot, irq_word,
};

/// How many messages of its own port a forger keeps for a replay, and leases that it heard of.
const KEPT_MAX: usize = 8;

type Slot = Box<[u8; SLOT_BYTES]>;

/// What one forgery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgery {
    /// A sound message, next in sequence, with any fields.
    Message,
    /// A sound answer to what the honest host has asked, or not.
    Reply,
    /// The next message's form around any bytes.
    Payload,
    /// What the own port sent before, again.
    Replay,
    /// The last message with an ack or a number far ahead.
    Ahead,
    /// A slot of any bytes.
    Noise,
    /// A status line that says anything.
    Status,
    /// Counts in the interrupt table.
    Counts,
    /// Another nonce in the honest host's mailbox.
    Nonce,
    /// Scratchpads.
    Scratchpads,
    /// The reserved tail, and what lies between.
    Tail,
    /// Any bells.
    Bells,
}

impl Forgery {
    /// With how often each is chosen: what ends the session at once is rare, or nothing else is reached.
    const ALL: [(Self, usize); 12] = [
        (Self::Message, 120),
        (Self::Reply, 30),
        (Self::Payload, 1),
        (Self::Replay, 10),
        (Self::Ahead, 1),
        (Self::Noise, 5),
        (Self::Status, 3),
        (Self::Counts, 20),
        (Self::Nonce, 1),
        (Self::Scratchpads, 1),
        (Self::Tail, 2),
        (Self::Bells, 5),
    ];

    fn choose(random: &mut Random) -> Self {
        let all: usize = Self::ALL.iter().map(|(_, weight)| weight).sum();
        let mut at = random.below(all);
        for (forgery, weight) in Self::ALL {
            match at.checked_sub(weight) {
                Some(left) => at = left,
                None => return forgery,
            }
        }
        Self::Message
    }
}

/// The forging host, and what it has learnt.
pub struct Forger {
    /// Which host.
    pub side: usize,
    /// It has forged since the honest host was last left in peace.
    pub at_it: bool,
    known: Known,
    kept: VecDeque<Slot>,
}

/// What stands in a host's mailbox: nothing where its window is closed.
fn peek<const N: usize>(host: &Host, offset: u64) -> Box<[u8; N]> {
    let mut bytes = Box::new([0; N]);
    if !host.port.space().maps().is_empty() {
        host.port.space().read(WINDOW_BASE.0 + offset, &mut *bytes);
    }
    bytes
}

/// The session by what a host's peer wrote into its status line, and what that has taken.
fn said(host: &Host) -> (u64, u64) {
    let line: Box<[u8; STATUS_BYTES]> = peek(host, STATUS_OFFSET);
    StatusLine::decode(&line).map_or((0, 0), |line| (line.session, line.ack))
}

fn u64_at(slot: &Slot, at: usize) -> u64 {
    let bytes = slot[at..at + 8].try_into();
    u64::from_le_bytes(bytes.expect("eight bytes"))
}

fn op_of(slot: &Slot) -> u16 {
    u16::from_le_bytes([slot[24], slot[25]])
}

fn payload(slot: &Slot) -> &[u8] {
    let len = u32::from_le_bytes([slot[28], slot[29], slot[30], slot[31]]) as usize;
    &slot[PAYLOAD_OFFSET..PAYLOAD_OFFSET + len.min(PAYLOAD_BYTES_MAX)]
}

fn write(port: &SoftPort, slot: &[u8; SLOT_BYTES]) {
    let window = port.window(0);
    window.write(SLOT_OFFSET, &slot[..COMMIT_OFFSET]);
    window.write(SLOT_OFFSET + COMMIT_OFFSET as u64, &slot[COMMIT_OFFSET..]);
    port.peer_doorbell_ring(BELL_MAILBOX);
}

fn noise(random: &mut Random, bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        let word = number(random).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

impl Forger {
    /// A host that has forged nothing yet.
    pub fn new(side: usize, hosts: &[Host; 2]) -> Self {
        let functions = &hosts[1 - side].functions;
        let own = &hosts[side].functions;
        Self {
            side,
            at_it: false,
            known: Known {
                functions: functions.iter().map(|lent| lent.bdf).collect(),
                infos: own.iter().map(|lent| lent.soft.info().clone()).collect(),
                ..Known::default()
            },
            kept: VecDeque::new(),
        }
    }

    /// What the honest host wrote last, and what the own port did.
    fn learn(&mut self, hosts: &[Host; 2]) -> (Slot, Slot) {
        let theirs: Slot = peek(&hosts[self.side], SLOT_OFFSET);
        let own: Slot = peek(&hosts[1 - self.side], SLOT_OFFSET);
        match Message::decode(op_of(&theirs), payload(&theirs)) {
            Ok(Message::Request(op, _)) => keep(&mut self.known.asked, (op, op_of(&theirs))),
            Ok(Message::Reply(_, _, Ok(Reply::Borrowed { lease, secret, .. }))) => {
                keep(&mut self.known.leases, (lease, secret));
            }
            _ => {}
        }
        if self.kept.back() != Some(&own) {
            self.kept.push_back(own.clone());
            if self.kept.len() > KEPT_MAX {
                self.kept.pop_front();
            }
        }
        (theirs, own)
    }

    /// Forges something; the honest host is told by a bell.
    fn forge(&mut self, hosts: &[Host; 2], forgery: Forgery, random: &mut Random) {
        let (theirs, own) = self.learn(hosts);
        let port = &*hosts[self.side].port;
        let (session, taken) = said(&hosts[self.side]);
        // The next of the session, and no ack of what was never sent.
        let same = |slot: &Slot| (u64_at(slot, 0) == session).then(|| u64_at(slot, 8));
        let seq = taken.wrapping_add(1);
        let ack = same(&theirs).unwrap_or(0);
        if same(&own) == Some(seq) && !random.once_in(8) {
            // It has not been taken yet, and what would overwrite it would be ahead.
            return raw(port, session, Forgery::Counts, random);
        }
        let send = |seq, ack, (op, payload): (u16, Vec<u8>)| {
            if let Ok(slot) = encode_slot(session, seq, ack, op, &payload) {
                write(port, &slot);
            }
        };
        let any_payload = |random: &mut Random| {
            let mut payload = vec![0; random.below(PAYLOAD_BYTES_MAX + 1)];
            noise(random, &mut payload);
            let reply = OP_REPLY * u16::from(random.once_in(3));
            (random.below(20) as u16 | reply, payload)
        };
        match forgery {
            Forgery::Message | Forgery::Reply => {
                let message = match forgery {
                    Forgery::Reply => self.known.reply(random),
                    _ => self.known.request(random),
                };
                let bytes = message.encode().unwrap_or_else(|_| any_payload(random));
                send(seq, ack, bytes);
            }
            Forgery::Payload => send(seq, ack, any_payload(random)),
            Forgery::Replay => {
                let at = random.below(self.kept.len());
                write(port, &self.kept[at]);
            }
            Forgery::Ahead => {
                let far = number(random);
                let (seq, ack) = match random.once_in(2) {
                    true => (seq.wrapping_add(far), ack),
                    false => (seq, far),
                };
                send(seq, ack, any_payload(random));
            }
            Forgery::Noise => {
                let mut slot = Box::new([0; SLOT_BYTES]);
                noise(random, &mut *slot);
                write(port, &slot);
            }
            Forgery::Status => {
                let line = StatusLine {
                    session,
                    heartbeat: number(random),
                    ack: match random.once_in(4) {
                        true => number(random),
                        false => ack,
                    },
                };
                port.window(0).write(STATUS_OFFSET, &line.encode());
                port.peer_doorbell_ring(BELL_MAILBOX);
            }
            _ => raw(port, session, forgery, random),
        }
    }
}

/// What is no message.
fn raw(port: &SoftPort, session: u64, forgery: Forgery, random: &mut Random) {
    let window = port.window(0);
    match forgery {
        Forgery::Counts => {
            for _ in 0..=random.below(16) {
                let rows = [16, IRQ_WORDS_MAX as usize][random.below(2)];
                let offset = IRQ_TABLE_OFFSET + 8 * random.below(rows) as u64;
                let count = number(random) as u32;
                let word = match random.once_in(4) {
                    true => number(random),
                    false => irq_word(session, count),
                };
                window.write_u64(offset, word);
            }
            port.peer_doorbell_ring(BELL_IRQ);
        }
        Forgery::Nonce => window.write_u64(NONCE_OFFSET, number(random)),
        Forgery::Scratchpads => {
            for _ in 0..=random.below(SPAD_COUNT) {
                let at = random.below(SPAD_COUNT + 2) as u32;
                port.peer_spad_write(at, number(random) as u32);
            }
        }
        Forgery::Tail => {
            let mut bytes = [0; 64];
            noise(random, &mut bytes);
            let at = random.below(MAILBOX_BYTES as usize / 64) as u64 * 64;
            window.write(at, &bytes);
        }
        _ => port.peer_doorbell_ring(number(random)),
    }
}

fn keep<T: PartialEq>(all: &mut Vec<T>, new: T) {
    if !all.contains(&new) {
        all.push(new);
        if all.len() > KEPT_MAX {
            all.remove(0);
        }
    }
}

impl World {
    /// The forging host does its worst. False where there is none, or it is down.
    pub fn forge(&mut self) -> bool {
        let Some(forger) = &mut self.forger else {
            return false;
        };
        if self.hosts[forger.side].engine.is_none() {
            return false;
        }
        forger.at_it = true;
        let many = 1 + self.random.below(4);
        let mut done = Vec::new();
        for _ in 0..many {
            let forgery = Forgery::choose(&mut self.random);
            forger.forge(&self.hosts, forgery, &mut self.random);
            done.push(forgery);
        }
        let name = self.hosts[forger.side].name();
        self.trace
            .tell(many as u64, || format!("{name} forges: {done:?}"));
        self.guests
            .iter()
            .for_each(|guest| guest.borrow_mut().forged_at());
        self.scheduler.poke();
        true
    }

    /// Whether the forging host has been at it, so that guests can trust in nothing of their functions.
    pub fn is_forged(&self) -> bool {
        self.forger.as_ref().is_some_and(|forger| forger.at_it)
    }

    /// The forging host's daemon is killed: whatever it made the honest host hold must go with it.
    pub fn end_forging(&mut self) {
        let Some(side) = self.forger.as_ref().filter(|f| f.at_it).map(|f| f.side) else {
            return;
        };
        self.check_bounds(1 - side);
        if self.hosts[side].engine.is_some() {
            let name = self.hosts[side].name();
            self.trace
                .tell(7, || format!("{name}: its forging daemon is killed"));
            self.kill_port(side);
        }
    }
}
