//! A function's vectors in a VM: trigger, message and mask, in any order and as often as one likes.

use super::event::Event;
use super::{Gsi, IrqError, Msi, Routes};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A vector is wired (an irqfd of KVM) exactly while it has a trigger and a message and is not
/// masked.
#[derive(Default)]
struct Vector {
    // Drop order: the irqfd is taken off in `Vectors::drop` before the route goes.
    trigger: Option<Event>,
    message: Option<Msi>,
    masked: bool,
    wired: bool,
    gsi: Option<Gsi>,
}

/// The vectors of one function. Each setter may be called again with what is already so.
///
/// While a vector is not wired its trigger counts; wiring it raises one interrupt for whatever was
/// signalled meanwhile, so nothing is lost by masking, by a swap of triggers, or by an order.
pub struct Vectors {
    routes: Arc<Routes>,
    vectors: Vec<Vector>,
}

fn refused(act: &'static str, vector: usize) -> impl Fn(io::Error) -> IrqError {
    move |source| IrqError::Kernel {
        act,
        number: vector as u32,
        source,
    }
}

impl Vectors {
    /// So many vectors, without triggers and messages.
    pub fn new(routes: Arc<Routes>, count: u32) -> Self {
        let vectors = (0..count).map(|_| Vector::default()).collect();
        Self { routes, vectors }
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.vectors.len() as u32
    }

    fn check(&self, vector: u32) -> Result<usize, IrqError> {
        match vector < self.count() {
            true => Ok(vector as usize),
            false => Err(IrqError::NoVector {
                vector,
                count: self.count(),
            }),
        }
    }

    /// Gives the vector this trigger, or takes its trigger away. What the old trigger still holds
    /// passes to the new one. On failure all is as before.
    pub fn set_trigger(&mut self, vector: u32, trigger: Option<OwnedFd>) -> Result<(), IrqError> {
        let at = self.check(vector)?;
        self.replace_trigger(at, trigger.map(Event::from_fd))
    }

    fn replace_trigger(&mut self, at: usize, trigger: Option<Event>) -> Result<(), IrqError> {
        self.unwire(at)?;
        let old = std::mem::replace(&mut self.vectors[at].trigger, trigger);
        if let Err(error) = self.settle(at) {
            self.vectors[at].trigger = old;
            self.settle(at)?;
            return Err(error);
        }
        let held = old.is_some_and(|old| old.take() != 0);
        if let (true, Some(trigger)) = (held, &self.vectors[at].trigger) {
            trigger.signal();
        }
        Ok(())
    }

    /// Makes a trigger and gives it to the vector; the fd returned is for whoever signals it.
    pub fn make_trigger(&mut self, vector: u32) -> Result<OwnedFd, IrqError> {
        let at = self.check(vector)?;
        let event = Event::new().map_err(refused("make an eventfd", at))?;
        let theirs = event.to_fd().map_err(refused("duplicate an eventfd", at))?;
        self.replace_trigger(at, Some(event))?;
        Ok(theirs)
    }

    /// The message that the vector sends from now on; without one it sends nothing.
    pub fn set_message(&mut self, vector: u32, message: Option<Msi>) -> Result<(), IrqError> {
        let at = self.check(vector)?;
        match message {
            Some(message) => {
                if self.vectors[at].gsi.is_none() {
                    self.vectors[at].gsi = Some(self.routes.allocate()?);
                }
                if let Some(gsi) = &self.vectors[at].gsi {
                    gsi.route(message)?;
                }
                self.vectors[at].message = Some(message);
            }
            None => {
                self.unwire(at)?;
                self.vectors[at].message = None;
                self.vectors[at].gsi = None;
            }
        }
        self.settle(at)
    }

    /// Masks or unmasks the vector. What is signalled while it is masked is raised once, when it
    /// is unmasked.
    pub fn set_masked(&mut self, vector: u32, masked: bool) -> Result<(), IrqError> {
        let at = self.check(vector)?;
        let before = std::mem::replace(&mut self.vectors[at].masked, masked);
        let settled = self.settle(at);
        if settled.is_err() {
            self.vectors[at].masked = before;
        }
        settled
    }

    /// Whether an interrupt waits for the vector to be unmasked.
    pub fn is_pending(&self, vector: u32) -> bool {
        let vector = self.vectors.get(vector as usize);
        let trigger = vector.filter(|v| !v.wired).and_then(|v| v.trigger.as_ref());
        trigger.is_some_and(Event::is_pending)
    }

    /// How many vectors are wired.
    pub fn wired(&self) -> usize {
        self.vectors.iter().filter(|vector| vector.wired).count()
    }

    /// The triggers of wired vectors with their messages.
    fn wired_triggers(&self) -> impl Iterator<Item = (&Event, Msi)> {
        let wired = self.vectors.iter().filter(|vector| vector.wired);
        wired.filter_map(|vector| Some((vector.trigger.as_ref()?, vector.message?)))
    }

    /// In a stand-in, what KVM would raise: the messages that are due, each once.
    pub(super) fn take_due(&self) -> Vec<Msi> {
        let due = self
            .wired_triggers()
            .filter(|(trigger, _)| trigger.take() != 0);
        due.map(|(_, message)| message).collect()
    }

    /// Waits until a message is due, at most so long.
    pub(super) fn wait_due(&self, limit: &Timespec) {
        let triggers = self.wired_triggers();
        let mut fds: Vec<_> = triggers
            .map(|(trigger, _)| PollFd::new(trigger, PollFlags::IN))
            .collect();
        // Whether it is due, the caller looks anyway.
        let _ = poll(&mut fds, Some(limit));
    }

    /// Takes every trigger, message and mask away. Fine where there are none.
    pub fn clear(&mut self) -> Result<(), IrqError> {
        for at in 0..self.vectors.len() {
            self.unwire(at)?;
            self.vectors[at] = Vector::default();
        }
        Ok(())
    }

    /// Makes the irqfd what trigger, message and mask say.
    fn settle(&mut self, at: usize) -> Result<(), IrqError> {
        let vector = &mut self.vectors[at];
        let wanted = vector.message.is_some() && !vector.masked;
        match (&vector.trigger, &vector.gsi) {
            (Some(trigger), Some(gsi)) if wanted => {
                if !vector.wired {
                    // The route stands, so what is pending finds its way.
                    if let Some(vm) = self.routes.vm() {
                        let wired = trigger.wire(vm, gsi.number());
                        wired.map_err(refused("add an irqfd", at))?;
                    }
                    vector.wired = true;
                }
                Ok(())
            }
            _ => self.unwire(at),
        }
    }

    fn unwire(&mut self, at: usize) -> Result<(), IrqError> {
        let vector = &mut self.vectors[at];
        if let (true, Some(trigger), Some(gsi)) = (vector.wired, &vector.trigger, &vector.gsi) {
            if let Some(vm) = self.routes.vm() {
                let unwired = trigger.unwire(vm, gsi.number());
                unwired.map_err(refused("take an irqfd away", at))?;
            }
            vector.wired = false;
        }
        Ok(())
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            tracing::error!(%error, "an irqfd is left until the VM ends");
        }
    }
}
