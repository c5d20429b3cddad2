//! Both halves and the link between them: what an access of one side does to the other.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::egress::{Access, InFlight, RETRY_PAUSE};
use crate::half::{Half, Side};
use crate::link::Link;
use crate::options::{DeviceOptions, Fault};
use crate::registers::SPAD;
use crate::stream::{Message, Stream, StreamError};
use crate::window::{is_msi, touches_msi_range};
use crate::wire::{DMA_PREFIX_BYTES, DMA_READ, DMA_WRITE, FLAG_ERROR, FLAG_NO_REPLY, Header};

/// The bridge.
#[derive(Debug)]
pub struct Model {
    halves: [Half; 2],
    link: Link,
    pub(crate) no_reset: bool,
    fault: Option<Fault>,
}

/// How far an access came.
enum Progress {
    Done,
    Waits(InFlight),
}

impl Model {
    /// A bridge without clients.
    pub fn new(options: &DeviceOptions) -> Self {
        Self {
            halves: Side::BOTH.map(|side| Half::new(side, options)),
            link: Link::new(options.training()),
            no_reset: options.no_reset,
            fault: options.fault,
        }
    }

    /// A half.
    pub fn half(&self, side: Side) -> &Half {
        &self.halves[side.index()]
    }

    pub(crate) fn half_mut(&mut self, side: Side) -> &mut Half {
        &mut self.halves[side.index()]
    }

    /// The link.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Changes the link by hand, and shows the change.
    pub fn change_link(&mut self, now: Instant, change: impl FnOnce(&mut Link)) {
        change(&mut self.link);
        self.update_link(now);
    }

    /// Breaks the bridge, or mends it.
    pub fn set_fault(&mut self, fault: Option<Fault>) {
        self.fault = fault;
    }

    /// Takes a client for a half that has none.
    pub fn connect(&mut self, side: Side, socket: UnixStream) {
        self.half_mut(side).stream = Some(Stream::new(socket));
        eprintln!("half {side:?}: client connected");
    }

    /// Gives a half's client up: the half resets, the link drops.
    pub(crate) fn disconnect(&mut self, side: Side, reason: &StreamError, now: Instant) {
        if self.half(side).stream.is_none() {
            return;
        }
        let source = std::error::Error::source(reason).map_or(String::new(), |e| format!(": {e}"));
        eprintln!("half {side:?}: client gone: {reason}{source}");
        self.half_mut(side).disconnect();
        self.update_link(now);
        // What the peer waited for from this client will not come.
        self.finish(side.peer(), None, now);
    }

    /// Receives from a half's client and works on what came.
    pub fn service(&mut self, side: Side, now: Instant) {
        let Some(stream) = &mut self.half_mut(side).stream else {
            return;
        };
        if let Err(error) = stream.receive() {
            // Messages before the end of the stream count: a posted write is not lost.
            self.pump(side, now);
            self.disconnect(side, &error, now);
        }
        while Side::BOTH.map(|side| self.pump(side, now)).contains(&true) {}
    }

    /// Works on whole messages that a half's client sent; returns whether there were any.
    fn pump(&mut self, side: Side, now: Instant) -> bool {
        let mut any = false;
        while !self.half(side).egress.is_full() {
            let Some(stream) = &mut self.half_mut(side).stream else {
                break;
            };
            let result = match stream.next_message() {
                Ok(None) => break,
                Ok(Some(message)) => self.message(side, message, now),
                Err(error) => Err(error),
            };
            any = true;
            if let Err(error) = result {
                self.disconnect(side, &error, now);
            }
        }
        any
    }

    fn message(&mut self, side: Side, message: Message, now: Instant) -> Result<(), StreamError> {
        if message.header.is_reply() {
            self.dma_reply(side, &message, now);
            return Ok(());
        }
        self.half_mut(side).counters.requests += 1;
        self.request(side, message, now)
    }

    /// Sends to a half's client; a client that cannot be sent to is given up.
    pub(crate) fn send(&mut self, side: Side, header: &Header, parts: &[&[u8]], now: Instant) {
        let Some(stream) = &mut self.half_mut(side).stream else {
            return;
        };
        if let Err(error) = stream.send(header, parts) {
            self.disconnect(side, &error, now);
        }
    }

    /// Sends what waits for a half's client.
    pub fn flush(&mut self, side: Side, now: Instant) {
        let Some(stream) = &mut self.half_mut(side).stream else {
            return;
        };
        if let Err(error) = stream.flush() {
            self.disconnect(side, &error, now);
        }
    }

    /// Brings the link to where both halves want it and shows a change to both.
    pub(crate) fn update_link(&mut self, now: Instant) {
        let wanted = self.halves.iter().all(|half| half.registers.link_enabled());
        let Some(up) = self.link.update(wanted, now) else {
            return;
        };
        eprintln!("link {}", if up { "up" } else { "down" });
        for half in &mut self.halves {
            half.counters.link_changes += 1;
            let vectors = half.registers.set_link(up);
            half.fire(vectors);
        }
    }

    /// When [`Model::tick`] must be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        let in_flight = self
            .halves
            .iter()
            .filter_map(|half| half.egress.in_flight.as_ref());
        in_flight
            .map(InFlight::deadline)
            .chain(self.link.deadline())
            .min()
    }

    /// Does what is due by the clock alone.
    pub fn tick(&mut self, now: Instant) {
        self.update_link(now);
        for side in Side::BOTH {
            let Some(in_flight) = &self.half(side).egress.in_flight else {
                continue;
            };
            if in_flight.deadline() > now {
                continue;
            }
            if in_flight.retry_at.is_some() {
                self.retry(side, now);
            } else {
                eprintln!("half {side:?}: no answer from the peer's client");
                self.finish(side, None, now);
            }
        }
        while Side::BOTH.map(|side| self.pump(side, now)).contains(&true) {}
    }

    /// Puts an access of `side` behind what it already has under way.
    pub(crate) fn enqueue(&mut self, side: Side, access: Access, now: Instant) {
        self.half_mut(side).egress.queue.push_back(access);
        self.run_egress(side, now);
    }

    fn run_egress(&mut self, side: Side, now: Instant) {
        while self.half(side).egress.in_flight.is_none() {
            let Some(access) = self.half_mut(side).egress.queue.pop_front() else {
                return;
            };
            if let Progress::Waits(in_flight) = self.execute(side, &access, now) {
                let egress = &mut self.half_mut(side).egress;
                egress.queue.push_front(access);
                egress.in_flight = Some(in_flight);
                if self.half(side.peer()).stream.is_none() {
                    self.finish(side, None, now);
                }
            }
        }
    }

    fn execute(&mut self, side: Side, access: &Access, now: Instant) -> Progress {
        let up = self.link.is_up();
        match access {
            Access::WindowRead {
                window,
                offset,
                count,
                ..
            } => {
                self.half_mut(side).counters.window_reads += 1;
                return self.window_read(side, access, (*window, *offset, *count), now);
            }
            Access::WindowWrite {
                window,
                offset,
                data,
            } => {
                self.half_mut(side).counters.window_writes += 1;
                return self.window_write(side, (*window, *offset), data, now);
            }
            Access::Ring { doorbells } => {
                self.half_mut(side).counters.doorbells += u64::from(doorbells.count_ones());
                if up && self.fault != Some(Fault::DropDoorbells) {
                    self.half_mut(side.peer()).ring(*doorbells);
                }
            }
            Access::SpadRead {
                request,
                prefix,
                offset,
                count,
            } => {
                let value = if up {
                    self.half(side.peer()).registers.read(SPAD + offset, *count)
                } else {
                    u64::MAX
                };
                let data = &value.to_le_bytes()[..usize::from(*count)];
                let header = request.reply(prefix.len() + data.len());
                self.send(side, &header, &[prefix, data], now);
            }
            Access::SpadWrite {
                offset,
                count,
                value,
            } => {
                if up {
                    // Scratchpads have no effects.
                    let _ =
                        self.half_mut(side.peer())
                            .registers
                            .write(SPAD + offset, *count, *value);
                }
            }
        }
        Progress::Done
    }

    /// The peer's DMA address of a window access, if it reaches anything at all.
    fn translate(&self, side: Side, window: usize, offset: u64, bytes: usize) -> Option<u64> {
        let peer = self.half(side.peer());
        if !self.link.is_up() || !peer.config.bus_master() {
            return None;
        }
        peer.inbound(window).translate(offset, bytes as u64)
    }

    fn window_read(
        &mut self,
        side: Side,
        access: &Access,
        (window, offset, count): (usize, u64, usize),
        now: Instant,
    ) -> Progress {
        let address = self.translate(side, window, offset, count);
        let address = address.filter(|address| !touches_msi_range(*address, count as u64));
        let Some(address) = address else {
            self.half_mut(side).counters.refused += 1;
            self.answer_read(side, access, None, now);
            return Progress::Done;
        };
        let peer = self.half_mut(side.peer());
        let mut data = vec![0; count];
        if peer.dma.read(address, &mut data) {
            peer.counters.dma_direct_reads += 1;
            self.answer_read(side, access, Some(&data), now);
            return Progress::Done;
        }
        peer.counters.dma_message_reads += 1;
        let id = self.send_dma(side.peer(), DMA_READ, 0, address, (count, &[]), now);
        Progress::Waits(InFlight {
            id,
            address,
            started: now,
            tries: 1,
            retry_at: None,
        })
    }

    fn window_write(
        &mut self,
        side: Side,
        (window, offset): (usize, u64),
        data: &[u8],
        now: Instant,
    ) -> Progress {
        let address = self.translate(side, window, offset, data.len());
        let address = address.filter(|_| self.fault != Some(Fault::DropWrites));
        let Some(address) = address else {
            self.half_mut(side).counters.refused += 1;
            return Progress::Done;
        };
        let bytes = data.len() as u64;
        if touches_msi_range(address, bytes) {
            if is_msi(address, bytes) {
                self.half_mut(side.peer()).counters.msi_writes += 1;
                let body = (data.len(), data);
                // Awaiting it would let two hosts that signal each other wait for each other.
                self.send_dma(side.peer(), DMA_WRITE, FLAG_NO_REPLY, address, body, now);
            } else {
                self.half_mut(side).counters.refused += 1;
            }
            return Progress::Done;
        }
        let peer = self.half_mut(side.peer());
        if peer.dma.write(address, data) {
            peer.counters.dma_direct_writes += 1;
            return Progress::Done;
        }
        peer.counters.dma_message_writes += 1;
        let id = self.send_dma(side.peer(), DMA_WRITE, 0, address, (data.len(), data), now);
        Progress::Waits(InFlight {
            id,
            address,
            started: now,
            tries: 1,
            retry_at: None,
        })
    }

    /// Sends a DMA message to a half's client and returns its id.
    fn send_dma(
        &mut self,
        side: Side,
        command: u16,
        flags: u32,
        address: u64,
        (count, data): (usize, &[u8]),
        now: Instant,
    ) -> u16 {
        let id = self.half_mut(side).next_id();
        let header = Header::request(id, command, flags, DMA_PREFIX_BYTES + data.len());
        let parts = [
            &address.to_le_bytes()[..],
            &(count as u64).to_le_bytes(),
            data,
        ];
        self.send(side, &header, &parts, now);
        id
    }

    /// An answer to a DMA message came from `side`'s client.
    fn dma_reply(&mut self, side: Side, message: &Message, now: Instant) {
        let header = &message.header;
        let asker = side.peer();
        let Some(in_flight) = &mut self.half_mut(asker).egress.in_flight else {
            return;
        };
        if in_flight.id != header.id || in_flight.retry_at.is_some() {
            return;
        }
        if header.flags & FLAG_ERROR == 0 {
            let data = message.body.get(DMA_PREFIX_BYTES..).unwrap_or(&[]);
            self.finish(asker, Some(data), now);
        } else if in_flight.may_retry(header.error, now) {
            in_flight.retry_at = Some(now + RETRY_PAUSE);
        } else {
            eprintln!(
                "half {side:?}: DMA at {:#x}: error {}",
                in_flight.address, header.error
            );
            self.finish(asker, None, now);
        }
    }

    fn retry(&mut self, side: Side, now: Instant) {
        let Some(access) = self.half_mut(side).egress.queue.pop_front() else {
            return;
        };
        let Some(mut in_flight) = self.half_mut(side).egress.in_flight.take() else {
            return;
        };
        let peer = side.peer();
        self.half_mut(peer).counters.dma_retries += 1;
        let (command, body) = match &access {
            Access::WindowWrite { data, .. } => (DMA_WRITE, (data.len(), &data[..])),
            Access::WindowRead { count, .. } => (DMA_READ, (*count, &[][..])),
            _ => return,
        };
        // The access is in its place again before the send: that may find the client gone.
        let address = in_flight.address;
        in_flight.tries += 1;
        in_flight.retry_at = None;
        in_flight.id = self.send_dma(peer, command, 0, address, body, now);
        let egress = &mut self.half_mut(side).egress;
        egress.queue.push_front(access);
        egress.in_flight = Some(in_flight);
        if self.half(peer).stream.is_none() {
            self.finish(side, None, now);
        }
    }

    /// The first access of a half that waited for an answer is over.
    fn finish(&mut self, side: Side, data: Option<&[u8]>, now: Instant) {
        if self.half_mut(side).egress.in_flight.take().is_none() {
            return;
        }
        let Some(access) = self.half_mut(side).egress.queue.pop_front() else {
            return;
        };
        if data.is_none() {
            self.half_mut(side).counters.refused += 1;
        }
        if let Access::WindowRead { count, .. } = &access {
            let data = data
                .filter(|data| data.len() >= *count)
                .map(|data| &data[..*count]);
            self.answer_read(side, &access, data, now);
        }
        self.run_egress(side, now);
    }

    /// Answers a window read; without data by all ones.
    fn answer_read(&mut self, side: Side, access: &Access, data: Option<&[u8]>, now: Instant) {
        let Access::WindowRead {
            request,
            prefix,
            count,
            ..
        } = access
        else {
            return;
        };
        let ones;
        let data = match data {
            Some(data) => data,
            None => {
                ones = vec![0xFF; *count];
                &ones
            }
        };
        self.send(
            side,
            &request.reply(prefix.len() + data.len()),
            &[prefix, data],
            now,
        );
    }
}
