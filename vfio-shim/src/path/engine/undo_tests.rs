//! Undoing whose steps fail, and peers that ring or write more than they may: what an executor and the irq thread make of it.

use super::control::Input;
use super::executor::{Executor, ExecutorShared};
use super::irq::{IrqCommand, IrqHandle, IrqThread};
use super::keep::{Keep, ResetWord, ScrubPlan};
use super::requests::{Watch, Wish};
use crate::model::{
    Access, AddressSpace, Aperture, BAR_COUNT, Bdf, DmaMap, Function, FunctionError, FunctionIds,
    FunctionInfo, IrqIndex, MapError, OsRuntime, PortIova, RegionIndex, Runtime, Span,
    WindowOffset,
};
use crate::ntb::NtbPort;
use crate::ntb::soft::{SoftFunction, SoftLink, SoftPort, SoftPortConfig};
use crate::path::grant::Scrub;
use crate::path::message::{LeaseId, MapRange};
use crate::path::wire::BELL_MAILBOX;
use crate::path::work::{FunctionWork, OpenPlan, WorkOutcome};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

const PAGE: u64 = 4096;
const BASE: PortIova = PortIova(1 << 32);
const LEASE: LeaseId = LeaseId(1);

/// A function whose kernel refuses to take anything away.
struct Stubborn {
    soft: SoftFunction,
    refuses: AtomicBool,
    has_bar: AtomicBool,
    /// Resets, and stores to its BARs: where, and what.
    done: Mutex<Vec<Done>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    Reset,
    Store(u64, u32),
}

impl Stubborn {
    fn refuses(&self) -> bool {
        self.refuses.load(Ordering::SeqCst)
    }
}

fn no() -> std::io::Error {
    std::io::Error::from_raw_os_error(5)
}

impl AddressSpace for Stubborn {
    fn usable(&self) -> Vec<Span> {
        self.soft.space().usable()
    }

    fn available(&self) -> u32 {
        self.soft.space().available()
    }

    fn map(&self, maps: &[DmaMap<'_>]) -> Result<(), MapError> {
        self.soft.space().map(maps)
    }

    /// Only what begins at 0 is refused.
    fn unmap(&self, span: Span) -> Result<u64, MapError> {
        let act = "unmap";
        let source = no();
        match self.refuses() && span.start() == 0 {
            true => Err(MapError::Kernel { act, span, source }),
            false => self.soft.space().unmap(span),
        }
    }
}

impl Function for Stubborn {
    fn info(&self) -> &FunctionInfo {
        self.soft.info()
    }

    fn region_read(&self, at: RegionIndex, from: u64, to: &mut [u8]) -> Result<(), FunctionError> {
        self.soft.region_read(at, from, to)
    }

    fn region_write(&self, at: RegionIndex, from: u64, data: &[u8]) -> Result<(), FunctionError> {
        if at.bar().is_some() {
            let word = u32::from_le_bytes(data.try_into().expect("a word"));
            self.done.lock().unwrap().push(Done::Store(from, word));
        }
        self.soft.region_write(at, from, data)
    }

    fn bar(&self, region: RegionIndex) -> Option<Arc<dyn Aperture>> {
        let has = self.has_bar.load(Ordering::SeqCst);
        self.soft.bar(region).filter(|_| has)
    }

    fn mmap_fd(&self, _region: RegionIndex) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        start: u32,
        triggers: Vec<Option<OwnedFd>>,
    ) -> Result<(), FunctionError> {
        self.soft.set_irqs(index, start, triggers)
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), FunctionError> {
        let act = "disable the interrupts";
        let source = no();
        match self.refuses() {
            true => Err(FunctionError::Kernel { act, source }),
            false => self.soft.disable_irqs(index),
        }
    }

    fn mask_irqs(
        &self,
        i: IrqIndex,
        start: u32,
        count: u32,
        on: bool,
    ) -> Result<(), FunctionError> {
        self.soft.mask_irqs(i, start, count, on)
    }

    fn raise_irqs(&self, i: IrqIndex, start: u32, count: u32) -> Result<(), FunctionError> {
        self.soft.raise_irqs(i, start, count)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        self.done.lock().unwrap().push(Done::Reset);
        self.soft.reset()
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self
    }
}

/// An executor with its irq thread and nothing else.
struct Rig {
    executor: Executor,
    function: Arc<Stubborn>,
    port: Arc<SoftPort>,
    far: Arc<SoftPort>,
    irq: IrqHandle,
    told: mpsc::Receiver<Input>,
    hurry: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        Self::of_class(0)
    }

    fn of_class(class: u32) -> Self {
        let config = SoftPortConfig {
            window_bytes: [64 << 20; 2],
        };
        let link = SoftLink::new([config; 2]).unwrap();
        let (port, far) = (link.port(0), link.port(1));
        let (inbox, told) = mpsc::channel();
        let (hurrying, hurry) = mpsc::channel();
        let (_, mailbox) = super::control::mailbox_memory().unwrap();
        let shared_port: Arc<dyn NtbPort> = port.clone();
        let runtime: Arc<dyn Runtime> = Arc::new(OsRuntime);
        let door = (inbox.clone(), Arc::clone(&runtime));
        let (thread, irq) =
            IrqThread::new(Arc::clone(&shared_port), mailbox, 1_000_000, door).unwrap();
        port.doorbell_unmask_only(BELL_MAILBOX);
        for side in [&port, &far] {
            side.link_enable(true);
        }
        let ids = FunctionIds {
            class,
            ..FunctionIds::default()
        };
        let function = Arc::new(Stubborn {
            soft: SoftFunction::new(ids, 4),
            refuses: AtomicBool::new(false),
            has_bar: AtomicBool::new(true),
            done: Mutex::default(),
        });
        let executor = Executor {
            function: function.clone(),
            port: shared_port,
            base: BASE,
            irq: irq.clone(),
            inbox,
            runtime,
            shared: Arc::new(ExecutorShared::default()),
            path: None,
            bdf: "01:00.1".parse().unwrap(),
            hurry,
            hurried: false,
            clean: false,
            keep: Keep::default(),
        };
        Self {
            executor,
            function,
            port,
            far,
            irq,
            told,
            hurry: hurrying,
            thread: Some(std::thread::spawn(move || thread.run())),
        }
    }

    fn refuse(&self, refuses: bool) {
        self.function.refuses.store(refuses, Ordering::SeqCst);
    }

    fn open(&mut self) -> Result<WorkOutcome, crate::path::Refusal> {
        let mut slices = [None; BAR_COUNT];
        slices[0] = Some(WindowOffset(0x10000));
        self.executor.work(FunctionWork::Open(OpenPlan {
            lease: LEASE,
            slices,
            irq_first: 0,
            irq_count: 4,
        }))
    }

    fn map(&mut self, starts: &[u64]) {
        let range = |start: &u64| MapRange {
            span: Span::new(*start, PAGE).unwrap(),
            offset: WindowOffset(0x10_0000 + *start),
            access: Access::READ_WRITE,
        };
        let ranges = starts.iter().map(range).collect();
        self.executor.work(FunctionWork::Map(ranges)).unwrap();
    }

    /// Returns when the irq thread has handled all that was ready before, with what it has told.
    fn irq_is_quiet(&self) -> Vec<Input> {
        // Ready behind all of that, so told of behind all of that: epoll keeps their order.
        let fd = eventfd(1, EventfdFlags::NONBLOCK).unwrap();
        let wish = Wish::Error;
        let nobody: Bdf = "7f:1f.7".parse().unwrap();
        self.irq
            .send(IrqCommand::Watch(nobody, vec![Watch { wish, fd }]));
        let told = self.told.iter();
        let told = told.take_while(|input| !matches!(input, Input::Wish(of, _) if *of == nobody));
        let told = told.collect();
        self.irq.send(IrqCommand::Unwatch(nobody));
        told
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.irq.send(IrqCommand::Stop);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[test]
fn mapping_that_cannot_be_taken_away_is_kept_in_mind_and_tried_again_before_the_next_tenant() {
    let mut rig = Rig::new();
    rig.open().unwrap();
    rig.map(&[0, PAGE, 2 * PAGE]);
    rig.refuse(true);
    rig.executor.work(FunctionWork::Close).unwrap_err();
    assert_eq!(rig.function.soft.space().maps().len(), 1, "all others went");
    rig.open().unwrap_err();
    rig.refuse(false);
    rig.open().unwrap();
    assert!(rig.function.soft.space().maps().is_empty());
    rig.executor.work(FunctionWork::Close).unwrap();
    assert!(rig.port.space().maps().is_empty());
}

#[test]
fn unmap_of_several_goes_on_behind_one_that_fails() {
    let mut rig = Rig::new();
    rig.open().unwrap();
    rig.map(&[0, PAGE]);
    rig.refuse(true);
    let spans = [0, PAGE].map(|start| Span::new(start, PAGE).unwrap());
    let unmap = FunctionWork::Unmap(spans.to_vec());
    rig.executor.work(unmap).unwrap_err();
    assert_eq!(rig.function.soft.space().maps().len(), 1);
}

#[test]
fn relay_is_quiet_after_a_close_whose_vectors_could_not_be_disabled() {
    let mut rig = Rig::new();
    rig.open().unwrap();
    let on = FunctionWork::Irqs(IrqIndex::Msix, true);
    rig.executor.work(on).unwrap();
    rig.refuse(true);
    rig.executor.work(FunctionWork::Close).unwrap_err();
    rig.function.raise_irqs(IrqIndex::Msix, 0, 1).unwrap();
    rig.irq_is_quiet();
    let counters = Arc::clone(&super::lock(&rig.executor.shared.counters));
    assert_eq!(counters[0].raised.load(Ordering::SeqCst), 0);
}

#[test]
fn vectors_that_a_close_could_not_disable_are_disabled_before_the_function_is_lent_again() {
    let mut rig = Rig::new();
    rig.open().unwrap();
    let on = FunctionWork::Irqs(IrqIndex::Msix, true);
    rig.executor.work(on).unwrap();
    rig.refuse(true);
    for work in [FunctionWork::Close, FunctionWork::PutBack] {
        rig.executor.work(work).unwrap_err();
    }
    rig.open().unwrap_err();
    assert_eq!(rig.function.soft.triggers(), 4);
    rig.refuse(false);
    rig.executor.work(FunctionWork::PutBack).unwrap();
    assert_eq!(rig.function.soft.triggers(), 0);
    rig.open().unwrap();
}

#[test]
fn config_space_is_not_written_for_a_peer() {
    let mut rig = Rig::new();
    rig.open().unwrap();
    let write = FunctionWork::Write {
        region: RegionIndex::CONFIG,
        offset: 4,
        data: vec![0, 0],
    };
    let refused = rig.executor.work(write).unwrap_err();
    assert!(refused.text.contains("is not written"), "{refused}");
    let mut command = [0; 2];
    rig.function
        .region_read(RegionIndex::CONFIG, 4, &mut command)
        .unwrap();
    assert_eq!(command[0] & 2, 2, "memory decoding is on");
}

#[test]
fn bar_that_cannot_be_mapped_is_no_open_path() {
    let mut rig = Rig::new();
    rig.function.has_bar.store(false, Ordering::SeqCst);
    let refused = rig.open().unwrap_err();
    assert!(refused.text.contains("BAR 0 cannot be mapped"), "{refused}");
}

#[test]
fn peer_that_rings_without_end_fills_no_queue() {
    let rig = Rig::new();
    for ring in 1..=50 {
        rig.far.peer_doorbell_ring(BELL_MAILBOX);
        while rig.irq.bells.taken.load(Ordering::SeqCst) < ring {
            std::thread::yield_now();
        }
    }
    let told = rig.irq_is_quiet();
    let bells = |input: &&Input| matches!(input, Input::Bell);
    assert_eq!(told.iter().filter(bells).count(), 1);
}

#[test]
fn nvme_keeps_no_admin_queue_of_the_last_tenant_and_no_other_class_is_written_to() {
    let cleared = [0x24, 0x28, 0x2c, 0x30, 0x34].map(|offset| Done::Store(offset, 0));
    for (class, clears) in [(0x01_0802, &cleared[..]), (0x03_0000, &[])] {
        let mut rig = Rig::of_class(class);
        rig.open().unwrap();
        for work in [FunctionWork::Reset, FunctionWork::Close] {
            rig.executor.work(work).unwrap();
        }
        let once = [&[Done::Reset], clears].concat();
        let done = rig.function.done.lock().unwrap();
        assert_eq!(*done, once.repeat(3), "class {class:#x}");
    }
}

#[test]
fn memory_that_something_else_clears_is_waited_for_and_told_as_assumed() {
    let mut rig = Rig::new();
    const MS: u64 = 50;
    rig.executor.keep.scrub = ScrubPlan::Wait { ms: MS };
    let start = std::time::Instant::now();
    rig.open().unwrap();
    // Who had it before is not known.
    assert!(start.elapsed().as_millis() >= u128::from(MS));
    let start = std::time::Instant::now();
    let closed = rig.executor.work(FunctionWork::Close).unwrap();
    assert_eq!(closed, WorkOutcome::Closed(Scrub::Assumed));
    assert!(start.elapsed().as_millis() >= u128::from(MS));
    rig.executor.keep.scrub = ScrubPlan::DriverWaits;
    rig.open().unwrap();
    let closed = rig.executor.work(FunctionWork::Close).unwrap();
    assert_eq!(closed, WorkOutcome::Closed(Scrub::Waited));
}

#[test]
fn wait_for_memory_to_be_cleared_ends_when_the_kernel_wants_the_function_back() {
    let mut rig = Rig::new();
    rig.open().unwrap();
    rig.executor.keep.scrub = ScrubPlan::Wait { ms: 3_600_000 };
    let hurry = rig.hurry.clone();
    let late = std::thread::spawn(move || hurry.send(()).unwrap());
    let refusal = rig.executor.work(FunctionWork::Close).unwrap_err();
    late.join().unwrap();
    assert!(
        refusal.text.contains("before its memory was cleared"),
        "{refusal}"
    );
    assert!(rig.executor.path.is_none(), "nothing of it is mapped");
}

/// It was told that a reset failed, before any that is seen here; and that each of those does.
struct Told {
    failed: bool,
    each_fails: bool,
}

impl ResetWord for Told {
    fn before(&mut self) {
        self.failed = self.each_fails;
    }

    fn failed(&mut self) -> Option<String> {
        self.failed.then(|| "FLR failed".to_owned())
    }
}

fn told(each_fails: bool) -> Option<Box<dyn ResetWord>> {
    let failed = true;
    Some(Box::new(Told { failed, each_fails }))
}

#[test]
fn reset_that_failed_by_the_kernels_word_is_a_failed_one() {
    let mut rig = Rig::new();
    rig.open().unwrap();
    rig.executor.keep.reset_word = told(true);
    let refusal = rig.executor.work(FunctionWork::Close).unwrap_err();
    assert_eq!(refusal.text, "FLR failed");
    let refusal = rig.executor.work(FunctionWork::PutBack).unwrap_err();
    assert_eq!(refusal.text, "FLR failed");
    rig.executor.keep.reset_word = None;
    rig.executor.work(FunctionWork::PutBack).unwrap();
}

#[test]
fn word_of_an_earlier_reset_is_not_the_last_ones() {
    let mut rig = Rig::new();
    rig.open().unwrap();
    rig.executor.keep.reset_word = told(false);
    rig.executor.work(FunctionWork::Close).unwrap();
}
