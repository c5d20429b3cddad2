//! Who serves a borrowed function to its VMM: a thread of this process, or a worker's own.

use super::folder::listen;
use super::{LocalHost, refuse};
use crate::daemon::host::borrow::from_call;
use crate::daemon::vocabulary::{BarMode, ErrorCode, VerbError, WorkerStatus};
use crate::ipc::Start;
use crate::warden::{OwnVmms, Starter, Warden};
use crate::worker::holders::{Holders, Vmms};
use crate::worker::server::{self, Settings, StartError, WorkerServer};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use vfio_shim::model::{Bdf, Function};
use vfio_shim::path::{BorrowedFunction, CallError, Engine, LeaseId, PoolEntry};
use vmm_glue::vfio_user::{
    self, Endpoint, MemoryCheck, Options, Peers, SessionShared, SessionState, Vmm,
    memory_check::MemoryMaps,
};

/// How borrowed functions are served.
#[derive(Clone, Debug, Default)]
pub enum Workers {
    /// By threads of this process: for tests, and where no VMM is hostile.
    #[default]
    Threads,
    /// Each by a process of its own, which this one starts.
    Processes(Arc<Warden>),
}

impl Workers {
    /// Listens for a VMM.
    pub(super) fn listen(&self, path: &Path, own_folder: bool) -> Result<Endpoint, VerbError> {
        match self {
            Self::Threads => listen(path, own_folder),
            Self::Processes(warden) => warden.listen(path, own_folder),
        }
    }

    /// Whoever may do something to the processes of VMMs, and sees whether their memory is shared.
    pub(super) fn vmms(&self, holders: Option<PathBuf>) -> Arc<dyn Vmms> {
        match self {
            Self::Threads => Arc::new(OwnVmms::new(holders)),
            Self::Processes(warden) => warden.clone(),
        }
    }

    pub(super) fn warden(&self) -> Option<Arc<Warden>> {
        match self {
            Self::Threads => None,
            Self::Processes(warden) => Some(warden.clone()),
        }
    }

    fn memory_maps(&self) -> Arc<dyn MemoryMaps> {
        match self {
            Self::Threads => Arc::new(PathBuf::from("/proc")),
            Self::Processes(warden) => warden.clone(),
        }
    }
}

/// How a guest session stands.
#[derive(Default)]
pub(super) struct View {
    /// `None` where the worker does not say.
    pub(super) state: Option<SessionState>,
    pub(super) last_error: Option<String>,
    /// As in [`crate::ipc::Told`].
    pub(super) counters: [u64; 6],
    pub(super) signals: Vec<u64>,
    pub(super) scanned: Vec<u64>,
    pub(super) worker: Option<WorkerStatus>,
}

impl View {
    pub(super) fn is_connected(&self) -> bool {
        matches!(
            self.state,
            Some(SessionState::Connected { .. } | SessionState::Undoing { .. })
        )
    }
}

/// The server of one borrowed function.
pub(super) enum Server {
    Thread(ThreadServer),
    Process(Arc<WorkerServer>),
}

/// A thread of this process.
pub(super) struct ThreadServer {
    holders: Arc<Holders>,
    function: Arc<BorrowedFunction>,
    shared: Arc<SessionShared>,
    stop: OwnedFd,
    handle: Mutex<Option<JoinHandle<()>>>,
}

impl ThreadServer {
    /// Ends the guest session, undoing it, and the endpoint.
    fn end(&self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        let mut handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = handle.take() {
            let _ = handle.join();
        }
        self.holders.end(self.function.lease());
    }
}

/// The account of one lease's VMMs.
struct OfLease {
    holders: Arc<Holders>,
    lease: LeaseId,
}

impl vfio_user::Holders for OfLease {
    fn begins(&self, vmm: Vmm) -> Result<(), String> {
        let began = self.holders.begins(self.lease, vmm);
        began.map_err(|error| vfio_shim::path::words(&error))
    }
}

impl Server {
    /// Why the lease is lost, if it is.
    pub(super) fn lost(&self) -> Option<String> {
        match self {
            Self::Thread(thread) => thread.function.lost(),
            Self::Process(worker) => worker.ended().or_else(|| worker.path().lost()),
        }
    }

    /// Why what the lease had stays in quarantine though it is over, if it does.
    pub(super) fn held(&self) -> Option<String> {
        match self {
            Self::Thread(_) => None,
            Self::Process(worker) => worker.held(),
        }
    }

    /// How the guest session stands. A process is asked, and may take its time.
    pub(super) fn view(&self) -> View {
        match self {
            Self::Thread(thread) => {
                let counters = &thread.shared.counters;
                View {
                    state: Some(thread.shared.state()),
                    last_error: thread.shared.last_error(),
                    counters: [
                        counters.bar_reads.get(),
                        counters.bar_writes.get(),
                        counters.config_reads.get(),
                        counters.maps_now.get(),
                        counters.bytes_now.get(),
                        counters.messages.get(),
                    ],
                    signals: thread.function.signals(),
                    scanned: thread.function.scanned(),
                    worker: None,
                }
            }
            Self::Process(worker) => {
                let told = worker.tell();
                let answers = told.is_some();
                let told = told.unwrap_or_default();
                let report = worker.report();
                let (messages, slowed) = worker.messages();
                View {
                    state: answers.then_some(told.state),
                    last_error: told.last_error,
                    counters: told.counters,
                    signals: told.signals,
                    scanned: worker.path().scanned(),
                    worker: Some(WorkerStatus {
                        pid: worker.pid(),
                        answers,
                        messages,
                        slowed,
                        landlock: report.landlock,
                        seccomp: report.seccomp,
                        namespaces: report.namespaces,
                    }),
                }
            }
        }
    }

    /// Ends the guest session, and the lease where that has not ended.
    pub(super) fn end(&self, engine: &Engine) -> Option<CallError> {
        match self {
            Self::Thread(thread) => {
                let lost = thread.function.lost().is_some();
                thread.end();
                match lost {
                    true => None,
                    false => engine.give_back_function(&thread.function).err(),
                }
            }
            Self::Process(worker) => worker.end(),
        }
    }
}

impl LocalHost {
    fn memory_maps(&self) -> Arc<dyn MemoryMaps> {
        let by_keeper = self.functions.memory_maps();
        by_keeper.unwrap_or_else(|| self.workers.memory_maps())
    }

    /// Borrows a function through `engine` and serves it on `endpoint`.
    pub(super) fn serve(
        &self,
        engine: &Arc<Engine>,
        (bdf, ram): (Bdf, Option<u64>),
        endpoint: Endpoint,
        bars: BarMode,
    ) -> Result<(LeaseId, PoolEntry, Server), VerbError> {
        match &self.workers {
            Workers::Threads => {
                let borrowed = engine.borrow(bdf, ram);
                let (lease, entry, function) = borrowed.map_err(|error| from_call(&error))?;
                let served = self.serve_by_thread(endpoint, &function, bars);
                let thread = served.inspect_err(|_| {
                    let _ = engine.give_back(lease);
                })?;
                Ok((lease, entry, Server::Thread(thread)))
            }
            Workers::Processes(warden) => {
                let start = Start {
                    lease: 0,
                    path: endpoint.path().display().to_string(),
                    mapped: bars == BarMode::Mapped,
                    memory_check: self.config.policy.memory_check,
                    vmm_uids: self.config.policy.vmm_uids(),
                    vmm_gids: self.config.policy.vmm_gids.clone(),
                    maps_max: self.config.limits.guest_maps,
                    bytes_max: self.config.limits.guest_mapped_bytes.unwrap_or(u64::MAX),
                    window: None,
                };
                let settings = Settings {
                    messages_per_second: self.config.limits.worker_messages_per_second,
                    memory_maps: self.memory_maps(),
                    holders: Arc::clone(&self.holders),
                };
                let by = (Box::new(Starter(warden.clone())) as _, &settings);
                let worker = server::start(engine, (bdf, ram), endpoint, start, by);
                let worker = worker.map_err(|error| from_start(&error))?;
                let (lease, entry) = (worker.lease(), *worker.path().entry());
                Ok((lease, entry, Server::Process(worker)))
            }
        }
    }

    fn serve_by_thread(
        &self,
        endpoint: Endpoint,
        function: &Arc<BorrowedFunction>,
        bars: BarMode,
    ) -> Result<ThreadServer, VerbError> {
        let failed = |error: std::io::Error| refuse(ErrorCode::Kernel, error.to_string());
        let options = Options {
            bars: match bars {
                BarMode::Trapped => vfio_user::BarMode::Trapped,
                BarMode::Mapped => vfio_user::BarMode::Mapped,
            },
            memory_check: match self.config.policy.memory_check {
                true => MemoryCheck::On,
                false => MemoryCheck::Off,
            },
            peers: Peers::Only {
                uids: self.config.policy.vmm_uids(),
                gids: self.config.policy.vmm_gids.clone(),
            },
            maps_max: self.config.limits.guest_maps,
            bytes_max: self.config.limits.guest_mapped_bytes.unwrap_or(u64::MAX),
            memory_maps: self.memory_maps(),
            holders: Some(Arc::new(OfLease {
                holders: Arc::clone(&self.holders),
                lease: function.lease(),
            })),
            ..Options::default()
        };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stop = eventfd(0, flags).map_err(|error| failed(error.into()))?;
        let stopped = stop.try_clone().map_err(failed)?;
        let served: Arc<dyn Function> = function.clone();
        let shared = Arc::new(SessionShared::default());
        let told = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name(format!("vmm-lease-{}", function.lease()));
        let handle = builder.spawn(move || {
            if let Err(error) = endpoint.serve(&served, &options, stopped.as_fd(), &told) {
                tracing::error!("a worker has ended: {}", vfio_shim::path::words(&error));
            }
        });
        Ok(ThreadServer {
            holders: Arc::clone(&self.holders),
            function: Arc::clone(function),
            shared,
            stop,
            handle: Mutex::new(Some(handle.map_err(failed)?)),
        })
    }
}

fn from_start(error: &StartError) -> VerbError {
    match error {
        StartError::Call(error) => from_call(error),
        error => refuse(ErrorCode::Kernel, vfio_shim::path::words(error)),
    }
}
