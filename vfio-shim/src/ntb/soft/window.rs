//! An outbound window of a soft port, for the host's software and its devices alike.

use super::egress::Store;
use super::link::Fabric;
use super::space::requester;
use crate::model::{Aperture, Mapping};
use std::sync::Arc;

/// A handle of a window.
pub(super) struct Window {
    fabric: Arc<Fabric>,
    side: usize,
    index: usize,
}

impl Window {
    pub(super) fn new(fabric: Arc<Fabric>, side: usize, index: usize) -> Self {
        Self {
            fabric,
            side,
            index: index.min(1),
        }
    }
}

impl Aperture for Window {
    fn len(&self) -> u64 {
        self.fabric.window_bytes[self.side][self.index]
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.fabric.tick(self.side);
        self.fabric.flush(self.side);
        self.fabric.load(self.side, self.index, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.fabric.tick(self.side);
        let store = Store {
            requester: requester(),
            window: self.index,
            offset,
            data,
        };
        self.fabric.store(self.side, &store);
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}
