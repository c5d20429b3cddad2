//! The port as a worker reaches it: requests over the channel, slices of the window, and no more.

use super::window::{BarWindow, Bars};
use crate::ipc::{
    Answered, Channel, Check, FDS_MAX, FILES_MAX, MapPart, MapPiece, PIECES_MAX, Sent, ToPort,
    Token,
};
use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
};
use vfio_shim::{
    model::{Aperture, Mapping, Runtime, Span, WindowOffset},
    path::{
        CallError, PathPort,
        borrower::{Answer, Call, GuestMap},
    },
};
use vmm_glue::vfio_user::{
    Holders, Vmm,
    memory_check::{Inode, MemoryError, MemoryMaps},
};

/// How much longer than the port a worker waits: the port's own word on what took too long is better.
const MARGIN_MS: u64 = 2_000;
/// How long a load through the port, or a look at a process's memory map, may take.
const LOOK_WAIT_MS: u64 = 4_000;

type Reply = Result<Answered, CallError>;

/// The port's side of the lease that this worker serves.
pub(super) struct ChannelPort {
    runtime: Arc<dyn Runtime>,
    channel: Arc<Channel>,
    last: AtomicU64,
    waiting: Mutex<HashMap<Token, mpsc::Sender<Reply>>>,
    bars: Bars,
    window: Option<(OwnedFd, u64)>,
    /// The lease is lost: nothing is asked any more but whether its memory is gone.
    over: AtomicBool,
    this: Weak<Self>,
}

impl std::fmt::Debug for ChannelPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChannelPort")
    }
}

fn gone() -> CallError {
    CallError::Gone("the lease is over".into())
}

impl ChannelPort {
    pub(super) fn new(
        runtime: Arc<dyn Runtime>,
        channel: Arc<Channel>,
        bars: Bars,
        window: Option<(OwnedFd, u64)>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            runtime,
            channel,
            last: AtomicU64::new(0),
            waiting: Mutex::default(),
            bars,
            window,
            over: AtomicBool::new(false),
            this: this.clone(),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<Token, mpsc::Sender<Reply>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What came of a request; one that nobody waits for any more is dropped.
    pub(super) fn answered(&self, token: Token, result: Reply) {
        if let Some(reply) = self.waiting().remove(&token) {
            let _ = reply.send(result);
        }
    }

    /// When it returns, nothing of the window is mapped here, and nobody waits for the port.
    pub(super) fn let_go(&self) {
        self.over.store(true, Ordering::SeqCst);
        for (_, reply) in self.waiting().drain() {
            let _ = reply.send(Err(gone()));
        }
        self.bars.iter().for_each(BarWindow::let_go);
    }

    /// Sends what `messages` gives, all under one token, and waits for the one answer.
    fn ask(&self, messages: impl FnOnce(Token) -> Vec<ToPort>, wait_ms: u64) -> Reply {
        // Behind the insertion: whoever sets it takes out what is there.
        let unless_over = |token| match self.over.load(Ordering::SeqCst) {
            true => Vec::new(),
            false => messages(token),
        };
        self.ask_always(unless_over, wait_ms)
    }

    /// The same, also of a lease that is lost. What has nothing to send is over.
    fn ask_always(&self, messages: impl FnOnce(Token) -> Vec<ToPort>, wait_ms: u64) -> Reply {
        let token = Token(self.last.fetch_add(1, Ordering::Relaxed) + 1);
        let (reply, answer) = mpsc::channel();
        self.waiting().insert(token, reply);
        let mut sent = Err(gone());
        for message in messages(token) {
            sent = match self.channel.send_to_port(&message) {
                Ok(Sent::Sent) => Ok(()),
                Ok(_) => Err(gone()),
                Err(error) => Err(CallError::Gone(vfio_shim::path::words(&error))),
            };
            if sent.is_err() {
                break;
            }
        }
        let until_ms = self.runtime.now_ms() + wait_ms + MARGIN_MS;
        let answer = sent.and_then(|()| match self.runtime.receive(&answer, Some(until_ms)) {
            Ok(answer) => answer,
            Err(_) => Err(CallError::Timeout(wait_ms)),
        });
        self.waiting().remove(&token);
        answer
    }
}

/// Cuts a map call into parts; each file goes with the first part that needs it.
fn parts(maps: &[GuestMap]) -> Result<Vec<MapPart>, CallError> {
    let failed = |error: std::io::Error| CallError::Gone(error.to_string());
    let mut files: Vec<&Arc<OwnedFd>> = Vec::new();
    let mut parts = Vec::new();
    let chunk = PIECES_MAX.min(FDS_MAX);
    for some in maps.chunks(chunk) {
        let mut pieces = Vec::with_capacity(some.len());
        let mut brought = Vec::new();
        for map in some {
            let known = files.iter().position(|file| Arc::ptr_eq(file, &map.fd));
            let file = match known {
                Some(file) => file,
                None => {
                    brought.push(map.fd.try_clone().map_err(failed)?);
                    files.push(&map.fd);
                    files.len() - 1
                }
            };
            if file >= FILES_MAX {
                let text = format!("guest memory is in more than {FILES_MAX} files");
                return Err(CallError::Gone(text));
            }
            pieces.push(MapPiece {
                span: map.span,
                access: map.access,
                file: file as u16,
                offset: map.fd_offset,
            });
        }
        let last = (parts.len() + 1) * chunk >= maps.len();
        parts.push(MapPart {
            last,
            pieces,
            files: brought,
        });
    }
    Ok(parts)
}

impl PathPort for ChannelPort {
    fn call(&self, call: Call, wait_ms: u64) -> Result<Answer, CallError> {
        let answered = match call {
            Call::Forward(_, request) => {
                self.ask(|token| vec![ToPort::Forward(token, request)], wait_ms)
            }
            Call::Unmap(_, span) => {
                self.ask_always(|token| vec![ToPort::Unmap(token, span)], wait_ms)
            }
            Call::Map(_, maps) => {
                let parts = parts(&maps)?;
                let name = |token| move |part| ToPort::Map(token, part);
                match parts.is_empty() {
                    true => Ok(Answered::Done),
                    false => self.ask(
                        |token| parts.into_iter().map(name(token)).collect(),
                        wait_ms,
                    ),
                }
            }
            Call::List | Call::Borrow(..) | Call::Open(_) | Call::Return(_) => {
                Err(CallError::Gone("that is not a worker's to ask".into()))
            }
        };
        answered.map(|answered| match answered {
            Answered::Done => Answer::Done,
            Answered::Bytes(bytes) => Answer::Bytes(bytes),
            Answered::Unmapped(bytes) => Answer::Unmapped(bytes),
        })
    }

    fn window(&self, bar: usize, _slice: WindowOffset) -> (Arc<dyn Aperture>, u64) {
        let aperture: Arc<dyn Aperture> = match (self.bars.get(bar), self.this.upgrade()) {
            (Some(BarWindow::Mapped(slice)), _) => Arc::clone(slice) as Arc<dyn Aperture>,
            (Some(BarWindow::Far { bar, bytes }), Some(port)) => Arc::new(Far {
                port,
                bar: *bar,
                bytes: *bytes,
            }),
            _ => Arc::new(Nothing),
        };
        (aperture, 0)
    }

    fn window_fd(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.window.as_ref().map(|(fd, at)| (fd.as_fd(), *at))
    }
}

impl MemoryMaps for ChannelPort {
    /// This process sees no `/proc`: the daemon looks for it.
    fn check_shared(&self, pid: i32, ranges: &[(Inode, Span)]) -> Result<(), MemoryError> {
        for some in ranges.chunks(PIECES_MAX) {
            let range = |(inode, range): &(Inode, Span)| (inode.device, inode.number, *range);
            let ranges = some.iter().map(range).collect();
            let check = Check { pid, ranges };
            let asked = self.ask(|token| vec![ToPort::Check(token, check)], LOOK_WAIT_MS);
            asked.map_err(|error| MemoryError::Told(error.to_string()))?;
        }
        Ok(())
    }
}

impl Holders for ChannelPort {
    fn begins(&self, vmm: Vmm) -> Result<(), String> {
        let Vmm { pid, process } = vmm;
        let holder = |token| vec![ToPort::Holder(token, pid, process)];
        let asked = self.ask(holder, LOOK_WAIT_MS);
        asked.map(drop).map_err(|error| error.to_string())
    }
}

/// A BAR that the port loads and stores for this process.
struct Far {
    port: Arc<ChannelPort>,
    bar: u8,
    bytes: u64,
}

/// The longest naturally aligned piece at `offset`, of at most 8 bytes and not longer than `left`.
fn piece(offset: u64, left: usize) -> usize {
    let aligned = 1 << offset.trailing_zeros().min(3);
    let fits = 1 << left.ilog2().min(3);
    aligned.min(fits)
}

impl Aperture for Far {
    fn len(&self) -> u64 {
        self.bytes
    }

    fn read(&self, mut offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut rest = data;
        while !rest.is_empty() {
            let (this, left) = rest.split_at_mut(piece(offset, rest.len()));
            let load = |token| vec![ToPort::Load(token, self.bar, offset, this.len() as u8)];
            match self.port.ask(load, LOOK_WAIT_MS) {
                Ok(Answered::Bytes(bytes)) if bytes.len() == this.len() => {
                    this.copy_from_slice(&bytes);
                }
                // What nobody answers reads as ones.
                _ => {}
            }
            offset += this.len() as u64;
            rest = left;
        }
    }

    fn write(&self, mut offset: u64, data: &[u8]) {
        let mut rest = data;
        while !rest.is_empty() {
            let (this, left) = rest.split_at(piece(offset, rest.len()));
            // Posted, as a store is: with the port gone there is nothing that it could reach.
            let store = ToPort::Store(self.bar, offset, this.to_vec());
            let _ = self.port.channel.send_to_port(&store);
            offset += this.len() as u64;
            rest = left;
        }
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

/// No BAR.
struct Nothing;

impl Aperture for Nothing {
    fn len(&self) -> u64 {
        0
    }
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_shim::{model::OsRuntime, path::LeaseId};

    #[test]
    fn of_a_lost_lease_only_that_its_memory_is_gone_is_asked_for() {
        let (near, far) = Channel::pair().unwrap();
        let runtime = Arc::new(OsRuntime);
        let port = ChannelPort::new(runtime, Arc::new(near), Bars::default(), None);
        port.let_go();
        let lease = LeaseId(0);
        let reset = Call::Forward(lease, vfio_shim::path::message::Request::Reset { lease });
        let refused = port.call(reset, 1_000);
        assert!(matches!(refused, Err(CallError::Gone(_))), "{refused:?}");
        let span = Span::new(0, 4096).unwrap();
        // Where nothing is asked, the channel ends with it.
        let asked_of = Arc::downgrade(&port);
        let asking = std::thread::spawn(move || port.call(Call::Unmap(lease, span), 10_000));
        // What is asked first is what comes first: no reset.
        let token = match far.receive_from_worker(true) {
            Ok(Some(ToPort::Unmap(token, asked))) if asked == span => token,
            other => panic!("{other:?}"),
        };
        let port = asked_of.upgrade().unwrap();
        port.answered(token, Ok(Answered::Unmapped(0)));
        let answer = asking.join().unwrap();
        assert!(matches!(answer, Ok(Answer::Unmapped(0))), "{answer:?}");
    }
}
