//! An outbound window of a soft port, as one requester of the fabric.

use super::egress::Store;
use super::link::Fabric;
use crate::model::{Aperture, Mapping};
use std::sync::Arc;

/// A handle of a window; each handle is a requester of its own.
pub(super) struct Window {
    fabric: Arc<Fabric>,
    side: usize,
    index: usize,
    requester: u64,
}

impl Window {
    pub(super) fn new(fabric: Arc<Fabric>, side: usize, index: usize) -> Self {
        Self {
            requester: fabric.requester(),
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
            requester: self.requester,
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
