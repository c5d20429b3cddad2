//! Where time, randomness and threads come from, and how a thread waits: from outside, so that a simulator can be it.

use super::undo::UndoStep;
use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// How a thread that has nothing to do goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// It waits in the kernel.
    Block,
    /// Others have run: it looks without waiting, and comes back where it finds nothing.
    Look,
}

/// What the threads of this process stand on. The operating system's is [`OsRuntime`]; a simulator
/// has another, and runs the same threads one after the other.
pub trait Runtime: Send + Sync {
    /// Milliseconds of a monotonic clock.
    fn now_ms(&self) -> u64;

    /// Randomness.
    fn entropy(&self) -> u64;

    /// Starts a thread.
    fn spawn(&self, name: String, run: Box<dyn FnOnce() + Send>) -> io::Result<Task>;

    /// The same of one that needs no more stack than this.
    fn spawn_small(
        &self,
        name: String,
        _stack_bytes: usize,
        run: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Task> {
        self.spawn(name, run)
    }

    /// Called by a thread before it waits.
    fn idle(&self, wait: Wait) -> Idle;

    /// A step of undoing is about to be made. A simulator may end the process here.
    fn reach(&self, _step: UndoStep) {}

    /// Whether this process has been killed, so that what it leaves undone stays so: a simulator
    /// runs destructors nevertheless, to free their memory.
    fn is_killed(&self) -> bool {
        false
    }

    /// Nanoseconds of a monotonic clock, where a thread may wait awake for others; none where they
    /// only run when it lets them.
    fn spin_clock_ns(&self) -> Option<u64> {
        None
    }
}

/// What a thread is about to wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wait {
    /// At most until then, by the clock.
    pub until_ms: Option<u64>,
    /// Its last look found nothing.
    pub again: bool,
    /// To look is a system call.
    pub fds: bool,
}

impl fmt::Debug for dyn Runtime + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Runtime")
    }
}

/// A thread that was started.
pub struct Task(Box<dyn FnOnce() + Send>);

impl Task {
    /// One that `join` waits for.
    pub fn new(join: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(join))
    }

    /// Returns when it has ended.
    pub fn join(self) {
        (self.0)();
    }

    /// For a field of its owner, whose own `drop` comes before its fields' and tells it to end.
    pub fn join_on_drop(self) -> JoinOnDrop {
        JoinOnDrop(Mutex::new(Some(self)))
    }
}

/// A thread that is waited for when this is dropped.
pub struct JoinOnDrop(Mutex<Option<Task>>);

impl Drop for JoinOnDrop {
    fn drop(&mut self) {
        let task = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = task.take() {
            task.join();
        }
    }
}

impl dyn Runtime + '_ {
    /// The next thing of a channel. Without `until_ms` it only fails when all senders are gone.
    pub fn receive<T>(
        &self,
        channel: &Receiver<T>,
        until_ms: Option<u64>,
    ) -> Result<T, RecvTimeoutError> {
        let mut again = false;
        loop {
            let left_ms = until_ms.map(|until| until.saturating_sub(self.now_ms()));
            let wait = Wait {
                until_ms,
                again,
                fds: false,
            };
            let block = self.idle(wait) == Idle::Block;
            match (block, left_ms) {
                (true, None) => {
                    return channel.recv().map_err(|_| RecvTimeoutError::Disconnected);
                }
                (true, Some(ms)) => return channel.recv_timeout(Duration::from_millis(ms)),
                (false, _) => {}
            }
            match channel.try_recv() {
                Ok(value) => return Ok(value),
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) if until_ms.is_some_and(|at| at <= self.now_ms()) => {
                    return Err(RecvTimeoutError::Timeout);
                }
                Err(TryRecvError::Empty) => again = true,
            }
        }
    }

    /// Waits until one of these fds is ready.
    pub fn poll(&self, fds: &mut [PollFd<'_>]) -> Result<(), Errno> {
        self.poll_until(fds, None).map(|_| ())
    }

    /// The same, at most until then by the clock: whether one is.
    pub fn poll_until(&self, fds: &mut [PollFd<'_>], until_ms: Option<u64>) -> Result<bool, Errno> {
        let mut again = false;
        loop {
            let timeout = self.look_until(again, until_ms);
            match poll(fds, timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) if until_ms.is_some_and(|at| at <= self.now_ms()) => {
                    return Ok(false);
                }
                Ok(0) | Err(Errno::INTR) => again = true,
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// How long the next look at fds may take: for ever, or not at all.
    pub fn look(&self, again: bool) -> Option<Timespec> {
        self.look_until(again, None)
    }

    /// How long the next look at fds may take: until then by the clock, or not at all.
    pub fn look_until(&self, again: bool, until_ms: Option<u64>) -> Option<Timespec> {
        let wait = Wait {
            until_ms,
            again,
            fds: true,
        };
        match (self.idle(wait), until_ms) {
            (Idle::Block, None) => None,
            (Idle::Block, Some(until_ms)) => {
                let left_ms = until_ms.saturating_sub(self.now_ms());
                Some(Timespec {
                    tv_sec: (left_ms / 1000) as i64,
                    tv_nsec: (left_ms % 1000 * 1_000_000) as _,
                })
            }
            (Idle::Look, _) => Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        }
    }

    /// Waits for what another thread changes, and tells by `changed`, until a look finds it; none
    /// where it did not until then by the clock.
    pub fn wait_for<T, R>(
        &self,
        (mutex, changed): (&Mutex<T>, &Condvar),
        until_ms: Option<u64>,
        mut look: impl FnMut(&mut T) -> Option<R>,
    ) -> Option<R> {
        let lock = || mutex.lock().unwrap_or_else(PoisonError::into_inner);
        let mut again = false;
        loop {
            let found = look(&mut lock());
            let left_ms = until_ms.map(|until| until.saturating_sub(self.now_ms()));
            if found.is_some() || left_ms == Some(0) {
                return found;
            }
            let wait = Wait {
                until_ms,
                again,
                fds: false,
            };
            if self.idle(wait) == Idle::Block {
                let mut guard = lock();
                // It may have changed since the last look, and been told.
                let found = look(&mut guard);
                if found.is_some() {
                    return found;
                }
                match left_ms.map(Duration::from_millis) {
                    None => drop(changed.wait(guard)),
                    Some(left) => drop(changed.wait_timeout(guard, left)),
                }
            }
            again = true;
        }
    }

    /// Waits for nothing but the clock.
    pub fn sleep_until(&self, until_ms: u64) {
        let mut again = false;
        loop {
            let left_ms = until_ms.saturating_sub(self.now_ms());
            if left_ms == 0 {
                return;
            }
            let wait = Wait {
                until_ms: Some(until_ms),
                again,
                fds: false,
            };
            if self.idle(wait) == Idle::Block {
                std::thread::sleep(Duration::from_millis(left_ms));
            }
            again = true;
        }
    }

    /// Takes a lock that is held over more than a look-up.
    pub fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        let mut again = false;
        loop {
            match mutex.try_lock() {
                Ok(guard) => return guard,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
            let wait = Wait {
                again,
                ..Wait::default()
            };
            if self.idle(wait) == Idle::Block {
                return mutex.lock().unwrap_or_else(PoisonError::into_inner);
            }
            again = true;
        }
    }
}

/// The kernel's clock, randomness and threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsRuntime;

impl Runtime for OsRuntime {
    fn now_ms(&self) -> u64 {
        let now = clock_gettime(ClockId::Monotonic);
        now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
    }

    fn entropy(&self) -> u64 {
        let mut bytes = [0; 8];
        let mut have = 0;
        while have < bytes.len() {
            // getrandom only fails before the kernel's pool is ready, or on a signal: ask again.
            let flags = rustix::rand::GetRandomFlags::empty();
            have += rustix::rand::getrandom(&mut bytes[have..], flags).unwrap_or(0);
        }
        u64::from_ne_bytes(bytes)
    }

    fn spawn(&self, name: String, run: Box<dyn FnOnce() + Send>) -> io::Result<Task> {
        start(std::thread::Builder::new().name(name), run)
    }

    fn spawn_small(
        &self,
        name: String,
        stack_bytes: usize,
        run: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Task> {
        let thread = std::thread::Builder::new().name(name);
        start(thread.stack_size(stack_bytes), run)
    }

    fn idle(&self, _wait: Wait) -> Idle {
        Idle::Block
    }

    fn spin_clock_ns(&self) -> Option<u64> {
        let now = clock_gettime(ClockId::Monotonic);
        Some(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }
}

fn start(thread: std::thread::Builder, run: Box<dyn FnOnce() + Send>) -> io::Result<Task> {
    let handle = thread.spawn(run)?;
    Ok(Task::new(move || {
        // A thread that panicked has said so itself.
        let _ = handle.join();
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, PollFlags, eventfd};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, mpsc};

    /// A clock that goes on by 1 ms at each look.
    #[derive(Default)]
    struct Looks(AtomicU64);

    impl Runtime for Looks {
        fn now_ms(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        fn entropy(&self) -> u64 {
            0
        }

        fn spawn(&self, _: String, _: Box<dyn FnOnce() + Send>) -> io::Result<Task> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn idle(&self, wait: Wait) -> Idle {
            assert_eq!(wait.again, self.now_ms() != 0);
            self.0.fetch_add(1, Ordering::Relaxed);
            Idle::Look
        }
    }

    #[test]
    fn a_channel_tells_its_next_thing_its_end_and_a_timeout_however_the_thread_waits() {
        let runtimes: [Arc<dyn Runtime>; 2] = [Arc::new(OsRuntime), Arc::<Looks>::default()];
        for (at, runtime) in runtimes.into_iter().enumerate() {
            let fresh = || -> Arc<dyn Runtime> {
                match at {
                    0 => Arc::clone(&runtime),
                    _ => Arc::<Looks>::default(),
                }
            };
            let (sender, channel) = mpsc::channel();
            sender.send(7).unwrap();
            assert_eq!(fresh().receive(&channel, None), Ok(7));
            let until = fresh().now_ms() + 5;
            let late = fresh().receive(&channel, Some(until));
            assert_eq!(late, Err(RecvTimeoutError::Timeout));
            drop(sender);
            let ended = fresh().receive(&channel, None);
            assert_eq!(ended, Err(RecvTimeoutError::Disconnected));
        }
    }

    #[test]
    fn fds_are_waited_for_until_they_are_ready_or_their_time_is_over() {
        let runtimes: [fn() -> Arc<dyn Runtime>; 2] =
            [|| Arc::new(OsRuntime), || Arc::<Looks>::default()];
        for fresh in runtimes {
            let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let wait = || {
                let runtime = fresh();
                let until_ms = Some(runtime.now_ms() + 5);
                runtime.poll_until(&mut [PollFd::new(&fd, PollFlags::IN)], until_ms)
            };
            assert_eq!(wait(), Ok(false));
            rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
            assert_eq!(wait(), Ok(true));
        }
    }
}
