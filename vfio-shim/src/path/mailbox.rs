//! The mailbox of one open session: one slot each way, stop and wait, the same bytes until acked.

use super::message::{Message, OpId};
use super::plan::Owner;
use super::refused::{RefusedAs, named};
use super::wire::{
    SLOT_BYTES, STATUS_BYTES, SlotFinding, StatusLine, WireError, check_slot, encode_slot,
};
use std::collections::VecDeque;

/// How many messages may wait for the slot.
pub const QUEUE_MAX: usize = 1024;
/// A message that is not acked is written again after so many heartbeats.
const RESEND_BEATS: u32 = 2;

/// Why a message is not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MailboxError {
    /// Too many wait already.
    #[error(
        "{QUEUE_MAX} messages wait for the peer already: it takes none; see its host's `sublet status`"
    )]
    Full,
    /// It has no form on the wire.
    #[error("the message cannot be sent")]
    Encode(#[from] WireError),
}

/// What the driver does next, in this order.
#[expect(clippy::large_enum_variant)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MailboxAction {
    /// Store into the peer's slot: bytes `0..COMMIT_OFFSET` first, the commit word last.
    WriteSlot(Box<[u8; SLOT_BYTES]>),
    /// Store the peer's status line.
    WriteStatus([u8; STATUS_BYTES]),
    /// Ring bell 0.
    RingMailbox,
    /// A message of the peer, each once and in order.
    Deliver(Message),
    /// A request that this version does not know: to be answered with error 1.
    UnknownOp {
        /// The operation's id.
        op: OpId,
        /// Its op.
        code: u16,
    },
    /// A message that was not taken names this lease.
    Refused(Owner, RefusedAs),
    /// The peer's heartbeat, as its status line has it.
    Heartbeat(u64),
    /// The peer broke the protocol: the session is over. Nothing comes after it.
    Violation(String),
}

/// What a mailbox has seen and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MailboxCounters {
    /// Messages written, each once.
    pub sent: u64,
    /// Messages taken.
    pub received: u64,
    /// Messages written again.
    pub resent: u64,
    /// Messages found that were taken earlier.
    pub replays: u64,
    /// Looks at a damaged slot.
    pub torn: u64,
    /// Looks at a slot of another session.
    pub foreign: u64,
    /// Violations: of one mailbox 0 or 1.
    pub violations: u64,
    /// Requests refused that named nothing of this host.
    pub refused: u64,
}

impl MailboxCounters {
    /// Adds what another mailbox has seen and done.
    pub fn add(&mut self, other: &Self) {
        self.sent += other.sent;
        self.received += other.received;
        self.resent += other.resent;
        self.replays += other.replays;
        self.torn += other.torn;
        self.foreign += other.foreign;
        self.violations += other.violations;
        self.refused += other.refused;
    }
}

struct InFlight {
    seq: u64,
    slot: Box<[u8; SLOT_BYTES]>,
    beats: u32,
}

/// One side's mailbox.
pub struct Mailbox {
    session: u64,
    queue: VecDeque<(u16, Vec<u8>)>,
    in_flight: Option<InFlight>,
    /// The last seq written, ours.
    sent_seq: u64,
    /// The last seq taken, the peer's.
    taken_seq: u64,
    heartbeat: u64,
    dead: bool,
    counters: MailboxCounters,
}

type Actions = Vec<MailboxAction>;

impl Mailbox {
    /// Of a session that has just opened.
    pub fn new(session: u64) -> Self {
        Self {
            session,
            queue: VecDeque::new(),
            in_flight: None,
            sent_seq: 0,
            taken_seq: 0,
            heartbeat: 0,
            dead: false,
            counters: MailboxCounters::default(),
        }
    }

    /// What it has seen and done.
    pub fn counters(&self) -> &MailboxCounters {
        &self.counters
    }

    /// How many messages wait for the slot.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Sends now, or when those before it are acked.
    pub fn send(&mut self, message: &Message) -> Result<Actions, MailboxError> {
        let encoded = message.encode()?;
        if self.queue.len() >= QUEUE_MAX {
            return Err(MailboxError::Full);
        }
        self.queue.push_back(encoded);
        Ok(self.write_next())
    }

    /// The heartbeat's time has come.
    pub fn beat(&mut self) -> Actions {
        if self.dead {
            return Vec::new();
        }
        self.heartbeat += 1;
        let mut actions = vec![self.status()];
        if let Some(flight) = &mut self.in_flight {
            flight.beats += 1;
            if flight.beats >= RESEND_BEATS {
                flight.beats = 0;
                self.counters.resent += 1;
                actions.push(MailboxAction::WriteSlot(flight.slot.clone()));
                actions.push(MailboxAction::RingMailbox);
            }
        }
        actions
    }

    /// A copy of the status line that the peer wrote.
    pub fn on_status(&mut self, line: &[u8; STATUS_BYTES]) -> Actions {
        let Some(line) = StatusLine::decode(line) else {
            return Vec::new();
        };
        if self.dead || line.session != self.session {
            return Vec::new();
        }
        let mut actions = self.on_ack(line.ack);
        if !self.dead {
            actions.insert(0, MailboxAction::Heartbeat(line.heartbeat));
        }
        actions
    }

    /// A copy of the slot that the peer wrote, at a bell or a heartbeat.
    pub fn on_slot(&mut self, slot: &[u8; SLOT_BYTES]) -> Actions {
        if self.dead {
            return Vec::new();
        }
        match check_slot(slot, self.session) {
            SlotFinding::Nothing => Vec::new(),
            SlotFinding::OtherSession => {
                self.counters.foreign += 1;
                Self::refused(slot, RefusedAs::Foreign)
            }
            SlotFinding::Torn => {
                self.counters.torn += 1;
                Self::refused(slot, RefusedAs::Torn)
            }
            SlotFinding::Message {
                seq,
                ack,
                op,
                payload,
            } => self.on_message((seq, ack), op, payload),
        }
    }

    fn refused(slot: &[u8; SLOT_BYTES], as_what: RefusedAs) -> Actions {
        let told = named(slot).map(|named| MailboxAction::Refused(named, as_what));
        told.into_iter().collect()
    }

    fn on_message(&mut self, (seq, ack): (u64, u64), op: u16, payload: &[u8]) -> Actions {
        let mut actions = self.on_ack(ack);
        if self.dead || seq == self.taken_seq {
            return actions;
        }
        if seq < self.taken_seq {
            self.counters.replays += 1;
            actions.push(self.status());
            return actions;
        }
        if seq - self.taken_seq > 1 {
            let last = self.taken_seq;
            return self.violation(format!("message {seq} came after message {last}"));
        }
        let action = match Message::decode(op, payload) {
            Ok(message) => MailboxAction::Deliver(message),
            Err(WireError::UnknownOp { id, op: code }) => {
                let op = OpId(id);
                MailboxAction::UnknownOp { op, code }
            }
            Err(error) => {
                return self.violation(format!("message {seq} with op {op:#x}: {error}"));
            }
        };
        self.taken_seq = seq;
        self.counters.received += 1;
        // The ack first: the peer's next message may then cross with our answer.
        actions.push(self.status());
        actions.push(MailboxAction::RingMailbox);
        actions.push(action);
        actions
    }

    fn on_ack(&mut self, ack: u64) -> Actions {
        if ack > self.sent_seq {
            let sent = self.sent_seq;
            return self.violation(format!(
                "message {ack} was acked, and {sent} is the last sent"
            ));
        }
        if self
            .in_flight
            .as_ref()
            .is_some_and(|flight| flight.seq == ack)
        {
            self.in_flight = None;
        }
        self.write_next()
    }

    fn write_next(&mut self) -> Actions {
        if self.dead || self.in_flight.is_some() {
            return Vec::new();
        }
        let Some((op, payload)) = self.queue.pop_front() else {
            return Vec::new();
        };
        let seq = self.sent_seq + 1;
        // `Message::encode` has bounded the payload.
        let Ok(slot) = encode_slot(self.session, seq, self.taken_seq, op, &payload) else {
            return self.violation(format!("own message {seq} has no form on the wire"));
        };
        self.sent_seq = seq;
        self.counters.sent += 1;
        self.in_flight = Some(InFlight {
            seq,
            slot: slot.clone(),
            beats: 0,
        });
        vec![MailboxAction::WriteSlot(slot), MailboxAction::RingMailbox]
    }

    fn status(&self) -> MailboxAction {
        let line = StatusLine {
            session: self.session,
            heartbeat: self.heartbeat,
            ack: self.taken_seq,
        };
        MailboxAction::WriteStatus(line.encode())
    }

    fn violation(&mut self, text: String) -> Actions {
        self.dead = true;
        self.counters.violations += 1;
        vec![MailboxAction::Violation(text)]
    }
}

#[cfg(test)]
#[path = "mailbox_tests.rs"]
mod tests;
