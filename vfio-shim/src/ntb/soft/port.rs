//! A soft port: one end of a soft link as the rest of this crate sees an NTB.

use super::SoftSpace;
use super::link::{DOORBELLS, Fabric, Half, LINK_BIT, SPADS};
use super::window::Window;
use crate::model::{AddressSpace, Aperture, PortIova};
use crate::ntb::{NtbPort, PortError, PortInfo};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

const PAGE: u64 = 4096;

/// One end of a [`super::SoftLink`].
pub struct SoftPort {
    fabric: Arc<Fabric>,
    side: usize,
    info: PortInfo,
}

impl SoftPort {
    pub(super) fn new(fabric: Arc<Fabric>, side: usize) -> Self {
        let info = PortInfo {
            chip: "soft",
            window_bytes: fabric.window_bytes[side],
            doorbell_count: DOORBELLS,
            spad_count: SPADS as u32,
            doorbell_ordered: fabric.doorbell_ordered,
        };
        Self { fabric, side, info }
    }

    /// What the kernel does when an NTB is opened and closed: link off, windows closed, doorbells
    /// masked, scratchpads 0. Mappings of its container stay until they are unmapped.
    pub fn reset(&self) {
        self.fabric
            .with_half(self.side, |half| *half = Half::default());
    }

    /// Its container, with the faults it has seen.
    pub fn space(&self) -> &Arc<SoftSpace> {
        &self.fabric.spaces[self.side]
    }

    fn half<T>(&self, act: impl FnOnce(&mut Half) -> T) -> T {
        self.fabric.tick(self.side);
        self.fabric.with_half(self.side, act)
    }
}

impl NtbPort for SoftPort {
    fn info(&self) -> &PortInfo {
        &self.info
    }

    fn link_enable(&self, enable: bool) {
        self.half(|half| half.link_enabled = enable);
    }

    fn link_is_up(&self) -> bool {
        self.fabric.tick(self.side);
        self.fabric.is_up()
    }

    fn window_open(&self, index: usize, base: PortIova, bytes: u64) -> Result<(), PortError> {
        let refused = |what, value| Err(PortError::Geometry { what, value });
        let own = self.info.window_bytes.get(index).copied().unwrap_or(0);
        if bytes == 0 || bytes > own || !bytes.is_multiple_of(PAGE) {
            return refused("window size asked for", bytes);
        }
        if !base.0.is_multiple_of(PAGE) || base.checked_add(bytes).is_none() {
            return refused("window base asked for", base.0);
        }
        self.half(|half| half.inbound[index] = Some((base, bytes)));
        Ok(())
    }

    fn window_close(&self, index: usize) {
        self.half(|half| {
            if let Some(inbound) = half.inbound.get_mut(index) {
                *inbound = None;
            }
        });
    }

    fn window(&self, index: usize) -> Arc<dyn Aperture> {
        Arc::new(Window::new(Arc::clone(&self.fabric), self.side, index))
    }

    fn spad_read(&self, index: u32) -> u32 {
        self.half(|half| half.spads.get(index as usize).copied())
            .unwrap_or(u32::MAX)
    }

    fn spad_write(&self, index: u32, value: u32) {
        self.half(|half| write_spad(half, index, value));
    }

    fn peer_spad_write(&self, index: u32, value: u32) {
        self.fabric.tick(self.side);
        self.fabric
            .with_far_half(self.side, |half| write_spad(half, index, value));
    }

    fn doorbell_unmask_only(&self, bits: u64) {
        self.half(|half| half.unmasked = bits & (LINK_BIT - 1) | LINK_BIT);
    }

    fn peer_doorbell_ring(&self, bits: u64) {
        self.fabric.tick(self.side);
        self.fabric.ring(self.side, bits & (LINK_BIT - 1));
    }

    fn doorbell_take(&self) -> u64 {
        self.half(|half| std::mem::take(&mut half.pending) & half.unmasked)
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.fabric.events[self.side].as_fd()
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self.fabric.hosts[self.side].act();
        &*self.fabric.spaces[self.side]
    }

    fn window_fd(&self, _index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
}

fn write_spad(half: &mut Half, index: u32, value: u32) {
    if let Some(spad) = half.spads.get_mut(index as usize) {
        *spad = value;
    }
}
