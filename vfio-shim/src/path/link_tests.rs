//! Link session tests: the moves one by one, and two links against each other under random trouble.

use super::*;
use proptest::prelude::*;

const BEAT: u64 = 250;
const LOST: u64 = 1500;

fn spads(set: ScratchpadSet) -> [u32; SPAD_COUNT] {
    let mut spads = [0; SPAD_COUNT];
    for (index, value) in set.stores() {
        spads[index as usize] = value;
    }
    spads
}

fn peer_set(nonce: u64, echo: u64) -> ScratchpadSet {
    ScratchpadSet {
        nonce,
        echo,
        highest: 1,
        lowest: 1,
    }
}

fn beat(link: &mut Link, set: ScratchpadSet, now: u64) -> Actions {
    let spads = spads(set);
    let fresh_nonce = 0xffff + now;
    link.handle(LinkEvent::Beat { spads, fresh_nonce }, now)
}

fn opened() -> Link {
    let mut link = Link::new(BEAT, LOST);
    link.handle(LinkEvent::Up { nonce: 5 }, 0);
    beat(&mut link, peer_set(9, 5), 0);
    let actions = beat(&mut link, peer_set(9, 5), BEAT);
    let session = session_id(5, 9);
    let opened = LinkAction::Opened {
        session,
        version: 1,
        peer_nonce: 9,
    };
    assert_eq!(actions.last(), Some(&opened));
    link
}

fn over_reason(actions: &Actions) -> Option<&OverReason> {
    let reason = actions.iter().find_map(|action| match action {
        LinkAction::Over { reason, .. } => Some(reason),
        _ => None,
    })?;
    assert_eq!(actions[0], LinkAction::CloseWindow, "first of all");
    let undo = LinkAction::Undo {
        reason: reason.clone(),
    };
    assert_eq!(actions.last(), Some(&undo));
    Some(reason)
}

#[test]
fn link_up_prepares_the_mailbox_before_the_window_opens_and_posts_last() {
    let mut link = Link::new(BEAT, LOST);
    let actions = link.handle(LinkEvent::Up { nonce: 5 }, 0);
    let expected = [
        LinkAction::PrepareMailbox { nonce: 5 },
        LinkAction::OpenWindow,
        LinkAction::Post(peer_set(5, 0)),
    ];
    assert_eq!(actions, expected);
}

#[test]
fn echo_seen_once_or_with_another_nonce_between_opens_nothing() {
    let mut link = Link::new(BEAT, LOST);
    link.handle(LinkEvent::Up { nonce: 5 }, 0);
    for nonce in [9, 10, 9] {
        let actions = beat(&mut link, peer_set(nonce, 5), 0);
        assert_eq!(actions, [LinkAction::Post(peer_set(5, nonce))]);
    }
    let torn = LinkEvent::Beat {
        spads: [9, 0, 5, 0, 1 << 16 | 1, 0],
        fresh_nonce: 1,
    };
    assert_eq!(
        link.handle(torn, 0),
        [LinkAction::Post(peer_set(5, 0))],
        "a set that is being posted is no set"
    );
    assert_eq!(beat(&mut link, peer_set(9, 5), 0).len(), 1);
}

#[test]
fn every_end_closes_the_window_undoes_and_takes_a_new_nonce() {
    let ends = [
        (LinkEvent::Down, OverReason::LinkDown),
        (LinkEvent::Up { nonce: 5 }, OverReason::LinkDown),
        (
            LinkEvent::Violation("x".into()),
            OverReason::Violation("x".into()),
        ),
        (
            LinkEvent::Beat {
                spads: spads(peer_set(10, 5)),
                fresh_nonce: 1,
            },
            OverReason::PeerNonce,
        ),
    ];
    for (event, reason) in ends {
        let mut link = opened();
        let actions = link.handle(event, 2 * BEAT);
        assert_eq!(over_reason(&actions), Some(&reason));
        assert_eq!(link.state(), &LinkState::Undoing);
        let silent = beat(&mut link, peer_set(9, 5), 2 * BEAT);
        assert_eq!(silent, [], "a post would be the promise that all is undone");
        link.handle(LinkEvent::Up { nonce: 6 }, 2 * BEAT);
        let actions = link.handle(LinkEvent::Undone { nonce: 5 }, 3 * BEAT);
        let prepare = LinkAction::PrepareMailbox { nonce: 6 };
        assert_eq!(actions[0], prepare, "the old nonce is not used again");
    }
}

#[test]
fn heartbeat_that_stands_still_is_lost_at_the_time_of_loss_and_not_before() {
    let mut link = opened();
    link.handle(LinkEvent::PeerHeartbeat(1), BEAT + 100);
    link.handle(LinkEvent::PeerHeartbeat(1), BEAT + 1000);
    let before = beat(&mut link, peer_set(9, 5), BEAT + 100 + LOST - 1);
    assert_eq!(over_reason(&before), None);
    let at = beat(&mut link, peer_set(9, 5), BEAT + 100 + LOST);
    let ms = LOST;
    assert_eq!(over_reason(&at), Some(&OverReason::HeartbeatLost { ms }));
}

#[test]
fn link_down_while_undoing_waits_for_the_link_and_undone_alone_does_not_start() {
    let mut link = opened();
    link.handle(LinkEvent::Down, 0);
    assert_eq!(link.handle(LinkEvent::Undone { nonce: 8 }, 0), []);
    assert_eq!(link.state(), &LinkState::Down);
    assert_eq!(link.handle(LinkEvent::Undone { nonce: 8 }, 0), []);
    assert_eq!(link.handle(LinkEvent::Up { nonce: 8 }, 0).len(), 3);
}

#[test]
fn peer_of_another_version_is_refused_in_words_with_both_ranges() {
    let mut link = Link::with_versions(BEAT, LOST, 3..=4);
    link.handle(LinkEvent::Up { nonce: 5 }, 0);
    for _ in 0..4 {
        let actions = beat(&mut link, peer_set(9, 5), 0);
        assert!(matches!(actions[..], [LinkAction::Post(_)]));
    }
    let words = link.state().to_string();
    assert!(
        words.contains("1..=1") && words.contains("3..=4"),
        "{words}"
    );
}

#[test]
fn neighbouring_versions_meet_at_the_highest_common_one() {
    let mut link = Link::with_versions(BEAT, LOST, 2..=3);
    link.handle(LinkEvent::Up { nonce: 5 }, 0);
    let set = ScratchpadSet {
        nonce: 9,
        echo: 5,
        highest: 2,
        lowest: 1,
    };
    beat(&mut link, set, 0);
    let actions = beat(&mut link, set, 0);
    assert!(matches!(
        actions.last(),
        Some(LinkAction::Opened { version: 2, .. })
    ));
}

#[test]
fn unusable_randomness_and_a_mirrored_nonce_still_give_a_sound_one() {
    for random in [0, u64::MAX] {
        let mut link = Link::new(BEAT, LOST);
        link.handle(LinkEvent::Up { nonce: random }, 0);
        let LinkState::Handshake { nonce, .. } = *link.state() else {
            panic!("no handshake");
        };
        assert!(nonce_is_sound(nonce));
        let mirrored = beat(&mut link, peer_set(nonce, nonce), 0);
        let LinkState::Handshake { nonce: next, .. } = *link.state() else {
            panic!("no handshake");
        };
        assert_ne!(next, nonce);
        assert_eq!(mirrored[0], LinkAction::CloseWindow);
    }
}

/// One host: its link machine, its own scratchpads, and what is mapped of which session.
struct Host {
    link: Link,
    spads: [u32; SPAD_COUNT],
    window_open: bool,
    open: Option<u64>,
    mapped: Option<u64>,
    undoing: bool,
    heartbeat: u64,
    seen: u64,
}

impl Host {
    fn new() -> Self {
        Self {
            link: Link::new(BEAT, LOST),
            spads: [0; SPAD_COUNT],
            window_open: false,
            open: None,
            mapped: None,
            undoing: false,
            heartbeat: 0,
            seen: 0,
        }
    }
}

struct World {
    hosts: [Host; 2],
    up: bool,
    now: u64,
    nonces: u64,
    drop_posts: bool,
}

impl World {
    fn nonce(&mut self) -> u64 {
        self.nonces += 1;
        self.nonces.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn event(&mut self, who: usize, event: LinkEvent) {
        let now = self.now;
        for action in self.hosts[who].link.handle(event, now) {
            match action {
                LinkAction::CloseWindow => self.hosts[who].window_open = false,
                LinkAction::Undo { .. } => self.hosts[who].undoing = true,
                LinkAction::PrepareMailbox { .. } => {
                    let host = &mut self.hosts[who];
                    assert!(
                        !host.window_open,
                        "the mailbox is zeroed behind a closed window"
                    );
                    assert_eq!(host.mapped, None, "undone before a new handshake");
                }
                LinkAction::OpenWindow => self.hosts[who].window_open = true,
                LinkAction::Post(set) => {
                    let (open, mapped) = (self.hosts[who].open, self.hosts[who].mapped);
                    assert!(mapped.is_none() || mapped == open, "a post is a promise");
                    if self.up && !self.drop_posts {
                        self.hosts[1 - who].spads = spads(set);
                    }
                }
                LinkAction::Opened { session, .. } => {
                    assert_eq!(self.hosts[who].mapped, None);
                    self.hosts[who].open = Some(session);
                    self.hosts[who].mapped = Some(session);
                }
                LinkAction::Over { session, .. } => {
                    assert_eq!(self.hosts[who].open.take(), Some(session));
                }
            }
        }
        self.check();
    }

    /// At no moment are two different sessions open, or is one open against mappings of another.
    fn check(&self) {
        let [a, b] = &self.hosts;
        if let (Some(one), Some(other)) = (a.open, b.open) {
            assert_eq!(one, other, "two sessions open at once");
        }
        for (one, other) in [(a, b), (b, a)] {
            if let (Some(open), Some(mapped)) = (one.open, other.mapped) {
                assert_eq!(open, mapped, "open while the peer has not undone");
            }
        }
    }

    fn beat(&mut self, who: usize) {
        self.now += BEAT / 2;
        let fresh_nonce = self.nonce();
        let spads = self.hosts[who].spads;
        self.event(who, LinkEvent::Beat { spads, fresh_nonce });
        // The status line: only within one session, only over a link.
        if let Some(session) = self.hosts[who].open {
            self.hosts[who].heartbeat += 1;
            let value = self.hosts[who].heartbeat;
            let same = self.hosts[1 - who].open == Some(session);
            if self.up && same && !self.drop_posts {
                self.hosts[1 - who].seen = value;
                self.event(1 - who, LinkEvent::PeerHeartbeat(value));
            }
        }
    }

    fn undone(&mut self, who: usize) {
        if std::mem::take(&mut self.hosts[who].undoing) {
            self.hosts[who].mapped = None;
            let nonce = self.nonce();
            self.event(who, LinkEvent::Undone { nonce });
        }
    }

    fn link(&mut self, up: bool, first: usize) {
        self.up = up;
        for who in [first, 1 - first] {
            let nonce = self.nonce();
            let event = if up {
                LinkEvent::Up { nonce }
            } else {
                LinkEvent::Down
            };
            self.event(who, event);
        }
    }

    /// The process dies, the kernel takes its mappings, another starts. Its scratchpads stay.
    fn restart(&mut self, who: usize) {
        let spads = self.hosts[who].spads;
        self.hosts[who] = Host::new();
        self.hosts[who].spads = spads;
        if self.up {
            let nonce = self.nonce();
            self.event(who, LinkEvent::Up { nonce });
        }
    }

    fn act(&mut self, act: u8, who: usize) {
        match act {
            0..=7 => self.beat(who),
            8..=10 => self.undone(who),
            11 => self.link(false, who),
            12 => self.link(true, who),
            13 => self.restart(who),
            14 => self.drop_posts = !self.drop_posts,
            _ => self.event(who, LinkEvent::Violation("made up".into())),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn two_links_never_open_different_sessions_and_meet_again_after_any_trouble(
        acts in prop::collection::vec((0u8..16, 0usize..2), 0..200)
    ) {
        let mut world = World {
            hosts: [Host::new(), Host::new()],
            up: false,
            now: 0,
            nonces: 0,
            drop_posts: false,
        };
        for (act, who) in acts {
            world.act(act, who);
        }
        // Trouble is over: they must meet again, at the latest after one time of loss.
        world.drop_posts = false;
        if !world.up {
            world.link(true, 0);
        }
        for _ in 0..40 {
            for who in 0..2 {
                world.undone(who);
                world.beat(who);
            }
        }
        let open = world.hosts[0].open;
        prop_assert!(open.is_some() && open == world.hosts[1].open);
    }
}
