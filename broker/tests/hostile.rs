//! Two tenants of one port with workers of their own, the first of them hostile: whatever it sends, the second's work goes on, and the port's heart beats.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod soft;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use soft::raw::{self, Raw};
use soft::{RAM_BYTES, Rig, VF_2, Vmm, fdid, fdid_of, status, until};
use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{JoinHandle, scope},
    time::{Duration, Instant},
};
use sublet::{
    daemon::vocabulary::{BorrowedStatus, FdidText, RefusedCounters, Verb},
    jail::Sandbox,
};
use vfio_shim::{
    model::{Function, IrqIndex},
    ntb::NtbPort,
    path::LeaseId,
    path::message::{Message, OpId, Request},
    path::wire::{BELL_MAILBOX, COMMIT_OFFSET, SLOT_BYTES, SLOT_OFFSET, encode_slot},
};

const PAGE: u64 = 4096;
/// Whole copies of the witness, for a median.
const COPIES: usize = 40;
/// Pairs of a baseline and an attack, by turns. The one in the middle is the verdict: what else a
/// machine is busy with for a while costs a pair.
const PAIRS: usize = 5;
/// One test at a time: each measures. nextest starts every test in a process of its own, and gives
/// these the whole machine (`.config/nextest.toml`).
static TURN: Mutex<()> = Mutex::new(());
/// More of a vector's interrupts in a second than a witness takes.
const INTERRUPTS_PER_SECOND: u64 = 400;
/// How long a witness rests between its copies, so that it keeps well below that.
const REST: Duration = Duration::from_millis(4);
/// The default of a port; this rig's own patience is longer, so that a slow machine is told apart.
const LOST_AFTER: Duration = Duration::from_millis(1_500);
/// Five beats of this rig: an older heartbeat is late.
const LATE_MS: u64 = 50;
/// Looks in a row, 5 ms or more between two of them, that may find it late: 250 ms for whoever
/// looks, however long the machine keeps all of them from running.
const LATE_LOOKS_MAX: u64 = 50;

/// The second tenant: copies by its function without end, each compared byte by byte.
struct Witness {
    took: Arc<Mutex<Vec<Duration>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64, String>>,
}

impl Witness {
    fn start(socket: &Path) -> Self {
        let mut vmm = Vmm::at(socket).unwrap();
        let (took, stop) = (
            Arc::<Mutex<Vec<_>>>::default(),
            Arc::<AtomicBool>::default(),
        );
        let (taken, stopped) = (Arc::clone(&took), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut copies = 0;
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                vmm.copy(copies as u8)?;
                copies += 1;
                taken.lock().unwrap().push(began.elapsed());
                std::thread::sleep(REST);
            }
            Ok(copies)
        });
        Self { took, stop, thread }
    }

    /// The middle one of the next copies.
    fn median(&self) -> Duration {
        self.took.lock().unwrap().clear();
        let mut took = until("the witness goes on", || {
            assert!(!self.thread.is_finished(), "the witness has ended");
            let took = self.took.lock().unwrap();
            (took.len() >= COPIES).then(|| took.clone())
        });
        took.sort();
        took[took.len() / 2]
    }

    /// The same beside threads that only take processors: what a hostile VMM and its worker take
    /// of them is its own, and a scheduler's matter.
    fn median_beside(&self, busy: usize) -> Duration {
        let stop = AtomicBool::new(false);
        scope(|scope| {
            for _ in 0..busy {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let _stop = StopOnDrop(&stop);
            self.median()
        })
    }

    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap()
    }
}

/// Ends what goes on beside the witness, also where the test has failed.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Looks how old the borrower's heartbeat is at the other host, all the time.
struct Heart {
    oldest_ms: Arc<AtomicU64>,
    /// Looks in a row that found it late, at most.
    late: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Heart {
    fn watch(rig: &Rig) -> Self {
        let [oldest_ms, late] = [(); 2].map(|()| Arc::<AtomicU64>::default());
        let stop = Arc::<AtomicBool>::default();
        let (oldest, most, stopped, lender) = (
            Arc::clone(&oldest_ms),
            Arc::clone(&late),
            Arc::clone(&stop),
            Arc::clone(rig.lender()),
        );
        let thread = std::thread::spawn(move || {
            let mut in_a_row = 0;
            while !stopped.load(Ordering::Relaxed) {
                let age_ms = status(&lender).ports[0].mailbox.heartbeat_age_ms;
                let age_ms = age_ms.unwrap_or(u64::MAX);
                in_a_row = if age_ms > LATE_MS { in_a_row + 1 } else { 0 };
                oldest.fetch_max(age_ms, Ordering::Relaxed);
                most.fetch_max(in_a_row, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self {
            oldest_ms,
            late,
            stop,
            thread,
        }
    }

    /// The oldest that was seen, and how many looks in a row found it late.
    fn end(self) -> (Duration, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        let oldest = Duration::from_millis(self.oldest_ms.load(Ordering::Relaxed));
        (oldest, self.late.load(Ordering::Relaxed))
    }
}

/// Both tenants have borrowed; the second is at work.
struct Tenants {
    rig: Rig,
    witness: Witness,
    heart: Heart,
    session: Option<u64>,
    _turn: MutexGuard<'static, ()>,
}

impl Tenants {
    fn start() -> Self {
        Self::with("")
    }

    /// With this line of policy.
    fn with(policy: &str) -> Self {
        Self::limited(policy, "")
    }

    fn limited(policy: &str, more: &str) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let program = Path::new(env!("CARGO_BIN_EXE_sublet"));
        let limits =
            format!("{policy}\n[limits]\ninterrupts_per_second = {INTERRUPTS_PER_SECOND}\n{more}");
        let rig = Rig::limited(program, Sandbox::On, &limits);
        rig.offer(VF_2);
        rig.borrow().unwrap();
        rig.borrow_as(fdid_of(VF_2), "second.sock").unwrap();
        let witness = Witness::start(&rig.dir.path().join("second.sock"));
        let session = status(rig.lender()).ports[0].session.id.map(|id| id.0);
        Self {
            heart: Heart::watch(&rig),
            rig,
            witness,
            session,
            _turn: turn,
        }
    }

    fn raw(&self) -> Raw {
        Raw::connect(&self.rig.socket())
    }

    /// What the borrower's `status` tells of the hostile tenant.
    fn told(&self) -> BorrowedStatus {
        self.of(&fdid())
    }

    fn of(&self, fdid: &sublet::daemon::vocabulary::FdidText) -> BorrowedStatus {
        let mut borrowed = status(self.rig.borrower()).borrowed.into_iter();
        borrowed.find(|one| one.fdid == *fdid).unwrap()
    }

    /// The hostile session is over and undone.
    fn gone(&self) -> BorrowedStatus {
        until("the hostile session has ended", || {
            let told = self.told();
            let state = told.state.as_str();
            assert!(
                matches!(state, "connected" | "undoing" | "waiting"),
                "{told:?}"
            );
            (state == "waiting").then_some(told)
        })
    }

    /// Nobody is connected, and the last guest session ended with these words.
    fn refused(&self, words: &str) {
        let told = self.gone();
        let error = told.last_error.unwrap_or_default();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
    }

    /// The witness's median beside an attack that goes on until it is told to stop, in terms of
    /// what it takes beside threads that only take as many processors.
    fn beside(&self, what: &str, busy: usize, attack: impl Fn(&AtomicBool) + Sync) {
        let mut ratios: Vec<f64> = (0..PAIRS)
            .map(|_| {
                let without = self.witness.median_beside(busy);
                let beside = self.median_under(&attack);
                println!("{what}: {beside:?} beside it, {without:?} without");
                beside.as_secs_f64() / without.as_secs_f64()
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = ratios[PAIRS / 2];
        assert!(
            ratio < 2.0,
            "{what}: {ratio:.2} times the witness's baseline, of {ratios:.2?}"
        );
    }

    fn median_under(&self, attack: &(impl Fn(&AtomicBool) + Sync)) -> Duration {
        let stop = AtomicBool::new(false);
        scope(|scope| {
            let attack = scope.spawn(|| attack(&stop));
            let median = {
                let _stop = StopOnDrop(&stop);
                self.witness.median()
            };
            attack.join().unwrap();
            median
        })
    }

    /// The witness was not harmed, the port's heart has beaten, and nothing is left behind.
    fn end(self) {
        // It is at work after all that, too.
        self.witness.median();
        let (copies, (oldest, late)) = (self.witness.end(), self.heart.end());
        println!("{copies} copies, all right; the oldest heartbeat {oldest:?}, {late} looks late");
        assert!(oldest < LOST_AFTER, "the heartbeat was {oldest:?} old");
        assert!(
            late <= LATE_LOOKS_MAX,
            "the heartbeat was late for {late} looks in a row, {oldest:?} at most"
        );
        let port = status(self.rig.lender()).ports.remove(0);
        assert_eq!(
            port.session.id.map(|id| id.0),
            self.session,
            "the same session"
        );
        for fdid in [fdid(), fdid_of(VF_2)] {
            self.rig.borrower().handle(Verb::Return { fdid }).unwrap();
        }
        self.rig.wait_clean();
        self.rig.end();
    }
}

fn memory(bytes: u64) -> OwnedFd {
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

#[test]
fn messages_without_end_and_answers_that_nobody_reads_slow_their_own_tenant_alone() {
    let tenants = Tenants::start();
    // The VMM's thread, and its worker.
    tenants.beside("a flood of messages", 2, |stop| {
        let mut raw = tenants.raw();
        let read = raw::access(0, 0, 4, &[]);
        while !stop.load(Ordering::Relaxed) {
            (0..32).for_each(|_| raw.send(raw::REGION_READ, &read, &[]).unwrap());
            (0..32).for_each(|_| assert_eq!(raw.answer().unwrap().0, 0));
        }
    });
    tenants.beside("answers that nobody reads", 0, |stop| {
        let mut raw = tenants.raw();
        raw.patience(Duration::from_millis(200));
        let read = raw::access(0, 0, 4, &[]);
        while raw.send(raw::REGION_READ, &read, &[]).is_ok() {}
        until("the witness is done", || {
            stop.load(Ordering::Relaxed).then_some(())
        });
    });
    tenants.end();
}

#[test]
fn storm_into_an_eventfd_at_its_limit_is_held_to_its_rate_and_told() {
    let tenants = Tenants::start();
    let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let mut raw = tenants.raw();
    let set = raw.ask(raw::SET_IRQS, &raw::trigger(0), &[full.as_fd()]);
    assert_eq!(set.map(|(errno, _)| errno), Some(0));
    until("the vector is armed", || {
        (tenants.rig.function.triggers() > 0).then_some(())
    });
    let vector = || status(tenants.rig.lender()).lent[0].vectors[0];
    tenants.beside("a storm into a full eventfd", 1, |stop| {
        let raise = || {
            let function = &tenants.rig.function;
            function.raise_irqs(IrqIndex::Msix, 0, 1).unwrap();
        };
        while !stop.load(Ordering::Relaxed) {
            raise();
        }
        // On a machine at work the witness may be done before a second's worth was relayed.
        until("the storm is told", || {
            (0..10_000).for_each(|_| raise());
            (vector().rate_limits > 0).then_some(())
        });
    });
    let quiet = status(tenants.rig.lender()).lent[1].vectors[0];
    assert_eq!(quiet.rate_limits, 0, "{quiet:?}");
    // Nothing of it is lost: all that was raised is read in the end.
    until("the storm is over", || {
        (!vector().rate_limited).then_some(())
    });
    drop(raw);
    tenants.end();
}

#[test]
fn memory_that_is_none_and_ranges_that_are_not_its_own_end_the_hostile_session_in_words() {
    let tenants = Tenants::start();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, vec![0; RAM_BYTES as usize]).unwrap();
    let file: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap()
        .into();
    let zero: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap()
        .into();
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let short = memory(PAGE);
    ftruncate(&short, 0).unwrap();
    let good = memory(RAM_BYTES);
    let maps: [(&OwnedFd, (u64, u64, u64), &str); 6] = [
        (&file, (0, 0, PAGE), "memfd"),
        (&zero, (0, 0, PAGE), "memfd"),
        (&pipe, (0, 0, PAGE), "memfd"),
        (&short, (0, 0, PAGE), "bytes"),
        (&good, (RAM_BYTES, 0, PAGE), "bytes"),
        (&good, (0, u64::MAX - PAGE + 1, 2 * PAGE), "wraps"),
    ];
    for (fd, (offset, iova, len), words) in maps {
        let mut raw = tenants.raw();
        let body = raw::map(offset, iova, len);
        let answer = raw.ask(raw::DMA_MAP, &body, &[fd.as_fd()]);
        assert!(answer.is_none_or(|(errno, _)| errno != 0), "{words}");
        assert!(raw.is_ended());
        tenants.refused(words);
    }
    // What is no register of its function is refused or all ones, and never the neighbour's.
    let mut raw = tenants.raw();
    for (region, offset) in [(0, 1 << 20), (0, u64::MAX - 3), (2, 0), (8, 0), (77, 0)] {
        match raw.ask(raw::REGION_READ, &raw::access(region, offset, 4, &[]), &[]) {
            Some((0, body)) => assert!(body[16..].iter().all(|byte| *byte == 0xff)),
            Some(_) => {}
            None => raw = tenants.raw(),
        }
        let write = raw::access(region, offset, 4, &[0x5a; 4]);
        if raw.ask(raw::REGION_WRITE, &write, &[]).is_none() {
            raw = tenants.raw();
        }
    }
    // An unmap of what it never mapped takes nothing of anybody.
    let _ = raw.ask(raw::DMA_UNMAP, &raw::unmap(0, RAM_BYTES), &[]);
    drop(raw);
    assert_eq!(tenants.of(&fdid_of(VF_2)).last_error, None);
    assert_eq!(tenants.of(&fdid_of(VF_2)).counters.dma_maps, 1);
    tenants.end();
}

#[test]
fn guest_with_as_many_maps_as_there_can_be_costs_nobody_else_and_one_more_is_refused() {
    const MAPS_MAX: u64 = 65_535;
    // A look at the VMM's memory map for each would take most of the time.
    let tenants = Tenants::limited("memory_check = \"off\"", "guest_maps = 65_535\n");
    let ram = memory(PAGE);
    let map = |raw: &mut Raw, at: u64| {
        let body = raw::map(0, at * PAGE, PAGE);
        raw.ask(raw::DMA_MAP, &body, &[ram.as_fd()])
    };
    tenants.beside("maps without end", 2, |stop| {
        let mut raw = tenants.raw();
        for at in (0..MAPS_MAX).take_while(|_| !stop.load(Ordering::Relaxed)) {
            assert_eq!(map(&mut raw, at).map(|(errno, _)| errno), Some(0));
        }
        drop(raw);
        tenants.gone();
    });
    let mut raw = tenants.raw();
    for at in 0..=MAPS_MAX {
        let refused = map(&mut raw, at).is_none_or(|(errno, _)| errno != 0);
        assert_eq!(refused, at == MAPS_MAX, "map {at}");
    }
    assert!(raw.is_ended());
    tenants.refused("the guest has 65535 DMA maps already, the most it may have");
    tenants.end();
}

#[test]
fn dma_outside_of_its_own_memory_faults_for_its_own_function_and_reaches_nobody() {
    let tenants = Tenants::start();
    let mut vmm = Vmm::start(&tenants.rig).unwrap();
    let space = tenants.rig.function.space();
    let outside = [
        RAM_BYTES,
        1 << 32,
        (1 << 32) + (1 << 16),
        0xfee0_0000,
        1 << 40,
    ];
    for (count, address) in outside.into_iter().enumerate() {
        let faults = 2 * count as u64;
        // The interrupt of a copy that was refused comes all the same.
        for (from, to, so_far) in [(0, address, faults + 1), (address, 0, faults + 2)] {
            vmm.dma(from, to).unwrap();
            assert_eq!(space.fault_count(), so_far, "{from:#x} to {to:#x}");
        }
    }
    assert_eq!(tenants.rig.second.space().fault_count(), 0);
    drop(vmm);
    tenants.end();
}

#[test]
fn mailbox_messages_that_a_peer_forges_are_told_and_cost_no_tenant() {
    let tenants = Tenants::start();
    let session = tenants.session.unwrap();
    let far = tenants.rig.link.port(0);
    let counters = || status(tenants.rig.borrower()).ports[0].mailbox;
    let forge = |slot: &[u8; SLOT_BYTES]| {
        let window = far.window(0);
        window.write(SLOT_OFFSET, &slot[..COMMIT_OFFSET]);
        window.write(SLOT_OFFSET + COMMIT_OFFSET as u64, &slot[COMMIT_OFFSET..]);
        far.peer_doorbell_ring(BELL_MAILBOX);
    };
    let mut torn = encode_slot(session, 1 << 40, 0, 1, &[0; 8]).unwrap();
    torn[40] ^= 1;
    let foreign = encode_slot(session ^ 1, 1 << 40, 0, 1, &[0; 8]).unwrap();
    let replay = encode_slot(session, 1, 0, 1, &[0; 8]).unwrap();
    until("all three are told", || {
        [&torn, &foreign, &replay]
            .into_iter()
            .for_each(|slot| forge(slot));
        let told = counters();
        (told.torn > 0 && told.foreign > 0 && told.replays > 0).then_some(())
    });
    // One that names a lease is told there, too, and at that lease alone.
    let of = |which: FdidText| tenants.of(&which);
    let counts = || [fdid(), fdid_of(VF_2)].map(|which| of(which).refused);
    assert_eq!(counts(), [RefusedCounters::default(); 2]);
    let revoked = Request::Revoked {
        lease: LeaseId(of(fdid()).lease.0),
        text: "over".to_owned(),
    };
    let (op, payload) = Message::Request(OpId(9), revoked).encode().unwrap();
    let mut torn = encode_slot(session, 1 << 40, 0, op, &payload).unwrap();
    torn[32] ^= 1;
    let foreign = encode_slot(session ^ 1, 1 << 40, 0, op, &payload).unwrap();
    until("both are told at the lease", || {
        forge(&torn);
        let is_torn = counts()[0].torn > 0;
        forge(&foreign);
        (is_torn && counts()[0].foreign > 0).then_some(())
    });
    assert_eq!(counts()[1], RefusedCounters::default());
    assert_eq!(counters().violations, 0);
    let told = [fdid(), fdid_of(VF_2)].map(|fdid| tenants.of(&fdid).last_error);
    assert_eq!(told, [None, None]);
    tenants.end();
}
