//! The one loop that reads every socket: clients, listeners, control, the end.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::control::{CONTROL_CLIENTS_MAX, ControlClient};
use crate::half::Side;
use crate::model::Model;
use crate::options::ServeOptions;
use crate::signals::termination_fd;

/// A listening socket whose file goes with it.
#[derive(Debug)]
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    fn bind(path: &Path) -> anyhow::Result<Self> {
        // A killed predecessor leaves its socket behind; a live one is not disturbed.
        if std::os::unix::net::UnixStream::connect(path).is_err() {
            let _ = std::fs::remove_file(path);
        }
        let socket =
            UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
        socket
            .set_nonblocking(true)
            .context("making a listener non-blocking")?;
        Ok(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// The next connection, if one waits.
    fn accept(&self) -> Option<std::os::unix::net::UnixStream> {
        let (socket, _) = self.socket.accept().ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(socket)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[derive(Debug, Clone, Copy)]
enum Source {
    Terminate,
    Stdin,
    Accept(Side),
    Client(Side),
    AcceptControl,
    Control(usize),
}

struct Server {
    model: Model,
    listeners: [Listener; 2],
    control: Option<Listener>,
    control_clients: Vec<ControlClient>,
    terminate: OwnedFd,
    stdin: Option<std::io::Stdin>,
}

/// Serves until told to end; prints `ready` when everything listens.
pub fn serve(options: &ServeOptions) -> anyhow::Result<()> {
    let mut server = Server {
        model: Model::new(&options.device),
        listeners: [
            Listener::bind(&options.socket_a)?,
            Listener::bind(&options.socket_b)?,
        ],
        control: options.control.as_deref().map(Listener::bind).transpose()?,
        control_clients: Vec::new(),
        terminate: termination_fd().context("blocking the termination signals")?,
        stdin: options.die_with_stdin.then(std::io::stdin),
    };
    println!("ready");
    std::io::stdout().flush().context("saying ready")?;
    while server.turn()? {}
    Ok(())
}

impl Server {
    /// What to wait for, and for what of it.
    fn interests(&self) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let mut all = vec![(Source::Terminate, self.terminate.as_fd(), PollFlags::IN)];
        if let Some(stdin) = &self.stdin {
            all.push((Source::Stdin, stdin.as_fd(), PollFlags::IN));
        }
        for side in Side::BOTH {
            let half = self.model.half(side);
            let Some(stream) = &half.stream else {
                let listener = &self.listeners[side.index()];
                all.push((Source::Accept(side), listener.socket.as_fd(), PollFlags::IN));
                continue;
            };
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !half.egress.is_full());
            flags.set(PollFlags::OUT, stream.has_output());
            all.push((Source::Client(side), stream.fd(), flags));
        }
        let room = self.control_clients.len() < CONTROL_CLIENTS_MAX;
        if let Some(control) = self.control.as_ref().filter(|_| room) {
            all.push((Source::AcceptControl, control.socket.as_fd(), PollFlags::IN));
        }
        for (n, client) in self.control_clients.iter().enumerate() {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, client.has_output());
            all.push((Source::Control(n), client.fd(), flags));
        }
        all
    }

    /// Waits once and does what came; false at the end.
    fn turn(&mut self) -> anyhow::Result<bool> {
        let ready = {
            let interests = self.interests();
            let mut fds: Vec<PollFd<'_>> = interests
                .iter()
                .map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
                .collect();
            let wait = self
                .model
                .deadline()
                .map(|at| at.saturating_duration_since(Instant::now()));
            let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
            match poll(&mut fds, wait.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for the sockets"),
            }
            let sources = interests.iter().map(|(source, ..)| *source);
            let events = sources.zip(fds.iter().map(PollFd::revents));
            events
                .filter(|(_, events)| !events.is_empty())
                .collect::<Vec<_>>()
        };
        let now = Instant::now();
        let mut gone = Vec::new();
        for (source, events) in ready {
            match source {
                Source::Terminate => return Ok(false),
                Source::Stdin => {
                    if self.stdin.as_mut().is_some_and(is_closed) {
                        return Ok(false);
                    }
                }
                Source::Accept(side) => {
                    if let Some(socket) = self.listeners[side.index()].accept() {
                        self.model.connect(side, socket);
                    }
                }
                Source::Client(side) => {
                    if events.contains(PollFlags::OUT) {
                        self.model.flush(side, now);
                    }
                    if events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                        self.model.service(side, now);
                    }
                }
                Source::AcceptControl => {
                    let accepted = self.control.as_ref().and_then(Listener::accept);
                    self.control_clients
                        .extend(accepted.map(ControlClient::new));
                }
                Source::Control(n) => {
                    if self.control_clients[n]
                        .service(&mut self.model, now)
                        .is_err()
                    {
                        gone.push(n);
                    }
                }
            }
        }
        for n in gone.into_iter().rev() {
            self.control_clients.swap_remove(n);
        }
        self.model.tick(now);
        Ok(true)
    }
}

/// Reads what is there; true at the end of the file.
fn is_closed(stdin: &mut std::io::Stdin) -> bool {
    !matches!(stdin.read(&mut [0; 256]), Ok(1..))
}
