//! A guest that ends without a word: whether its processor shut down, and whether that can be ours.
//!
//! A triple fault is an order to start again to QEMU, which then ends with 0 as it does after a
//! `poweroff`. The host's KVM has a tracepoint for it. What comes while the guest's kernel is at
//! work, but before anything is said of a panic or by its first program, is the fault of TCG that
//! `NESTED_FAULTS` names: no driver has touched a device yet, and what firmware asked of one was
//! answered before the kernel began.

use crate::agent::Agent;
use anyhow::Result;
use std::fs;
use std::path::Path;

/// From now on, KVM writes down which guest's processor shuts down, and where.
const TELL: &str = "cd /sys/kernel/tracing
    echo 1 > options/record-tgid
    echo 'exit_reason == 0x7f' > events/kvm/kvm_exit/filter
    echo 1 > events/kvm/kvm_exit/enable";

/// Where a kernel runs: its text is in the uppermost 2 GiB.
const KERNEL: u64 = 0xffff_ffff_8000_0000;

/// Has a host write down what its guests' processors end by.
pub fn tell(host: &Agent) -> Result<()> {
    host.sh(TELL).map(drop)
}

/// What KVM wrote down of a VMM that has ended.
pub fn of(host: &Agent, pid: u32) -> Result<Option<String>> {
    let trace = host.text("/sys/kernel/tracing/trace")?;
    Ok(line_of(&trace, pid).map(str::to_owned))
}

/// Keeps the line as a log of its own, where it cannot be ours.
pub fn keep_if_not_ours(line: &str, console: &Path, kept: &Path) -> Result<()> {
    if is_of_kernel(line) && fs::read(console)?.is_empty() {
        fs::write(kept, format!("{line}\n"))?;
    }
    Ok(())
}

fn line_of(trace: &str, pid: u32) -> Option<&str> {
    let of_pid = |line: &&str| {
        let thread_group = line
            .split_once('(')
            .and_then(|(_, rest)| rest.split_once(')'));
        thread_group.is_some_and(|(id, _)| id.trim() == pid.to_string())
    };
    let mut shutdowns = trace
        .lines()
        .filter(|line| line.contains("reason shutdown"));
    shutdowns.find(of_pid).map(str::trim)
}

fn is_of_kernel(line: &str) -> bool {
    let rip = line.split_once("rip 0x").map_or("", |(_, rest)| rest);
    let digits = rip.split(' ').next().unwrap_or_default();
    u64::from_str_radix(digits, 16).is_ok_and(|rip| rip >= KERNEL)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF_KERNEL: &str = "qemu-system-x86-205 (    201) [000] d....    13.301: kvm_exit: vcpu 0 reason shutdown rip 0xffffffff8d737cdf info1 0x0";
    const OF_FIRMWARE: &str = "qemu-system-x86-305 (    301) [000] d....    13.301: kvm_exit: vcpu 0 reason shutdown rip 0xfd0a1 info1 0x0";

    #[test]
    fn shutdown_is_told_of_its_own_vmm() {
        let trace = format!("# tracer: nop\n  {OF_FIRMWARE}\n  {OF_KERNEL}\n");
        assert_eq!(line_of(&trace, 201), Some(OF_KERNEL));
        assert_eq!(line_of(&trace, 301), Some(OF_FIRMWARE));
        assert_eq!(line_of(&trace, 205), None);
        assert_eq!(line_of("", 201), None);
    }

    #[test]
    fn only_a_kernel_that_has_said_nothing_has_met_a_fault_of_others() {
        let dir = std::env::temp_dir().join(format!("sublet-shutdown-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let [silent, spoken, kept] = ["silent", "spoken", "kept"].map(|name| dir.join(name));
        fs::write(&silent, "").unwrap();
        fs::write(&spoken, "a word\n").unwrap();
        keep_if_not_ours(OF_KERNEL, &spoken, &kept).unwrap();
        keep_if_not_ours(OF_FIRMWARE, &silent, &kept).unwrap();
        assert!(!kept.exists());
        keep_if_not_ours(OF_KERNEL, &silent, &kept).unwrap();
        assert!(
            fs::read_to_string(&kept)
                .unwrap()
                .contains("reason shutdown")
        );
        fs::remove_dir_all(&dir).unwrap();
    }
}
