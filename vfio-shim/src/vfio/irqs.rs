//! A function's triggers: remembered, so that a set can grow where the kernel cannot grow it.

use super::ioctl;
use crate::model::{FunctionError, IrqIndex, IrqInfo};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE,
};

const TRIGGER_FDS: u32 = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
const TRIGGER_NONE: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;

/// One irq index: what the kernel says of it, and the triggers that it has.
#[derive(Default)]
pub(super) struct Irq {
    pub info: IrqInfo,
    grows: bool,
    /// Empty = not enabled. The fds are kept only to hand them over again when the set must grow.
    triggers: Vec<Option<OwnedFd>>,
}

fn kernel(act: &'static str) -> impl FnOnce(io::Error) -> FunctionError {
    move |source| FunctionError::Kernel { act, source }
}

/// Checks that `start..start + count` are vectors of the index.
pub(super) fn check(
    index: IrqIndex,
    info: IrqInfo,
    start: u32,
    count: u64,
) -> Result<(), FunctionError> {
    let end = u64::from(start) + count;
    if end > u64::from(info.count) {
        return Err(FunctionError::NoVector {
            index,
            start,
            end,
            count: info.count,
        });
    }
    Ok(())
}

fn fd_words(triggers: &[Option<OwnedFd>]) -> impl Iterator<Item = u32> {
    // -1 = no trigger.
    let raw = |fd: &Option<OwnedFd>| fd.as_ref().map_or(-1, |fd| fd.as_raw_fd());
    triggers.iter().map(move |fd| raw(fd) as u32)
}

fn set_eventfds(
    device: BorrowedFd<'_>,
    index: IrqIndex,
    start: u32,
    triggers: &[Option<OwnedFd>],
) -> io::Result<()> {
    let mut words = vec![TRIGGER_FDS, index as u32, start, triggers.len() as u32];
    words.extend(fd_words(triggers));
    ioctl::set_irqs(device, &words)
}

impl Irq {
    /// What the kernel says of `index`; one that it does not have has no vectors.
    pub fn read(device: BorrowedFd<'_>, index: IrqIndex) -> io::Result<Self> {
        let info = match ioctl::irq_info(device, index as u32) {
            Ok(info) => info,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(Self::default()),
            Err(error) => return Err(error),
        };
        // INTx is never offered: it is level triggered and cannot cross an NTB.
        let count = if index == IrqIndex::Intx {
            0
        } else {
            info.count
        };
        Ok(Self {
            info: IrqInfo { count },
            grows: info.flags & VFIO_IRQ_INFO_NORESIZE == 0,
            triggers: Vec::new(),
        })
    }

    pub fn set(
        &mut self,
        device: BorrowedFd<'_>,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        check(index, self.info, start, triggers.len() as u64)?;
        let end = start as usize + triggers.len();
        let enabled = self.triggers.len();
        if triggers.is_empty() || (enabled == 0 && triggers.iter().all(Option::is_none)) {
            return Ok(());
        }
        if enabled != 0 && end > enabled && !self.grows {
            return self.grow(device, index, start, triggers);
        }
        set_eventfds(device, index, start, &triggers).map_err(kernel("set the interrupts"))?;
        self.remember(start, triggers);
        Ok(())
    }

    /// The kernel fixed the number of vectors when the first was set: all off, all on.
    fn grow(
        &mut self,
        device: BorrowedFd<'_>,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        let mut all = std::mem::take(&mut self.triggers);
        ioctl::set_irqs(device, &[TRIGGER_NONE, index as u32, 0, 0])
            .map_err(kernel("disable the interrupts to grow their set"))?;
        place(&mut all, start, triggers);
        set_eventfds(device, index, 0, &all).map_err(kernel("set the interrupts"))?;
        self.triggers = all;
        Ok(())
    }

    fn remember(&mut self, start: u32, triggers: Vec<Option<OwnedFd>>) {
        place(&mut self.triggers, start, triggers);
    }

    pub fn disable(
        &mut self,
        device: BorrowedFd<'_>,
        index: IrqIndex,
    ) -> Result<(), FunctionError> {
        // The kernel answers EINVAL where nothing is enabled.
        if self.triggers.is_empty() {
            return Ok(());
        }
        ioctl::set_irqs(device, &[TRIGGER_NONE, index as u32, 0, 0])
            .map_err(kernel("disable the interrupts"))?;
        self.triggers.clear();
        Ok(())
    }

    pub fn raise(
        &self,
        device: BorrowedFd<'_>,
        index: IrqIndex,
        start: u32,
        count: u32,
    ) -> Result<(), FunctionError> {
        check(index, self.info, start, u64::from(count))?;
        if count == 0 {
            // A count of 0 would disable the whole index.
            return Ok(());
        }
        ioctl::set_irqs(device, &[TRIGGER_NONE, index as u32, start, count])
            .map_err(kernel("raise an interrupt"))
    }
}

fn place(all: &mut Vec<Option<OwnedFd>>, start: u32, triggers: Vec<Option<OwnedFd>>) {
    let end = start as usize + triggers.len();
    if all.len() < end {
        all.resize_with(end, || None);
    }
    for (slot, trigger) in all[start as usize..end].iter_mut().zip(triggers) {
        *slot = trigger;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_past_the_last_are_refused_without_wrapping() {
        let info = IrqInfo { count: 4 };
        assert!(check(IrqIndex::Msix, info, 0, 4).is_ok());
        assert!(check(IrqIndex::Msix, info, 4, 0).is_ok());
        for (start, count) in [(0, 5), (4, 1), (u32::MAX, 1), (1, u64::from(u32::MAX))] {
            let refused = check(IrqIndex::Msix, info, start, count);
            assert!(matches!(refused, Err(FunctionError::NoVector { .. })));
        }
    }

    #[test]
    fn a_later_set_replaces_only_its_own_vectors() {
        let fd = || Some(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let mut all = Vec::new();
        place(&mut all, 0, vec![fd(), fd()]);
        place(&mut all, 1, vec![None, fd(), fd()]);
        let there: Vec<_> = all.iter().map(Option::is_some).collect();
        assert_eq!(there, [true, false, true, true]);
    }
}
