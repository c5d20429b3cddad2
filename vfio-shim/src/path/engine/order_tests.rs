//! The order in which a relay touches the NTB: fence, word, bell, with nothing missing and nothing swapped; a turn for each beside a peer that rings without end; and a function that stands before its guest's memory goes.

use super::soft_tests::{bdf, until};
use super::*;
use crate::model::contract::Driver;
use crate::model::{
    Access, AddressSpace, Aperture, DmaMap, FunctionIds, MapError, Mapping, Memory, PortIova,
    RegionIndex, Span,
};
use crate::ntb::soft::function_tests::ENGINE;
use crate::ntb::soft::{FaultPlan, SoftFunction, SoftLink, SoftPort, SoftPortConfig};
use crate::ntb::{PortError, PortInfo};
use crate::path::message::PoolState;
use crate::path::wire::{BELL_IRQ, IRQ_TABLE_OFFSET, MAILBOX_BYTES};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Duration;

const WINDOW_BYTES: u64 = 64 << 20;

/// What the relay did to its port. Messages of the mailbox are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    Fence,
    Word,
    ReadBack,
    Bell,
    /// Memory is taken out of the port's address space, with the lent function's DMA on or off.
    Unmap {
        dma: bool,
    },
}

type Story = Arc<Mutex<Vec<Touch>>>;

fn is_word(offset: u64) -> bool {
    (IRQ_TABLE_OFFSET..MAILBOX_BYTES).contains(&offset)
}

/// A port that writes down what its software does.
struct Watched {
    port: Arc<SoftPort>,
    info: PortInfo,
    story: Story,
    /// The peer rings faster than anybody takes.
    endless: Arc<AtomicBool>,
    lent: Arc<SoftFunction>,
    slow: Slow,
}

/// The next map that takes so long as its test likes: it tells that it has begun.
type Slow = Arc<Mutex<Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>>>;

impl AddressSpace for Watched {
    fn usable(&self) -> Vec<Span> {
        self.port.address_space().usable()
    }

    fn available(&self) -> u32 {
        self.port.address_space().available()
    }

    fn map(&self, maps: &[DmaMap<'_>]) -> Result<(), MapError> {
        let slow = lock(&self.slow).take();
        if let Some((began, go)) = slow {
            began.send(()).unwrap();
            // A test that has failed lets go too.
            let _ = go.recv();
        }
        self.port.address_space().map(maps)
    }

    fn unmap(&self, span: Span) -> Result<u64, MapError> {
        let dma = masters(&*self.lent);
        lock(&self.story).push(Touch::Unmap { dma });
        self.port.address_space().unmap(span)
    }
}

/// The bus master bit of its Command register (PCI 3.0 section 6.2.2).
fn masters(function: &dyn Function) -> bool {
    let mut command = [0; 2];
    let read = function.region_read(RegionIndex::CONFIG, 4, &mut command);
    read.unwrap();
    u16::from_le_bytes(command) & 1 << 2 != 0
}

struct WatchedWindow {
    window: Arc<dyn Aperture>,
    story: Story,
}

impl WatchedWindow {
    fn tell(&self, touch: Touch) {
        lock(&self.story).push(touch);
    }
}

impl Aperture for WatchedWindow {
    fn len(&self) -> u64 {
        self.window.len()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 {
            self.tell(Touch::Fence);
        } else if is_word(offset) {
            self.tell(Touch::ReadBack);
        }
        self.window.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if is_word(offset) {
            self.tell(Touch::Word);
        }
        self.window.write(offset, data);
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

impl NtbPort for Watched {
    fn info(&self) -> &PortInfo {
        &self.info
    }

    fn link_enable(&self, enable: bool) {
        self.port.link_enable(enable);
    }

    fn link_is_up(&self) -> bool {
        self.port.link_is_up()
    }

    fn window_open(&self, index: usize, base: PortIova, bytes: u64) -> Result<(), PortError> {
        self.port.window_open(index, base, bytes)
    }

    fn window_close(&self, index: usize) {
        self.port.window_close(index);
    }

    fn window(&self, index: usize) -> Arc<dyn Aperture> {
        Arc::new(WatchedWindow {
            window: self.port.window(index),
            story: Arc::clone(&self.story),
        })
    }

    fn spad_read(&self, index: u32) -> u32 {
        self.port.spad_read(index)
    }

    fn spad_write(&self, index: u32, value: u32) {
        self.port.spad_write(index, value);
    }

    fn peer_spad_write(&self, index: u32, value: u32) {
        self.port.peer_spad_write(index, value);
    }

    fn doorbell_unmask_only(&self, bits: u64) {
        self.port.doorbell_unmask_only(bits);
    }

    fn peer_doorbell_ring(&self, bits: u64) {
        if bits & BELL_IRQ != 0 {
            lock(&self.story).push(Touch::Bell);
        }
        self.port.peer_doorbell_ring(bits);
    }

    fn doorbell_take(&self) -> u64 {
        let bits = self.port.doorbell_take();
        match self.endless.load(Ordering::SeqCst) {
            true => bits | BELL_IRQ,
            false => bits,
        }
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.port.event()
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self
    }

    fn window_fd(&self, index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        self.port.window_fd(index)
    }
}

fn engine(port: Arc<dyn NtbPort>, node: u16) -> Arc<Engine> {
    let config = EngineConfig {
        name: format!("order{node}"),
        node,
        window_base: PortIova(1 << 32),
        window_bytes: WINDOW_BYTES,
        heartbeat_ms: 10,
        lost_after_ms: 10_000,
        limits: Default::default(),
    };
    Engine::start(port, config).unwrap()
}

/// The first lends it to the second.
fn lend(engines: &[Arc<Engine>; 2], bdf: Bdf, lent: Arc<SoftFunction>) -> Arc<BorrowedFunction> {
    let entry = PoolEntry {
        bdf,
        ids: FunctionIds::default(),
        state: PoolState::Available,
        irq_count: 4,
        bar_bytes: 8192,
        serial: 0,
    };
    engines[0].offer(entry, lent).unwrap();
    let (_, _, borrowed) = until("the function can be borrowed", || {
        engines[1].borrow(bdf, None).ok()
    });
    borrowed
}

/// Two hosts with watched ports on chips that promise so much, and a function of the first that the
/// second has borrowed.
struct Hosts {
    engines: [Arc<Engine>; 2],
    borrowed: Arc<BorrowedFunction>,
    /// The lender's port.
    story: Story,
    borrower: Story,
    endless: Arc<AtomicBool>,
    far: Arc<SoftPort>,
    /// Of the borrower's port.
    slow: Slow,
}

fn hosts(doorbell_ordered: bool) -> Hosts {
    let config = SoftPortConfig {
        window_bytes: [WINDOW_BYTES; 2],
    };
    let link = SoftLink::faulty([config; 2], FaultPlan::default()).unwrap();
    let lent = Arc::new(SoftFunction::new(FunctionIds::default(), 4));
    let stories = [Story::default(), Story::default()];
    let endless = Arc::<AtomicBool>::default();
    let slow = Slow::default();
    let watched = |side: usize| Watched {
        port: link.port(side),
        info: PortInfo {
            doorbell_ordered,
            ..link.port(side).info().clone()
        },
        story: Arc::clone(&stories[side]),
        endless: match side {
            0 => Arc::clone(&endless),
            _ => Arc::default(),
        },
        lent: Arc::clone(&lent),
        slow: match side {
            1 => Arc::clone(&slow),
            _ => Arc::default(),
        },
    };
    let engines = [0, 1].map(|side| engine(Arc::new(watched(side)), side as u16 + 1));
    let borrowed = lend(&engines, bdf(), lent);
    let [story, borrower] = stories;
    Hosts {
        engines,
        borrowed,
        story,
        borrower,
        endless,
        far: link.port(1),
        slow,
    }
}

impl Hosts {
    /// A map of the first function's that has begun, and goes on when it may.
    fn map_slowly(&self) -> (JoinHandle<Result<(), MapError>>, mpsc::Sender<()>) {
        let ((began, has_begun), (go, waits)) = (mpsc::channel(), mpsc::channel());
        *lock(&self.slow) = Some((began, waits));
        let large = Arc::clone(&self.borrowed);
        let large = std::thread::spawn(move || map(&large));
        has_begun.recv().unwrap();
        (large, go)
    }
}

/// What a lender does to its port for one interrupt.
fn story_of_an_interrupt(doorbell_ordered: bool) -> Vec<Touch> {
    let hosts = hosts(doorbell_ordered);
    let story = &hosts.story;
    let driver = Driver::new(&*hosts.borrowed, ENGINE);
    driver.start();
    // The first one is taken as it comes: what it races with is done when it has arrived.
    driver.copy(4096, 8192, 8);
    assert!(driver.interrupted());
    until("the relay has rung", || {
        (lock(story).last() == Some(&Touch::Bell)).then_some(())
    });
    lock(story).clear();
    driver.copy(4096, 8192, 8);
    assert!(driver.interrupted());
    until("the relay has rung", || {
        (lock(story).last() == Some(&Touch::Bell)).then_some(())
    });
    lock(story).clone()
}

#[test]
fn relay_reads_the_fence_stores_the_word_and_rings_in_this_order() {
    let story = story_of_an_interrupt(true);
    assert_eq!(story, [Touch::Fence, Touch::Word, Touch::Bell]);
}

#[test]
fn relay_reads_its_word_back_before_the_bell_where_bells_may_overtake_stores() {
    let story = story_of_an_interrupt(false);
    let whole = [Touch::Fence, Touch::Word, Touch::ReadBack, Touch::Bell];
    assert_eq!(story, whole);
}

#[test]
fn interrupts_are_relayed_beside_a_peer_that_rings_without_end() {
    let hosts = hosts(true);
    let driver = Driver::new(&*hosts.borrowed, ENGINE);
    driver.start();
    hosts.endless.store(true, Ordering::SeqCst);
    hosts.far.peer_doorbell_ring(BELL_IRQ);
    let relayed = (0..20).all(|_| {
        driver.copy(4096, 8192, 8);
        driver.interrupted()
    });
    // Without a turn for others its irq thread would not even end.
    hosts.endless.store(false, Ordering::SeqCst);
    assert!(relayed);
}

#[test]
fn function_stands_before_its_guests_memory_is_unpinned() {
    let hosts = hosts(true);
    let driver = Driver::new(&*hosts.borrowed, ENGINE);
    driver.start();
    driver.copy(4096, 8192, 8);
    assert!(driver.interrupted());
    lock(&hosts.borrower).clear();
    hosts.engines[1]
        .give_back_function(&hosts.borrowed)
        .unwrap();
    let unmaps = |touch: &Touch| matches!(touch, Touch::Unmap { .. });
    let story = lock(&hosts.borrower).clone();
    let unmapped: Vec<_> = story.into_iter().filter(unmaps).collect();
    assert!(!unmapped.is_empty());
    assert!(
        unmapped
            .iter()
            .all(|touch| *touch == Touch::Unmap { dma: false })
    );
}

const MEMORY: Span = match Span::new(0, 4096) {
    Some(span) => span,
    None => panic!("a page fits"),
};

fn map(function: &BorrowedFunction) -> Result<(), MapError> {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, MEMORY.len()).unwrap();
    function.address_space().map(&[DmaMap {
        span: MEMORY,
        access: Access::READ_WRITE,
        memory: Memory::Fd(fd.as_fd(), 0),
    }])
}

#[test]
fn tenant_that_ends_while_another_ones_map_takes_long_is_undone_behind_it_and_not_given_up() {
    let hosts = hosts(true);
    let lent = Arc::new(SoftFunction::new(FunctionIds::default(), 4));
    let ending = lend(&hosts.engines, "4a:00.2".parse().unwrap(), lent);
    map(&ending).unwrap();
    let (large, go) = hosts.map_slowly();
    let (unmapped, told) = mpsc::channel();
    let unmap = move || unmapped.send(ending.address_space().unmap(MEMORY)).unwrap();
    let unmap = std::thread::spawn(unmap);
    // Past the time in which maps and registers are answered, as the map that is too late itself.
    assert!(matches!(large.join().unwrap(), Err(MapError::Timeout(..))));
    let early = told.recv_timeout(Duration::from_millis(500));
    assert!(early.is_err(), "{early:?}");
    go.send(()).unwrap();
    assert_eq!(told.recv().unwrap().unwrap(), MEMORY.len());
    unmap.join().unwrap();
}

#[test]
fn unmap_of_a_lease_that_ends_is_answered_when_all_it_had_is_unpinned() {
    for begun_before in [true, false] {
        let hosts = hosts(true);
        let lent = Arc::new(SoftFunction::new(FunctionIds::default(), 4));
        let ending = lend(&hosts.engines, "4a:00.2".parse().unwrap(), lent);
        map(&ending).unwrap();
        let (large, go) = hosts.map_slowly();
        lock(&hosts.borrower).clear();
        let (unmapped, told) = mpsc::channel();
        let unmap = || {
            let (ending, story) = (Arc::clone(&ending), Arc::clone(&hosts.borrower));
            let unmap = move || {
                let result = ending.address_space().unmap(MEMORY);
                unmapped.send((result, lock(&story).clone())).unwrap();
            };
            std::thread::spawn(unmap)
        };
        let end = || {
            hosts.engines[0].stop();
            until("the lease is lost", || ending.lost());
        };
        let unmap = match begun_before {
            true => {
                let unmap = unmap();
                until("it is under way", || {
                    let borrowed = hosts.engines[1].status()?.borrowed;
                    let mut own = borrowed.iter().filter(|own| own.lease == ending.lease());
                    own.all(|own| own.maps == 0).then_some(())
                });
                end();
                unmap
            }
            false => {
                end();
                unmap()
            }
        };
        let early = told.recv_timeout(Duration::from_millis(500));
        assert!(early.is_err(), "begun before: {begun_before}, {early:?}");
        go.send(()).unwrap();
        let (result, story) = told.recv().unwrap();
        result.unwrap();
        let unpinned = |touch: &Touch| matches!(touch, Touch::Unmap { .. });
        assert!(story.iter().any(unpinned), "begun before: {begun_before}");
        unmap.join().unwrap();
        assert!(large.join().unwrap().is_err(), "its lease is lost too");
    }
}
