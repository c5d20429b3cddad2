//! What the kernel asks of whoever lends a function: to let go of it, or to know that it failed.
//!
//! The eventfds are this process's own, and the irq thread waits for them. While a function is
//! being unbound, or its PF's VFs are removed, the kernel waits in that until it is closed here.

use super::irq::{IrqCommand, IrqHandle};
use crate::model::{Bdf, Function, IrqIndex};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::OwnedFd;

/// What the kernel asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// The function back.
    Return,
    /// Nothing: the function reported an error that it cannot correct.
    Error,
}

impl Wish {
    /// Why a lease ends by it.
    pub(super) fn cause(self) -> &'static str {
        match self {
            Self::Return => {
                "the lender's kernel takes the function away: its driver is unbound, or the \
                 virtual functions of its PF are removed"
            }
            Self::Error => "the function reported an error that it could not correct",
        }
    }
}

/// An eventfd that the kernel fires.
pub(super) struct Watch {
    pub(super) wish: Wish,
    pub(super) fd: OwnedFd,
}

const WISHES: [(IrqIndex, Wish); 2] = [(IrqIndex::Req, Wish::Return), (IrqIndex::Err, Wish::Error)];

fn arm_one(function: &dyn Function, index: IrqIndex) -> io::Result<OwnedFd> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let given = vec![Some(fd.try_clone()?)];
    let set = function.set_irqs(index, 0, given);
    set.map_err(|error| io::Error::other(crate::path::words(&error)))?;
    Ok(fd)
}

/// Arms what the function has of them; what cannot be armed is told in the log.
pub(super) fn arm(function: &dyn Function, bdf: Bdf, irq: &IrqHandle) {
    let mut watches = Vec::new();
    for (index, wish) in WISHES {
        if function.info().irqs[index as usize].count == 0 {
            continue;
        }
        match arm_one(function, index) {
            Ok(fd) => watches.push(Watch { wish, fd }),
            Err(error) => {
                tracing::error!(%bdf, ?index, %error, "it could not be armed: what waits for this \
                                function to be closed will wait for ever");
            }
        }
    }
    irq.send(IrqCommand::Watch(bdf, watches));
}

/// Takes them back, before the function is closed.
pub(super) fn disarm(function: &dyn Function, bdf: Bdf, irq: &IrqHandle) {
    for (index, _) in WISHES {
        if function.info().irqs[index as usize].count == 0 {
            continue;
        }
        if let Err(error) = function.disable_irqs(index) {
            // Of a function that is gone there is nothing to take back.
            tracing::debug!(%bdf, ?index, %error, "it could not be disarmed");
        }
    }
    irq.send(IrqCommand::Unwatch(bdf));
}
