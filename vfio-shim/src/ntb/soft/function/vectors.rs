//! A software function's message interrupts: triggers, masks and what is pending.

use std::os::fd::OwnedFd;

#[derive(Default)]
pub(super) struct Vector {
    trigger: Option<OwnedFd>,
    masked: bool,
    /// Masked by the guest in the MSI capability.
    masked_in_config: bool,
    pending: bool,
}

impl Vector {
    pub(super) fn raise(&mut self) {
        if self.masked || self.masked_in_config {
            self.pending = true;
        } else if let Some(trigger) = &self.trigger {
            // Only fails when the counter is at its limit, and then it is readable.
            let _ = rustix::io::write(trigger, &1u64.to_ne_bytes());
        }
    }

    fn catch_up(&mut self) {
        if std::mem::take(&mut self.pending) {
            self.raise();
        }
    }

    pub(super) fn mask(&mut self, masked: bool) {
        self.masked = masked;
        self.catch_up();
    }

    pub(super) fn mask_in_config(&mut self, masked: bool) {
        self.masked_in_config = masked;
        self.catch_up();
    }

    pub(super) fn set_trigger(&mut self, trigger: Option<OwnedFd>) {
        self.trigger = trigger;
    }

    /// No trigger, nothing pending, and no mask but the guest's own.
    pub(super) fn disable(&mut self) {
        *self = Self {
            masked_in_config: self.masked_in_config,
            ..Self::default()
        };
    }

    pub(super) fn has_trigger(&self) -> bool {
        self.trigger.is_some()
    }
}
