//! The messages between a daemon and a worker as bytes: total on any bytes, bounded both ways.

use super::message::{
    Answered, Check, FILES_MAX, MapPart, MapPiece, PEERS_MAX, PIECES_MAX, SIGNALS_MAX, Start,
    ToPort, ToWorker, Token, Told,
};
use crate::jail::Report;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vfio_shim::{
    model::{Access, FunctionIds, Span},
    path::{
        CallError, LeaseId, Refusal, RefusalCode,
        message::{ACCESS_BYTES_MAX, CONFIG_BYTES_MAX, Message, OpId, Reply, Request, clean_text},
        wire::{Reader, WireError, Writer},
    },
};
use vmm_glue::vfio_user::SessionState;

/// Why a message cannot be.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Its fields.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Longer than any message, in bytes or descriptors.
    #[error("a message of {0} bytes and {1} descriptors is longer than any")]
    TooLong(usize, usize),
    /// Not as many descriptors as it says.
    #[error("a message came with {came} descriptors and takes {takes}")]
    Fds {
        /// With it.
        came: usize,
        /// By its kind.
        takes: usize,
    },
    /// Descriptors of another kind than memory.
    #[error("a message came with a descriptor that is no memfd or hugetlbfs file")]
    NoMemory,
    /// A request that is not a worker's to make.
    #[error("a worker cannot ask for operation {0}")]
    NotForWorkers(u16),
}

type Coded<T> = Result<T, MessageError>;

mod kind {
    pub const READY: u16 = 1;
    pub const FORWARD: u16 = 2;
    pub const MAP: u16 = 3;
    pub const UNMAP: u16 = 4;
    pub const LOAD: u16 = 5;
    pub const STORE: u16 = 6;
    pub const CHECK: u16 = 7;
    pub const TOLD: u16 = 8;
    pub const FAILED: u16 = 9;
    pub const HOLDER: u16 = 10;

    pub const FUNCTION: u16 = 33;
    pub const CONFIG: u16 = 34;
    pub const START: u16 = 35;
    pub const ANSWER: u16 = 36;
    pub const TELL: u16 = 37;
    pub const LOST: u16 = 38;
    pub const RAISED: u16 = 39;
}

/// The op of `open`, whose reply describes a function (PROTOCOL.md).
const OPEN: u16 = 5;

pub(crate) fn bad(field: &'static str, value: impl Into<u64>) -> MessageError {
    let value = value.into();
    WireError::Field { field, value }.into()
}

fn put_span(w: &mut Writer, span: Span) {
    w.u64(span.start());
    w.u64(span.len());
}

fn get_span(r: &mut Reader<'_>) -> Coded<Span> {
    let (start, len) = (r.u64()?, r.u64()?);
    Span::new(start, len).ok_or_else(|| bad("span", start))
}

pub(crate) fn put_text(w: &mut Writer, text: &str) -> Coded<()> {
    Ok(w.text(&clean_text(text))?)
}

pub(crate) fn get_text(r: &mut Reader<'_>) -> Coded<String> {
    Ok(clean_text(r.text()?))
}

fn put_bytes(w: &mut Writer, bytes: &[u8], max: usize) -> Coded<()> {
    w.count("bytes", bytes.len(), max)?;
    w.raw(bytes);
    Ok(())
}

fn get_bytes(r: &mut Reader<'_>, max: usize) -> Coded<Vec<u8>> {
    let count = r.count("bytes", max)?;
    Ok(r.raw(count)?.to_vec())
}

fn width(len: usize) -> Coded<usize> {
    match len.is_power_of_two() && len <= ACCESS_BYTES_MAX {
        true => Ok(len),
        false => Err(bad("length", len as u64)),
    }
}

/// What the lender does at once for a worker; all else is the port's own to ask.
fn is_for_workers(request: &Request) -> bool {
    match request {
        // The others are the lending host's own.
        Request::Irqs { index, .. } => index.is_message(),
        Request::Mask { .. }
        | Request::BusMaster { .. }
        | Request::Reset { .. }
        | Request::RegionRead { .. }
        | Request::RegionWrite { .. } => true,
        _ => false,
    }
}

fn put_piece(w: &mut Writer, piece: &MapPiece) {
    put_span(w, piece.span);
    w.bool(piece.access.read);
    w.bool(piece.access.write);
    w.u16(piece.file);
    w.u64(piece.offset);
}

fn get_piece(r: &mut Reader<'_>) -> Coded<MapPiece> {
    let span = get_span(r)?;
    let (read, write) = (r.bool("read")?, r.bool("write")?);
    let file = r.u16()?;
    if usize::from(file) >= FILES_MAX {
        return Err(bad("file", file));
    }
    let offset = r.u64()?;
    if Span::new(offset, span.len()).is_none() {
        return Err(bad("offset", offset));
    }
    let access = Access { read, write };
    Ok(MapPiece {
        span,
        access,
        file,
        offset,
    })
}

fn put_told(w: &mut Writer, told: &Told) -> Coded<()> {
    let (state, pid) = match told.state {
        SessionState::Closed => (0, 0),
        SessionState::Waiting => (1, 0),
        SessionState::Connected { pid } => (2, pid),
        SessionState::Undoing { pid } => (3, pid),
    };
    w.u8(state);
    w.u32(pid as u32);
    put_text(w, told.last_error.as_deref().unwrap_or_default())?;
    told.counters.iter().for_each(|counter| w.u64(*counter));
    w.count("signals", told.signals.len(), SIGNALS_MAX)?;
    told.signals.iter().for_each(|count| w.u64(*count));
    Ok(())
}

fn get_told(r: &mut Reader<'_>) -> Coded<Told> {
    let (state, pid) = (r.u8()?, r.u32()? as i32);
    let state = match state {
        0 => SessionState::Closed,
        1 => SessionState::Waiting,
        2 => SessionState::Connected { pid },
        3 => SessionState::Undoing { pid },
        other => return Err(bad("state", other)),
    };
    let last_error = Some(get_text(r)?).filter(|text| !text.is_empty());
    let mut counters = [0; 6];
    for counter in &mut counters {
        *counter = r.u64()?;
    }
    let count = r.count("signals", SIGNALS_MAX)?;
    let signals = (0..count).map(|_| r.u64()).collect::<Result<_, _>>()?;
    Ok(Told {
        state,
        last_error,
        counters,
        signals,
    })
}

fn put_answer(w: &mut Writer, result: &Result<Answered, CallError>) -> Coded<()> {
    match result {
        Ok(Answered::Done) => w.u8(0),
        Ok(Answered::Bytes(bytes)) => {
            w.u8(1);
            put_bytes(w, bytes, ACCESS_BYTES_MAX)?;
        }
        Ok(Answered::Unmapped(bytes)) => {
            w.u8(2);
            w.u64(*bytes);
        }
        Err(CallError::Gone(text)) => {
            w.u8(10);
            put_text(w, text)?;
        }
        // Of its lease's end, which no worker asks for.
        Err(CallError::Held) => {
            w.u8(10);
            put_text(w, &CallError::Held.to_string())?;
        }
        Err(CallError::Refused(refusal)) => {
            w.u8(11);
            w.u16(refusal.code.raw());
            w.u64(refusal.figure);
            put_text(w, &refusal.text)?;
        }
        Err(CallError::Overlap(span)) => {
            w.u8(12);
            put_span(w, *span);
        }
        Err(CallError::Bisect(span)) => {
            w.u8(15);
            put_span(w, *span);
        }
        Err(CallError::Align(span)) => {
            w.u8(16);
            put_span(w, *span);
        }
        Err(CallError::Timeout(ms)) => {
            w.u8(13);
            w.u64(*ms);
        }
        Err(CallError::Pin(text)) => {
            w.u8(14);
            put_text(w, text)?;
        }
    }
    Ok(())
}

fn get_answer(r: &mut Reader<'_>) -> Coded<Result<Answered, CallError>> {
    Ok(match r.u8()? {
        0 => Ok(Answered::Done),
        1 => Ok(Answered::Bytes(get_bytes(r, ACCESS_BYTES_MAX)?)),
        2 => Ok(Answered::Unmapped(r.u64()?)),
        10 => Err(CallError::Gone(get_text(r)?)),
        11 => {
            let raw = r.u16()?;
            let code = RefusalCode::from_raw(raw).ok_or_else(|| bad("refusal", raw))?;
            let (figure, text) = (r.u64()?, get_text(r)?);
            Err(CallError::Refused(Refusal { code, figure, text }))
        }
        12 => Err(CallError::Overlap(get_span(r)?)),
        13 => Err(CallError::Timeout(r.u64()?)),
        14 => Err(CallError::Pin(get_text(r)?)),
        15 => Err(CallError::Bisect(get_span(r)?)),
        16 => Err(CallError::Align(get_span(r)?)),
        other => return Err(bad("answer", other)),
    })
}

fn put_ids(w: &mut Writer, ids: &FunctionIds) {
    w.u16(ids.vendor);
    w.u16(ids.device);
    w.u16(ids.subsystem_vendor);
    w.u16(ids.subsystem_device);
    w.u32(ids.class);
    w.u8(ids.revision);
}

fn get_ids(r: &mut Reader<'_>) -> Coded<FunctionIds> {
    Ok(FunctionIds {
        vendor: r.u16()?,
        device: r.u16()?,
        subsystem_vendor: r.u16()?,
        subsystem_device: r.u16()?,
        class: r.u32()?,
        revision: r.u8()?,
    })
}

fn put_start(w: &mut Writer, start: &Start) -> Coded<()> {
    w.u64(start.lease);
    put_text(w, &start.path)?;
    w.bool(start.mapped);
    w.bool(start.memory_check);
    put_peers(w, &start.vmm_uids)?;
    put_peers(w, &start.vmm_gids)?;
    w.u32(start.maps_max);
    w.u64(start.bytes_max);
    w.bool(start.window.is_some());
    w.u64(start.window.unwrap_or_default());
    Ok(())
}

fn get_start(r: &mut Reader<'_>) -> Coded<Start> {
    Ok(Start {
        lease: r.u64()?,
        path: get_text(r)?,
        mapped: r.bool("mapped")?,
        memory_check: r.bool("memory check")?,
        vmm_uids: get_peers(r)?,
        vmm_gids: get_peers(r)?,
        maps_max: r.u32()?,
        bytes_max: r.u64()?,
        window: match (r.bool("window")?, r.u64()?) {
            (true, offset) => Some(offset),
            (false, _) => None,
        },
    })
}

fn put_peers(w: &mut Writer, peers: &[u32]) -> Coded<()> {
    w.count("peers", peers.len(), PEERS_MAX)?;
    peers.iter().for_each(|id| w.u32(*id));
    Ok(())
}

fn get_peers(r: &mut Reader<'_>) -> Coded<Vec<u32>> {
    let count = r.count("peers", PEERS_MAX)?;
    (0..count).map(|_| Ok(r.u32()?)).collect()
}

/// How many descriptors go with a start: listener, table, grip, and the window's.
fn start_fds(start: &Start) -> usize {
    3 + usize::from(start.window.is_some())
}

pub(crate) fn check_fds(came: usize, takes: usize) -> Coded<()> {
    match came == takes {
        true => Ok(()),
        false => Err(MessageError::Fds { came, takes }),
    }
}

fn get_map(r: &mut Reader<'_>, files: Vec<OwnedFd>) -> Coded<MapPart> {
    let last = r.bool("last")?;
    let takes = usize::from(r.u16()?);
    check_fds(files.len(), takes)?;
    let count = r.count("pieces", PIECES_MAX)?;
    Ok(MapPart {
        last,
        pieces: (0..count).map(|_| get_piece(r)).collect::<Coded<_>>()?,
        files,
    })
}

pub(crate) fn put_check(w: &mut Writer, check: &Check) -> Coded<()> {
    w.u32(check.pid as u32);
    w.count("ranges", check.ranges.len(), PIECES_MAX)?;
    for (device, inode, span) in &check.ranges {
        w.u64(*device);
        w.u64(*inode);
        put_span(w, *span);
    }
    Ok(())
}

pub(crate) fn get_check(r: &mut Reader<'_>) -> Coded<Check> {
    let pid = r.u32()? as i32;
    let count = r.count("ranges", PIECES_MAX)?;
    let mut range = || Ok((r.u64()?, r.u64()?, get_span(r)?));
    let ranges = (0..count).map(|_| range()).collect::<Coded<_>>()?;
    Ok(Check { pid, ranges })
}

fn get_forward(r: &mut Reader<'_>, rest: &[u8]) -> Coded<ToPort> {
    let op = r.u16()?;
    // Behind kind and op.
    let payload = rest.get(2..).unwrap_or_default();
    r.raw(payload.len())?;
    match Message::decode(op, payload)? {
        Message::Request(id, request) if is_for_workers(&request) => {
            Ok(ToPort::Forward(Token(id.0), request.of(LeaseId(0))))
        }
        _ => Err(MessageError::NotForWorkers(op)),
    }
}

impl ToPort {
    /// The descriptors that go along.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Map(_, part) => part.files.iter().map(AsFd::as_fd).collect(),
            Self::Holder(_, _, process) => vec![process.as_fd()],
            _ => Vec::new(),
        }
    }

    fn put(&self, w: &mut Writer) -> Coded<()> {
        match self {
            Self::Ready(report) => {
                w.u16(kind::READY);
                w.bool(report.landlock);
                w.bool(report.seccomp);
                put_text(w, &report.namespaces.join(" "))?;
            }
            Self::Forward(token, request) => {
                // Whose lease it is follows from the socket that it comes on.
                let request = request.clone().of(LeaseId(0));
                let (op, payload) = Message::Request(OpId(token.0), request).encode()?;
                w.u16(kind::FORWARD);
                w.u16(op);
                w.raw(&payload);
            }
            Self::Map(token, part) => {
                w.u16(kind::MAP);
                w.u64(token.0);
                w.bool(part.last);
                w.count("files", part.files.len(), super::FDS_MAX)?;
                w.count("pieces", part.pieces.len(), PIECES_MAX)?;
                part.pieces.iter().for_each(|piece| put_piece(w, piece));
            }
            Self::Unmap(token, span) => {
                w.u16(kind::UNMAP);
                w.u64(token.0);
                put_span(w, *span);
            }
            Self::Load(token, bar, offset, len) => {
                w.u16(kind::LOAD);
                w.u64(token.0);
                w.u8(*bar);
                w.u64(*offset);
                w.u8(width(usize::from(*len))? as u8);
            }
            Self::Store(bar, offset, data) => {
                w.u16(kind::STORE);
                w.u8(*bar);
                w.u64(*offset);
                width(data.len())?;
                put_bytes(w, data, ACCESS_BYTES_MAX)?;
            }
            Self::Check(token, check) => {
                w.u16(kind::CHECK);
                w.u64(token.0);
                put_check(w, check)?;
            }
            Self::Holder(token, pid, _) => {
                w.u16(kind::HOLDER);
                w.u64(token.0);
                w.u32(*pid as u32);
            }
            Self::Told(token, told) => {
                w.u16(kind::TOLD);
                w.u64(token.0);
                put_told(w, told)?;
            }
            Self::Failed(text) => {
                w.u16(kind::FAILED);
                put_text(w, text)?;
            }
        }
        Ok(())
    }

    /// Its bytes.
    pub fn encode(&self) -> Coded<Vec<u8>> {
        let mut w = Writer::new();
        self.put(&mut w)?;
        Ok(w.finish()?)
    }

    /// From a datagram. Whatever does not belong to it is an error, and its descriptors are closed.
    pub fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Coded<Self> {
        let mut r = Reader::new(bytes);
        let kind = r.u16()?;
        match kind {
            kind::MAP => {}
            kind::HOLDER => check_fds(fds.len(), 1)?,
            _ => check_fds(fds.len(), 0)?,
        }
        let message = match kind {
            kind::READY => Self::Ready(Report {
                landlock: r.bool("landlock")?,
                seccomp: r.bool("seccomp")?,
                namespaces: get_text(&mut r)?
                    .split_whitespace()
                    .map(str::to_owned)
                    .collect(),
            }),
            kind::FORWARD => get_forward(&mut r, &bytes[2..])?,
            kind::MAP => Self::Map(Token(r.u64()?), get_map(&mut r, fds)?),
            kind::UNMAP => Self::Unmap(Token(r.u64()?), get_span(&mut r)?),
            kind::LOAD => {
                let (token, bar, offset, len) = (r.u64()?, r.u8()?, r.u64()?, r.u8()?);
                width(usize::from(len))?;
                Self::Load(Token(token), bar, offset, len)
            }
            kind::STORE => {
                let (bar, offset) = (r.u8()?, r.u64()?);
                let data = get_bytes(&mut r, ACCESS_BYTES_MAX)?;
                width(data.len())?;
                Self::Store(bar, offset, data)
            }
            kind::CHECK => Self::Check(Token(r.u64()?), get_check(&mut r)?),
            kind::HOLDER => {
                let (token, pid) = (Token(r.u64()?), r.u32()? as i32);
                let process = fds.into_iter().next();
                let process = process.ok_or(MessageError::Fds { came: 0, takes: 1 })?;
                Self::Holder(token, pid, process)
            }
            kind::TOLD => Self::Told(Token(r.u64()?), get_told(&mut r)?),
            kind::FAILED => Self::Failed(get_text(&mut r)?),
            other => return Err(bad("kind", other)),
        };
        r.finish()?;
        Ok(message)
    }
}

impl ToWorker {
    /// The descriptors that go along.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Start(_, fds) => fds.iter().map(AsFd::as_fd).collect(),
            _ => Vec::new(),
        }
    }

    fn put(&self, w: &mut Writer) -> Coded<()> {
        match self {
            Self::Function(ids, function) => {
                let reply = Ok(Reply::Opened(function.as_ref().clone()));
                let (_, payload) = Message::Reply(OpId(0), OPEN, reply).encode()?;
                w.u16(kind::FUNCTION);
                put_ids(w, ids);
                w.raw(&payload);
            }
            Self::Config(bytes) => {
                w.u16(kind::CONFIG);
                put_bytes(w, bytes, CONFIG_BYTES_MAX)?;
            }
            Self::Start(start, fds) => {
                check_fds(fds.len(), start_fds(start))?;
                w.u16(kind::START);
                put_start(w, start)?;
            }
            Self::Answer(token, result) => {
                w.u16(kind::ANSWER);
                w.u64(token.0);
                put_answer(w, result)?;
            }
            Self::Tell(token, first) => {
                w.u16(kind::TELL);
                w.u64(token.0);
                w.u32(*first);
            }
            Self::Lost(text) => {
                w.u16(kind::LOST);
                put_text(w, text)?;
            }
            Self::Raised => w.u16(kind::RAISED),
        }
        Ok(())
    }

    /// Its bytes.
    pub fn encode(&self) -> Coded<Vec<u8>> {
        let mut w = Writer::new();
        self.put(&mut w)?;
        Ok(w.finish()?)
    }

    /// From a datagram.
    pub fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Coded<Self> {
        let mut r = Reader::new(bytes);
        let kind = r.u16()?;
        if kind != kind::START {
            check_fds(fds.len(), 0)?;
        }
        let message = match kind {
            kind::FUNCTION => {
                let ids = get_ids(&mut r)?;
                // Behind kind and ids.
                let payload = bytes.get(2 + 13..).unwrap_or_default();
                r.raw(payload.len())?;
                match Message::decode(OPEN | vfio_shim::path::wire::OP_REPLY, payload)? {
                    Message::Reply(_, _, Ok(Reply::Opened(function))) => {
                        Self::Function(ids, Box::new(function))
                    }
                    _ => return Err(bad("kind", kind)),
                }
            }
            kind::CONFIG => Self::Config(get_bytes(&mut r, CONFIG_BYTES_MAX)?),
            kind::START => {
                let start = get_start(&mut r)?;
                check_fds(fds.len(), start_fds(&start))?;
                Self::Start(start, fds)
            }
            kind::ANSWER => Self::Answer(Token(r.u64()?), get_answer(&mut r)?),
            kind::TELL => Self::Tell(Token(r.u64()?), r.u32()?),
            kind::LOST => Self::Lost(get_text(&mut r)?),
            kind::RAISED => Self::Raised,
            other => return Err(bad("kind", other)),
        };
        r.finish()?;
        Ok(message)
    }
}
