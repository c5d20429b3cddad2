//! A vCPU in a thread of its own: exits go to the bus, and it ends by itself, by a deadline or killed.

use super::{Attachment, RunError};
use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::{c_int, c_void, siginfo_t};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How long a kick is waited for before the next: one that comes just before KVM_RUN is lost.
const KICK_MS: u64 = 1;

/// What the guest's loads and stores meet where there is no memory.
#[derive(Clone, Default)]
pub struct Bus {
    /// The functions. All other addresses read as ones.
    pub attachments: Vec<Arc<Attachment>>,
    /// The I/O port by which the guest says that it is done, and how it went.
    pub exit_port: u16,
}

/// How a vCPU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest wrote this to the exit port.
    Exit(u32),
    /// A triple fault.
    Shutdown,
    /// By [`VcpuThread::kill`].
    Killed,
    /// By something that KVM cannot go on from.
    Failed(String),
}

/// A running vCPU. Dropping it kills it. `SIGRTMIN` is what kicks it out of the guest: its handler
/// is set here, for the whole process, and does nothing.
pub struct VcpuThread {
    handle: Option<JoinHandle<()>>,
    ended: mpsc::Receiver<Ended>,
    how: Option<Ended>,
    stop: Arc<AtomicBool>,
}

extern "C" fn kicked(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

fn kick_signal() -> io::Result<c_int> {
    static SET: OnceLock<Result<(), i32>> = OnceLock::new();
    let set =
        SET.get_or_init(|| register_signal_handler(SIGRTMIN(), kicked).map_err(|e| e.errno()));
    set.map_err(io::Error::from_raw_os_error)?;
    Ok(SIGRTMIN())
}

impl Bus {
    pub(super) fn read(&self, address: u64, data: &mut [u8]) {
        if !self.attachments.iter().any(|one| one.read(address, data)) {
            data.fill(0xff);
        }
    }

    pub(super) fn write(&self, address: u64, data: &[u8]) {
        if !self.attachments.iter().any(|one| one.write(address, data)) {
            tracing::debug!(address, "a store met nothing");
        }
    }

    /// Handles one exit; how the vCPU ended, if it has.
    fn handle(&self, exit: VcpuExit<'_>) -> Option<Ended> {
        match exit {
            VcpuExit::MmioRead(address, data) => self.read(address, data),
            VcpuExit::MmioWrite(address, data) => self.write(address, data),
            VcpuExit::IoIn(_, data) => data.fill(0xff),
            VcpuExit::IoOut(port, data) if port == self.exit_port => {
                let mut code = [0; 4];
                code.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
                return Some(Ended::Exit(u32::from_le_bytes(code)));
            }
            VcpuExit::IoOut(..) | VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::Shutdown => return Some(Ended::Shutdown),
            other => return Some(Ended::Failed(format!("{other:?}"))),
        }
        None
    }
}

fn run(mut vcpu: VcpuFd, bus: &Bus, stop: &AtomicBool) -> Ended {
    while !stop.load(Ordering::Acquire) {
        match vcpu.run() {
            Ok(exit) => {
                if let Some(ended) = bus.handle(exit) {
                    return ended;
                }
            }
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
            Err(error) => return Ended::Failed(format!("KVM_RUN: {error}")),
        }
    }
    Ended::Killed
}

impl VcpuThread {
    /// Lets the vCPU run.
    pub fn start(vcpu: VcpuFd, bus: Bus) -> Result<Self, RunError> {
        Self::spawn(move |stop| run(vcpu, &bus, stop))
    }

    /// Lets something run that looks at `stop` often. All that it holds goes before its end is
    /// told.
    pub(super) fn spawn(
        body: impl FnOnce(&AtomicBool) -> Ended + Send + 'static,
    ) -> Result<Self, RunError> {
        kick_signal().map_err(RunError::kernel("set a signal's handler"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, ended) = mpsc::channel();
        let stopped = Arc::clone(&stop);
        let thread = move || {
            let _ = sender.send(body(&stopped));
        };
        let handle = thread::Builder::new()
            .name("vcpu".to_owned())
            .spawn(thread)
            .map_err(RunError::kernel("start a vCPU's thread"))?;
        Ok(Self {
            handle: Some(handle),
            ended,
            how: None,
            stop,
        })
    }

    /// How it ended, if that is within `limit`; it goes on otherwise.
    pub fn wait(&mut self, limit: Duration) -> Option<Ended> {
        if self.how.is_none() {
            match self.ended.recv_timeout(limit) {
                Ok(how) => self.how = Some(how),
                Err(mpsc::RecvTimeoutError::Timeout) => return None,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    self.how = Some(Ended::Failed("the vCPU's thread panicked".to_owned()));
                }
            }
            if let Some(handle) = self.handle.take() {
                // A panic is told above.
                let _ = handle.join();
            }
        }
        self.how.clone()
    }

    /// Ends it wherever it is, halted or spinning, and tells how it ended: `Killed`, or what came
    /// first. When this returns it executes nothing more.
    pub fn kill(&mut self) -> Ended {
        self.stop.store(true, Ordering::Release);
        loop {
            if let (Some(handle), Ok(signal)) = (&self.handle, kick_signal()) {
                // Fails only when the thread has ended, which the next line tells.
                let _ = handle.kill(signal);
            }
            if let Some(how) = self.wait(Duration::from_millis(KICK_MS)) {
                return how;
            }
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.kill();
    }
}
