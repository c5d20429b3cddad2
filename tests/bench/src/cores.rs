//! Which core a thread runs on: both sides of a pair stand on the same ones.
//!
//! A wake-up on the waker's own core is a switch, and on another one an interrupt to a core that may
//! sleep: a blocking echo took 8 us or 45 us on one machine. Left to the scheduler, either side of a
//! pair has the one now and the other later, and a ratio tells where threads stood.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::sync::OnceLock;

/// Those of this process when it began.
fn cores() -> &'static [usize] {
    static CORES: OnceLock<Vec<usize>> = OnceLock::new();
    CORES.get_or_init(|| {
        let set = sched_getaffinity(None).expect("a set of cores");
        (0..CpuSet::MAX_CPU)
            .filter(|core| set.is_set(*core))
            .collect()
    })
}

/// Holds this thread, and those that it starts from now on, to the `nth` core that this process may
/// use; to the last, where it has fewer.
pub fn on_core(nth: usize) {
    let cores = cores();
    let mut set = CpuSet::new();
    set.set(cores[nth.min(cores.len() - 1)]);
    sched_setaffinity(None, &set).expect("a core of this process");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_stands_where_it_was_put_and_so_do_those_that_it_starts() {
        let of_this_thread = || sched_getaffinity(None).unwrap().count();
        let all = cores().len();
        std::thread::spawn(move || {
            on_core(1);
            assert_eq!(of_this_thread(), 1);
            assert_eq!(std::thread::spawn(of_this_thread).join().unwrap(), 1);
        })
        .join()
        .unwrap();
        assert_eq!(of_this_thread() as usize, all);
    }
}
