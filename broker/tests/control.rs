//! The control socket under clients that are slow, silent, many or talk nonsense.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod fake;

use fake::Server;
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};
use sublet::daemon::{
    control::{CLIENTS_MAX, Deadlines, REQUEST_MAX},
    vocabulary::*,
};
use tempfile::TempDir;

const LIST: &[u8] = b"{\"verb\":\"list\"}\n";
const RETURN: &[u8] = b"{\"verb\":\"return\",\"fdid\":\"44a01\"}\n";

fn deadlines(request_ms: u64) -> Deadlines {
    Deadlines {
        request: Duration::from_millis(request_ms),
        ..Deadlines::default()
    }
}

fn server(deadlines: Deadlines) -> (TempDir, PathBuf, Server) {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control.sock");
    let server = Server::start(&control, deadlines);
    (dir, control, server)
}

fn reply(stream: &UnixStream) -> Option<Reply> {
    // A server that never answers fails the test instead of holding it up.
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
}

fn refusal(stream: &UnixStream) -> VerbError {
    match reply(stream) {
        Some(Reply::Error(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

fn ask(control: &PathBuf, request: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(control).unwrap();
    // A server that refuses early may have closed already.
    let _ = stream.write_all(request);
    stream
}

fn list_is_answered(stream: &UnixStream) -> bool {
    matches!(reply(stream), Some(Reply::Ok(Outcome::List(list))) if list == [fake::entry()])
}

#[test]
fn one_connection_carries_several_requests() {
    let (_dir, control, _server) = server(Deadlines::default());
    let mut stream = ask(&control, LIST);
    assert!(list_is_answered(&stream));
    stream.write_all(LIST).unwrap();
    assert!(list_is_answered(&stream));
}

#[test]
fn a_request_that_comes_in_pieces_is_put_together() {
    let (_dir, control, _server) = server(Deadlines::default());
    let mut stream = ask(&control, &LIST[..5]);
    stream.write_all(&LIST[5..]).unwrap();
    assert!(list_is_answered(&stream));
}

#[test]
fn nonsense_is_refused_and_the_connection_goes_on() {
    let (_dir, control, _server) = server(Deadlines::default());
    for nonsense in [
        "\n",
        "x\n",
        "{\"verb\":\"lend\"}\n",
        "{\"verb\":\"add\"}\n",
        "{\"verb\":\"add\",\"bdf\":\"99:99.9\"}\n",
        "{\"verb\":\"add\",\"bdf\":\"01:00.1\",\"force\":true}\n",
    ] {
        let mut stream = ask(&control, nonsense.as_bytes());
        assert_eq!(refusal(&stream).code, ErrorCode::BadRequest, "{nonsense}");
        stream.write_all(LIST).unwrap();
        assert!(list_is_answered(&stream));
    }
}

#[test]
fn a_request_of_the_largest_size_is_read_and_one_byte_more_is_refused() {
    let (_dir, control, _server) = server(Deadlines::default());
    let padded = |size: usize| {
        let mut request = vec![b' '; size - LIST.len()];
        request.extend_from_slice(LIST);
        request
    };
    assert!(list_is_answered(&ask(&control, &padded(REQUEST_MAX))));
    let stream = ask(&control, &padded(REQUEST_MAX + 1));
    assert_eq!(refusal(&stream).code, ErrorCode::RequestTooLarge);
    let endless = ask(&control, &vec![b' '; 4 * REQUEST_MAX]);
    assert_eq!(refusal(&endless).code, ErrorCode::RequestTooLarge);
}

#[test]
fn stuck_clients_do_not_block_others_and_lose_their_slot() {
    let (_dir, control, _server) = server(deadlines(300));
    let started = Instant::now();
    let silent = ask(&control, b"");
    let half = ask(&control, b"{\"verb\":");
    assert!(list_is_answered(&ask(&control, LIST)));
    assert!(
        started.elapsed() < Duration::from_millis(300),
        "waited for a stuck client"
    );
    assert_eq!(reply(&silent), None);
    assert_eq!(refusal(&half).code, ErrorCode::BadRequest);
}

#[test]
fn a_client_that_drips_is_cut_off_at_the_deadline() {
    let (_dir, control, _server) = server(deadlines(200));
    let mut stream = ask(&control, b"");
    let started = Instant::now();
    let (_keep, mut quiet) = UnixStream::pair().unwrap();
    quiet
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    while stream.write_all(b" ").is_ok() {
        assert!(started.elapsed() < Duration::from_secs(10), "never cut off");
        // Paces the drip: nothing ever comes here.
        assert!(quiet.read(&mut [0]).is_err());
    }
    assert_eq!(refusal(&stream).code, ErrorCode::BadRequest);
}

#[test]
fn clients_are_taken_up_to_the_limit_and_slots_come_free_again() {
    let (_dir, control, server) = server(Deadlines::default());
    let mut clients: Vec<UnixStream> = (0..CLIENTS_MAX).map(|_| ask(&control, LIST)).collect();
    for client in &clients {
        assert!(list_is_answered(client));
    }
    let one_more = ask(&control, b"");
    assert_eq!(refusal(&one_more).code, ErrorCode::TooManyClients);
    clients.pop();
    let started = Instant::now();
    loop {
        match reply(&ask(&control, LIST)) {
            Some(Reply::Ok(_)) => break,
            Some(Reply::Error(refusal)) => assert_eq!(refusal.code, ErrorCode::TooManyClients),
            None => panic!("no reply"),
        }
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "no slot came free"
        );
    }
    drop(server);
}

#[test]
fn stopping_lets_a_verb_under_way_return_and_takes_the_file_away() {
    let (_dir, control, server) = server(Deadlines::default());
    let waiting = ask(&control, RETURN);
    server.host.wait_for_verbs(1);
    drop(server);
    assert_eq!(refusal(&waiting).code, ErrorCode::Stopping);
    assert!(!control.exists());
}

#[test]
fn a_client_that_does_not_read_its_replies_costs_only_its_slot() {
    let (_dir, control, server) = server(Deadlines {
        reply: Duration::from_millis(200),
        ..Deadlines::default()
    });
    let mut greedy = ask(&control, b"");
    greedy.set_nonblocking(true).unwrap();
    // Until the server no longer takes requests, because its replies are not taken.
    let started = Instant::now();
    loop {
        match greedy.write(LIST) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                assert!(list_is_answered(&ask(&control, LIST)));
            }
            Err(_) => break,
        }
        assert!(started.elapsed() < Duration::from_secs(20), "never cut off");
    }
    drop(server);
}
