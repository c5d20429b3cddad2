//! The cable between two soft ports, and the registers of both halves.

use super::{SoftPort, SoftSpace};
use crate::model::{Aperture, Mapping, PortIova};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{array, io};

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

struct State {
    halves: [Half; 2],
    cable_in: bool,
    up: bool,
}

/// What both ports and the cable share.
pub(super) struct Fabric {
    state: Mutex<State>,
    pub(super) events: [OwnedFd; 2],
    pub(super) spaces: [Arc<SoftSpace>; 2],
    pub(super) window_bytes: [[u64; 2]; 2],
}

impl Fabric {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_up(&self) -> bool {
        self.lock().up
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

    fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let before = state.halves.each_ref().map(|h| h.pending & h.unmasked);
        let result = act(&mut state);
        let up = state.cable_in && state.halves.iter().all(|half| half.link_enabled);
        if std::mem::replace(&mut state.up, up) != up {
            state.halves.iter_mut().for_each(|h| h.pending |= LINK_BIT);
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

    /// Where an access of `side` through window `index` goes at the far end.
    fn translate(&self, side: usize, index: usize, offset: u64, len: usize) -> Option<u64> {
        let state = self.lock();
        let (base, limit) = (*state.halves[1 - side].inbound.get(index)?)?;
        let end = offset.checked_add(len as u64)?;
        let inside = end <= limit && end <= self.window_bytes[side][index];
        (state.up && inside).then_some(base.0 + offset)
    }
}

/// An outbound window of one port.
pub(super) struct Window {
    pub(super) fabric: Arc<Fabric>,
    pub(super) side: usize,
    pub(super) index: usize,
}

impl Window {
    /// The window in pieces of at most 8 bytes at a limit, so that what lies before it arrives.
    fn pieces(&self, offset: u64, len: usize, mut act: impl FnMut(u64, std::ops::Range<usize>)) {
        if let Some(address) = self.fabric.translate(self.side, self.index, offset, len) {
            return act(address, 0..len);
        }
        let mut done = 0;
        while done < len {
            let at = offset.saturating_add(done as u64);
            let step = (len - done).min(8 - (at % 8) as usize);
            let address = self.fabric.translate(self.side, self.index, at, step);
            if let Some(address) = address {
                act(address, done..done + step);
            }
            done += step;
        }
    }
}

impl Aperture for Window {
    fn len(&self) -> u64 {
        self.fabric.window_bytes[self.side][self.index]
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let space = &self.fabric.spaces[1 - self.side];
        self.pieces(offset, data.len(), |address, range| {
            space.read(address, &mut data[range]);
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let space = &self.fabric.spaces[1 - self.side];
        self.pieces(offset, data.len(), |address, range| {
            space.write(address, &data[range]);
        });
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

/// The cable, with a port at each end.
pub struct SoftLink {
    fabric: Arc<Fabric>,
    ports: [Arc<SoftPort>; 2],
}

impl SoftLink {
    /// Two ports with the cable in; the link comes up when both have enabled it.
    pub fn new(configs: [SoftPortConfig; 2]) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fabric = Arc::new(Fabric {
            state: Mutex::new(State {
                halves: array::from_fn(|_| Half::default()),
                cable_in: true,
                up: false,
            }),
            events: [eventfd(0, flags)?, eventfd(0, flags)?],
            spaces: array::from_fn(|_| Arc::new(SoftSpace::new())),
            window_bytes: configs.map(|config| config.window_bytes),
        });
        let ports = array::from_fn(|side| Arc::new(SoftPort::new(Arc::clone(&fabric), side)));
        Ok(Self { fabric, ports })
    }

    /// The port at end 0 or 1.
    pub fn port(&self, side: usize) -> Arc<SoftPort> {
        Arc::clone(&self.ports[side & 1])
    }

    /// Pulls the cable.
    pub fn cut(&self) {
        self.fabric.change(|state| state.cable_in = false);
    }

    /// Puts it back.
    pub fn plug(&self) {
        self.fabric.change(|state| state.cable_in = true);
    }
}
