//! `sublet demo` end to end: every claim holds and nothing stays behind; and each claim can be made to fail, by name.
#![cfg(target_arch = "x86_64")]

use rustix::process::{Pid, Signal, getuid, kill_process};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const CLAIMS: [&str; 13] = [
    "vfs",
    "pool",
    "borrow",
    "registers",
    "dma",
    "interrupts",
    "order",
    "stray",
    "kill",
    "reset",
    "return",
    "left",
    "memory",
];
const NOBODY: u32 = 65_534;

/// The demo with a temporary folder of its own.
fn demo(folder: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sublet"));
    command.arg("demo").env("TMPDIR", folder.path());
    command
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn held(report: &Value) -> Vec<&str> {
    let steps = report["steps"].as_array().unwrap().iter();
    steps.map(|step| step["claim"].as_str().unwrap()).collect()
}

fn assert_empty(folder: &TempDir) {
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// All that holds of a run to its end.
fn assert_whole(output: &Output) {
    let report = report(output);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(report["holds"], true);
    assert_eq!(held(&report), CLAIMS);
    let figures = &report["figures"];
    let count = |name: &str| figures[name].as_u64().unwrap();
    assert_eq!(count("vfs"), 5);
    assert_eq!(count("interrupts"), 132);
    assert!(count("register_accesses") > 500 && count("stores_held") >= 100);
    let anonymous = count("rss_anon_bytes") + count("vmm_rss_anon_bytes");
    assert!(anonymous < 64 << 20, "{anonymous} bytes");
}

#[test]
fn every_claim_holds_and_the_guest_is_kvm_wherever_kvm_opens() {
    let folder = tempfile::tempdir().unwrap();
    let output = demo(&folder).arg("--json").output().unwrap();
    assert_whole(&output);
    assert_empty(&folder);
    let report = report(&output);
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    match kvm {
        Ok(_) => assert_eq!(report["guest"], "kvm"),
        Err(_) => {
            assert_eq!(report["guest"], "stand-in");
            let why = report["guest_why"].as_str().unwrap();
            assert!(why.contains("/dev/kvm"), "{why}");
        }
    }
}

#[test]
fn user_without_rights_sees_the_same_and_writes_nothing_elsewhere() {
    if !getuid().is_root() {
        // Then every other test here is that one.
        return;
    }
    // Whoever is nobody must reach the program.
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = place.path().join("sublet");
    fs::copy(env!("CARGO_BIN_EXE_sublet"), &program).unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let output = Command::new(program)
        .args(["demo", "--json"])
        .env_clear()
        .env("TMPDIR", folder.path())
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    assert_whole(&output);
    assert_empty(&folder);
}

#[test]
fn piped_output_is_plain_lines_with_the_pool_and_the_block_of_fields() {
    let folder = tempfile::tempdir().unwrap();
    let output = demo(&folder).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains(['\u{1b}', '\r']), "{text}");
    for expected in [
        "\n             44a05: VGA compatible controller Intel Corporation ",
        "\n             Remote BDF: 0000:4a:00.1\n",
        "\n             NodeId: 4\n",
        " a write to 0x80000000 was refused; ",
        "\n13 claims hold, in ",
    ] {
        assert!(text.contains(expected), "no {expected:?} in:\n{text}");
    }
}

#[test]
fn folder_that_cannot_be_written_to_is_told_with_its_mend() {
    let folder = tempfile::tempdir().unwrap();
    let output = demo(&folder).env("TMPDIR", "/proc").output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("cannot make a folder in /proc"), "{words}");
    assert!(words.contains("set TMPDIR"), "{words}");
}

#[test]
fn demo_that_is_stopped_by_a_signal_leaves_no_file_and_no_process() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = demo(&folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // The guest runs by now.
    let vmm = lines.find_map(|line| {
        let line = line.unwrap();
        let pid = line.trim_start().strip_prefix("process ")?;
        pid.split(':').next()?.parse::<i32>().ok()
    });
    let vmm = Pid::from_raw(vmm.expect("a VMM")).unwrap();
    let pid = Pid::from_raw(child.id() as i32).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let words = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(8), "{words}");
    assert!(words.contains("stopped by a signal"), "{words}");
    assert!(rustix::process::test_kill_process(vmm).is_err(), "the VMM");
    assert_empty(&folder);
}

#[test]
fn linux_guest_needs_a_qemu_that_has_vfio_user() {
    let folder = tempfile::tempdir().unwrap();
    let place = tempfile::tempdir().unwrap();
    let qemu = place.path().join("qemu");
    let kernel = place.path().join("vmlinuz");
    let words = |version: &str| {
        fs::write(&qemu, format!("#!/bin/sh\necho '{version}'\n")).unwrap();
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = demo(&folder);
        command.args(["--linux", "--kernel"]).arg(&kernel);
        let output = command.arg("--qemu").arg(&qemu).output().unwrap();
        assert_eq!(output.status.code(), Some(5));
        assert_empty(&folder);
        String::from_utf8(output.stderr).unwrap()
    };
    let old = words("QEMU emulator version 10.0.9 (Debian)");
    assert!(
        old.contains("vfio-user-pci is in QEMU 10.1 and newer"),
        "{old}"
    );
    let none = words("QEMU emulator version 10.1.0");
    assert!(none.contains("vmlinuz cannot be read"), "{none}");
    let alone = demo(&folder).arg("--linux").output().unwrap();
    assert_eq!(alone.status.code(), Some(2), "no kernel");
}

/// A claim made false on purpose: the demo fails, names it, and had got so far.
fn breaks(claim: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = demo(&folder);
    let output = command.args(["--json", "--fault", claim]).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{words}");
    let named = format!("claim `{claim}` does not hold");
    assert!(words.contains(&named), "{words}");
    let report = report(&output);
    assert_eq!(report["holds"], false);
    assert_eq!(report["broken"]["claim"], claim);
    let place = CLAIMS.iter().position(|name| *name == claim).unwrap();
    // What is false about the order of interrupts shows while they are counted.
    let seen = if claim == "order" { place - 1 } else { place };
    assert_eq!(held(&report), CLAIMS[..seen]);
    assert_empty(&folder);
}

macro_rules! faults {
    ($($name:ident $claim:literal)*) => { $(#[test] fn $name() { breaks($claim); })* };
}

faults! {
    vf_that_does_not_answer_breaks_vfs "vfs"
    pulled_cable_breaks_pool "pool"
    reset_that_fails_at_the_start_breaks_borrow "borrow"
    closed_window_breaks_registers "registers"
    lost_store_breaks_dma "dma"
    masked_interrupt_breaks_interrupts "interrupts"
    lost_data_before_its_interrupt_breaks_order "order"
    memory_of_somebody_else_in_reach_breaks_stray "stray"
    guest_that_leaves_by_itself_breaks_kill "kill"
    reset_that_fails_after_the_guest_breaks_reset "reset"
    reset_that_fails_at_the_end_breaks_return "return"
    fd_that_stays_open_breaks_left "left"
    memory_held_beside_the_guest_breaks_memory "memory"
}
