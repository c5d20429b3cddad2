//! The worker: the process that faces one VMM. It is handed what it needs, gives up its rights, and only then listens.
//!
//! ```text
//! started --function, start, descriptors--> told --slices mapped, window closed--> confined
//!         --channel's thread--> sealed --ready--> serves one VMM after the other --killed--> gone
//! ```
//! Two threads: this one serves the VMM; the channel's reads what the port says, and writes the
//! VMM's eventfds. It holds the write end of a pipe, its grip, as long as it can reach its slice of
//! the window: closed when the lease is lost, and by its death. It dies with the daemon: by a
//! signal, and by the channel's end.

pub mod holders;
mod port;
mod role;
pub mod server;
mod serving;
mod window;

pub use role::{ALLOCATOR, ROLE};
pub use serving::{Orders, Serving, bars};
pub use window::{BarWindow, Bars, Slice};

use crate::{
    ipc::{Channel, ChannelError},
    jail::{JailError, Role, Sandbox, confine},
};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    process::exit,
    sync::Arc,
};
use vfio_shim::{
    model::{OsRuntime, Runtime},
    path::{CallError, words},
};
use vmm_glue::vfio_user::{EndpointError, SessionShared};

/// Why a worker ends before it serves anybody.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// It was started by somebody else, or the daemon has died meanwhile.
    #[error("a worker is started by `sublet port`, which is not its parent (any more)")]
    Orphan,
    /// The channel.
    #[error("the channel to the daemon")]
    Channel(#[from] ChannelError),
    /// The daemon said something else than a start.
    #[error("the daemon did not say what to serve")]
    NotTold,
    /// It cannot give its rights up.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The function, as it was told, cannot be served.
    #[error("the function cannot be served")]
    Function(#[from] CallError),
    /// The kernel refused.
    #[error("cannot {act}")]
    Kernel {
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// Serving ended.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
}

fn kernel(act: &'static str) -> impl Fn(io::Error) -> WorkerError {
    move |source| WorkerError::Kernel { act, source }
}

/// Makes sure that the worker does not outlive the daemon that started it.
fn die_with(parent: i32) -> Result<(), WorkerError> {
    let signal = set_parent_process_death_signal(Some(Signal::KILL));
    signal.map_err(|errno| kernel("tie its life to the daemon's")(errno.into()))?;
    // A daemon that died before that call has sent no signal.
    match getppid().map(Pid::as_raw_nonzero) {
        Some(now) if now.get() == parent => Ok(()),
        _ => Err(WorkerError::Orphan),
    }
}

/// The channel, which came as stdin. Nothing else reads there.
fn channel() -> io::Result<Channel> {
    Ok(Channel::of(io::stdin().as_fd().try_clone_to_owned()?))
}

/// Runs a worker for the daemon `parent`, whose channel is stdin, held to `role`.
pub fn run(parent: i32, sandbox: Sandbox, role: &'static Role) -> Result<(), WorkerError> {
    die_with(parent)?;
    let channel = Arc::new(channel().map_err(kernel("take its channel"))?);
    let mut orders = Orders::receive(&channel)?;
    let runtime: Arc<dyn Runtime> = Arc::new(OsRuntime);
    let bars = bars(orders.function(), |slice, info| match &orders.window {
        None => Ok(None),
        Some((fd, window)) => {
            let runtime = Arc::clone(&runtime);
            BarWindow::mapped(runtime, fd.as_fd(), window + slice, info).map(Some)
        }
    });
    let bars = bars.map_err(kernel("map its slice of the window"))?;
    // A window that no VMM maps itself is closed here, for good; the slice stays as a mapping.
    let window = orders.window.take().filter(|_| orders.mapped());
    let mut own = vec![0, 1, 2, channel.as_fd().as_raw_fd()];
    own.extend(orders.descriptors());
    own.extend(window.as_ref().map(|(fd, _)| fd.as_raw_fd()));
    orders.window = window;
    let confined = confine(role, sandbox, &own)?;

    let shared = Arc::new(SessionShared::default());
    let serving = Serving::new(runtime, channel, orders, bars, shared)?;
    look_up();
    start_listening(&serving)?;
    serving.serve(confined.seal()?)
}

/// Has libraries find out now what they would ask the kernel for at their first use.
pub fn look_up() {
    // Where the kernel's clock is mapped.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
}

/// Returns when the second thread has begun: what the kernel is asked for at the start of a thread
/// is nothing that it may be asked for later.
fn start_listening(serving: &Arc<Serving>) -> Result<(), WorkerError> {
    let listening = Arc::clone(serving);
    let (began, begun) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("channel".into());
    let spawned = thread.spawn(move || {
        let _ = began.send(());
        drop(began);
        let ended = listening.listen();
        if let Err(error) = &ended {
            tracing::error!("a worker ends: {}", words(error));
        }
        // The daemon has gone, or has told what cannot be: nothing of this process may go on.
        exit(i32::from(ended.is_err()));
    });
    spawned.map_err(kernel("start its second thread"))?;
    begun.recv().map_err(|_| WorkerError::Orphan)
}
