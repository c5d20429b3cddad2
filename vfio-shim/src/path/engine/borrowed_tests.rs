//! A borrowed function by itself: what its VMM is told, its accesses when its lease ends, and a port that does not answer.

use super::*;
use crate::model::{Mapping, OsRuntime};
use crate::path::message::RemoteFunction;
use std::sync::mpsc;

/// A port that answers nobody.
struct Silent;

impl PathPort for Silent {
    fn call(&self, _call: Call, wait_ms: u64) -> Result<Answer, CallError> {
        Err(CallError::Timeout(wait_ms))
    }

    fn window(&self, _bar: usize, _slice: WindowOffset) -> (Arc<dyn Aperture>, u64) {
        unreachable!("it has no BARs")
    }

    fn window_fd(&self) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
}

fn silent() -> BorrowedFunction {
    let mut function = RemoteFunction::default();
    function.irqs[IrqIndex::Msix as usize].count = 2;
    let opened = OpenedPath {
        function,
        config: vec![0; 256],
    };
    let told = (FunctionIds::default(), opened);
    BorrowedFunction::at(Arc::new(OsRuntime), Arc::new(Silent), LeaseId(1), told).unwrap()
}

fn event(flags: EventfdFlags) -> OwnedFd {
    eventfd(0, flags).unwrap()
}

fn value(event: &OwnedFd) -> u64 {
    let mut value = [0; 8];
    rustix::io::read(event, &mut value).unwrap();
    u64::from_ne_bytes(value)
}

/// A window whose stores arrive when they are let through.
struct Slow {
    entered: mpsc::Sender<()>,
    go: Mutex<mpsc::Receiver<()>>,
}

impl Aperture for Slow {
    fn len(&self) -> u64 {
        4096
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {
        self.entered.send(()).unwrap();
        lock(&self.go).recv().unwrap();
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

#[test]
fn vmm_is_told_of_no_error_interrupt_to_stop_its_guest_at() {
    let mut lent = FunctionInfo::default();
    lent.irqs.iter_mut().for_each(|irq| irq.count = 1);
    let told = told(lent, FunctionIds::default());
    assert_eq!(told.irqs.map(|irq| irq.count), [1, 1, 1, 0, 1]);
}

#[test]
fn lease_is_not_lost_before_a_store_under_way_has_left() {
    let (entered, store_began) = mpsc::channel();
    let (let_go, go) = mpsc::channel();
    let runtime = Arc::new(OsRuntime);
    let state = LeaseShared::new(runtime, Signals::new(1).unwrap());
    let bar = SliceAperture {
        window: Arc::new(Slow {
            entered,
            go: Mutex::new(go),
        }),
        base: 0,
        len: 4096,
        state: Arc::clone(&state),
    };
    let store = std::thread::spawn(move || bar.write(0, &[1]));
    store_began.recv().unwrap();
    assert!(state.lost.try_lock().is_err(), "losing it waits");
    let_go.send(()).unwrap();
    store.join().unwrap();
    state.lose("over".into());
}

#[test]
fn what_a_mask_held_back_comes_with_its_end_also_where_the_lender_does_not_answer() {
    let function = silent();
    let event = event(EventfdFlags::NONBLOCK);
    let trigger = Some(event.try_clone().unwrap());
    // The vector is armed here all the same.
    function
        .set_irqs(IrqIndex::Msix, 0, vec![trigger])
        .unwrap_err();
    let mask = |masked| function.mask_irqs(IrqIndex::Msix, 0, 1, masked);
    mask(true).unwrap_err();
    function.raise(0);
    function.deliver();
    mask(false).unwrap_err();
    let mut woken = [PollFd::from_borrowed_fd(function.wake_fd(), PollFlags::IN)];
    let now = rustix::time::Timespec::default();
    assert_eq!(poll(&mut woken, Some(&now)), Ok(1));
    function.deliver();
    assert_eq!(value(&event), 1);
}
