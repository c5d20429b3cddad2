//! The client's end of the control socket.

use crate::daemon::{
    ask::ask,
    vocabulary::{ErrorCode, Outcome, Verb, VerbError},
};
use std::{io, os::unix::net::UnixStream, path::Path, time::Duration};

/// Where the daemon listens if nobody says otherwise; the same as the configuration's default.
pub(super) const CONTROL_DEFAULT: &str = "/run/sublet/control.sock";
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
    ask(stream, verb, REPLY_DEADLINE).map_err(|error| lost(control, &error.to_string()))?
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
