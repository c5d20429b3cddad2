//! The control socket: one JSON object per line in, one per line out.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::half::Side;
use crate::model::Model;
use crate::options::Fault;

/// Most control clients at once.
pub const CONTROL_CLIENTS_MAX: usize = 8;
/// Longest line of a control client.
const LINE_BYTES_MAX: usize = 4096;

#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum Operation {
    Counters {},
    State {},
    Maps { half: HalfName },
    Flap { ms: u64 },
    Link { up: bool },
    Fault { name: Option<Fault> },
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum HalfName {
    A,
    B,
}

/// Carries out one line.
pub fn answer(model: &mut Model, line: &str, now: Instant) -> Value {
    match serde_json::from_str(line) {
        Ok(operation) => carry_out(model, &operation, now),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

fn carry_out(model: &mut Model, operation: &Operation, now: Instant) -> Value {
    match operation {
        Operation::Counters {} => json!({
            "a": model.half(Side::A).counters,
            "b": model.half(Side::B).counters,
        }),
        Operation::State {} => json!({
            "link": model.link().is_up(),
            "a": state(model, Side::A),
            "b": state(model, Side::B),
        }),
        Operation::Maps { half } => {
            let side = match half {
                HalfName::A => Side::A,
                HalfName::B => Side::B,
            };
            let maps = model.half(side).dma.iter().map(|(iova, map)| {
                json!({ "iova": iova, "size": map.size, "flags": map.flags, "has_fd": map.has_fd() })
            });
            json!({ "maps": maps.collect::<Vec<_>>() })
        }
        Operation::Flap { ms } => {
            model.change_link(now, |link| link.flap(now + Duration::from_millis(*ms)));
            json!({ "ok": true })
        }
        Operation::Link { up } => {
            model.change_link(now, |link| link.hold(!up));
            json!({ "ok": true })
        }
        Operation::Fault { name } => {
            model.set_fault(*name);
            json!({ "ok": true })
        }
    }
}

fn state(model: &Model, side: Side) -> Value {
    let half = model.half(side);
    let windows = [0, 1].map(|window| {
        let inbound = half.inbound(window);
        json!({ "xbase": inbound.base, "xlmt": inbound.limit, "bar": inbound.bar_base })
    });
    json!({
        "connected": half.stream.is_some(),
        "link_enabled": half.registers.link_enabled(),
        "bus_master": half.config.bus_master(),
        "msix_enabled": half.config.msix_enabled(),
        "maps": half.dma.iter().count(),
        "waiting": half.egress.queue.len(),
        "windows": windows,
    })
}

/// One control client.
#[derive(Debug)]
pub struct ControlClient {
    socket: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl ControlClient {
    /// Takes a non-blocking socket.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            input: Vec::new(),
            output: Vec::new(),
        }
    }

    /// The socket, for polling.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// True while an answer waits to be read.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Reads, works, answers; an error is the end of this client.
    pub fn service(&mut self, model: &mut Model, now: Instant) -> std::io::Result<()> {
        let mut bytes = [0; LINE_BYTES_MAX];
        match self.socket.read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.input.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            let reply = answer(model, &String::from_utf8_lossy(&line), now);
            self.output.extend_from_slice(reply.to_string().as_bytes());
            self.output.push(b'\n');
        }
        if self.input.len() > LINE_BYTES_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        self.flush()
    }

    /// Sends what the client takes.
    pub fn flush(&mut self) -> std::io::Result<()> {
        while !self.output.is_empty() {
            match self.socket.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The client side for shells: words in, the answer's line out.
pub fn ask(control: &Path, words: &[String]) -> anyhow::Result<String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let request = match words[..] {
        [op @ ("counters" | "state")] => json!({ "op": op }),
        ["maps", half] => json!({ "op": "maps", "half": half }),
        ["flap", ms] => json!({ "op": "flap", "ms": ms.parse::<u64>().context("flap MS")? }),
        ["fault", "none"] => json!({ "op": "fault", "name": null }),
        ["fault", name] => json!({ "op": "fault", "name": name }),
        ["link", up @ ("up" | "down")] => json!({ "op": "link", "up": up == "up" }),
        _ => bail!(
            "one of: counters, state, maps a, maps b, flap MS, link up, link down, fault NAME, fault none"
        ),
    };
    let mut socket = UnixStream::connect(control).context("connecting to the control socket")?;
    socket
        .write_all(format!("{request}\n").as_bytes())
        .context("asking")?;
    let mut line = String::new();
    BufReader::new(socket)
        .read_line(&mut line)
        .context("reading the answer")?;
    let reply: Value = serde_json::from_str(&line).context("reading the answer")?;
    if let Some(error) = reply.get("error") {
        bail!("the model refused: {error}");
    }
    Ok(line)
}
