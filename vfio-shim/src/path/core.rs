//! One port's whole state: link session, mailbox, lender's and borrower's ends, joined; pure.
//!
//! Events go in with the time, actions come out. `path::engine` is the thin driver around it, the
//! simulator another.

use super::borrower::{Borrower, BorrowerAction, Call, CallError, Pin, Step, Token};
use super::grant::{ToPool, ToPort};
use super::lender::{JobId, Lender, LenderAction};
use super::limits::Limits;
use super::link::{Link, LinkAction, LinkEvent, OverReason};
use super::mailbox::{Mailbox, MailboxAction, MailboxCounters, MailboxError};
use super::message::{LeaseId, Message, OpId, Refusal, RefusalCode, Reply, Request, Secret};
use super::plan::{Owner, Quarantine, SlicePool};
use super::wire::{SLOT_BYTES, STATUS_BYTES, ScratchpadSet};
use super::work::{FunctionWork, WorkOutcome};
use crate::model::{Bdf, WindowOffset};
use std::collections::HashMap;

/// Randomness from outside.
pub type Entropy = Box<dyn FnMut() -> u64 + Send>;

/// What a port is told at its start.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// This host's node id.
    pub node: u16,
    /// Own window in bytes: what this side's inbound window can hold.
    pub window_bytes: u64,
    /// Heartbeat, milliseconds.
    pub heartbeat_ms: u64,
    /// The peer is lost when its heartbeat stands still for so long, milliseconds.
    pub lost_after_ms: u64,
    /// What each tenant may take.
    pub limits: Limits,
}

/// What happened.
pub enum Event {
    /// The heartbeat's time has come; what the driver read.
    Beat {
        /// Whether the link is up.
        link_up: bool,
        /// The own scratchpads.
        spads: [u32; 6],
        /// The mailbox.
        inbox: Inbox,
    },
    /// Bell 0 rang.
    Bell(Inbox),
    /// The port told of a change of link, and this is the link now.
    LinkChange(bool),
    /// A worker or a verb calls.
    Call(Token, Call),
    /// An executor has done its work.
    Worked(JobId, Result<WorkOutcome, Refusal>),
    /// The mapper has pinned or unpinned.
    Pinned(Step, Result<(), CallError>),
    /// Nobody on this host can store into the slices of an ended lease any more.
    LetGo(Step),
    /// The pool of leases tells something.
    Pool(ToPort),
}

/// Copies of what the peer wrote.
pub struct Inbox {
    /// The peer's status line.
    pub status: [u8; STATUS_BYTES],
    /// The slot.
    pub slot: Box<[u8; SLOT_BYTES]>,
}

/// What the driver has to do, in this order.
#[derive(Debug)]
pub enum Action {
    /// Close the inbound window.
    CloseWindow,
    /// Zero the own mailbox, then store the nonce.
    PrepareMailbox(u64),
    /// Open the inbound window as far as its mailbox; with `SessionOpened` all of it.
    OpenWindow,
    /// Post to the peer's scratchpads.
    Post(ScratchpadSet),
    /// Write the peer's slot: all but commit, then commit.
    WriteSlot(Box<[u8; SLOT_BYTES]>),
    /// Write the peer's status line.
    WriteStatus([u8; STATUS_BYTES]),
    /// Ring bell 0.
    RingMailbox,
    /// A session is open.
    SessionOpened {
        /// Its id.
        session: u64,
        /// What the fence must read.
        peer_nonce: u64,
    },
    /// It is over: relays stop, workers read ones.
    SessionOver,
    /// Work for a function's executor.
    Work(Bdf, JobId, FunctionWork),
    /// Map guest RAM into the port's container.
    Pin(Step, LeaseId, Vec<Pin>),
    /// Unmap it.
    Unpin(Step, LeaseId, Vec<(WindowOffset, u64)>),
    /// Scan interrupt words for a lease.
    Scan(LeaseId, u32, u32),
    /// Scan them no more.
    ScanEnd(LeaseId),
    /// Tell the pool of leases.
    Pool(ToPool),
    /// Answer a call.
    Answer(Token, Result<super::borrower::Answer, CallError>),
    /// A borrowed lease is over; its worker lets go, which `Event::LetGo` tells.
    Lost(Step, LeaseId, String),
    /// An offered function is to be closed for good: the kernel waits for it.
    Gone(Bdf),
}

/// The open session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Its id.
    pub session: u64,
    /// The protocol's version.
    pub version: u16,
    /// Who is at the far end, once it has said so.
    pub peer_node: Option<u16>,
    /// When it opened, in the driver's milliseconds.
    pub since_ms: u64,
}

/// How many leases a peer may have lost without saying that it has let go of them, in one session.
/// A worker may take for ever for that, and a lender remembers each.
pub const REVOKED_MAX: usize = 128;

enum Waiting {
    Hello,
    Step(Step),
    Revoked(LeaseId),
}

struct Session {
    info: SessionInfo,
    mailbox: Mailbox,
    waiting: HashMap<OpId, Waiting>,
    op_last: u64,
}

/// One port's whole state.
pub struct PortCore {
    config: CoreConfig,
    entropy: Entropy,
    link: Link,
    /// The lender's end.
    pub lender: Lender,
    /// The borrower's end.
    pub borrower: Borrower,
    pool: SlicePool,
    session: Option<Session>,
    /// Of the sessions that are over.
    past: MailboxCounters,
    link_up: bool,
    undoing: bool,
    over_reason: Option<String>,
}

impl PortCore {
    /// A port whose window is closed.
    pub fn new(config: CoreConfig, entropy: Entropy) -> Self {
        let link = Link::new(config.heartbeat_ms, config.lost_after_ms);
        let borrower = Borrower::new(config.limits);
        Self {
            pool: SlicePool::closed(),
            config,
            entropy,
            link,
            lender: Lender::default(),
            borrower,
            session: None,
            past: MailboxCounters::default(),
            link_up: false,
            undoing: false,
            over_reason: None,
        }
    }

    /// The open session, if there is one.
    pub fn session(&self) -> Option<&SessionInfo> {
        self.session.as_ref().map(|session| &session.info)
    }

    /// The mailbox's counters, while a session is open.
    pub fn mailbox(&self) -> Option<&Mailbox> {
        self.session.as_ref().map(|session| &session.mailbox)
    }

    /// What the mailboxes of all sessions have seen and done.
    pub fn mailbox_counters(&self) -> MailboxCounters {
        let mut sum = self.past.clone();
        if let Some(mailbox) = self.mailbox() {
            sum.add(mailbox.counters());
        }
        sum.refused += self.lender.refused_unnamed();
        sum
    }

    /// The link session's state.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Why the last session ended.
    pub fn over_reason(&self) -> Option<&str> {
        self.over_reason.as_deref()
    }

    /// The window's slices.
    pub fn pool(&self) -> &SlicePool {
        &self.pool
    }

    /// What of the window and of the interrupt table waits for the peer's confirmation.
    pub fn quarantine(&self) -> Quarantine {
        let mapped = self.borrower.slices_in_use();
        let holds = |owner| match owner {
            Owner::Lent(lease) => self.lender.holds(lease),
            Owner::Borrowed(lease) => self.borrower.holds(lease),
        };
        let in_use = |owner, offset| match owner {
            Owner::Lent(lease) => self.lender.holds(lease),
            Owner::Borrowed(_) => mapped.contains(&offset),
        };
        Quarantine {
            words: self.borrower.words_in_quarantine(),
            ..self.pool.quarantine(in_use, holds)
        }
    }

    /// Whether nothing is lent, borrowed or under way.
    pub fn is_idle(&self) -> bool {
        self.lender.is_undone() && self.borrower.is_undone()
    }

    /// The same, but for workers that have not let go of what they had.
    pub fn waits_for_workers_alone(&self) -> bool {
        self.lender.is_undone() && self.borrower.waits_for_workers_alone()
    }

    /// One event, at `now_ms` of a monotonic clock.
    pub fn handle(&mut self, event: Event, now_ms: u64) -> Vec<Action> {
        let mut out = Vec::new();
        self.lender.tick(now_ms);
        match event {
            Event::Beat {
                link_up,
                spads,
                inbox,
            } => self.beat(link_up, spads, inbox, now_ms, &mut out),
            Event::Bell(inbox) => self.inbox(inbox, now_ms, &mut out),
            Event::LinkChange(up) => self.link_changed(up, now_ms, &mut out),
            Event::Call(token, call) => self.call(token, call, now_ms, &mut out),
            Event::Worked(job, result) => {
                let actions = self.lender.done(job, result, &mut self.pool);
                self.lender_actions(actions, now_ms, &mut out);
            }
            Event::Pinned(step, result) => {
                let actions = self.borrower.pinned(step, result, &mut self.pool);
                self.borrower_actions(actions, now_ms, &mut out);
            }
            Event::LetGo(step) => {
                let actions = self.borrower.let_go(step, &mut self.pool);
                self.borrower_actions(actions, now_ms, &mut out);
            }
            Event::Pool(message) => {
                let actions = self.lender.pool_says(message);
                self.lender_actions(actions, now_ms, &mut out);
            }
        }
        let leaving = self.lender.leaving();
        self.lender_actions(leaving, now_ms, &mut out);
        self.finish_undo(now_ms, &mut out);
        out
    }

    /// Ends every path, as if the session were over, and starts no new one: for an orderly stop.
    pub fn shut_down(&mut self, now_ms: u64) -> Vec<Action> {
        let mut out = Vec::new();
        self.link_change(false, now_ms, &mut out);
        out
    }

    /// Ends the lease of a lent function from this side.
    pub fn revoke(&mut self, bdf: Bdf, why: &str, now_ms: u64) -> Vec<Action> {
        let mut out = Vec::new();
        let actions = self.lender.revoke(bdf, why);
        self.lender_actions(actions, now_ms, &mut out);
        out
    }

    /// Tries again to put a function of the quarantine back.
    pub fn retry(&mut self, bdf: Bdf, now_ms: u64) -> Result<Vec<Action>, Refusal> {
        let mut out = Vec::new();
        let actions = self.lender.retry(bdf)?;
        self.lender_actions(actions, now_ms, &mut out);
        Ok(out)
    }

    /// Gives a function out of quarantine as it is.
    pub fn clear(&mut self, bdf: Bdf, by: &str, now_ms: u64) -> Result<Vec<Action>, Refusal> {
        let mut out = Vec::new();
        let actions = self.lender.clear(bdf, by)?;
        self.lender_actions(actions, now_ms, &mut out);
        Ok(out)
    }

    /// The kernel takes a lent function away.
    pub fn taken_away(&mut self, bdf: Bdf, why: &str, now_ms: u64) -> Vec<Action> {
        let mut out = Vec::new();
        let mut actions = self.lender.taken_away(bdf, why);
        actions.extend(self.lender.leaving());
        self.lender_actions(actions, now_ms, &mut out);
        out
    }

    /// The port told of a change. One that leaves the link up was a flap too short to be seen: DMA
    /// posted meanwhile is lost, so the session ends all the same.
    fn link_changed(&mut self, up: bool, now_ms: u64, out: &mut Vec<Action>) {
        if up && self.link_up {
            let nonce = (self.entropy)();
            return self.link_event(LinkEvent::Up { nonce }, now_ms, out);
        }
        self.link_change(up, now_ms, out);
    }

    fn link_change(&mut self, up: bool, now_ms: u64, out: &mut Vec<Action>) {
        if up == self.link_up {
            return;
        }
        self.link_up = up;
        let event = if up {
            LinkEvent::Up {
                nonce: (self.entropy)(),
            }
        } else {
            LinkEvent::Down
        };
        self.link_event(event, now_ms, out);
    }

    fn beat(
        &mut self,
        link_up: bool,
        spads: [u32; 6],
        inbox: Inbox,
        now_ms: u64,
        out: &mut Vec<Action>,
    ) {
        self.link_change(link_up, now_ms, out);
        let fresh_nonce = (self.entropy)();
        self.link_event(LinkEvent::Beat { spads, fresh_nonce }, now_ms, out);
        self.inbox(inbox, now_ms, out);
        if let Some(session) = &mut self.session {
            let actions = session.mailbox.beat();
            self.mailbox_actions(actions, now_ms, out);
        }
    }

    fn inbox(&mut self, inbox: Inbox, now_ms: u64, out: &mut Vec<Action>) {
        let Some(session) = &mut self.session else {
            return;
        };
        let mut actions = session.mailbox.on_status(&inbox.status);
        actions.extend(session.mailbox.on_slot(&inbox.slot));
        self.mailbox_actions(actions, now_ms, out);
    }

    fn call(&mut self, token: Token, call: Call, now_ms: u64, out: &mut Vec<Action>) {
        let ready = self
            .session
            .as_ref()
            .is_some_and(|s| s.info.peer_node.is_some());
        if !ready {
            let why = match (self.link.state(), &self.over_reason) {
                (state, _) if state.is_mismatch() => state.to_string(),
                (_, Some(reason)) => reason.clone(),
                (_, None) => "the other host has not answered yet".to_owned(),
            };
            let text = format!(
                "no link session is open ({why}): see `sublet status`, and check that the other \
                 host's daemon runs and the cable is in"
            );
            out.push(Action::Answer(token, Err(CallError::Gone(text))));
            return;
        }
        let actions = self.borrower.call(token, call, &mut self.pool);
        self.borrower_actions(actions, now_ms, out);
    }

    fn link_event(&mut self, event: LinkEvent, now_ms: u64, out: &mut Vec<Action>) {
        for action in self.link.handle(event, now_ms) {
            match action {
                LinkAction::CloseWindow => out.push(Action::CloseWindow),
                LinkAction::Undo { reason } => self.undo(reason.to_string(), now_ms, out),
                LinkAction::PrepareMailbox { nonce } => out.push(Action::PrepareMailbox(nonce)),
                LinkAction::OpenWindow => out.push(Action::OpenWindow),
                LinkAction::Post(set) => out.push(Action::Post(set)),
                LinkAction::Opened {
                    session,
                    version,
                    peer_nonce,
                } => {
                    self.opened(session, version, peer_nonce, now_ms, out);
                }
                LinkAction::Over { reason, .. } => {
                    self.over_reason = Some(reason.to_string());
                    self.forget_session(&reason);
                    out.push(Action::SessionOver);
                }
            }
        }
    }

    fn forget_session(&mut self, reason: &OverReason) {
        let mut counters = match self.session.take() {
            Some(session) => session.mailbox.counters().clone(),
            None => MailboxCounters::default(),
        };
        // Some are found by the mailbox, and some by who takes its messages.
        counters.violations = u64::from(matches!(reason, OverReason::Violation(_)));
        self.past.add(&counters);
    }

    fn opened(
        &mut self,
        session: u64,
        version: u16,
        peer_nonce: u64,
        now_ms: u64,
        out: &mut Vec<Action>,
    ) {
        let info = SessionInfo {
            session,
            version,
            peer_node: None,
            since_ms: now_ms,
        };
        self.session = Some(Session {
            info,
            mailbox: Mailbox::new(session),
            waiting: HashMap::new(),
            op_last: 0,
        });
        out.push(Action::SessionOpened {
            session,
            peer_nonce,
        });
        let hello = Request::Hello {
            node: self.config.node,
            window_bytes: self.config.window_bytes,
        };
        self.request(Waiting::Hello, hello, now_ms, out);
    }

    fn undo(&mut self, reason: String, now_ms: u64, out: &mut Vec<Action>) {
        self.undoing = true;
        let lender = self.lender.session_over();
        self.lender_actions(lender, now_ms, out);
        let borrower = self.borrower.session_over(&reason);
        self.borrower_actions(borrower, now_ms, out);
    }

    /// When nothing of the old session is under way any more, the link machine may go on, and all
    /// slices are free again: the next session's handshake says that the peer maps none of them.
    fn finish_undo(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if self.undoing && self.lender.is_undone() && self.borrower.is_undone() {
            if self.borrower.has_left() {
                let text = "guest memory could not be unpinned, see the log: restart the daemon";
                self.over_reason = Some(text.to_owned());
                return;
            }
            self.undoing = false;
            self.pool = SlicePool::closed();
            let nonce = (self.entropy)();
            self.link_event(LinkEvent::Undone { nonce }, now_ms, out);
        }
    }

    fn request(&mut self, waiting: Waiting, request: Request, now_ms: u64, out: &mut Vec<Action>) {
        let Some(session) = &mut self.session else {
            return;
        };
        session.op_last += 1;
        let op = OpId(session.op_last);
        match session.mailbox.send(&Message::Request(op, request)) {
            Ok(actions) => {
                session.waiting.insert(op, waiting);
                self.mailbox_actions(actions, now_ms, out);
            }
            // One caller's refusal, and nobody else's: the session goes on.
            Err(error) => {
                let refusal = Refusal::new(RefusalCode::Limit, 0, super::words(&error));
                self.replied_to(waiting, Err(refusal), now_ms, out);
            }
        }
    }

    /// A reply that cannot be sent would leave the peer waiting for ever: the session ends.
    fn send(&mut self, message: Message, now_ms: u64, out: &mut Vec<Action>) {
        let Some(session) = &mut self.session else {
            return;
        };
        match (session.mailbox.send(&message), message) {
            (Ok(actions), _) => self.mailbox_actions(actions, now_ms, out),
            // One function's answer that has no form on the wire is no other tenant's fault.
            (Err(error @ MailboxError::Encode(_)), Message::Reply(op, code, Ok(_))) => {
                let refusal = Refusal::new(RefusalCode::Limit, 0, super::words(&error));
                self.send(Message::Reply(op, code, Err(refusal)), now_ms, out);
            }
            (Err(error), _) => self.violation(super::words(&error), now_ms, out),
        }
    }

    fn violation(&mut self, text: String, now_ms: u64, out: &mut Vec<Action>) {
        self.link_event(LinkEvent::Violation(text), now_ms, out);
    }

    fn mailbox_actions(&mut self, actions: Vec<MailboxAction>, now_ms: u64, out: &mut Vec<Action>) {
        for action in actions {
            match action {
                MailboxAction::WriteSlot(slot) => out.push(Action::WriteSlot(slot)),
                MailboxAction::WriteStatus(status) => out.push(Action::WriteStatus(status)),
                MailboxAction::RingMailbox => out.push(Action::RingMailbox),
                MailboxAction::Heartbeat(value) => {
                    self.link_event(LinkEvent::PeerHeartbeat(value), now_ms, out);
                }
                MailboxAction::Refused(named, as_what) => match named {
                    Owner::Lent(lease) => self.lender.count_refused(lease, as_what),
                    Owner::Borrowed(lease) => self.borrower.count_refused(lease, as_what),
                },
                MailboxAction::Deliver(message) => self.deliver(message, now_ms, out),
                MailboxAction::UnknownOp { op, code } => {
                    let text = "this version of Sublet does not know the operation: upgrade it";
                    let refusal = Refusal {
                        code: RefusalCode::UnknownOp,
                        figure: code.into(),
                        text: text.into(),
                    };
                    self.send(Message::Reply(op, code, Err(refusal)), now_ms, out);
                }
                MailboxAction::Violation(text) => self.violation(text, now_ms, out),
            }
        }
    }

    fn deliver(&mut self, message: Message, now_ms: u64, out: &mut Vec<Action>) {
        match message {
            Message::Request(op, Request::Hello { node, window_bytes }) => {
                self.hello(node, window_bytes);
                let reply = Reply::Hello {
                    node: self.config.node,
                    window_bytes: self.config.window_bytes,
                };
                let code = Request::HELLO;
                self.send(Message::Reply(op, code, Ok(reply)), now_ms, out);
            }
            Message::Request(op, Request::Revoked { lease, text }) => {
                let actions = self.borrower.revoked(op, lease, text, &mut self.pool);
                self.borrower_actions(actions, now_ms, out);
            }
            Message::Request(op, request) => {
                let secret = self.fresh_secret();
                let peer = self.session().and_then(|info| info.peer_node);
                let named = (op, request.op());
                let slices = &mut self.pool;
                let actions = self.lender.request(named, request, slices, peer, secret);
                self.lender_actions(actions, now_ms, out);
            }
            Message::Reply(op, _, result) => self.replied(op, result, now_ms, out),
        }
    }

    fn replied(
        &mut self,
        op: OpId,
        result: Result<Reply, Refusal>,
        now_ms: u64,
        out: &mut Vec<Action>,
    ) {
        let Some(session) = &mut self.session else {
            return;
        };
        match session.waiting.remove(&op) {
            Some(waiting) => self.replied_to(waiting, result, now_ms, out),
            None => {
                let text = format!("an answer to operation {op}, which was never asked");
                self.violation(text, now_ms, out);
            }
        }
    }

    fn replied_to(
        &mut self,
        waiting: Waiting,
        result: Result<Reply, Refusal>,
        now_ms: u64,
        out: &mut Vec<Action>,
    ) {
        match waiting {
            Waiting::Hello => {
                if let Ok(Reply::Hello { node, window_bytes }) = result {
                    self.hello(node, window_bytes);
                }
            }
            Waiting::Step(step) => {
                let actions = self.borrower.reply(step, result, &mut self.pool);
                self.borrower_actions(actions, now_ms, out);
            }
            // Not confirmed, or not even sent: the slices stay in quarantine.
            Waiting::Revoked(lease) => {
                if result.is_ok() {
                    self.lender.revoke_confirmed(lease, &mut self.pool);
                }
            }
        }
    }

    fn hello(&mut self, node: u16, window_bytes: u64) {
        let Some(session) = &mut self.session else {
            return;
        };
        // The first word counts: verbs go by the node, and slices by the size.
        if session.info.peer_node.is_none() {
            session.info.peer_node = Some(node);
            self.pool = SlicePool::open(self.config.window_bytes.min(window_bytes));
        }
    }

    fn revoked_unanswered(&self) -> usize {
        let waiting = self
            .session
            .iter()
            .flat_map(|session| session.waiting.values());
        waiting
            .filter(|waiting| matches!(waiting, Waiting::Revoked(_)))
            .count()
    }

    fn fresh_secret(&mut self) -> Secret {
        let (a, b) = ((self.entropy)(), (self.entropy)());
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&a.to_le_bytes());
        bytes[8..].copy_from_slice(&b.to_le_bytes());
        Secret(bytes)
    }

    fn lender_actions(&mut self, actions: Vec<LenderAction>, now_ms: u64, out: &mut Vec<Action>) {
        for action in actions {
            match action {
                LenderAction::Work(bdf, job, work) => out.push(Action::Work(bdf, job, work)),
                LenderAction::Reply(op, code, result) => {
                    self.send(Message::Reply(op, code, *result), now_ms, out);
                }
                LenderAction::Revoked(lease, text) if self.revoked_unanswered() < REVOKED_MAX => {
                    let request = Request::Revoked { lease, text };
                    self.request(Waiting::Revoked(lease), request, now_ms, out);
                }
                LenderAction::Revoked(..) => {
                    let text = format!(
                        "the peer has let go of none of {REVOKED_MAX} leases that were taken from it"
                    );
                    self.violation(text, now_ms, out);
                }
                LenderAction::Pool(message) => out.push(Action::Pool(message)),
                LenderAction::Gone(bdf) => out.push(Action::Gone(bdf)),
            }
        }
    }

    fn borrower_actions(
        &mut self,
        actions: Vec<BorrowerAction>,
        now_ms: u64,
        out: &mut Vec<Action>,
    ) {
        for action in actions {
            match action {
                BorrowerAction::Send(step, request) => {
                    self.request(Waiting::Step(step), request, now_ms, out);
                }
                BorrowerAction::Pin(step, lease, pins) => {
                    out.push(Action::Pin(step, lease, pins));
                }
                BorrowerAction::Unpin(step, lease, spans) => {
                    out.push(Action::Unpin(step, lease, spans));
                }
                BorrowerAction::Scan(lease, first, count) => {
                    out.push(Action::Scan(lease, first, count));
                }
                BorrowerAction::ScanEnd(lease) => out.push(Action::ScanEnd(lease)),
                BorrowerAction::Confirm(op, result) => {
                    let failed = |error: CallError| {
                        Refusal::new(RefusalCode::Kernel, 0, super::words(&error))
                    };
                    let result = result.map(|()| Reply::Done).map_err(failed);
                    self.send(Message::Reply(op, Request::REVOKED, result), now_ms, out);
                }
                BorrowerAction::Answer(token, result) => out.push(Action::Answer(token, result)),
                BorrowerAction::Lost(step, lease, why) => {
                    out.push(Action::Lost(step, lease, why));
                }
            }
        }
    }
}
