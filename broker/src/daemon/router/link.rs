//! The daemon's way to one port: its line of leases, held by a thread, and its verbs.

use super::leases::{LeaseLine, Line, LinePort, is_missing};
use crate::config::Config;
use crate::daemon::ask::ask;
use crate::daemon::vocabulary::{ErrorCode, Outcome, Verb, VerbError};
use crate::line::connect;
use crate::pool::PortPool;
use crate::port::{leases_socket, verbs_socket};
use rustix::net::SocketType;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vfio_shim::model::{Fdid, OsRuntime};

/// One port, as the daemon reaches it. The thread ends on drop.
pub(super) struct PortLink {
    pub(super) name: String,
    verbs: PathBuf,
    /// What starts it, for people.
    start: String,
    line: LeaseLine,
}

impl PortLink {
    /// Looks for the port from now on.
    pub(super) fn start(
        config: &Config,
        start: String,
        name: &str,
        pool: Arc<PortPool>,
    ) -> io::Result<Self> {
        let port = LinePort {
            node: config.node_id,
            name: name.to_owned(),
            socket: leases_socket(config, name),
        };
        Ok(Self {
            name: name.to_owned(),
            verbs: verbs_socket(config, name),
            start,
            line: LeaseLine::start_on(Arc::new(OsRuntime), port, pool)?,
        })
    }

    pub(super) fn line(&self) -> Line {
        self.line.now()
    }

    /// Has the port do one verb.
    pub(super) fn ask(&self, verb: &Verb, deadline: Duration) -> Result<Outcome, VerbError> {
        let stream = connect(&self.verbs, SocketType::STREAM).and_then(|socket| {
            let stream = UnixStream::from(socket);
            stream.set_nonblocking(false)?;
            Ok(stream)
        });
        let stream = stream.map_err(|error| self.away(&error))?;
        ask(&stream, verb, deadline).map_err(|error| self.silent(&error))?
    }

    /// Whether the host at its far end offers a function through it.
    pub(super) fn offers(&self, fdid: Fdid, deadline: Duration) -> bool {
        match self.ask(&Verb::List, deadline) {
            Ok(Outcome::List(entries)) => entries.iter().any(|entry| entry.fdid.0 == fdid),
            _ => false,
        }
    }

    /// Whether anybody listens there. If not, no port of this name holds anything.
    pub(super) fn is_there(&self) -> bool {
        !connect(&self.verbs, SocketType::STREAM).is_err_and(|error| is_missing(&error))
    }

    /// Nobody is there.
    fn away(&self, error: &io::Error) -> VerbError {
        if error.kind() == io::ErrorKind::WouldBlock {
            return self.silent(error);
        }
        let (name, start) = (&self.name, &self.start);
        let text = match is_missing(error) {
            true => format!("no process serves port `{name}`: start `{start}`"),
            false => format!(
                "port `{name}` cannot be reached ({error}): run the daemon as the port's user, \
                 or start `{start}` anew"
            ),
        };
        VerbError::new(ErrorCode::PortAway, text)
    }

    /// Somebody is there and says nothing.
    fn silent(&self, error: &io::Error) -> VerbError {
        let (name, start) = (&self.name, &self.start);
        let who = match self.line() {
            Line::There { pid: Some(pid), .. } => format!("process {pid}"),
            _ => "its process".to_owned(),
        };
        let what = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                "no reply came in time".to_owned()
            }
            _ => error.to_string(),
        };
        let text = format!(
            "port `{name}` ({who}) does not answer ({what}): look at its log; if it hangs, end it \
             and start `{start}`, which ends the paths of its guests"
        );
        VerbError::new(ErrorCode::PortAway, text)
    }
}
