//! A chain of eventfds with a thread between each two: what a signal through as many threads costs by itself.

use crate::on_core;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

/// What ends a chain: more than any signal adds up to here.
const END: u64 = 1 << 32;

/// The chain. Its threads end with it.
pub struct Hops {
    first: Arc<OwnedFd>,
    last: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

fn blocking() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"))
}

fn take(fd: &OwnedFd) -> u64 {
    let mut value = [0; 8];
    read(fd, &mut value).expect("an eventfd is read");
    u64::from_ne_bytes(value)
}

fn put(fd: &OwnedFd, value: u64) {
    write(fd, &value.to_ne_bytes()).expect("an eventfd is written");
}

impl Hops {
    /// A thread on each of these cores ([`on_core`]), one behind the other: from `signal` to its
    /// return there is the wake-up of each, and the caller's own.
    pub fn new(cores: &[usize]) -> Self {
        let first = blocking();
        let mut last = Arc::clone(&first);
        let mut threads = Vec::new();
        for core in cores.iter().copied() {
            let (from, to) = (last, blocking());
            last = Arc::clone(&to);
            threads.push(std::thread::spawn(move || {
                on_core(core);
                loop {
                    let value = take(&from);
                    put(&to, value);
                    if value >= END {
                        return;
                    }
                }
            }));
        }
        Self {
            first,
            last,
            threads,
        }
    }

    /// Sends a signal through the chain, and returns when it has come out.
    pub fn signal(&self) {
        put(&self.first, 1);
        take(&self.last);
    }
}

impl Drop for Hops {
    fn drop(&mut self) {
        put(&self.first, END);
        for thread in self.threads.drain(..) {
            // It has no way to fail but the asserts above, which were told.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signal_comes_out_once_and_the_threads_end() {
        for cores in [&[][..], &[0], &[0, 1, 0]] {
            let hops = Hops::new(cores);
            (0..10).for_each(|_| hops.signal());
            assert_eq!(hops.threads.len(), cores.len());
        }
    }
}
