//! What a worker holds of its lease, and the thread that makes it let go, waits for that, and buries it.
//!
//! What a worker must let go of, it holds by its grip: a pipe whose end it closes when it has let
//! go, and that its death closes. Of one that does not, the kernel's word counts: that it is gone,
//! or that its memory, and with it each mapping, is. Both can take for ever, as no signal ends what
//! waits in the kernel for a file system's server. So nobody waits for it but this thread.

use super::{Process, Settings, StartError, kernel, lock};
use crate::{
    ipc::{Channel, Sent, ToWorker},
    worker::holders::Holders,
};
use rustix::event::{PollFd, PollFlags};
use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};
use vfio_shim::{
    model::Runtime,
    path::{
        LeaseId,
        engine::{HasLetGo, LetGo},
    },
};

/// How long a worker may take to let go of its slices before it is ended.
const LET_GO_MS: u64 = 500;
/// How long one that was ended is waited for before each look at its memory. There are not many:
/// a process can make a look stand still.
const LOOKS_MS: [u64; 4] = [250, 500, 1_000, 4_000];

/// What one worker holds.
pub(super) struct Hold {
    runtime: Arc<dyn Runtime>,
    lease: LeaseId,
    channel: Arc<Channel>,
    process: Mutex<Option<Arc<dyn Process>>>,
    /// The read end of its grip.
    grip: OwnedFd,
    /// Whether its VMM maps the window.
    pub(super) mapped: bool,
    pub(super) holders: Arc<Holders>,
    /// It was killed, and is not gone.
    stuck: AtomicBool,
}

impl Hold {
    pub(super) fn new(
        (runtime, lease): (&Arc<dyn Runtime>, LeaseId),
        (grip, mapped): (OwnedFd, bool),
        channel: &Arc<Channel>,
        settings: &Settings,
    ) -> Arc<Self> {
        Arc::new(Self {
            runtime: Arc::clone(runtime),
            lease,
            channel: Arc::clone(channel),
            process: Mutex::default(),
            grip,
            mapped,
            holders: Arc::clone(&settings.holders),
            stuck: AtomicBool::new(false),
        })
    }

    /// From here on whoever ends the lease finds the process; before, it found none.
    pub(super) fn begins(&self, process: &Arc<dyn Process>) {
        *lock(&self.process) = Some(Arc::clone(process));
    }

    pub(super) fn process(&self) -> Option<Arc<dyn Process>> {
        lock(&self.process).clone()
    }

    pub(super) fn kill(&self) {
        if let Some(process) = self.process() {
            process.kill();
        }
        self.channel.close();
    }

    /// Starts the thread that waits for the lease's end, so that at that end no thread can be
    /// missing. It ends without it, too, when nobody can bring it about any more.
    pub(super) fn let_go_by_a_thread(self: &Arc<Self>) -> Result<LetGo, StartError> {
        let (lost, is_lost) = mpsc::channel::<(String, HasLetGo)>();
        let hold = Arc::clone(self);
        let run = move || {
            let runtime = Arc::clone(&hold.runtime);
            if let Ok((why, has_let_go)) = runtime.receive(&is_lost, None) {
                hold.let_go(&why);
                hold.stuck.store(false, Ordering::SeqCst);
                has_let_go();
            }
        };
        let name = format!("let-go-{}", self.lease);
        let spawned = self.runtime.spawn(name, Box::new(run));
        spawned.map_err(kernel("start a thread"))?;
        Ok(Box::new(move |why, has_let_go| {
            // The thread waits for this.
            let _ = lost.send((why.to_owned(), has_let_go));
        }))
    }

    /// Makes the worker let go of the lease's slices: when this returns, no store of it can reach
    /// them any more.
    fn let_go(&self, why: &str) {
        let lost = ToWorker::Lost(why.to_owned());
        let told = matches!(self.channel.send_to_worker(&lost, false), Ok(Sent::Sent));
        let let_go = told && self.has_let_go() && !self.maps_a_device();
        if !let_go {
            self.kill();
            if let Some(process) = self.process() {
                self.wait_for(&*process);
            }
        }
        // It hands the window over no more: who has it, is known.
        self.holders.end(self.lease);
    }

    /// For ever, if need be: what is not gone can still store into a slice that would be another
    /// tenant's, though it was killed and runs no more: a system call that it stands in may end
    /// with one. What is gone of it first is its memory, and then it can stand on in the kernel.
    fn wait_for(&self, process: &dyn Process) {
        for look_ms in LOOKS_MS {
            if process.gone(Some(look_ms)) || !self.mapped && !process.maps_a_device() {
                return;
            }
            self.stuck.store(true, Ordering::SeqCst);
        }
        process.gone(None);
    }

    /// Whether it was killed, and has not let go of what it had for all that.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::SeqCst)
    }

    /// Waits until the other end of the grip is closed; false if not in time.
    fn has_let_go(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.grip.as_fd(), PollFlags::IN)];
        let until_ms = self.runtime.now_ms() + LET_GO_MS;
        match self.runtime.poll_until(&mut fds, Some(until_ms)) {
            Ok(closed) => closed,
            Err(error) => {
                tracing::error!(%error, "cannot wait for a worker");
                false
            }
        }
    }

    /// Whether a device is mapped by the worker, whatever it says itself. A worker whose VMM maps
    /// the window is as trusted as that.
    fn maps_a_device(&self) -> bool {
        let process = self.process().filter(|_| !self.mapped);
        process.is_some_and(|process| process.maps_a_device())
    }
}
