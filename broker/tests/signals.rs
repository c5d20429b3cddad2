//! A daemon that is told to end by a signal stops its host and takes its socket file away.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod fake;

use fake::FakeHost;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    env,
    io::{BufRead, BufReader},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};
use sublet::{config::Config, daemon};

const CONTROL: &str = "SUBLET_TEST_CONTROL";

/// Not a test by itself: what the test below starts as a process of its own.
#[test]
fn the_daemon_of_the_other_test() {
    let Some(control) = env::var_os(CONTROL) else {
        return;
    };
    let text = format!(
        "[node]\nid = 4\nname = \"a\"\n[daemon]\ncontrol = {control:?}\n\
         [[port]]\nname = \"ntb0\"\nbdf = \"02:00.0\"\npeers = \"cable\"\ntrust_domain = \"t\"\n"
    );
    let config = Config::parse(Path::new("test.toml"), &text).unwrap();
    let host = Arc::new(FakeHost::default());
    let started = Arc::clone(&host);
    daemon::run_with(&config, move |_| {
        eprintln!("ready");
        Ok(started)
    })
    .unwrap();
    eprintln!("host stopped: {}", host.stopped.lock().unwrap());
}

fn ends_cleanly_on(signal: Signal) {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "the_daemon_of_the_other_test", "--nocapture"])
        .env(CONTROL, &control)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut wait_for = |text: &str| {
        assert!(
            lines.by_ref().any(|line| line.unwrap().contains(text)),
            "no `{text}`"
        );
    };
    wait_for("ready");
    assert!(UnixStream::connect(&control).is_ok());
    kill_process(Pid::from_child(&child), signal).unwrap();
    wait_for("host stopped: true");
    assert!(child.wait().unwrap().success());
    assert!(!control.exists());
}

#[test]
fn sigterm_stops_the_host_and_removes_the_socket() {
    ends_cleanly_on(Signal::TERM);
}

#[test]
fn sigint_stops_the_host_and_removes_the_socket() {
    ends_cleanly_on(Signal::INT);
}
