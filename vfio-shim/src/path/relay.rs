//! Interrupts across the NTB: the lender's relay of one vector, the borrower's scan of the table.
//!
//! ```text
//! eventfd --on_raise--> masked? pending : Fence --on_fence--> Store(word), then the bell
//! bell or heartbeat --scan--> every word that differs from the one seen: masked? pending : signal
//! ```

use super::wire::{irq_count, irq_word};

/// What the lender's driver does next for a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayStep {
    /// Nothing.
    Nothing,
    /// Read the borrower's nonce through the function's window, then call `on_fence`.
    Fence,
    /// Store this word, then ring.
    Store(u64),
    /// The fence did not read the session's nonce: the path is suspect.
    Suspect,
}

/// The lender's end of one vector.
#[derive(Clone, Debug, Default)]
pub struct VectorRelay {
    masked: bool,
    pending: bool,
    suspect: bool,
    /// Fences asked for and not yet read. One is due for each raise: a fence that was read before
    /// a raise does not order that raise's DMA.
    fencing: u32,
    count: u32,
    counters: VectorCounters,
}

/// What a vector's relay has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorCounters {
    /// Sum of the values read from the vector's eventfd.
    pub raised: u64,
    /// Fences read.
    pub fences: u64,
    /// Words stored, each followed by a bell.
    pub bells: u64,
}

impl VectorRelay {
    /// A relay armed again on an open path, whose words the borrower has seen up to `count`: one
    /// that began at 0 could store the count that was seen last, and its raise would be lost.
    pub fn resuming(count: u32) -> Self {
        Self {
            count,
            ..Self::default()
        }
    }

    /// The count in the word that was stored last; 0 = none.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// What it has done.
    pub fn counters(&self) -> VectorCounters {
        self.counters
    }

    /// The vector's eventfd was read, once, and gave `value`.
    pub fn on_raise(&mut self, value: u64) -> RelayStep {
        if value == 0 {
            return RelayStep::Nothing;
        }
        self.counters.raised = self.counters.raised.wrapping_add(value);
        self.fire()
    }

    fn fire(&mut self) -> RelayStep {
        if self.suspect {
            return RelayStep::Nothing;
        }
        if self.masked {
            self.pending = true;
            return RelayStep::Nothing;
        }
        self.fencing = self.fencing.saturating_add(1);
        RelayStep::Fence
    }

    /// The fence read `read`.
    pub fn on_fence(&mut self, read: u32, peer_nonce: u64, session: u64) -> RelayStep {
        if self.fencing == 0 {
            return RelayStep::Nothing;
        }
        self.fencing -= 1;
        self.counters.fences += 1;
        if self.suspect || read != peer_nonce as u32 {
            self.suspect = true;
            return RelayStep::Suspect;
        }
        if self.masked {
            self.pending = true;
            return RelayStep::Nothing;
        }
        self.count = self.count.wrapping_add(1);
        self.counters.bells += 1;
        RelayStep::Store(irq_word(session, self.count))
    }

    /// Masks or unmasks; what was raised meanwhile fires once at unmask.
    pub fn mask(&mut self, masked: bool) -> RelayStep {
        self.masked = masked;
        if masked || !std::mem::take(&mut self.pending) {
            return RelayStep::Nothing;
        }
        self.fire()
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    count: u32,
    masked: bool,
    pending: bool,
}

/// The borrower's end of one path's words. The words were 0 when the path was opened.
#[derive(Clone, Debug)]
pub struct Scan {
    words: Vec<Seen>,
    spurious: bool,
}

impl Scan {
    /// Of so many words.
    pub fn new(words: usize) -> Self {
        Self {
            words: vec![Seen::default(); words],
            spurious: false,
        }
    }

    /// The next scan finds every vector raised, once: after a start whose earlier raises are not
    /// known. A driver takes a spurious interrupt, and never a lost one.
    pub fn raise_all(&mut self) {
        self.spurious = true;
    }

    /// The vectors to be signalled now.
    pub fn scan(&mut self, read: impl Fn(usize) -> u64, session: u64) -> Vec<usize> {
        let spurious = std::mem::take(&mut self.spurious);
        let mut raised = Vec::new();
        for (vector, seen) in self.words.iter_mut().enumerate() {
            let count = irq_count(read(vector), session).unwrap_or(seen.count);
            if count == seen.count && !spurious {
                continue;
            }
            seen.count = count;
            if seen.masked {
                seen.pending = true;
            } else {
                raised.push(vector);
            }
        }
        raised
    }

    /// Masks or unmasks; true = signal the vector now.
    pub fn mask(&mut self, vector: usize, masked: bool) -> bool {
        let Some(seen) = self.words.get_mut(vector) else {
            return false;
        };
        seen.masked = masked;
        !masked && std::mem::take(&mut seen.pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::wire::session_id;

    const NONCE: u64 = 0xaaaa_bbbb_cccc_dddd;
    const FENCE: u32 = 0xcccc_dddd;

    fn session() -> u64 {
        session_id(NONCE, 7)
    }

    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[test]
    fn raise_while_masked_fires_once_at_unmask() {
        let mut relay = VectorRelay::default();
        assert_eq!(relay.mask(true), RelayStep::Nothing);
        assert_eq!(relay.on_raise(2), RelayStep::Nothing);
        assert_eq!(relay.on_raise(1), RelayStep::Nothing);
        assert_eq!(relay.mask(false), RelayStep::Fence);
        let word = irq_word(session(), 1);
        let step = relay.on_fence(FENCE, NONCE, session());
        assert_eq!(step, RelayStep::Store(word));
        assert_eq!(relay.mask(false), RelayStep::Nothing);
        let counters = relay.counters();
        assert_eq!((counters.raised, counters.bells), (3, 1));
    }

    #[test]
    fn mask_between_raise_and_fence_keeps_the_raise_pending() {
        let mut relay = VectorRelay::default();
        assert_eq!(relay.on_raise(1), RelayStep::Fence);
        relay.mask(true);
        assert_eq!(relay.on_fence(FENCE, NONCE, session()), RelayStep::Nothing);
        assert_eq!(relay.mask(false), RelayStep::Fence);
    }

    #[test]
    fn wrong_nonce_at_the_fence_stops_the_path_for_good() {
        for read in [u32::MAX, 0, FENCE ^ 1] {
            let mut relay = VectorRelay::default();
            relay.on_raise(1);
            let step = relay.on_fence(read, NONCE, session());
            assert_eq!(step, RelayStep::Suspect);
            assert_eq!(relay.on_raise(1), RelayStep::Nothing);
            assert_eq!(relay.counters().bells, 0);
        }
    }

    #[test]
    fn count_wraps_and_the_raise_is_still_seen() {
        let mut relay = VectorRelay {
            count: u32::MAX,
            ..VectorRelay::default()
        };
        let mut scan = Scan::new(1);
        let at_max = irq_word(session(), u32::MAX);
        assert_eq!(scan.scan(|_| at_max, session()), [0]);
        relay.on_raise(1);
        let RelayStep::Store(word) = relay.on_fence(FENCE, NONCE, session()) else {
            panic!("no store");
        };
        assert_eq!(scan.scan(|_| word, session()), [0]);
        assert_eq!(scan.scan(|_| word, session()), [0; 0]);
    }

    #[test]
    fn relay_armed_again_goes_on_counting_so_that_its_first_raise_is_seen() {
        let mut scan = Scan::new(1);
        let mut relay = VectorRelay::default();
        for _ in 0..2 {
            relay.on_raise(1);
            let RelayStep::Store(word) = relay.on_fence(FENCE, NONCE, session()) else {
                panic!("no store");
            };
            assert_eq!(scan.scan(|_| word, session()), [0]);
            relay = VectorRelay::resuming(relay.count());
        }
    }

    #[test]
    fn words_of_another_session_raise_nothing() {
        let mut scan = Scan::new(2);
        let foreign = irq_word(session() ^ 1, 5);
        assert!(scan.scan(|_| foreign, session()).is_empty());
    }

    #[test]
    fn raise_all_signals_every_vector_once() {
        let mut scan = Scan::new(3);
        scan.mask(1, true);
        scan.raise_all();
        assert_eq!(scan.scan(|_| 0, session()), [0, 2]);
        assert!(scan.scan(|_| 0, session()).is_empty());
        assert!(scan.mask(1, false));
    }

    #[derive(Clone)]
    struct Both {
        relays: Vec<VectorRelay>,
        scan: Scan,
        words: Vec<u64>,
        owed: Vec<bool>,
        signalled: u64,
    }

    impl Both {
        fn step(&mut self, vector: usize, step: RelayStep) {
            if step != RelayStep::Fence {
                return;
            }
            let relay = &mut self.relays[vector];
            if let RelayStep::Store(word) = relay.on_fence(FENCE, NONCE, session()) {
                self.words[vector] = word;
            }
        }

        fn signal(&mut self, vector: usize) {
            self.owed[vector] = false;
            self.signalled += 1;
        }

        fn scan(&mut self) {
            let words = &self.words;
            for vector in self.scan.scan(|at| words[at], session()) {
                self.signal(vector);
            }
        }

        fn act(&mut self, dice: u64) {
            let vector = (dice >> 8) as usize % self.relays.len();
            match dice % 8 {
                0..=3 => {
                    self.owed[vector] = true;
                    let step = self.relays[vector].on_raise(1 + (dice >> 32) % 3);
                    self.step(vector, step);
                }
                // Bells are lost at random: a scan comes only now and then.
                4 => self.scan(),
                5 => {
                    let step = self.relays[vector].mask(dice >> 40 & 1 == 0);
                    self.step(vector, step);
                }
                _ => {
                    if self.scan.mask(vector, dice >> 40 & 1 == 0) {
                        self.signal(vector);
                    }
                }
            }
        }
    }

    #[test]
    fn no_raise_is_lost_in_a_hundred_thousand_random_steps() {
        let vectors = 5;
        let mut both = Both {
            relays: vec![VectorRelay::default(); vectors],
            scan: Scan::new(vectors),
            words: vec![0; vectors],
            owed: vec![false; vectors],
            signalled: 0,
        };
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for round in 0..100_000 {
            both.act(random(&mut state));
            // Whatever is masked and unscanned now: were it settled, nobody would be owed anything.
            let mut settled = both.clone();
            for vector in 0..vectors {
                let step = settled.relays[vector].mask(false);
                settled.step(vector, step);
                if settled.scan.mask(vector, false) {
                    settled.signal(vector);
                }
            }
            settled.scan();
            assert_eq!(settled.owed, vec![false; vectors], "round {round}");
        }
        let raised: u64 = both.relays.iter().map(|r| r.counters().raised).sum();
        let bells: u64 = both.relays.iter().map(|r| r.counters().bells).sum();
        assert!(both.signalled <= bells && bells <= raised, "never invented");
    }
}
