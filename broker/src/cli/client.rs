//! The client's end of the control socket.

use crate::daemon::vocabulary::{ErrorCode, Outcome, Reply, Verb, VerbError};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

/// Where the daemon listens if nobody says otherwise; the same as the configuration's default.
pub(super) const CONTROL_DEFAULT: &str = "/run/sublet/control.sock";
/// Longest reply in bytes.
const REPLY_MAX: usize = 16 << 20;
/// How long a verb may take: resets and scrubbing of a function on the other host are in it.
const REPLY_DEADLINE: Duration = Duration::from_secs(120);

/// Has the daemon do one verb.
pub(crate) fn request(control: &Path, verb: &Verb) -> Result<Outcome, VerbError> {
    let stream = UnixStream::connect(control).map_err(|e| no_daemon(control, &e))?;
    request_on(&stream, control, verb)
}

/// The same over a connected socket.
pub(crate) fn request_on(
    stream: &UnixStream,
    control: &Path,
    verb: &Verb,
) -> Result<Outcome, VerbError> {
    let line = match exchange(stream, verb) {
        Ok(line) if !line.is_empty() => line,
        Ok(_) => return Err(lost(control, "it closed the connection")),
        Err(e) => return Err(lost(control, &e.to_string())),
    };
    match serde_json::from_slice(&line) {
        Ok(Reply::Ok(outcome)) => Ok(outcome),
        Ok(Reply::Error(refusal)) => Err(refusal),
        Err(e) => Err(lost(
            control,
            &format!("its reply is not understood ({e}); is it of the same version?"),
        )),
    }
}

fn no_daemon(control: &Path, error: &io::Error) -> VerbError {
    let mend = match error.kind() {
        io::ErrorKind::PermissionDenied => "run this as the user that the daemon runs as",
        _ => "start `sublet daemon`, or name its socket with --control",
    };
    let text = format!("no daemon at {}: {error}; {mend}", control.display());
    VerbError::new(ErrorCode::NoDaemon, text)
}

fn lost(control: &Path, cause: &str) -> VerbError {
    let text = format!(
        "the daemon at {} gave no reply: {cause}; look at its log, and at `sublet status` for what was done",
        control.display()
    );
    VerbError::new(ErrorCode::DaemonLost, text)
}

fn exchange(mut stream: &UnixStream, verb: &Verb) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(verb)?;
    line.push(b'\n');
    let deadline = Instant::now() + REPLY_DEADLINE;
    stream.set_write_timeout(Some(REPLY_DEADLINE))?;
    match stream.write_all(&line) {
        // The daemon may refuse and close before it has read: its words are there all the same.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    let mut reply = Vec::new();
    let mut chunk = [0; 8192];
    while reply.last() != Some(&b'\n') {
        if reply.len() > REPLY_MAX {
            return Err(io::Error::other(format!("it is over {REPLY_MAX} bytes")));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => reply.extend_from_slice(&chunk[..count]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(reply)
}
