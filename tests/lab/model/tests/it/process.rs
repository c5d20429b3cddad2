//! The binary itself: it says when it is ready, serves, answers its control socket, and cleans up.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use ntb_model::control;
use ntb_model::wire::{self, HEADER_BYTES, Header};

use crate::common::{region_body, version_body};

/// Starts the model and waits for its `ready`.
fn start(dir: &Path, more: &[&str]) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ntb-model"))
        .current_dir(dir)
        .args(["--socket-a", "a", "--socket-b", "b", "--control", "c"])
        .args(more)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut line = String::new();
    let output = child.stdout.as_mut().expect("piped");
    BufReader::new(output).read_line(&mut line).expect("a line");
    assert_eq!(line, "ready\n");
    child
}

fn call(socket: &mut UnixStream, command: u16, body: &[u8]) -> Vec<u8> {
    let header = Header::request(1, command, 0, body.len()).encode();
    socket
        .write_all(&[&header[..], body].concat())
        .expect("sent");
    let mut header = [0; HEADER_BYTES];
    socket.read_exact(&mut header).expect("a header");
    let size = Header::parse(&header).expect("a header").size as usize;
    let mut body = vec![0; size - HEADER_BYTES];
    socket.read_exact(&mut body).expect("a body");
    body
}

fn ask(dir: &Path, words: &str) -> anyhow::Result<serde_json::Value> {
    let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    Ok(serde_json::from_str(&control::ask(
        &dir.join("c"),
        &words,
    )?)?)
}

#[test]
fn process_serves_clients_one_after_the_other_and_removes_its_sockets_at_its_end() {
    let dir = tempfile::tempdir().expect("folder");
    let dir = dir.path();
    let mut child = start(dir, &["--device-id", "0db4"]);
    for _ in 0..2 {
        let mut client = UnixStream::connect(dir.join("b")).expect("connected");
        call(&mut client, wire::VERSION, &version_body());
        let id = call(&mut client, wire::REGION_READ, &region_body(7, 2, 2));
        assert_eq!(id[16..], [0xB4, 0x0D]);
        assert_eq!(ask(dir, "state").expect("state")["b"]["connected"], true);
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signalled");
    assert!(child.wait().expect("ended").success());
    for name in ["a", "b", "c"] {
        assert!(!dir.join(name).exists(), "{name}");
    }
}

#[test]
fn control_socket_answers_what_it_knows_and_refuses_the_rest() {
    let dir = tempfile::tempdir().expect("folder");
    let dir = dir.path();
    let mut child = start(dir, &["--die-with-stdin"]);
    assert_eq!(ask(dir, "counters").expect("counters")["a"]["doorbells"], 0);
    assert_eq!(
        ask(dir, "maps b").expect("maps")["maps"],
        serde_json::json!([])
    );
    for words in [
        "flap 5",
        "link down",
        "link up",
        "fault drop-doorbells",
        "fault none",
    ] {
        assert_eq!(ask(dir, words).expect(words)["ok"], true);
    }
    assert!(ask(dir, "maps c").is_err());
    assert!(ask(dir, "fault other").is_err());
    let mut socket = UnixStream::connect(dir.join("c")).expect("connected");
    socket
        .write_all(b"{\"op\":\"counters\",\"more\":1}\nnonsense\n")
        .expect("sent");
    let answers = BufReader::new(socket)
        .lines()
        .take(2)
        .collect::<Result<Vec<_>, _>>();
    assert!(
        answers
            .expect("two answers")
            .iter()
            .all(|line| line.contains("error"))
    );

    drop(child.stdin.take());
    assert!(child.wait().expect("ended").success());
    assert!(!dir.join("a").exists());
}

#[test]
fn second_model_on_the_same_sockets_is_refused_and_the_first_lives_on() {
    let dir = tempfile::tempdir().expect("folder");
    let dir = dir.path();
    let mut first = start(dir, &["--die-with-stdin"]);
    let second = Command::new(env!("CARGO_BIN_EXE_ntb-model"))
        .current_dir(dir)
        .args(["--socket-a", "a", "--socket-b", "b"])
        .output()
        .expect("ran");
    assert!(!second.status.success());
    assert!(ask(dir, "counters").is_ok());
    drop(first.stdin.take());
    first.wait().expect("ended");
}
