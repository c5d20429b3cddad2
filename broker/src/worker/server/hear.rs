//! The thread that starts one worker, hears it until it is gone or must go, and undoes what it leaves.

use super::looks::Looks;
use super::{Launch, Process, WorkerServer, lock};
use crate::ipc::{
    Answered, Channel, ChannelError, FILES_MAX, MapPart, Sent, ToPort, ToWorker, Token,
};
use std::{
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering, mpsc},
};
use vfio_shim::{
    model::UndoStep,
    path::{
        CallError,
        borrower::{Answer, GuestMap},
        limits::Bucket,
        words,
    },
};
use vmm_glue::vfio_user::{Endpoint, Vmm, memory_check::MemoryMaps};

/// The thread that starts and serves one worker.
pub(super) struct Hearing {
    worker: Arc<WorkerServer>,
    endpoint: Endpoint,
    looks: Looks,
    ready: Option<mpsc::Sender<Result<(), String>>>,
    /// A map call whose last part has not come yet.
    map: Option<MapCall>,
    /// What its messages are held to.
    rate: Bucket,
}

struct MapCall {
    token: Token,
    files: Vec<Arc<OwnedFd>>,
    maps: Vec<GuestMap>,
}

/// Why a worker is ended by the port's side.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("it asked for what no worker asks for: {0}")]
    Impossible(&'static str),
    #[error("it cannot go on: {0}")]
    Failed(String),
    #[error("it has ended")]
    Gone,
}

impl Hearing {
    pub(super) fn new(
        worker: Arc<WorkerServer>,
        endpoint: Endpoint,
        (memory_maps, rate): (Arc<dyn MemoryMaps>, Bucket),
        ready: mpsc::Sender<Result<(), String>>,
    ) -> Self {
        Self {
            worker,
            endpoint,
            looks: Looks::new(memory_maps),
            ready: Some(ready),
            map: None,
            rate,
        }
    }

    pub(super) fn run(mut self, launch: &dyn Launch, theirs: Channel, orders: Vec<ToWorker>) {
        match self.worker.launch(launch, theirs, orders) {
            Ok(process) => {
                let fault = self.serve();
                self.finish(process, &fault);
            }
            Err(error) => {
                self.worker.set_ended(words(&error));
                self.tell_ready(Err(words(&error)));
            }
        }
    }

    fn tell_ready(&mut self, result: Result<(), String>) {
        if let Some(ready) = self.ready.take() {
            // Nobody waits any more after its time.
            let _ = ready.send(result);
        }
    }

    /// Answers the worker until it is gone, or must go.
    fn serve(&mut self) -> Fault {
        // As its VMM is: what it tells of that comes with the VMM's pidfd.
        let trusted = self.worker.hold.mapped;
        loop {
            let message = match self.worker.channel.receive_from_worker(trusted) {
                Ok(Some(message)) => message,
                Ok(None) => return Fault::Gone,
                Err(error) => return error.into(),
            };
            self.keep_to_rate();
            if let Err(fault) = self.hear(message) {
                return fault;
            }
        }
    }

    /// Waits while the worker is over its rate; its channel fills, and then it waits as well. Ends
    /// early when the worker does.
    fn keep_to_rate(&mut self) {
        self.worker.taken.fetch_add(1, Ordering::Relaxed);
        let runtime = Arc::clone(&self.worker.runtime);
        while let Err(until_ms) = self.rate.take(|| runtime.now_ms()) {
            self.worker.slowed.fetch_add(1, Ordering::Relaxed);
            let process = self.worker.hold.process();
            let left_ms = until_ms.saturating_sub(runtime.now_ms());
            if process.is_none_or(|process| process.gone(Some(left_ms))) {
                return;
            }
        }
    }

    /// The worker ends, whatever it is doing, and its lease with it, unless the owner ends that.
    fn finish(&mut self, process: Arc<dyn Process>, fault: &Fault) {
        self.worker.hold.kill();
        let pid = process.id();
        let status = self.worker.bury(process);
        let owner = self.worker.ending.load(Ordering::SeqCst);
        let why = match fault {
            Fault::Gone => format!("its worker (process {pid}) has ended: {status}"),
            fault => format!("its worker (process {pid}) was ended: {fault}"),
        };
        if !owner {
            tracing::error!("a lease is lost: {why}");
        }
        self.worker.set_ended(why.clone());
        self.tell_ready(Err(why));
        if !owner && self.worker.path.lost().is_none() {
            self.worker.runtime.reach(UndoStep::Bury);
            // The path is closed and the function reset: what the worker cannot do any more.
            if let Some(error) = self.worker.give_back() {
                tracing::error!(%error, "the lease of a dead worker was not given back");
            }
        }
        lock(&self.worker.tells).clear();
    }

    fn hear(&mut self, message: ToPort) -> Result<(), Fault> {
        let path = &self.worker.path;
        let (token, result) = match message {
            ToPort::Ready(report) => {
                *lock(&self.worker.report) = report;
                self.tell_ready(Ok(()));
                return Ok(());
            }
            ToPort::Store(bar, offset, data) => {
                let bar = path.bar(bar.into());
                bar.ok_or(Fault::Impossible("a BAR"))?.write(offset, &data);
                return Ok(());
            }
            ToPort::Told(token, told) => {
                if let Some(asked) = lock(&self.worker.tells).remove(&token) {
                    let _ = asked.send(told);
                }
                return Ok(());
            }
            ToPort::Holder(token, pid, process) => {
                let began = self.worker.holder(Vmm { pid, process });
                (token, began.map(|()| Answer::Done))
            }
            ToPort::Failed(why) => return Err(Fault::Failed(why)),
            ToPort::Map(token, part) => match self.map(token, part)? {
                Some(maps) => (token, self.worker.path.map(maps)),
                None => return Ok(()),
            },
            ToPort::Forward(token, request) => (token, path.forward(request)),
            ToPort::Unmap(token, span) => (token, path.unmap(span)),
            ToPort::Load(token, bar, offset, len) => {
                let bar = path.bar(bar.into()).ok_or(Fault::Impossible("a BAR"))?;
                let mut data = vec![0xff; len.into()];
                bar.read(offset, &mut data);
                (token, Ok(Answer::Bytes(data)))
            }
            ToPort::Check(token, check) => {
                let shared = self.looks.check(check).map(|()| Answer::Done);
                let shared = shared.map_err(|error| CallError::Gone(words(&error)));
                (token, shared)
            }
        };
        self.answer(token, result)
    }

    fn answer(&self, token: Token, result: Result<Answer, CallError>) -> Result<(), Fault> {
        let result = result.and_then(|answer| match answer {
            Answer::Done => Ok(Answered::Done),
            Answer::Bytes(bytes) => Ok(Answered::Bytes(bytes)),
            Answer::Unmapped(bytes) => Ok(Answered::Unmapped(bytes)),
            other => Err(CallError::Gone(format!(
                "an answer of the wrong kind: {other:?}"
            ))),
        });
        let answer = ToWorker::Answer(token, result);
        match self.worker.channel.send_to_worker(&answer, true)? {
            Sent::Sent => Ok(()),
            Sent::Full | Sent::Closed => Err(Fault::Gone),
        }
    }

    /// Takes one part of a map call; with the last one, the whole of it.
    fn map(&mut self, token: Token, part: MapPart) -> Result<Option<Vec<GuestMap>>, Fault> {
        let call = self.map.get_or_insert_with(|| MapCall {
            token,
            files: Vec::new(),
            maps: Vec::new(),
        });
        if call.token != token {
            return Err(Fault::Impossible("two map calls at once"));
        }
        call.files.extend(part.files.into_iter().map(Arc::new));
        if call.files.len() > FILES_MAX {
            return Err(Fault::Impossible("too many memory files"));
        }
        if call.maps.len() + part.pieces.len() > vfio_shim::path::borrower::MAPS_MAX {
            return Err(Fault::Impossible("too many maps"));
        }
        for piece in part.pieces {
            let fd = call.files.get(usize::from(piece.file));
            call.maps.push(GuestMap {
                span: piece.span,
                access: piece.access,
                fd: Arc::clone(fd.ok_or(Fault::Impossible("a memory file"))?),
                fd_offset: piece.offset,
            });
        }
        match part.last {
            true => Ok(self.map.take().map(|call| call.maps)),
            false => Ok(None),
        }
    }
}

impl Drop for Hearing {
    fn drop(&mut self) {
        // The socket's file goes with `endpoint`: nobody listens there any more.
        tracing::debug!(path = %self.endpoint.path().display(), "a worker's socket is removed");
    }
}
