//! Frames of the agent protocol: a magic, two lengths, a JSON head and a body of bytes.
//!
//! ```text
//! "LAB1" | head length u32 LE | body length u32 LE | head (JSON) | body
//! ```
//!
//! The runner sends a [`Head`] with a [`Request`] and gets one with a [`Reply`] of the same id;
//! requests run side by side and are answered in any order. A head whose `via` names Unix sockets
//! is passed on: the agent takes the first name off and sends the frame into that socket, where
//! a guest's agent listens, and hands everything that comes back to its own port untouched.
//! A reader skips whatever is not the magic: a serial line may carry a boot loader's text first.

use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// The first bytes of every frame.
pub const MAGIC: [u8; 4] = *b"LAB1";
/// The longest JSON head.
pub const HEAD_BYTES_MAX: usize = 64 << 10;
/// The longest body.
pub const BODY_BYTES_MAX: usize = 8 << 20;
/// How much of each of a program's two outputs is kept; the rest is read and dropped.
pub const OUTPUT_BYTES_MAX: usize = 2 << 20;

/// What stands in front of a body, in both directions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// Chosen by the runner, unique among all its requests; the reply bears it too.
    pub id: u64,
    /// Sockets still to be passed, nearest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub via: Vec<String>,
    /// The request or the reply.
    #[serde(flatten)]
    pub message: Message,
}

/// One of the two kinds of message.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// From the runner.
    Request(Request),
    /// From an agent.
    Reply(Reply),
}

/// What an agent does.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Answers with [`Reply::Done`].
    Ping,
    /// Runs a program to its end, its stdin being the body; killed with its process group at the timeout.
    Run { argv: Vec<String>, timeout_ms: u64 },
    /// Starts a program in the background, both outputs appended to a file.
    Spawn { argv: Vec<String>, output: String },
    /// Waits for the end of a program that `Spawn` started.
    Wait { pid: u32, timeout_ms: u64 },
    /// Sends a signal to any process.
    Kill { pid: u32, signal: i32 },
    /// Writes the body to a file.
    Put { path: String, mode: u32 },
    /// Reads part of a file; the reply's body holds it.
    Get {
        path: String,
        offset: u64,
        bytes_max: usize,
    },
}

/// What an agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "re", rename_all = "snake_case")]
pub enum Reply {
    /// It was done; a `Get` has the bytes in its body.
    Done,
    /// A program ended. The body is its stdout (of `stdout_bytes`), then its stderr.
    Exited {
        code: Option<i32>,
        signal: Option<i32>,
        stdout_bytes: usize,
        truncated: bool,
    },
    /// A program runs in the background.
    Spawned { pid: u32 },
    /// The time ran out; what was written so far is in the body as for `Exited`.
    TimedOut { stdout_bytes: usize },
    /// It could not be done.
    Failed { why: String },
}

/// A head and its body.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The JSON part.
    pub head: Head,
    /// The bytes.
    pub body: Vec<u8>,
}

impl Frame {
    /// A reply to the request of this id.
    pub fn reply(id: u64, reply: Reply, body: Vec<u8>) -> Self {
        let head = Head {
            id,
            via: Vec::new(),
            message: Message::Reply(reply),
        };
        Frame { head, body }
    }

    /// A reply that says what went wrong.
    pub fn failed(id: u64, why: impl ToString) -> Self {
        Self::reply(
            id,
            Reply::Failed {
                why: why.to_string(),
            },
            Vec::new(),
        )
    }
}

/// Writes a frame in one call, so that two writers under one lock never mix.
pub fn write_frame(to: &mut impl Write, frame: &Frame) -> io::Result<()> {
    let head = serde_json::to_vec(&frame.head)?;
    if head.len() > HEAD_BYTES_MAX || frame.body.len() > BODY_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "frame too long",
        ));
    }
    let mut bytes = Vec::with_capacity(12 + head.len() + frame.body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(frame.body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(&frame.body);
    to.write_all(&bytes)?;
    to.flush()
}

/// Reads the next frame, skipping what is not one.
pub fn read_frame(from: &mut impl Read) -> io::Result<Frame> {
    loop {
        seek_magic(from)?;
        let head_bytes = read_u32(from)? as usize;
        let body_bytes = read_u32(from)? as usize;
        if head_bytes > HEAD_BYTES_MAX || body_bytes > BODY_BYTES_MAX {
            continue;
        }
        let mut head = vec![0; head_bytes];
        from.read_exact(&mut head)?;
        let mut body = vec![0; body_bytes];
        from.read_exact(&mut body)?;
        if let Ok(head) = serde_json::from_slice(&head) {
            return Ok(Frame { head, body });
        }
    }
}

fn seek_magic(from: &mut impl Read) -> io::Result<()> {
    let mut seen = [0; 4];
    from.read_exact(&mut seen)?;
    while seen != MAGIC {
        seen.rotate_left(1);
        from.read_exact(&mut seen[3..])?;
    }
    Ok(())
}

fn read_u32(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(body: &[u8]) -> Frame {
        let request = Request::Run {
            argv: vec!["true".into()],
            timeout_ms: 5,
        };
        let head = Head {
            id: 7,
            via: vec!["/run/g.sock".into()],
            message: Message::Request(request),
        };
        Frame {
            head,
            body: body.to_vec(),
        }
    }

    #[test]
    fn frame_after_boot_noise_is_found() {
        let mut bytes = b"SeaBIOS LALAB".to_vec();
        write_frame(&mut bytes, &sample(b"abc")).unwrap();
        let frame = read_frame(&mut bytes.as_slice()).unwrap();
        assert_eq!(
            (frame.head.id, frame.body.as_slice()),
            (7, b"abc".as_slice())
        );
        assert_eq!(frame.head.via, ["/run/g.sock"]);
    }

    #[test]
    fn body_over_the_bound_is_refused() {
        let at = sample(&vec![0; BODY_BYTES_MAX]);
        assert!(write_frame(&mut io::sink(), &at).is_ok());
        let over = sample(&vec![0; BODY_BYTES_MAX + 1]);
        assert!(write_frame(&mut io::sink(), &over).is_err());
    }

    #[test]
    fn announced_length_over_the_bound_is_skipped() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&(HEAD_BYTES_MAX as u32 + 1).to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        write_frame(&mut bytes, &sample(b"x")).unwrap();
        assert_eq!(read_frame(&mut bytes.as_slice()).unwrap().body, b"x");
    }
}
