//! The link session: from one agreed pair of nonces to the next, and who has to undo what before.
//!
//! ```text
//!          Up                     echo == own nonce, twice
//! Down -----------> Handshake ------------------------------> Open
//!  ^ ^                ^  | Down                                 | Down, Up, a nonce changed,
//!  | +----------------|--+                                      | heartbeat lost, violation
//!  |                  |                                         v
//!  +------------------+---------------------------------- Undoing
//!    Undone, link down  Undone, link up
//! ```
//! A port posts only in `Handshake` and `Open`: what it posts is the promise that nothing of an
//! older session is mapped. A session ends with a new nonce, so that the peer notices.

use super::wire::{SPAD_COUNT, ScratchpadSet, VERSIONS, nonce_is_sound, session_id};
use std::{fmt, ops::RangeInclusive};

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// The link came up; or it was down so briefly that nobody saw it.
    Up {
        /// Fresh randomness.
        nonce: u64,
    },
    /// The link went down.
    Down,
    /// All of the old session is undone.
    Undone {
        /// Fresh randomness.
        nonce: u64,
    },
    /// The heartbeat's time has come.
    Beat {
        /// The own scratchpads.
        spads: [u32; SPAD_COUNT],
        /// Fresh randomness.
        fresh_nonce: u64,
    },
    /// The heartbeat in the peer's status line of this session.
    PeerHeartbeat(u64),
    /// The peer broke the protocol.
    Violation(String),
}

/// What the driver does next, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkAction {
    /// Close the inbound window.
    CloseWindow,
    /// Undo everything of the session, then send `Undone`.
    Undo {
        /// Why.
        reason: OverReason,
    },
    /// Zero the own mailbox, then store the nonce in it.
    PrepareMailbox {
        /// The own nonce.
        nonce: u64,
    },
    /// Open the inbound window.
    OpenWindow,
    /// Post to the peer's scratchpads.
    Post(ScratchpadSet),
    /// A session is open.
    Opened {
        /// Its id, the same on both sides.
        session: u64,
        /// The protocol's version, the highest that both speak.
        version: u16,
        /// What the fence must read.
        peer_nonce: u64,
    },
    /// The session is over.
    Over {
        /// Its id.
        session: u64,
        /// Why.
        reason: OverReason,
    },
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OverReason {
    /// The link went down.
    LinkDown,
    /// The peer has another nonce: it was restarted, or ended the session.
    PeerNonce,
    /// The peer's heartbeat stood still.
    HeartbeatLost {
        /// For how long.
        ms: u64,
    },
    /// The peer broke the protocol.
    Violation(String),
}

impl fmt::Display for OverReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LinkDown => f.write_str("the NTB link went down"),
            Self::PeerNonce => f.write_str("the peer was restarted or ended the session"),
            Self::HeartbeatLost { ms } => write!(f, "the peer's heartbeat stood still for {ms} ms"),
            Self::Violation(text) => write!(f, "the peer broke the protocol: {text}"),
        }
    }
}

/// Two ranges of protocol versions that do not meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionMismatch {
    /// Own lowest and highest.
    pub own: (u16, u16),
    /// The peer's lowest and highest.
    pub peer: (u16, u16),
}

/// Where the link session stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// The link is down, and nothing of any session is mapped.
    Down,
    /// The last session is being undone.
    Undoing,
    /// Waiting for the peer.
    Handshake {
        /// The own nonce.
        nonce: u64,
        /// What the peer posts, if it posts.
        peer: Option<ScratchpadSet>,
        /// Set when no session can ever open with this peer.
        version_mismatch: Option<VersionMismatch>,
    },
    /// A session is open.
    Open {
        /// Its id.
        session: u64,
        /// The protocol's version.
        version: u16,
        /// The own nonce.
        nonce: u64,
        /// The peer's.
        peer_nonce: u64,
        /// The last value of the peer's heartbeat.
        heartbeat: u64,
        /// When it last changed.
        alive_ms: u64,
    },
}

impl LinkState {
    /// Whether no session can ever open with this peer.
    pub fn is_mismatch(&self) -> bool {
        matches!(
            self,
            Self::Handshake {
                version_mismatch: Some(_),
                ..
            }
        )
    }
}

impl fmt::Display for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down => f.write_str("link down"),
            Self::Undoing => f.write_str("undoing the last session"),
            Self::Handshake {
                version_mismatch: Some(mismatch),
                ..
            } => {
                let VersionMismatch { own, peer } = mismatch;
                write!(
                    f,
                    "the peer speaks protocol versions {}..={}, this host {}..={}: upgrade the older \
                     one",
                    peer.0, peer.1, own.0, own.1
                )
            }
            Self::Handshake { peer: None, .. } => f.write_str("waiting for the peer"),
            Self::Handshake { .. } => f.write_str("agreeing with the peer"),
            Self::Open {
                session, version, ..
            } => {
                write!(f, "session {session:016x} open, protocol version {version}")
            }
        }
    }
}

/// The link session of one port.
#[derive(Clone, Debug)]
pub struct Link {
    heartbeat_ms: u64,
    lost_after_ms: u64,
    versions: RangeInclusive<u16>,
    link_up: bool,
    state: LinkState,
    last_nonce: u64,
    peer_versions: Option<(u16, u16)>,
}

type Actions = Vec<LinkAction>;

impl Link {
    /// A port whose link is down. The peer is lost when its heartbeat stands still for
    /// `lost_after_ms`, and never sooner than two of the own heartbeats.
    pub fn new(heartbeat_ms: u64, lost_after_ms: u64) -> Self {
        Self::with_versions(heartbeat_ms, lost_after_ms, VERSIONS)
    }

    /// The same, speaking these versions.
    pub fn with_versions(
        heartbeat_ms: u64,
        lost_after_ms: u64,
        versions: RangeInclusive<u16>,
    ) -> Self {
        Self {
            heartbeat_ms,
            lost_after_ms,
            versions,
            link_up: false,
            state: LinkState::Down,
            last_nonce: 0,
            peer_versions: None,
        }
    }

    /// Where it stands.
    pub fn state(&self) -> &LinkState {
        &self.state
    }

    /// The own lowest and highest protocol version.
    pub fn own_versions(&self) -> (u16, u16) {
        (*self.versions.start(), *self.versions.end())
    }

    /// The peer's lowest and highest protocol version, as long as it is there to tell them.
    pub fn peer_versions(&self) -> Option<(u16, u16)> {
        match self.state {
            LinkState::Handshake { .. } | LinkState::Open { .. } => self.peer_versions,
            LinkState::Down | LinkState::Undoing => None,
        }
    }

    /// How long ago the peer's heartbeat changed, while a session is open.
    pub fn heartbeat_age_ms(&self, now: u64) -> Option<u64> {
        match self.state {
            LinkState::Open { alive_ms, .. } => Some(now.saturating_sub(alive_ms)),
            _ => None,
        }
    }

    /// One event, at `now` of a monotonic clock in milliseconds.
    pub fn handle(&mut self, event: LinkEvent, now: u64) -> Actions {
        match event {
            LinkEvent::Up { nonce } => self.up(nonce),
            LinkEvent::Down => self.down(),
            LinkEvent::Undone { nonce } => self.undone(nonce),
            LinkEvent::Beat { spads, fresh_nonce } => {
                self.beat(ScratchpadSet::decode(&spads), fresh_nonce, now)
            }
            LinkEvent::PeerHeartbeat(value) => {
                if let LinkState::Open {
                    heartbeat,
                    alive_ms,
                    ..
                } = &mut self.state
                    && *heartbeat != value
                {
                    *heartbeat = value;
                    *alive_ms = now;
                }
                Vec::new()
            }
            LinkEvent::Violation(text) => self.over(OverReason::Violation(text)),
        }
    }

    fn up(&mut self, nonce: u64) -> Actions {
        let was_up = std::mem::replace(&mut self.link_up, true);
        match self.state {
            LinkState::Down => self.start(nonce, None),
            LinkState::Undoing => Vec::new(),
            // Nothing is mapped, but the window has to be programmed again after a link-up.
            LinkState::Handshake { .. } => {
                let mut actions = vec![LinkAction::CloseWindow];
                actions.extend(self.start(nonce, None));
                actions
            }
            LinkState::Open { .. } => {
                debug_assert!(was_up, "a session is open only while the link is up");
                self.over(OverReason::LinkDown)
            }
        }
    }

    fn down(&mut self) -> Actions {
        self.link_up = false;
        match self.state {
            LinkState::Down | LinkState::Undoing => Vec::new(),
            LinkState::Handshake { .. } => {
                self.state = LinkState::Down;
                vec![LinkAction::CloseWindow]
            }
            LinkState::Open { .. } => self.over(OverReason::LinkDown),
        }
    }

    fn undone(&mut self, nonce: u64) -> Actions {
        match self.state {
            LinkState::Undoing if self.link_up => self.start(nonce, None),
            LinkState::Undoing => {
                self.state = LinkState::Down;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// A new handshake. The randomness is bent where it would be no nonce, the last one or the
    /// peer's, which random numbers never are.
    fn start(&mut self, random: u64, peer: Option<u64>) -> Actions {
        let refused =
            |nonce| !nonce_is_sound(nonce) || nonce == self.last_nonce || Some(nonce) == peer;
        // Four values are refused at most, so that five tries do.
        let nonce = (0..5)
            .map(|bend| random.wrapping_add(bend))
            .find(|nonce| !refused(*nonce))
            .unwrap_or(1);
        self.last_nonce = nonce;
        self.peer_versions = None;
        self.state = LinkState::Handshake {
            nonce,
            peer: None,
            version_mismatch: None,
        };
        vec![
            LinkAction::PrepareMailbox { nonce },
            LinkAction::OpenWindow,
            self.post(nonce, 0),
        ]
    }

    fn post(&self, nonce: u64, echo: u64) -> LinkAction {
        LinkAction::Post(ScratchpadSet {
            nonce,
            echo,
            highest: *self.versions.end(),
            lowest: *self.versions.start(),
        })
    }

    fn over(&mut self, reason: OverReason) -> Actions {
        let LinkState::Open { session, .. } = self.state else {
            return Vec::new();
        };
        self.state = LinkState::Undoing;
        vec![
            LinkAction::CloseWindow,
            LinkAction::Over {
                session,
                reason: reason.clone(),
            },
            LinkAction::Undo { reason },
        ]
    }

    fn beat(&mut self, set: Option<ScratchpadSet>, fresh_nonce: u64, now: u64) -> Actions {
        match self.state {
            LinkState::Down | LinkState::Undoing => Vec::new(),
            LinkState::Handshake { nonce, peer, .. } => {
                self.handshake_beat(nonce, peer, set, fresh_nonce, now)
            }
            LinkState::Open {
                nonce,
                peer_nonce,
                alive_ms,
                ..
            } => self.open_beat(nonce, peer_nonce, alive_ms, set, now),
        }
    }

    fn handshake_beat(
        &mut self,
        nonce: u64,
        before: Option<ScratchpadSet>,
        set: Option<ScratchpadSet>,
        fresh_nonce: u64,
        now: u64,
    ) -> Actions {
        if set.is_some_and(|set| set.nonce == nonce) {
            let mut actions = vec![LinkAction::CloseWindow];
            actions.extend(self.start(fresh_nonce, Some(nonce)));
            return actions;
        }
        let common = set.map(|set| self.common_version(&set));
        self.peer_versions = set.map(|set| (set.lowest, set.highest));
        self.state = LinkState::Handshake {
            nonce,
            peer: set,
            version_mismatch: common.and_then(Result::err),
        };
        let mut actions = vec![self.post(nonce, set.map_or(0, |set| set.nonce))];
        let (Some(set), Some(Ok(version))) = (set, common) else {
            return actions;
        };
        let twice = before.is_some_and(|b| b.nonce == set.nonce && b.echo == nonce);
        if twice && set.echo == nonce {
            let session = session_id(nonce, set.nonce);
            self.state = LinkState::Open {
                session,
                version,
                nonce,
                peer_nonce: set.nonce,
                heartbeat: 0,
                alive_ms: now,
            };
            actions.push(LinkAction::Opened {
                session,
                version,
                peer_nonce: set.nonce,
            });
        }
        actions
    }

    fn open_beat(
        &mut self,
        nonce: u64,
        peer_nonce: u64,
        alive_ms: u64,
        set: Option<ScratchpadSet>,
        now: u64,
    ) -> Actions {
        if set.is_some_and(|set| set.nonce != peer_nonce) {
            return self.over(OverReason::PeerNonce);
        }
        let ms = now.saturating_sub(alive_ms);
        if ms >= self.lost_after_ms.max(2 * self.heartbeat_ms) {
            return self.over(OverReason::HeartbeatLost { ms });
        }
        vec![self.post(nonce, peer_nonce)]
    }

    fn common_version(&self, peer: &ScratchpadSet) -> Result<u16, VersionMismatch> {
        let own = self.own_versions();
        let (lowest, highest) = (own.0.max(peer.lowest), own.1.min(peer.highest));
        if lowest <= highest && peer.lowest <= peer.highest {
            return Ok(highest);
        }
        Err(VersionMismatch {
            own,
            peer: (peer.lowest, peer.highest),
        })
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
