//! Which vectors of a borrowed function were raised: set by the irq thread, taken by the worker.

use super::Tell;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One bit per vector, and an eventfd that wakes the worker.
pub struct Signals {
    bits: Box<[AtomicU64]>,
    wake: OwnedFd,
    scanned: Box<[AtomicU64]>,
    /// The interrupt words, as the irq thread last read them.
    seen: Box<[AtomicU64]>,
    /// Of a worker in another process.
    tell: Option<Tell>,
    /// The lease is over.
    ended: AtomicBool,
}

impl Signals {
    /// For so many vectors, none raised.
    pub fn new(vectors: u32) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let words = (vectors as usize).div_ceil(64);
        let bits = (0..words).map(|_| AtomicU64::new(0)).collect();
        let zeros = || (0..vectors).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            bits,
            wake,
            scanned: zeros(),
            seen: zeros(),
            tell: None,
            ended: AtomicBool::new(false),
        })
    }

    /// For a worker in another process, which hears of each raise. No thread of this one waits.
    pub fn told(vectors: u32, tell: Tell) -> io::Result<Self> {
        let tell = Some(tell);
        Ok(Self {
            tell,
            ..Self::new(vectors)?
        })
    }

    /// The lease is over, and nothing is raised any more: guest memory is about to be unpinned, and
    /// the data behind a later interrupt would have gone nowhere.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// A vector was raised. Many raises before the worker looks are one.
    pub fn raise(&self, vector: u32) {
        if self.ended.load(Ordering::SeqCst) {
            return;
        }
        let Some(word) = self.bits.get(vector as usize / 64) else {
            return;
        };
        let Some(scanned) = self.scanned.get(vector as usize) else {
            return;
        };
        let count = scanned.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(tell) = &self.tell {
            return tell(vector, count);
        }
        word.fetch_or(1 << (vector % 64), Ordering::Release);
        self.wake();
    }

    /// The irq thread has read this word, and raises what follows from it.
    pub(super) fn saw(&self, vector: usize, word: u64) {
        if let Some(seen) = self.seen.get(vector) {
            seen.store(word, Ordering::Relaxed);
        }
    }

    /// Whether a word stands there that the irq thread has not read.
    pub(super) fn has_unseen(&self, read: impl Fn(u32) -> u64) -> bool {
        let mut words = (0..).zip(&self.seen);
        words.any(|(vector, seen)| read(vector) != seen.load(Ordering::Relaxed))
    }

    /// Wakes the worker.
    pub fn wake(&self) {
        // It can only fail at 2^64 - 2 wakes that nobody took; the worker is awake then.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The eventfd that wakes the worker.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Takes the raised vectors, word by word.
    pub fn take(&self, mut each: impl FnMut(u32)) {
        let mut drained = [0u8; 8];
        let _ = rustix::io::read(&self.wake, &mut drained);
        for (at, word) in self.bits.iter().enumerate() {
            let mut bits = word.swap(0, Ordering::Acquire);
            while bits != 0 {
                each(at as u32 * 64 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
    }

    /// How often each vector was found raised by a scan.
    pub fn scanned(&self) -> Vec<u64> {
        self.scanned
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_raised_after_the_end_comes_to_nobody() {
        let signals = Signals::new(2).expect("an eventfd");
        signals.raise(0);
        signals.end();
        signals.raise(1);
        let mut taken = Vec::new();
        signals.take(|vector| taken.push(vector));
        assert_eq!((taken, signals.scanned()), (vec![0], vec![1, 0]));
    }
}
