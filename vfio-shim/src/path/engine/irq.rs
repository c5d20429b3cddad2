//! The irq thread: doorbells, the lender's relay with its fence, and the borrower's scan; it never waits for an ioctl.

use super::control::Input;
use super::requests::{Watch, Wish};
use super::{EngineError, Signals};
use crate::model::{Aperture, Bdf, Runtime};
use crate::ntb::NtbPort;
use crate::path::limits::Bucket;
use crate::path::message::LeaseId;
use crate::path::relay::{RelayStep, Scan, VectorRelay};
use crate::path::wire::{BELL_IRQ, BELL_MAILBOX, IRQ_TABLE_OFFSET};
use rustix::event::{EventfdFlags, epoll, eventfd};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

const KEY_PORT: u64 = 0;
const KEY_COMMAND: u64 = 1;
const KEY_RELAY: u64 = 1 << 63;
const KEY_WATCH: u64 = 1 << 62;
/// How many events one wait takes.
const EVENTS_MAX: usize = 64;
/// How often doorbells are taken before others have their turn: a peer may ring without end.
const TAKES_MAX: usize = 4;

/// What the relay of one vector of a lent function has done.
#[derive(Debug, Default)]
pub(super) struct VectorCounters {
    /// The sum of the values read from its eventfd.
    pub(super) raised: AtomicU64,
    /// Fences read.
    pub(super) fences: AtomicU64,
    /// Bells rung.
    pub(super) bells: AtomicU64,
    /// Whether it is masked.
    pub(super) masked: AtomicBool,
    /// Whether a fence read wrong since it was armed.
    pub(super) suspect: AtomicBool,
    /// Whether it is masked for its rate now.
    pub(super) rate_limited: AtomicBool,
    /// How often it was.
    pub(super) rate_limits: AtomicU64,
}

/// What a port's doorbells have done.
#[derive(Debug, Default)]
pub(super) struct BellCounters {
    /// Rung for interrupts at the peer.
    pub(super) rung: AtomicU64,
    /// Taken, of either kind.
    pub(super) taken: AtomicU64,
}

/// A path's relay, as the executor hands it over.
pub(super) struct Relay {
    pub(super) lease: LeaseId,
    pub(super) first: u32,
    pub(super) eventfds: Vec<OwnedFd>,
    pub(super) counters: Arc<[VectorCounters]>,
}

/// What other threads ask of the irq thread.
pub(super) enum IrqCommand {
    SessionOpened {
        session: u64,
        peer_nonce: u64,
    },
    SessionOver,
    /// Confirmed when all of its eventfds are watched, or none is.
    Arm(Relay, mpsc::Sender<rustix::io::Result<()>>),
    /// Confirmed when no bell for the path comes any more.
    Disarm(LeaseId, mpsc::Sender<()>),
    Mask {
        lease: LeaseId,
        start: u32,
        count: u32,
        masked: bool,
    },
    Scan {
        lease: LeaseId,
        first: u32,
        count: u32,
        signals: Arc<Signals>,
    },
    ScanEnd(LeaseId),
    /// Scan all now.
    Look,
    /// Tell control when one of these fires.
    Watch(Bdf, Vec<Watch>),
    Unwatch(Bdf),
    Stop,
}

/// The irq thread's door for other threads.
#[derive(Clone)]
pub(super) struct IrqHandle {
    commands: mpsc::Sender<IrqCommand>,
    wake: Arc<OwnedFd>,
    pub(super) bells: Arc<BellCounters>,
    pub(super) told: Arc<Told>,
}

impl IrqHandle {
    pub(super) fn send(&self, command: IrqCommand) {
        // Both only fail when the thread is gone, and then there is no relay and no scan either.
        let _ = self.commands.send(command);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    /// Returns when the path's relay works. It has read nothing by then.
    pub(super) fn arm(&self, runtime: &dyn Runtime, relay: Relay) -> rustix::io::Result<()> {
        let (done, wait) = mpsc::channel();
        self.send(IrqCommand::Arm(relay, done));
        let armed = runtime.receive(&wait, None);
        armed.unwrap_or(Err(rustix::io::Errno::PIPE))
    }

    /// Returns when the path's relay rings no more.
    pub(super) fn disarm(&self, runtime: &dyn Runtime, lease: LeaseId) {
        let (done, wait) = mpsc::channel();
        self.send(IrqCommand::Disarm(lease, done));
        let _ = runtime.receive(&wait, None);
    }
}

struct Vector {
    event: OwnedFd,
    relay: VectorRelay,
    rate: Bucket,
}

struct Armed {
    first: u32,
    vectors: Vec<Vector>,
    counters: Arc<[VectorCounters]>,
    index: u64,
}

struct Scanned {
    first: u32,
    scan: Scan,
    signals: Arc<Signals>,
}

pub(super) struct IrqThread {
    port: Arc<dyn NtbPort>,
    window: Arc<dyn Aperture>,
    mailbox: Arc<dyn Aperture>,
    inbox: mpsc::Sender<Input>,
    runtime: Arc<dyn Runtime>,
    commands: mpsc::Receiver<IrqCommand>,
    wake: Arc<OwnedFd>,
    epoll: OwnedFd,
    session: Option<(u64, u64)>,
    relays: BTreeMap<LeaseId, Armed>,
    by_index: BTreeMap<u64, LeaseId>,
    index_last: u64,
    scans: BTreeMap<LeaseId, Scanned>,
    watched: BTreeMap<u64, (Bdf, Watch)>,
    watch_last: u64,
    interrupts_per_second: u32,
    /// Vectors that are masked for their rate: until when, and their keys.
    over_rate: BTreeSet<(u64, u64)>,
    bells: Arc<BellCounters>,
    told: Arc<Told>,
}

/// What control has been told and has not looked at yet: a peer that rings without end fills no
/// memory.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) bell: AtomicBool,
    pub(super) link_change: AtomicBool,
    pub(super) beat: AtomicBool,
}

fn made<T>(what: &'static str, result: rustix::io::Result<T>) -> Result<T, EngineError> {
    result.map_err(|error| EngineError::Thread {
        what,
        source: error.into(),
    })
}

impl IrqThread {
    pub(super) fn new(
        port: Arc<dyn NtbPort>,
        mailbox: Arc<dyn Aperture>,
        interrupts_per_second: u32,
        (inbox, runtime): (mpsc::Sender<Input>, Arc<dyn Runtime>),
    ) -> Result<(Self, IrqHandle), EngineError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(made("wake-up eventfd", eventfd(0, flags))?);
        let epoll = made("epoll", epoll::create(epoll::CreateFlags::CLOEXEC))?;
        let (sender, commands) = mpsc::channel();
        let bells = Arc::<BellCounters>::default();
        let told = Arc::<Told>::default();
        let watched: [(BorrowedFd<'_>, u64); 2] =
            [(port.event(), KEY_PORT), (wake.as_fd(), KEY_COMMAND)];
        for (fd, key) in watched {
            let data = epoll::EventData::new_u64(key);
            made(
                "epoll entry",
                epoll::add(&epoll, fd, data, epoll::EventFlags::IN),
            )?;
        }
        let thread = Self {
            window: port.window(0),
            port,
            mailbox,
            inbox,
            runtime,
            commands,
            wake: Arc::clone(&wake),
            epoll,
            session: None,
            relays: BTreeMap::new(),
            by_index: BTreeMap::new(),
            index_last: 0,
            scans: BTreeMap::new(),
            watched: BTreeMap::new(),
            watch_last: 0,
            interrupts_per_second,
            over_rate: BTreeSet::new(),
            bells: Arc::clone(&bells),
            told: Arc::clone(&told),
        };
        Ok((
            thread,
            IrqHandle {
                commands: sender,
                wake,
                bells,
                told,
            },
        ))
    }

    /// Works until told to stop.
    pub(super) fn run(mut self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS_MAX);
        let mut again = false;
        loop {
            events.clear();
            let unmask_ms = self.over_rate.first().map(|(at_ms, _)| *at_ms);
            let timeout = self.runtime.look_until(again, unmask_ms);
            let room = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, room, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the irq thread cannot wait for events");
                    return;
                }
            }
            again = events.is_empty();
            self.unmask_for_rate();
            for event in &events {
                match event.data.u64() {
                    KEY_PORT => self.doorbell(),
                    KEY_COMMAND => {
                        if self.commanded() {
                            return;
                        }
                    }
                    key if key & KEY_RELAY != 0 => self.raised(key),
                    key => self.wished(key),
                }
            }
        }
    }

    fn doorbell(&mut self) {
        drain(self.port.event());
        for _ in 0..TAKES_MAX {
            let bits = self.port.doorbell_take();
            if bits == 0 {
                return;
            }
            self.bells.taken.fetch_add(1, Ordering::Relaxed);
            if bits >> self.port.info().doorbell_count != 0 {
                self.tell(&self.told.link_change, Input::LinkChange);
            }
            if bits & BELL_MAILBOX != 0 {
                self.tell(&self.told.bell, Input::Bell);
            }
            if bits & BELL_IRQ != 0 {
                self.scan_all();
            }
        }
        // Comes back to the rest, after whatever else waits here. No one but the kernel and this
        // thread writes the event, so it is far from full.
        let _ = rustix::io::write(self.port.event(), &1u64.to_ne_bytes());
    }

    fn tell(&self, told: &AtomicBool, input: Input) {
        // Control clears it before it looks, so that what came after its look is told again.
        if !told.swap(true, Ordering::SeqCst) {
            let _ = self.inbox.send(input);
        }
    }

    fn scan_all(&mut self) {
        let Some((session, _)) = self.session else {
            return;
        };
        for scanned in self.scans.values_mut() {
            let first = scanned.first;
            let (mailbox, signals) = (&self.mailbox, &scanned.signals);
            let read = |vector: usize| {
                let word = mailbox.read_u64(word_offset(first, vector as u32));
                signals.saw(vector, word);
                word
            };
            for vector in scanned.scan.scan(read, session) {
                scanned.signals.raise(vector as u32);
            }
        }
    }

    /// True when told to stop.
    fn commanded(&mut self) -> bool {
        drain(self.wake.as_fd());
        while let Ok(command) = self.commands.try_recv() {
            match command {
                IrqCommand::Stop => return true,
                IrqCommand::SessionOpened {
                    session,
                    peer_nonce,
                } => {
                    self.session = Some((session, peer_nonce));
                }
                IrqCommand::SessionOver => self.session = None,
                IrqCommand::Arm(relay, done) => {
                    let _ = done.send(self.arm(relay));
                }
                IrqCommand::Disarm(lease, done) => {
                    self.disarm(lease);
                    let _ = done.send(());
                }
                IrqCommand::Mask {
                    lease,
                    start,
                    count,
                    masked,
                } => {
                    self.mask(lease, start, count, masked);
                }
                IrqCommand::Scan {
                    lease,
                    first,
                    count,
                    signals,
                } => {
                    let scan = Scan::new(count as usize);
                    self.scans.insert(
                        lease,
                        Scanned {
                            first,
                            scan,
                            signals,
                        },
                    );
                }
                IrqCommand::ScanEnd(lease) => {
                    self.scans.remove(&lease);
                }
                IrqCommand::Look => self.scan_all(),
                IrqCommand::Watch(bdf, watches) => self.watch(bdf, watches),
                IrqCommand::Unwatch(bdf) => self.watched.retain(|_, (of, _)| *of != bdf),
            }
        }
        false
    }

    fn watch(&mut self, bdf: Bdf, watches: Vec<Watch>) {
        for watch in watches {
            self.watch_last += 1;
            let key = KEY_WATCH | self.watch_last;
            let data = epoll::EventData::new_u64(key);
            match epoll::add(&self.epoll, &watch.fd, data, epoll::EventFlags::IN) {
                // Closing the last copy of it takes it out again; the kernel has one as long as it
                // is armed, so the executor disarms it first.
                Ok(()) => drop(self.watched.insert(key, (bdf, watch))),
                Err(error) => {
                    tracing::error!(%bdf, %error, "what the kernel asks of a function is not heard");
                }
            }
        }
    }

    fn wished(&mut self, key: u64) {
        if let Some((bdf, watch)) = self.watched.get(&key)
            && read_count(watch.fd.as_fd()) != 0
        {
            let wish: Wish = watch.wish;
            let _ = self.inbox.send(Input::Wish(*bdf, wish));
        }
    }

    fn arm(&mut self, relay: Relay) -> rustix::io::Result<()> {
        self.disarm(relay.lease);
        self.index_last += 1;
        let index = self.index_last & 0x7fff_ffff;
        for (vector, fd) in relay.eventfds.iter().enumerate() {
            let data = epoll::EventData::new_u64(key(index, vector as u32));
            epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN).inspect_err(|_| {
                for watched in &relay.eventfds[..vector] {
                    let _ = epoll::delete(&self.epoll, watched);
                }
            })?;
        }
        // The counts go on where they were before a reset: the borrower has seen them, and a
        // first raise that stored the same count again would be lost. Each bell was one count.
        let count = |vector: &VectorCounters| vector.bells.load(Ordering::Relaxed) as u32;
        let rate = Bucket::new(self.interrupts_per_second, self.runtime.now_ms());
        let vectors = relay
            .eventfds
            .into_iter()
            .zip(relay.counters.iter())
            .map(|(event, counters)| Vector {
                event,
                relay: VectorRelay::resuming(count(counters)),
                rate,
            })
            .collect();
        for counters in &*relay.counters {
            counters.suspect.store(false, Ordering::Relaxed);
            counters.rate_limited.store(false, Ordering::Relaxed);
        }
        let armed = Armed {
            first: relay.first,
            vectors,
            counters: relay.counters,
            index,
        };
        self.by_index.insert(index, relay.lease);
        self.relays.insert(relay.lease, armed);
        Ok(())
    }

    fn disarm(&mut self, lease: LeaseId) {
        let Some(armed) = self.relays.remove(&lease) else {
            return;
        };
        self.by_index.remove(&armed.index);
        for (vector, Vector { event: fd, .. }) in armed.vectors.iter().enumerate() {
            // Raises that nobody has read yet are counted, so that the sums agree.
            let raised = read_count(fd.as_fd());
            armed.counters[vector]
                .raised
                .fetch_add(raised, Ordering::Relaxed);
            let _ = epoll::delete(&self.epoll, fd);
        }
    }

    fn mask(&mut self, lease: LeaseId, start: u32, count: u32, masked: bool) {
        let Some(armed) = self.relays.get_mut(&lease) else {
            return;
        };
        let mut fire = Vec::new();
        for vector in start..start.saturating_add(count).min(armed.vectors.len() as u32) {
            let relay = &mut armed.vectors[vector as usize].relay;
            armed.counters[vector as usize]
                .masked
                .store(masked, Ordering::Relaxed);
            if relay.mask(masked) == RelayStep::Fence {
                fire.push(vector);
            }
        }
        for vector in fire {
            self.relay(lease, vector);
        }
    }

    fn raised(&mut self, key: u64) {
        let (index, vector) = index_and_vector(key);
        let Some(lease) = self.by_index.get(&index).copied() else {
            return;
        };
        let Some(armed) = self.relays.get_mut(&lease) else {
            return;
        };
        let Some(Vector { event, relay, rate }) = armed.vectors.get_mut(vector as usize) else {
            return;
        };
        let counters = &armed.counters[vector as usize];
        if let Err(unmask_ms) = rate.take(|| self.runtime.now_ms()) {
            // What it raises meanwhile stays in its eventfd, and nobody looks there.
            counters.rate_limits.fetch_add(1, Ordering::Relaxed);
            watch(&self.epoll, (event, key), epoll::EventFlags::empty());
            counters.rate_limited.store(true, Ordering::Relaxed);
            self.over_rate.insert((unmask_ms, key));
            return;
        }
        let value = read_count(event.as_fd());
        if value == 0 {
            return;
        }
        counters.raised.fetch_add(value, Ordering::Relaxed);
        if relay.on_raise(value) == RelayStep::Fence {
            self.relay(lease, vector);
        }
    }

    /// Vectors whose rate allows it again are heard: what they raised meanwhile comes at once.
    fn unmask_for_rate(&mut self) {
        if self.over_rate.is_empty() {
            return;
        }
        let now_ms = self.runtime.now_ms();
        while let Some(&(at_ms, key)) = self.over_rate.first()
            && at_ms <= now_ms
        {
            self.over_rate.pop_first();
            let (index, vector) = index_and_vector(key);
            let lease = self.by_index.get(&index);
            let Some(armed) = lease.and_then(|lease| self.relays.get(lease)) else {
                continue;
            };
            let event = &armed.vectors[vector as usize].event;
            watch(&self.epoll, (event, key), epoll::EventFlags::IN);
            let counters = &armed.counters[vector as usize];
            counters.rate_limited.store(false, Ordering::Relaxed);
        }
    }

    /// Fence, count, bell; in this order, or an interrupt could overtake the data it tells of.
    fn relay(&mut self, lease: LeaseId, vector: u32) {
        let Some((session, peer_nonce)) = self.session else {
            return;
        };
        let Some(armed) = self.relays.get_mut(&lease) else {
            return;
        };
        let Some(Vector { relay, .. }) = armed.vectors.get_mut(vector as usize) else {
            return;
        };
        let counters = &armed.counters[vector as usize];
        counters.fences.fetch_add(1, Ordering::Relaxed);
        let read = self.window.read_u32(0);
        let word = match relay.on_fence(read, peer_nonce, session) {
            RelayStep::Store(word) => word,
            RelayStep::Suspect => {
                counters.suspect.store(true, Ordering::Relaxed);
                tracing::warn!(%lease, vector, "a fence read {read:#x}: the path is suspect");
                // Control looks at link, scratchpads and mailbox: one of them tells why.
                self.tell(&self.told.beat, Input::Beat);
                return;
            }
            RelayStep::Nothing | RelayStep::Fence => return,
        };
        let offset = word_offset(armed.first, vector);
        self.window.write_u64(offset, word);
        if !self.port.info().doorbell_ordered {
            let _ = self.window.read_u64(offset);
        }
        self.port.peer_doorbell_ring(BELL_IRQ);
        counters.bells.fetch_add(1, Ordering::Relaxed);
        self.bells.rung.fetch_add(1, Ordering::Relaxed);
    }
}

/// How an event of a relay's vector names it.
fn key(index: u64, vector: u32) -> u64 {
    KEY_RELAY | index << 32 | u64::from(vector)
}

fn index_and_vector(key: u64) -> (u64, u32) {
    (key >> 32 & 0x7fff_ffff, key as u32)
}

/// Changes what is heard of an eventfd that is watched already.
fn watch(epoll: &OwnedFd, (event, key): (&OwnedFd, u64), flags: epoll::EventFlags) {
    // Fails only for what is not watched, which was told when it could not be.
    let _ = epoll::modify(epoll, event, epoll::EventData::new_u64(key), flags);
}

pub(super) fn word_offset(first: u32, vector: u32) -> u64 {
    IRQ_TABLE_OFFSET + (u64::from(first) + u64::from(vector)) * 8
}

fn read_count(fd: BorrowedFd<'_>) -> u64 {
    let mut value = [0u8; 8];
    match rustix::io::read(fd, &mut value) {
        Ok(8) => u64::from_ne_bytes(value),
        _ => 0,
    }
}

fn drain(fd: BorrowedFd<'_>) {
    let _ = read_count(fd);
}

#[cfg(test)]
mod tests;
