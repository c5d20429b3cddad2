//! The control socket's server: one JSON line per request and reply, everything bounded.
//!
//! A thread per client; a client that is slow, silent or talks nonsense costs its own slot, and
//! that only until its deadline.

use super::{
    Host,
    socket::ControlSocket,
    vocabulary::{ErrorCode, Reply, Verb, VerbError},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::sockopt::socket_peercred,
};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Longest request in bytes, its newline counted.
pub const REQUEST_MAX: usize = 64 << 10;
/// Most clients at a time.
pub const CLIENTS_MAX: usize = 16;

/// How long things may take; tests make them short.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// From a connection or the last reply to the end of the next request.
    pub request: Duration,
    /// For a reply to be taken by the client.
    pub reply: Duration,
    /// At the end: for verbs under way to return once the host has stopped.
    pub stop: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(5),
            reply: Duration::from_secs(5),
            stop: Duration::from_secs(10),
        }
    }
}

/// The clients that are connected.
#[derive(Default)]
struct Clients {
    open: Mutex<Open>,
    gone: Condvar,
}

#[derive(Default)]
struct Open {
    streams: HashMap<u64, UnixStream>,
    next: u64,
    stopping: bool,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for one more client, or why there is none.
    fn admit(self: &Arc<Self>, stream: &UnixStream) -> Result<Slot, VerbError> {
        let mut open = self.lock();
        if open.streams.len() >= CLIENTS_MAX {
            let text =
                format!("{CLIENTS_MAX} clients are connected, the most there may be; try again");
            return Err(VerbError::new(ErrorCode::TooManyClients, text));
        }
        let stream = (stream.try_clone())
            .map_err(|e| VerbError::new(ErrorCode::Kernel, format!("no fd for a client: {e}")))?;
        let id = open.next;
        open.next += 1;
        open.streams.insert(id, stream);
        let clients = Arc::clone(self);
        Ok(Slot { clients, id })
    }

    fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    /// No client is heard any more; replies still go out.
    fn hush(&self) {
        let mut open = self.lock();
        open.stopping = true;
        for stream in open.streams.values() {
            // A client that has gone already needs no hushing.
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    fn wait_until_gone(&self, longest: Duration) {
        let waited = (self.gone)
            .wait_timeout_while(self.lock(), longest, |open| !open.streams.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        if !waited.0.streams.is_empty() {
            let clients = waited.0.streams.len();
            tracing::warn!(clients, "verbs under way did not return in time");
        }
    }
}

/// One client's slot, free again when dropped (by a panicking thread too).
struct Slot {
    clients: Arc<Clients>,
    id: u64,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.clients.lock().streams.remove(&self.id);
        self.clients.gone.notify_all();
    }
}

/// Serves until `stop` is readable, then stops the host and lets the verbs under way return.
pub fn serve(
    socket: &ControlSocket,
    host: &Arc<dyn Host>,
    stop: BorrowedFd<'_>,
    deadlines: Deadlines,
) -> io::Result<()> {
    let clients = Arc::new(Clients::default());
    let served = accept_until(socket, stop, |stream| {
        welcome(&clients, stream, host, deadlines);
    });
    clients.hush();
    host.stop();
    clients.wait_until_gone(deadlines.stop);
    served
}

fn accept_until(
    socket: &ControlSocket,
    stop: BorrowedFd<'_>,
    mut each: impl FnMut(UnixStream),
) -> io::Result<()> {
    let listener = socket.listener();
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
        match listener.accept() {
            Ok((stream, _)) => each(stream),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of fds or memory: the listener stays readable, so wait on `stop` alone.
                tracing::warn!(%error, "a client could not be accepted");
                let mut fds = [PollFd::from_borrowed_fd(stop, PollFlags::IN)];
                let pause = Timespec {
                    tv_sec: 0,
                    tv_nsec: 100_000_000,
                };
                let _ = poll(&mut fds, Some(&pause));
            }
        }
    }
}

fn welcome(clients: &Arc<Clients>, stream: UnixStream, host: &Arc<dyn Host>, deadlines: Deadlines) {
    let slot = match clients.admit(&stream) {
        Ok(slot) => slot,
        Err(refusal) => {
            // Fits the socket's buffer; a client that is gone already misses nothing.
            let _ = send(&stream, &Reply::Error(refusal), Duration::from_millis(10));
            return;
        }
    };
    let host = Arc::clone(host);
    let spawned = thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || {
            if let Err(error) = converse(&stream, host.as_ref(), &slot.clients, deadlines) {
                tracing::debug!(%error, "a client went away");
            }
            drop(slot);
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for a client");
    }
}

/// What reading a request came to.
enum Request {
    Line(Vec<u8>),
    Over,
    Refused(VerbError),
}

fn converse(
    stream: &UnixStream,
    host: &dyn Host,
    clients: &Clients,
    deadlines: Deadlines,
) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let line = match read_request(stream, &mut buffer, Instant::now() + deadlines.request)? {
            Request::Line(line) => line,
            Request::Over => return Ok(()),
            Request::Refused(refusal) => {
                return send(stream, &Reply::Error(refusal), deadlines.reply);
            }
        };
        let reply = match serde_json::from_slice::<Verb>(&line) {
            Ok(_) if clients.is_stopping() => Reply::Error(VerbError::new(
                ErrorCode::Stopping,
                "the daemon is going down; try again when it is back",
            )),
            Ok(verb) => answer(host, signed(verb, stream)),
            Err(e) => Reply::Error(VerbError::new(
                ErrorCode::BadRequest,
                format!("the request is no verb: {e}; use the `sublet` of the same version"),
            )),
        };
        send(stream, &reply, deadlines.reply)?;
    }
}

/// With who asks for it, where that is written down.
fn signed(mut verb: Verb, stream: &UnixStream) -> Verb {
    if let Verb::QuarantineClear { by, .. } = &mut verb {
        by.get_or_insert_with(|| match socket_peercred(stream) {
            Ok(peer) => format!("user {}", peer.uid.as_raw()),
            Err(error) => format!("a user who is not known ({error})"),
        });
    }
    verb
}

fn answer(host: &dyn Host, verb: Verb) -> Reply {
    tracing::debug!(?verb, "verb");
    match host.handle(verb) {
        Ok(outcome) => Reply::Ok(outcome),
        Err(refusal) => {
            tracing::info!(code = %refusal.code, text = %refusal.text, "refused");
            Reply::Error(refusal)
        }
    }
}

/// Takes one line; `buffer` keeps what came after it.
fn read_request(
    mut stream: &UnixStream,
    buffer: &mut Vec<u8>,
    deadline: Instant,
) -> io::Result<Request> {
    let mut chunk = [0; 4096];
    loop {
        if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let rest = buffer.split_off(end + 1);
            return Ok(Request::Line(std::mem::replace(buffer, rest)));
        }
        if buffer.len() >= REQUEST_MAX {
            let text = format!("the request is over {REQUEST_MAX} bytes, the most there may be");
            return Ok(Request::Refused(VerbError::new(
                ErrorCode::RequestTooLarge,
                text,
            )));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let room = chunk.len().min(REQUEST_MAX - buffer.len());
        // A timeout of zero would mean none at all.
        let read = if left.is_zero() {
            Err(io::ErrorKind::TimedOut.into())
        } else {
            stream.set_read_timeout(Some(left))?;
            stream.read(&mut chunk[..room])
        };
        match read {
            Ok(0) => return Ok(Request::Over),
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if is_late(&e) && buffer.is_empty() => return Ok(Request::Over),
            Err(e) if is_late(&e) => {
                let text = "the request did not come to its end in time; send a line of JSON";
                return Ok(Request::Refused(VerbError::new(
                    ErrorCode::BadRequest,
                    text,
                )));
            }
            Err(e) => return Err(e),
        }
    }
}

fn is_late(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// Writes one line, all of it within `longest`.
fn send(mut stream: &UnixStream, reply: &Reply, longest: Duration) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let deadline = Instant::now() + longest;
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        match stream.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
