//! The asking end of a control socket: one verb, one reply, both bounded, all within a deadline.

use super::vocabulary::{Outcome, Reply, Verb, VerbError};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

/// Longest reply in bytes.
const REPLY_MAX: usize = 16 << 20;

/// Has whoever serves this socket do one verb. The outer error is a reply that did not come.
pub fn ask(
    stream: &UnixStream,
    verb: &Verb,
    deadline: Duration,
) -> io::Result<Result<Outcome, VerbError>> {
    let line = exchange(stream, verb, Instant::now() + deadline)?;
    if line.is_empty() {
        return Err(io::Error::other("it closed the connection"));
    }
    match serde_json::from_slice(&line) {
        Ok(Reply::Ok(outcome)) => Ok(Ok(outcome)),
        Ok(Reply::Error(refusal)) => Ok(Err(refusal)),
        Err(error) => Err(io::Error::other(format!(
            "its reply is not understood ({error}); is it of the same version?"
        ))),
    }
}

fn exchange(mut stream: &UnixStream, verb: &Verb, deadline: Instant) -> io::Result<Vec<u8>> {
    // A timeout of zero would mean none at all.
    let left = || match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::Error::from(io::ErrorKind::TimedOut)),
        left => Ok(Some(left)),
    };
    let mut line = serde_json::to_vec(verb)?;
    line.push(b'\n');
    stream.set_write_timeout(left()?)?;
    match stream.write_all(&line) {
        // It may refuse and close before it has read: its words are there all the same.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    let mut reply = Vec::new();
    let mut chunk = [0; 8192];
    while reply.last() != Some(&b'\n') {
        if reply.len() > REPLY_MAX {
            return Err(io::Error::other(format!("it is over {REPLY_MAX} bytes")));
        }
        stream.set_read_timeout(left()?)?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => reply.extend_from_slice(&chunk[..count]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(reply)
}
