//! How fast this machine's time stamp counter runs: QEMU's TCG gives a host that very counter, and a busy one measures it wrong.
// The counter is only read by an instruction that has no safe wrapper.
#![allow(unsafe_code)]

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// Debian's kernels for amd64 tick so often in a second.
const HZ: u64 = 250;
const MEASURED: Duration = Duration::from_millis(100);
/// A reading between two looks at the clock is the better the closer they are; on a busy machine
/// one of these is not interrupted.
const READINGS: usize = 50;

/// Kernel parameters for a host, so that it need not calibrate. Linux measures the counter against
/// a timer that QEMU's main loop keeps, and loops of its second processor against ticks: on a busy
/// machine it took 2445 MHz for 393 MHz, and then delays and timeouts are anything.
pub fn parameters() -> String {
    parameters_for(khz())
}

fn parameters_for(khz: u64) -> String {
    let loops_per_jiffy = khz * 1000 / HZ;
    format!("tsc_early_khz={khz} lpj={loops_per_jiffy} tsc=reliable")
}

fn khz() -> u64 {
    let (start, first) = reading();
    thread::sleep(MEASURED);
    let (end, second) = reading();
    let nanoseconds = (end - start).as_nanos().max(1);
    let counted = u128::from(second.wrapping_sub(first));
    (counted * 1_000_000 / nanoseconds) as u64
}

/// The clock and the counter at one time.
fn reading() -> (Instant, u64) {
    let once = || {
        let before = Instant::now();
        // SAFETY: every x86-64 processor has it, and it only reads.
        let counter = unsafe { _rdtsc() };
        let apart = before.elapsed();
        (apart, before + apart / 2, counter)
    };
    let best = (0..READINGS)
        .map(|_| once())
        .min_by_key(|(apart, ..)| *apart);
    best.map_or_else(|| (Instant::now(), 0), |(_, at, counter)| (at, counter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_is_measured_alike_twice() {
        let (one, two) = (khz(), khz());
        // No processor that boots these kernels counts slower than 100 MHz.
        assert!(one > 100_000, "{one} kHz");
        assert!(one.abs_diff(two) < one / 100, "{one} and {two} kHz");
    }

    #[test]
    fn loops_per_jiffy_follow_from_the_counter() {
        let words = "tsc_early_khz=2445432 lpj=9781728 tsc=reliable";
        assert_eq!(parameters_for(2_445_432), words);
    }
}
