//! What a port knows of its leases, so that a daemon that comes anew can be told; pure.
//!
//! A port outlives its daemon: leases are opened and ended meanwhile. The last lease of each
//! function is kept with its end, until the function is lent again: a daemon may have died before
//! it wrote that end down, and to hear of it twice does no harm.

use crate::line::{FromDaemon, FromPort, Lease, short};
use std::collections::BTreeMap;
use vfio_shim::model::Bdf;
use vfio_shim::path::grant::{AskId, EndCause, Grant, LeaseEnd, ToPool, ToPort};
use vfio_shim::path::message::Secret;
use vfio_shim::path::{LeaseId, Refusal, RefusalCode};

/// Most leases that are over and still remembered; the oldest are forgotten first.
pub const ENDED_MAX: usize = 256;

#[derive(Debug)]
struct Known {
    lease: LeaseId,
    path_open: bool,
    end: Option<LeaseEnd>,
}

impl Known {
    /// Why this lease ended.
    fn cause_of(&self, lease: LeaseId) -> Option<EndCause> {
        let end = self.end.as_ref().filter(|_| self.lease == lease)?;
        Some(end.cause.clone())
    }
}

/// All leases of one port.
#[derive(Debug, Default)]
pub struct Ledger {
    known: BTreeMap<Bdf, Known>,
    /// What the daemon has been asked. The secrets stay here: who only writes leases down has no
    /// use for them.
    asks: BTreeMap<AskId, (Bdf, Secret)>,
}

impl Ledger {
    /// The port's engine says something: what the daemon is to be told.
    pub fn told(&mut self, message: ToPool) -> FromPort {
        match message {
            ToPool::Grant {
                ask,
                bdf,
                borrower,
                secret,
            } => {
                self.asks.insert(ask, (bdf, secret));
                FromPort::Ask {
                    ask: ask.0,
                    function: bdf.into(),
                    borrower,
                }
            }
            ToPool::Opened { bdf, lease } => {
                if let Some(known) = self.in_force(bdf, lease) {
                    known.path_open = true;
                }
                FromPort::Opened {
                    function: bdf.into(),
                    epoch: lease.0,
                }
            }
            ToPool::Ended { bdf, lease, end } => {
                if let Some(known) = self.in_force(bdf, lease) {
                    known.end = Some(end.clone());
                }
                self.forget();
                FromPort::Ended {
                    function: bdf.into(),
                    epoch: lease.0,
                    end: short(end.into()),
                }
            }
            ToPool::Mended { bdf, lease, undone } => {
                let cause = self.known.get(&bdf).and_then(|known| known.cause_of(lease));
                let cause = cause.unwrap_or(EndCause::Reclaimed);
                let end = LeaseEnd { cause, undone };
                let known = Known {
                    lease,
                    path_open: false,
                    end: Some(end.clone()),
                };
                self.known.insert(bdf, known);
                self.forget();
                FromPort::Ended {
                    function: bdf.into(),
                    epoch: lease.0,
                    end: short(end.into()),
                }
            }
            ToPool::Gone => {
                *self = Self::default();
                FromPort::Gone
            }
        }
    }

    /// The daemon says something: what the engine is to be told. Nothing, where it answers what it
    /// was not asked.
    pub fn said(&mut self, message: FromDaemon) -> Option<ToPort> {
        match message {
            FromDaemon::Granted { ask, epoch } => {
                let (bdf, secret) = self.asks.remove(&AskId(ask))?;
                let lease = LeaseId(epoch);
                let known = Known {
                    lease,
                    path_open: false,
                    end: None,
                };
                self.known.insert(bdf, known);
                Some(ToPort::Granted(AskId(ask), Ok(Grant { lease, secret })))
            }
            FromDaemon::Refused {
                ask,
                code,
                figure,
                text,
            } => {
                self.asks.remove(&AskId(ask))?;
                let code = RefusalCode::from_raw(code).unwrap_or(RefusalCode::Kernel);
                let refusal = Refusal::new(code, figure, text);
                Some(ToPort::Granted(AskId(ask), Err(refusal)))
            }
            FromDaemon::Expired { epoch } => Some(ToPort::Expired(LeaseId(epoch))),
        }
    }

    /// The daemon is not there (any more): nobody who asked is kept waiting.
    pub fn lost(&mut self) -> Vec<ToPort> {
        let asks = std::mem::take(&mut self.asks).into_keys();
        asks.map(|ask| ToPort::Granted(ask, Err(no_daemon())))
            .collect()
    }

    /// All that a daemon has to know.
    pub fn leases(&self) -> Vec<Lease> {
        let lease = |(bdf, known): (&Bdf, &Known)| Lease {
            function: (*bdf).into(),
            epoch: known.lease.0,
            path_open: known.path_open,
            end: known.end.clone().map(|end| short(end.into())),
        };
        self.known.iter().map(lease).collect()
    }

    fn in_force(&mut self, bdf: Bdf, lease: LeaseId) -> Option<&mut Known> {
        let known = self.known.get_mut(&bdf)?;
        (known.lease == lease && known.end.is_none()).then_some(known)
    }

    fn forget(&mut self) {
        let ended = self.known.iter().filter(|(_, known)| known.end.is_some());
        if ended.clone().count() > ENDED_MAX {
            let oldest = ended.min_by_key(|(_, known)| known.lease);
            if let Some(bdf) = oldest.map(|(bdf, _)| *bdf) {
                self.known.remove(&bdf);
            }
        }
    }
}

fn no_daemon() -> Refusal {
    let text = "the lender's daemon does not run, and without it no lease is written down: start \
                `sublet daemon` on the lender, and borrow again";
    Refusal::new(RefusalCode::WrongState, 0, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_shim::path::grant::Undone;

    fn bdf(at: usize) -> Bdf {
        format!("{at:04x}:01:00.1").parse().unwrap()
    }

    fn lend(ledger: &mut Ledger, at: usize, epoch: u64) -> ToPort {
        ledger.told(ToPool::Grant {
            ask: AskId(epoch),
            bdf: bdf(at),
            borrower: Some(8),
            secret: Secret([epoch as u8; 16]),
        });
        let ask = epoch;
        ledger.said(FromDaemon::Granted { ask, epoch }).unwrap()
    }

    fn end(ledger: &mut Ledger, at: usize, epoch: u64) {
        ledger.told(ToPool::Ended {
            bdf: bdf(at),
            lease: LeaseId(epoch),
            end: LeaseEnd {
                cause: EndCause::Returned,
                undone: Undone::NoPath,
            },
        });
    }

    #[test]
    fn grant_comes_with_the_secret_that_never_left_the_port() {
        let mut ledger = Ledger::default();
        let asked = ledger.told(ToPool::Grant {
            ask: AskId(7),
            bdf: bdf(0),
            borrower: None,
            secret: Secret([9; 16]),
        });
        assert!(
            !String::from_utf8(asked.encode().unwrap())
                .unwrap()
                .contains("secret")
        );
        let granted = ledger.said(FromDaemon::Granted { ask: 7, epoch: 3 });
        let grant = Grant {
            lease: LeaseId(3),
            secret: Secret([9; 16]),
        };
        assert_eq!(granted, Some(ToPort::Granted(AskId(7), Ok(grant))));
        let again = FromDaemon::Granted { ask: 7, epoch: 4 };
        assert_eq!(ledger.said(again), None, "nobody asked");
    }

    #[test]
    fn what_happened_without_a_daemon_is_told_to_the_next() {
        let mut ledger = Ledger::default();
        for (at, epoch) in [(0, 1), (1, 2), (2, 3)] {
            lend(&mut ledger, at, epoch);
        }
        ledger.told(ToPool::Opened {
            bdf: bdf(1),
            lease: LeaseId(2),
        });
        end(&mut ledger, 2, 3);
        let leases = ledger.leases();
        let seen: Vec<_> = leases
            .iter()
            .map(|lease| (lease.epoch, lease.path_open, lease.end.is_some()))
            .collect();
        assert_eq!(
            seen,
            [(1, false, false), (2, true, false), (3, false, true)]
        );
        // The end of an older lease is not that of the newer one.
        lend(&mut ledger, 2, 4);
        end(&mut ledger, 2, 3);
        assert_eq!(ledger.leases()[2].end, None);
    }

    #[test]
    fn whoever_asked_a_daemon_that_is_gone_is_refused_once() {
        let mut ledger = Ledger::default();
        ledger.told(ToPool::Grant {
            ask: AskId(1),
            bdf: bdf(0),
            borrower: None,
            secret: Secret([0; 16]),
        });
        let refused = ledger.lost();
        let [ToPort::Granted(AskId(1), Err(refusal))] = &refused[..] else {
            panic!("{refused:?}");
        };
        assert!(refusal.text.contains("`sublet daemon`"), "{refusal:?}");
        assert!(ledger.lost().is_empty() && ledger.leases().is_empty());
    }

    #[test]
    fn ended_leases_are_remembered_up_to_the_limit_and_those_in_force_all() {
        let mut ledger = Ledger::default();
        lend(&mut ledger, 0, 1);
        for at in 1..=ENDED_MAX + 1 {
            lend(&mut ledger, at, 1 + at as u64);
            end(&mut ledger, at, 1 + at as u64);
            let ended = ledger.leases().len() - 1;
            assert_eq!(ended, at.min(ENDED_MAX));
        }
        let epochs: Vec<u64> = ledger.leases().iter().map(|lease| lease.epoch).collect();
        assert_eq!(epochs[..2], [1, 3], "the oldest end is forgotten");
    }
}
