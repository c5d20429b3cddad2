//! The cable between two soft ports, and the registers of both halves.

use super::armed::Armed;
use super::egress::{Egress, Store};
use super::fault::{Fault, FaultPlan, Operation};
use super::space::{PROCESSORS, in_hardware};
use super::{SoftHost, SoftPort, SoftSpace};
use crate::model::PortIova;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{array, io, thread};

/// Doorbells per half, as Intel's gen4.
pub(super) const DOORBELLS: u32 = 32;
/// Scratchpads per half, as Intel's gen4.
pub(super) const SPADS: usize = 16;
/// The status bit for a change of link.
pub(super) const LINK_BIT: u64 = 1 << DOORBELLS;

/// What a soft port is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftPortConfig {
    /// Sizes of its two memory windows.
    pub window_bytes: [u64; 2],
}

/// One half's registers.
#[derive(Default)]
pub(super) struct Half {
    pub(super) link_enabled: bool,
    pub(super) spads: [u32; SPADS],
    pub(super) pending: u64,
    pub(super) unmasked: u64,
    pub(super) inbound: [Option<(PortIova, u64)>; 2],
}

#[derive(Default)]
struct State {
    halves: [Half; 2],
    unpowered: [bool; 2],
    cable_out: bool,
    /// The operation at which a link that flapped comes back.
    flap_end: Option<u64>,
    /// Bells under way: when, to which side, which.
    bells: Vec<(u64, usize, u64)>,
    up: bool,
}

/// What both ports and the cable share.
pub(super) struct Fabric {
    state: Mutex<State>,
    egress: [Mutex<Egress>; 2],
    delivered: Condvar,
    faults: Armed,
    pub(super) doorbell_ordered: bool,
    /// Whether stores can be held at all.
    holding: bool,
    /// Operations of both ports so far, counted while faults are planned.
    clock: AtomicU64,
    downs: AtomicU64,
    pub(super) hosts: [Arc<SoftHost>; 2],
    pub(super) events: [OwnedFd; 2],
    pub(super) spaces: [Arc<SoftSpace>; 2],
    pub(super) window_bytes: [[u64; 2]; 2],
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fabric {
    pub(super) fn is_up(&self) -> bool {
        lock(&self.state).up
    }

    /// Works on one half's registers, then lets the link and the interrupt follow from them.
    pub(super) fn with_half<T>(&self, side: usize, act: impl FnOnce(&mut Half) -> T) -> T {
        self.change(|state| act(&mut state.halves[side]))
    }

    /// Works on the far half's registers; nothing arrives while the link is down.
    pub(super) fn with_far_half(&self, side: usize, act: impl FnOnce(&mut Half)) {
        self.change(|state| {
            if state.up {
                act(&mut state.halves[1 - side]);
            }
        });
    }

    pub(super) fn set_power(&self, side: usize, on: bool) {
        self.change(|state| {
            state.halves[side] = Half::default();
            state.unpowered[side] = !on;
        });
    }

    fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.state);
        let before = state.halves.each_ref().map(|h| h.pending & h.unmasked);
        let result = act(&mut state);
        let enabled = state.halves.iter().all(|half| half.link_enabled);
        let whole = !state.cable_out && state.flap_end.is_none() && state.unpowered == [false; 2];
        let up = enabled && whole;
        if std::mem::replace(&mut state.up, up) != up {
            state.halves.iter_mut().for_each(|h| h.pending |= LINK_BIT);
            self.downs.fetch_add(u64::from(!up), Ordering::AcqRel);
            // What is under way when the link goes down is lost.
            state.bells.clear();
            self.egress
                .iter()
                .for_each(|egress| lock(egress).lose_all());
        }
        for ((half, before), event) in state.halves.iter().zip(before).zip(&self.events) {
            // A bit that is set already is silent: an interrupt is an edge.
            if half.pending & half.unmasked & !before != 0 {
                // Only fails when the counter is at its limit, and then it is readable.
                let _ = rustix::io::write(event, &1u64.to_ne_bytes());
            }
        }
        result
    }

    /// Software of `side` does something with its port: what is under way comes nearer.
    pub(super) fn tick(&self, side: usize) {
        self.hosts[side].act();
        if !self.faults.is_active() {
            return;
        }
        let now = self.clock.fetch_add(1, Ordering::AcqRel) + 1;
        self.change(|state| {
            state.flap_end = state.flap_end.filter(|end| *end > now);
            deliver_bells(state, Some(now));
        });
        // A device's access arrives by itself, and carries nothing else along.
        if !in_hardware() {
            (0..2).for_each(|side| self.deliver(side, Some(now)));
        }
    }

    /// Rings the far half, if the plan lets it.
    pub(super) fn ring(&self, side: usize, bits: u64) {
        let now = self.clock.load(Ordering::Acquire);
        match self.faults.roll(Operation::Bell) {
            Some(Fault::BellLost) => {}
            Some(Fault::BellLate(late)) => self.change(|state| {
                if state.up {
                    state.bells.push((now + u64::from(late), 1 - side, bits));
                }
            }),
            Some(Fault::FlapAtBell(away)) => self.flap(away),
            _ => self.with_far_half(side, |half| half.pending |= bits),
        }
    }

    fn flap(&self, away: u32) {
        let now = self.clock.load(Ordering::Acquire);
        self.change(|state| state.flap_end = Some(now + u64::from(away)));
        if away == 0 {
            self.change(|state| state.flap_end = None);
        }
    }

    /// A store through a window of `side`.
    pub(super) fn store(&self, side: usize, store: &Store<'_>) {
        let now = self.clock.load(Ordering::Acquire);
        let device = store.requester != PROCESSORS;
        let mut fault = self.faults.roll(Operation::Store);
        if fault.is_none() && device {
            fault = self.faults.roll(Operation::Dma);
        }
        let late = match fault {
            Some(Fault::FlapAtStore(away)) => return self.flap(away),
            Some(Fault::DmaLost) => return,
            Some(Fault::StoreHeld(late) | Fault::DmaHeld(late)) => Some(u64::from(late)),
            _ => None,
        };
        if !self.holding || !self.hold(side, store, late, now) {
            self.arrive(side, store);
        }
    }

    /// True when the store is held: by the plan, or because one before it is.
    fn hold(&self, side: usize, store: &Store<'_>, late: Option<u64>, now: u64) -> bool {
        let mut egress = lock(&self.egress[side]);
        if egress.is_full() {
            drop(egress);
            self.deliver(side, None);
            return false;
        }
        let held = late.is_some() || egress.blocks(store.requester);
        if held {
            egress.hold(store.held(now + late.unwrap_or(0)));
        }
        held
    }

    /// What a load does to the stores of its side: it pushes all of them before it.
    pub(super) fn flush(&self, side: usize) {
        if self.holding {
            self.deliver(side, None);
        }
    }

    /// Lets held stores of `side` arrive: those that are due, or all.
    fn deliver(&self, side: usize, now: Option<u64>) {
        let me = thread::current().id();
        let mut egress = lock(&self.egress[side]);
        // Who comes only by the way, or in the middle of a device's access, does not wait: two
        // such could wait for each other.
        while let Some(other) = egress.deliverer {
            if other == me || now.is_some() || in_hardware() {
                return;
            }
            let woken = self.delivered.wait(egress);
            egress = woken.unwrap_or_else(PoisonError::into_inner);
        }
        if !egress.is_due(now) {
            return;
        }
        egress.deliverer = Some(me);
        while let Some(store) = egress.next(now) {
            egress.under_way = Some(store.requester);
            drop(egress);
            self.arrive(side, &store.as_store());
            egress = lock(&self.egress[side]);
            egress.under_way = None;
        }
        egress.deliverer = None;
        self.delivered.notify_all();
    }

    /// A store reaches the far end, in pieces of at most 8 bytes at a limit, so that what lies
    /// before it arrives.
    fn arrive(&self, side: usize, store: &Store<'_>) {
        let space = &self.spaces[1 - side];
        let len = store.data.len();
        self.pieces(side, store.window, store.offset, len, |address, range| {
            space.write(address, &store.data[range]);
        });
    }

    /// A load from the far end.
    pub(super) fn load(&self, side: usize, window: usize, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let space = &self.spaces[1 - side];
        self.pieces(side, window, offset, data.len(), |address, range| {
            space.read(address, &mut data[range]);
        });
    }

    fn pieces(
        &self,
        side: usize,
        window: usize,
        offset: u64,
        len: usize,
        mut act: impl FnMut(u64, std::ops::Range<usize>),
    ) {
        if let Some(address) = self.translate(side, window, offset, len) {
            return act(address, 0..len);
        }
        let mut done = 0;
        while done < len {
            let at = offset.saturating_add(done as u64);
            let step = (len - done).min(8 - (at % 8) as usize);
            if let Some(address) = self.translate(side, window, at, step) {
                act(address, done..done + step);
            }
            done += step;
        }
    }

    /// Where an access of `side` through window `index` goes at the far end.
    fn translate(&self, side: usize, index: usize, offset: u64, len: usize) -> Option<u64> {
        let state = lock(&self.state);
        let (base, limit) = (*state.halves[1 - side].inbound.get(index)?)?;
        let end = offset.checked_add(len as u64)?;
        let inside = end <= limit && end <= self.window_bytes[side][index];
        (state.up && inside).then_some(base.0 + offset)
    }
}

fn deliver_bells(state: &mut State, now: Option<u64>) {
    let arrived = |(due, _, _): &(u64, usize, u64)| now.is_none_or(|now| *due <= now);
    for (_, side, bits) in state.bells.iter().filter(|bell| arrived(bell)) {
        state.halves[*side].pending |= bits;
    }
    state.bells.retain(|bell| !arrived(bell));
}

/// The plan would hold stores of a kind that the link's own plan never held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a plan that holds stores back needs a link that was made with such a plan")]
pub struct StoresAreOrdered;

/// The cable, with a port at each end.
pub struct SoftLink {
    fabric: Arc<Fabric>,
    ports: [Arc<SoftPort>; 2],
}

impl SoftLink {
    /// Two ports of two hosts with the cable in; the link comes up when both have enabled it.
    pub fn new(configs: [SoftPortConfig; 2]) -> io::Result<Self> {
        Self::faulty(configs, FaultPlan::default())
    }

    /// The same, with a plan of faults.
    pub fn faulty(configs: [SoftPortConfig; 2], plan: FaultPlan) -> io::Result<Self> {
        Self::between(array::from_fn(|_| SoftHost::new()), configs, plan)
    }

    /// The same between two given hosts. A plan that holds stores takes from the ports the promise
    /// that a doorbell stays behind earlier stores.
    pub fn between(
        hosts: [Arc<SoftHost>; 2],
        configs: [SoftPortConfig; 2],
        plan: FaultPlan,
    ) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fabric = Arc::new(Fabric {
            state: Mutex::default(),
            egress: array::from_fn(|_| Mutex::default()),
            delivered: Condvar::new(),
            doorbell_ordered: !plan.holds_stores(),
            holding: plan.holds_dma(),
            faults: Armed::new(plan),
            clock: AtomicU64::new(0),
            downs: AtomicU64::new(0),
            hosts,
            events: [eventfd(0, flags)?, eventfd(0, flags)?],
            spaces: array::from_fn(|_| Arc::new(SoftSpace::new())),
            window_bytes: configs.map(|config| config.window_bytes),
        });
        for (side, host) in fabric.hosts.iter().enumerate() {
            host.attach(&fabric, side);
        }
        let ports = array::from_fn(|side| Arc::new(SoftPort::new(Arc::clone(&fabric), side)));
        Ok(Self { fabric, ports })
    }

    /// The port at end 0 or 1.
    pub fn port(&self, side: usize) -> Arc<SoftPort> {
        Arc::clone(&self.ports[side & 1])
    }

    /// The host at end 0 or 1.
    pub fn host(&self, side: usize) -> &Arc<SoftHost> {
        &self.fabric.hosts[side & 1]
    }

    /// Replaces the plan; its operations are counted from now on. What is under way arrives.
    pub fn arm(&self, plan: FaultPlan) -> Result<(), StoresAreOrdered> {
        let unfit = plan.holds_stores() && self.fabric.doorbell_ordered;
        if unfit || plan.holds_dma() && !self.fabric.holding {
            return Err(StoresAreOrdered);
        }
        // What arrives now may have a device store, at which the last plan would strike once more: a
        // link that flapped then would not come back, as nothing counts without a plan.
        self.fabric.faults.arm(FaultPlan::default());
        self.settle();
        self.fabric.faults.arm(plan);
        Ok(())
    }

    /// Lets everything arrive that is under way, and a link that flapped come back.
    pub fn settle(&self) {
        self.fabric.change(|state| {
            state.flap_end = None;
            deliver_bells(state, None);
        });
        (0..2).for_each(|side| self.fabric.deliver(side, None));
    }

    /// Which faults of the plan have struck, and how often.
    pub fn struck(&self) -> BTreeMap<Fault, u64> {
        self.fabric.faults.struck()
    }

    /// How often the link has gone down, for however short a time.
    pub fn downs(&self) -> u64 {
        self.fabric.downs.load(Ordering::Acquire)
    }

    /// Pulls the cable.
    pub fn cut(&self) {
        self.fabric.change(|state| state.cable_out = true);
    }

    /// Puts it back.
    pub fn plug(&self) {
        self.fabric.change(|state| state.cable_out = false);
    }
}
