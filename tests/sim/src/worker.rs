//! A worker of the simulation: a process of its own that runs the product's loops, and how its port starts and ends it.

use crate::coroutine::{Pause, is_dying, is_inside, pause};
use crate::scheduler::{Core, Process, SIGNALLER};
use std::io;
use std::sync::{Arc, Weak};
use sublet::ipc::Channel;
use sublet::worker::server::{self, Launch, StartError, kernel};
use sublet::worker::{BarWindow, Bars, Orders, Serving, WorkerError, bars};
use vfio_shim::model::{Aperture, Mapping, Runtime, Wait};
use vfio_shim::path::message::RemoteFunction;
use vmm_glue::vfio_user::SessionShared;

/// Starts one worker. It stays with the thread of the port that outlives the worker, and goes when
/// that has ended.
pub struct Launcher {
    /// Whose threads the worker's are beside.
    pub core: Arc<Core>,
    /// The worker's process.
    pub process: Process,
    /// Where the worker reaches BARs itself, as a mapping: the port's window. Else by its channel.
    pub window: Option<Arc<dyn Aperture>>,
    /// Where its guest session stands.
    pub shared: Arc<SessionShared>,
    /// Gone with this.
    pub alive: Arc<()>,
}

impl Launch for Launcher {
    fn launch(&self, theirs: Channel) -> Result<Arc<dyn server::Process>, StartError> {
        let mapped = Arc::new(());
        let running = Arc::new(Running {
            core: Arc::clone(&self.core),
            process: self.process,
            mapped: Arc::downgrade(&mapped),
        });
        let runtime = self.core.runtime(self.process);
        let life = Life {
            channel: Arc::new(theirs.on(Arc::clone(&runtime))),
            runtime: Arc::clone(&runtime),
            window: self.window.clone().map(|window| (window, mapped)),
            shared: Arc::clone(&self.shared),
            running: Arc::clone(&running),
        };
        let run = Box::new(move || life.run());
        let spawned = runtime.spawn("worker".into(), run);
        spawned.map_err(kernel("start a process"))?;
        Ok(running)
    }
}

/// A worker's process, as its port has it.
struct Running {
    core: Arc<Core>,
    process: Process,
    /// Alive as long as something of the window is mapped there.
    mapped: Weak<()>,
}

impl server::Process for Running {
    fn id(&self) -> u32 {
        self.process.number as u32
    }

    fn kill(&self) {
        self.core.kill(self.process);
    }

    fn gone(&self, wait_ms: Option<u64>) -> bool {
        let until_ms = wait_ms.map(|ms| self.core.now_ms() + ms);
        let mut again = false;
        while !self.core.is_dead(self.process) {
            let late = until_ms.is_some_and(|at| at <= self.core.now_ms());
            if late || !is_inside() || is_dying() {
                return false;
            }
            pause(Pause::Idle(Wait {
                until_ms,
                again,
                fds: false,
            }));
            again = true;
        }
        true
    }

    fn maps_a_device(&self) -> bool {
        self.mapped.strong_count() != 0
    }

    fn status(&self) -> String {
        self.gone(None);
        "gone".into()
    }
}

impl Running {
    fn access(&self) {
        self.core.access(self.process);
    }

    /// The process's own end: its thread goes no further.
    fn exit(&self) {
        use server::Process;
        self.kill();
        self.gone(None);
    }
}

/// What a worker does, as `sublet worker` does it, but for the sandbox.
struct Life {
    runtime: Arc<dyn Runtime>,
    channel: Arc<Channel>,
    window: Option<(Arc<dyn Aperture>, Arc<()>)>,
    shared: Arc<SessionShared>,
    running: Arc<Running>,
}

impl Life {
    fn run(self) {
        let running = Arc::clone(&self.running);
        // An error ends the process, and its port hears of that alone.
        let _ = self.serve();
        running.exit();
    }

    fn serve(self) -> Result<(), WorkerError> {
        let orders = Orders::receive(&self.channel)?;
        let bars = self.bars(orders.function());
        let runtime = Arc::clone(&self.runtime);
        let serving = Serving::new(runtime, self.channel, orders, bars, self.shared)?;
        let (listening, running) = (Arc::clone(&serving), self.running);
        let listen = move || {
            let _ = listening.listen();
            running.exit();
        };
        let name = format!("{SIGNALLER}worker");
        let spawned = self.runtime.spawn(name, Box::new(listen));
        drop((self.runtime, self.window));
        spawned.expect("a thread of a living process");
        serving.serve(Default::default())
    }

    fn bars(&self, function: &RemoteFunction) -> Bars {
        let all = bars(function, |base, info| {
            let near = self.window.as_ref().map(|(window, mapped)| {
                let slice = Slice {
                    running: Arc::clone(&self.running),
                    window: Arc::clone(window),
                    base,
                    len: info.size,
                    _mapped: Arc::clone(mapped),
                };
                BarWindow::near(Arc::clone(&self.runtime), info.size, Box::new(slice))
            });
            Ok::<_, io::Error>(near)
        });
        all.expect("slices of a window")
    }
}

/// A slice of the window that is mapped in a worker.
struct Slice {
    running: Arc<Running>,
    window: Arc<dyn Aperture>,
    base: u64,
    len: u64,
    _mapped: Arc<()>,
}

impl Aperture for Slice {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.running.access();
        self.window.read(self.base + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.running.access();
        self.window.write(self.base + offset, data);
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}
