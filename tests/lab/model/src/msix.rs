//! The MSI-X vectors of one half: eventfds that the client gave, and what waits for one.

use std::os::fd::{AsRawFd, OwnedFd};

use thiserror::Error;

use crate::config_space::VECTORS;

const DATA_NONE: u32 = 1 << 0;
const DATA_BOOL: u32 = 1 << 1;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_TRIGGER: u32 = 1 << 5;
/// VFIO's index of MSI-X.
pub const MSIX_INDEX: u32 = 2;

/// Why a SET_IRQS was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IrqError {
    #[error("irq index {index} with flags {flags:#x} is not supported")]
    Unsupported { index: u32, flags: u32 },
    #[error("vectors {start} and {count} from there pass the end")]
    Range { start: u32, count: u32 },
    #[error("{count} vectors with {fds} file descriptors")]
    Count { count: u32, fds: usize },
    #[error("a trigger is no eventfd")]
    NotEventfd,
}

/// The vectors.
#[derive(Debug)]
pub struct Vectors {
    triggers: [Option<OwnedFd>; VECTORS],
    /// Fired while MSI-X was enabled and no trigger was there.
    pending: u64,
}

impl Default for Vectors {
    fn default() -> Self {
        Self {
            triggers: [const { None }; VECTORS],
            pending: 0,
        }
    }
}

impl Vectors {
    /// Forgets all triggers.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The pending bits, as the PBA shows them.
    pub fn pending(&self) -> u64 {
        self.pending
    }

    /// Carries out a SET_IRQS; returns how many interrupts were signalled by it.
    pub fn set(
        &mut self,
        (flags, index): (u32, u32),
        (start, count): (u32, u32),
        data: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<u64, IrqError> {
        let unsupported = IrqError::Unsupported { index, flags };
        if index != MSIX_INDEX {
            // Switching off what never was on is what a client does while it tears down.
            return if flags == DATA_NONE | ACTION_TRIGGER && count == 0 {
                Ok(0)
            } else {
                Err(unsupported)
            };
        }
        let end = start
            .checked_add(count)
            .filter(|end| *end as usize <= VECTORS);
        let end = end.ok_or(IrqError::Range { start, count })?;
        let range = start as usize..end as usize;
        if flags == DATA_NONE | ACTION_TRIGGER && count == 0 {
            self.clear();
            return Ok(0);
        }
        if flags == DATA_EVENTFD | ACTION_TRIGGER {
            return self.assign(range, fds);
        }
        let chosen: Vec<bool> = if flags == DATA_NONE | ACTION_TRIGGER {
            vec![true; range.len()]
        } else if flags == DATA_BOOL | ACTION_TRIGGER && data.len() >= range.len() {
            data.iter()
                .take(range.len())
                .map(|byte| *byte != 0)
                .collect()
        } else {
            return Err(unsupported);
        };
        let vectors = range.zip(chosen).filter(|(_, chosen)| *chosen);
        Ok(vectors.filter(|(vector, _)| self.signal(*vector)).count() as u64)
    }

    /// Gives vectors their triggers; without descriptors, takes the triggers away.
    fn assign(
        &mut self,
        range: std::ops::Range<usize>,
        fds: Vec<OwnedFd>,
    ) -> Result<u64, IrqError> {
        if fds.is_empty() {
            for vector in range {
                self.triggers[vector] = None;
            }
            return Ok(0);
        }
        if fds.len() != range.len() {
            return Err(IrqError::Count {
                count: range.len() as u32,
                fds: fds.len(),
            });
        }
        if !fds.iter().all(is_eventfd) {
            return Err(IrqError::NotEventfd);
        }
        let mut signalled = 0;
        for (vector, fd) in range.zip(fds) {
            self.triggers[vector] = Some(fd);
            if self.pending >> vector & 1 != 0 {
                self.pending &= !(1 << vector);
                signalled += u64::from(self.signal(vector));
            }
        }
        Ok(signalled)
    }

    /// Fires a vector. Without a trigger it stays pending while MSI-X is enabled, else it is lost,
    /// as in hardware. Returns whether an interrupt went out.
    pub fn fire(&mut self, vector: usize, enabled: bool) -> bool {
        if self.signal(vector) {
            return true;
        }
        if enabled && vector < VECTORS {
            self.pending |= 1 << vector;
        }
        false
    }

    fn signal(&self, vector: usize) -> bool {
        let Some(Some(trigger)) = self.triggers.get(vector) else {
            return false;
        };
        rustix::io::write(trigger, &1u64.to_ne_bytes()).is_ok()
    }
}

/// A trigger must be an eventfd: a write to anything else could block the model.
fn is_eventfd(fd: &OwnedFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|link| link.as_os_str() == "anon_inode:[eventfd]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    const ASSIGN: (u32, u32) = (DATA_EVENTFD | ACTION_TRIGGER, MSIX_INDEX);
    const NONE: (u32, u32) = (DATA_NONE | ACTION_TRIGGER, MSIX_INDEX);

    fn trigger() -> OwnedFd {
        eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("eventfd")
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }

    #[test]
    fn new_trigger_takes_over_at_once() {
        let (first, second) = (trigger(), trigger());
        let mut vectors = Vectors::default();
        for fd in [&first, &second] {
            let fds = vec![fd.try_clone().expect("dup")];
            assert_eq!(vectors.set(ASSIGN, (32, 1), &[], fds), Ok(0));
            assert!(vectors.fire(32, true));
            assert_eq!(count(fd), 1);
        }
        assert_eq!(count(&first), 0);
    }

    #[test]
    fn vector_without_a_trigger_is_pending_only_while_msix_is_enabled() {
        let fd = trigger();
        let mut vectors = Vectors::default();
        assert!(!vectors.fire(0, false) && !vectors.fire(1, true));
        assert_eq!(vectors.pending(), 1 << 1);
        let fds = vec![fd.try_clone().expect("dup"), trigger()];
        assert_eq!(vectors.set(ASSIGN, (1, 2), &[], fds), Ok(1));
        assert_eq!((count(&fd), vectors.pending()), (1, 0));
    }

    #[test]
    fn switching_off_forgets_the_triggers() {
        let fd = trigger();
        let mut vectors = Vectors::default();
        let fds = vec![fd.try_clone().expect("dup")];
        vectors.set(ASSIGN, (0, 1), &[], fds).expect("assigned");
        vectors.set(NONE, (0, 0), &[], vec![]).expect("off");
        vectors
            .set(NONE, (0, 0), &[], vec![])
            .expect("off again is no error");
        assert!(!vectors.fire(0, false));
        assert_eq!(count(&fd), 0);
    }

    #[test]
    fn vectors_past_the_last_one_and_other_descriptors_are_refused() {
        let mut vectors = Vectors::default();
        let set = |vectors: &mut Vectors, start, count, fds| {
            vectors.set(ASSIGN, (start, count), &[], fds)
        };
        assert_eq!(set(&mut vectors, 32, 1, vec![trigger()]), Ok(0));
        assert!(set(&mut vectors, 33, 1, vec![trigger()]).is_err());
        assert!(set(&mut vectors, u32::MAX, 2, vec![trigger()]).is_err());
        assert!(set(&mut vectors, 0, 2, vec![trigger()]).is_err());
        let file = std::fs::File::open("/dev/null").expect("open").into();
        assert_eq!(
            set(&mut vectors, 0, 1, vec![file]),
            Err(IrqError::NotEventfd)
        );
        assert!(
            vectors
                .set((DATA_EVENTFD | ACTION_TRIGGER, 1), (0, 1), &[], vec![])
                .is_err()
        );
        assert!(!vectors.fire(64, true));
    }
}
