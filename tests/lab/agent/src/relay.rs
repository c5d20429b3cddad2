//! Passes frames on into Unix sockets, behind which a guest's agent listens on a serial line.

use crate::serve::Port;
use lab_agent::wire::{Frame, Message, Reply, read_frame, write_frame};
use std::collections::{HashMap, HashSet};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// One open way to a guest, and the requests that it has not answered.
struct Way {
    stream: UnixStream,
    open: HashSet<u64>,
}

/// All ways, by the socket's path. A guest that goes takes its way along; the next request opens a new one.
#[derive(Clone, Default)]
pub struct Relays(Arc<Mutex<HashMap<String, Way>>>);

impl Relays {
    /// Sends a frame into a socket; what comes back goes to the port by itself.
    pub fn pass(&self, socket: &str, frame: Frame, port: &Port) {
        let id = frame.head.id;
        if let Err(error) = self.try_pass(socket, frame, port) {
            port.send(&Frame::failed(id, format!("relay to {socket}: {error}")));
        }
    }

    fn try_pass(&self, socket: &str, frame: Frame, port: &Port) -> std::io::Result<()> {
        let mut ways = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !ways.contains_key(socket) {
            let stream = UnixStream::connect(socket)?;
            self.listen(socket.to_owned(), stream.try_clone()?, port.clone());
            let open = HashSet::new();
            ways.insert(socket.to_owned(), Way { stream, open });
        }
        if let Some(way) = ways.get_mut(socket) {
            way.open.insert(frame.head.id);
            if let Err(error) = write_frame(&mut way.stream, &frame) {
                ways.remove(socket);
                return Err(error);
            }
        }
        Ok(())
    }

    fn listen(&self, socket: String, mut stream: UnixStream, port: Port) {
        let ways = self.0.clone();
        thread::spawn(move || {
            while let Ok(frame) = read_frame(&mut stream) {
                // A serial line without raw mode echoes: a request that comes back is no answer.
                if matches!(frame.head.message, Message::Request(_)) {
                    continue;
                }
                let mut ways = ways.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(way) = ways.get_mut(&socket) {
                    way.open.remove(&frame.head.id);
                }
                drop(ways);
                port.send(&frame);
            }
            let gone = ways
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&socket);
            for id in gone.into_iter().flat_map(|way| way.open) {
                let why = format!("relay to {socket}: the guest went away");
                port.send(&Frame::reply(id, Reply::Failed { why }, Vec::new()));
            }
        });
    }
}
