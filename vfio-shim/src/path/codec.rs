//! Messages as bytes: op and payload of PROTOCOL.md's table, total on any bytes, bounded both ways.

use super::message::{
    ACCESS_BYTES_MAX, AREAS_MAX, CONFIG_BYTES_MAX, LIST_MAX, LeaseId, MapRange, Message, OpId,
    PoolEntry, PoolState, RANGES_MAX, Refusal, RefusalCode, RemoteFunction, RemoteRegion, Reply,
    Request, Secret, clean_text,
};
use super::wire::{OP_REPLY, Reader, WireError, Writer};
use crate::model::{Access, Bdf, FunctionIds, IrqIndex, RegionInfo, Span, WindowOffset};

mod op {
    pub const HELLO: u16 = 1;
    pub const LIST: u16 = 2;
    pub const BORROW: u16 = 3;
    pub const RETURN: u16 = 4;
    pub const OPEN: u16 = 5;
    pub const CONFIG: u16 = 6;
    pub const MAP: u16 = 7;
    pub const UNMAP: u16 = 8;
    pub const IRQS: u16 = 9;
    pub const MASK: u16 = 10;
    pub const BUS_MASTER: u16 = 11;
    pub const RESET: u16 = 12;
    pub const REGION_READ: u16 = 13;
    pub const REGION_WRITE: u16 = 14;
    // 15 is not assigned.
    pub const REVOKED: u16 = 16;
}

/// On the wire: this region has no slice.
const NO_SLICE: u64 = u64::MAX;
const ACCESS_READ: u8 = 1;
const ACCESS_WRITE: u8 = 2;

type Encoded = Result<(), WireError>;

fn bad(field: &'static str, value: impl Into<u64>) -> WireError {
    WireError::Field {
        field,
        value: value.into(),
    }
}

fn width_is_sound(len: usize) -> bool {
    len <= ACCESS_BYTES_MAX && len.is_power_of_two()
}

fn put_bdf(w: &mut Writer, bdf: Bdf) {
    w.u32(u32::from(bdf.domain()) << 16 | u32::from(bdf.routing_id()));
}

fn get_bdf(r: &mut Reader<'_>) -> Result<Bdf, WireError> {
    let raw = r.u32()?;
    Ok(Bdf::from_routing_id((raw >> 16) as u16, raw as u16))
}

fn put_span(w: &mut Writer, span: Span) {
    w.u64(span.start());
    w.u64(span.len());
}

fn get_span(r: &mut Reader<'_>) -> Result<Span, WireError> {
    let (start, len) = (r.u64()?, r.u64()?);
    Span::new(start, len).ok_or_else(|| bad("span", start))
}

fn get_lease(r: &mut Reader<'_>) -> Result<LeaseId, WireError> {
    r.u64().map(LeaseId)
}

fn get_index(r: &mut Reader<'_>) -> Result<IrqIndex, WireError> {
    let raw = r.u8()?;
    IrqIndex::from_raw(raw.into()).ok_or_else(|| bad("irq index", raw))
}

fn put_bytes(w: &mut Writer, bytes: &[u8], max: usize) -> Encoded {
    w.count("bytes", bytes.len(), max)?;
    w.raw(bytes);
    Ok(())
}

fn get_bytes(r: &mut Reader<'_>, max: usize) -> Result<Vec<u8>, WireError> {
    let count = r.count("bytes", max)?;
    Ok(r.raw(count)?.to_vec())
}

fn put_range(w: &mut Writer, range: &MapRange) -> Encoded {
    put_span(w, range.span);
    w.u64(range.offset.0);
    let bits = match (range.access.read, range.access.write) {
        (false, false) => return Err(bad("access", 0u8)),
        (true, false) => ACCESS_READ,
        (false, true) => ACCESS_WRITE,
        (true, true) => ACCESS_READ | ACCESS_WRITE,
    };
    w.u8(bits);
    Ok(())
}

fn get_range(r: &mut Reader<'_>) -> Result<MapRange, WireError> {
    let span = get_span(r)?;
    let offset = WindowOffset(r.u64()?);
    let bits = r.u8()?;
    if bits == 0 || bits > ACCESS_READ | ACCESS_WRITE {
        return Err(bad("access", bits));
    }
    let access = Access {
        read: bits & ACCESS_READ != 0,
        write: bits & ACCESS_WRITE != 0,
    };
    Ok(MapRange {
        span,
        offset,
        access,
    })
}

fn put_entry(w: &mut Writer, entry: &PoolEntry) {
    put_bdf(w, entry.bdf);
    w.u16(entry.ids.vendor);
    w.u16(entry.ids.device);
    w.u16(entry.ids.subsystem_vendor);
    w.u16(entry.ids.subsystem_device);
    w.u32(entry.ids.class);
    w.u8(entry.ids.revision);
    w.u8(entry.state as u8);
    w.u32(entry.irq_count);
    w.u64(entry.bar_bytes);
    w.u64(entry.serial);
}

fn get_entry(r: &mut Reader<'_>) -> Result<PoolEntry, WireError> {
    let bdf = get_bdf(r)?;
    let ids = FunctionIds {
        vendor: r.u16()?,
        device: r.u16()?,
        subsystem_vendor: r.u16()?,
        subsystem_device: r.u16()?,
        class: r.u32()?,
        revision: r.u8()?,
    };
    let state = match r.u8()? {
        0 => PoolState::Available,
        1 => PoolState::InUse,
        2 => PoolState::Quarantine,
        other => return Err(bad("state", other)),
    };
    Ok(PoolEntry {
        bdf,
        ids,
        state,
        irq_count: r.u32()?,
        bar_bytes: r.u64()?,
        serial: r.u64()?,
    })
}

fn put_region(w: &mut Writer, region: &RemoteRegion) -> Encoded {
    let RegionInfo {
        size,
        readable,
        writable,
        areas,
    } = &region.info;
    w.u64(*size);
    w.u8((u8::from(*readable) * ACCESS_READ) | (u8::from(*writable) * ACCESS_WRITE));
    match region.slice {
        Some(WindowOffset(NO_SLICE)) => return Err(bad("slice", NO_SLICE)),
        Some(offset) => w.u64(offset.0),
        None => w.u64(NO_SLICE),
    }
    w.count("areas", areas.len(), AREAS_MAX)?;
    areas.iter().for_each(|area| put_span(w, *area));
    Ok(())
}

fn get_region(r: &mut Reader<'_>) -> Result<RemoteRegion, WireError> {
    let size = r.u64()?;
    let flags = r.u8()?;
    if flags > ACCESS_READ | ACCESS_WRITE {
        return Err(bad("region flags", flags));
    }
    let slice = Some(r.u64()?)
        .filter(|offset| *offset != NO_SLICE)
        .map(WindowOffset);
    let count = r.count("areas", AREAS_MAX)?;
    let info = RegionInfo {
        size,
        readable: flags & ACCESS_READ != 0,
        writable: flags & ACCESS_WRITE != 0,
        areas: (0..count).map(|_| get_span(r)).collect::<Result<_, _>>()?,
    };
    if !info.areas_are_sound() {
        return Err(bad("areas", size));
    }
    Ok(RemoteRegion { info, slice })
}

fn put_function(w: &mut Writer, function: &RemoteFunction) -> Encoded {
    w.u16(function.config_len);
    for region in &function.regions {
        put_region(w, region)?;
    }
    function.irqs.iter().for_each(|irq| w.u32(irq.count));
    Ok(())
}

fn get_function(r: &mut Reader<'_>) -> Result<RemoteFunction, WireError> {
    let mut function = RemoteFunction {
        config_len: r.u16()?,
        ..RemoteFunction::default()
    };
    for region in &mut function.regions {
        *region = get_region(r)?;
    }
    for irq in &mut function.irqs {
        irq.count = r.u32()?;
    }
    Ok(function)
}

fn put_lists(w: &mut Writer, request: &Request) -> Encoded {
    match request {
        Request::Map { ranges, .. } => {
            w.count("ranges", ranges.len(), RANGES_MAX)?;
            ranges.iter().try_for_each(|range| put_range(w, range))?;
        }
        Request::Unmap { spans, .. } => {
            w.count("spans", spans.len(), RANGES_MAX)?;
            spans.iter().for_each(|span| put_span(w, *span));
        }
        Request::RegionWrite {
            region,
            offset,
            data,
            ..
        } => {
            w.u8(*region);
            w.u64(*offset);
            if !width_is_sound(data.len()) {
                return Err(bad("length", data.len() as u64));
            }
            put_bytes(w, data, ACCESS_BYTES_MAX)?;
        }
        Request::Revoked { text, .. } => w.text(&clean_text(text))?,
        _ => {}
    }
    Ok(())
}

impl Request {
    /// `hello`, whose reply a port makes itself.
    pub const HELLO: u16 = op::HELLO;
    /// `revoked`, whose reply a port makes itself.
    pub const REVOKED: u16 = op::REVOKED;

    /// The op of PROTOCOL.md's table.
    pub fn op(&self) -> u16 {
        match self {
            Self::Hello { .. } => op::HELLO,
            Self::List { .. } => op::LIST,
            Self::Borrow { .. } => op::BORROW,
            Self::Return { .. } => op::RETURN,
            Self::Open { .. } => op::OPEN,
            Self::Config { .. } => op::CONFIG,
            Self::Map { .. } => op::MAP,
            Self::Unmap { .. } => op::UNMAP,
            Self::Irqs { .. } => op::IRQS,
            Self::Mask { .. } => op::MASK,
            Self::BusMaster { .. } => op::BUS_MASTER,
            Self::Reset { .. } => op::RESET,
            Self::RegionRead { .. } => op::REGION_READ,
            Self::RegionWrite { .. } => op::REGION_WRITE,
            Self::Revoked { .. } => op::REVOKED,
        }
    }

    /// The lease that the request is about, if it is about one.
    pub fn lease(&self) -> Option<LeaseId> {
        match self {
            Self::Hello { .. } | Self::List { .. } | Self::Borrow { .. } => None,
            Self::Return { lease }
            | Self::Open { lease, .. }
            | Self::Config { lease, .. }
            | Self::Map { lease, .. }
            | Self::Unmap { lease, .. }
            | Self::Irqs { lease, .. }
            | Self::Mask { lease, .. }
            | Self::BusMaster { lease, .. }
            | Self::Reset { lease }
            | Self::RegionRead { lease, .. }
            | Self::RegionWrite { lease, .. }
            | Self::Revoked { lease, .. } => Some(*lease),
        }
    }

    fn put(&self, w: &mut Writer) -> Encoded {
        if let Some(lease) = self.lease() {
            w.u64(lease.0);
        }
        match self {
            Self::Hello { node, window_bytes } => {
                w.u16(*node);
                w.u64(*window_bytes);
            }
            Self::List { cursor } => w.u32(*cursor),
            Self::Borrow { bdf } => put_bdf(w, *bdf),
            Self::Open {
                secret,
                irq_first,
                irq_count,
                ..
            } => {
                w.raw(&secret.0);
                w.u32(*irq_first);
                w.u32(*irq_count);
            }
            Self::Config { offset, len, .. } => {
                if usize::from(*len) > CONFIG_BYTES_MAX {
                    return Err(bad("length", *len));
                }
                w.u16(*offset);
                w.u16(*len);
            }
            Self::Irqs { index, enable, .. } => {
                w.u8(*index as u8);
                w.bool(*enable);
            }
            Self::Mask {
                index,
                start,
                count,
                masked,
                ..
            } => {
                w.u8(*index as u8);
                w.u32(*start);
                w.u32(*count);
                w.bool(*masked);
            }
            Self::BusMaster { enable, .. } => w.bool(*enable),
            Self::RegionRead {
                region,
                offset,
                len,
                ..
            } => {
                if !width_is_sound(usize::from(*len)) {
                    return Err(bad("length", *len));
                }
                w.u8(*region);
                w.u64(*offset);
                w.u8(*len);
            }
            _ => put_lists(w, self)?,
        }
        Ok(())
    }

    fn get_lists(op: u16, lease: LeaseId, r: &mut Reader<'_>) -> Result<Option<Self>, WireError> {
        Ok(Some(match op {
            op::MAP => {
                let count = r.count("ranges", RANGES_MAX)?;
                let ranges = (0..count).map(|_| get_range(r)).collect::<Result<_, _>>()?;
                Self::Map { lease, ranges }
            }
            op::UNMAP => {
                let count = r.count("spans", RANGES_MAX)?;
                let spans = (0..count).map(|_| get_span(r)).collect::<Result<_, _>>()?;
                Self::Unmap { lease, spans }
            }
            op::REGION_READ => {
                let (region, offset, len) = (r.u8()?, r.u64()?, r.u8()?);
                if !width_is_sound(usize::from(len)) {
                    return Err(bad("length", len));
                }
                Self::RegionRead {
                    lease,
                    region,
                    offset,
                    len,
                }
            }
            op::REGION_WRITE => {
                let (region, offset) = (r.u8()?, r.u64()?);
                let data = get_bytes(r, ACCESS_BYTES_MAX)?;
                if !width_is_sound(data.len()) {
                    return Err(bad("length", data.len() as u64));
                }
                Self::RegionWrite {
                    lease,
                    region,
                    offset,
                    data,
                }
            }
            op::REVOKED => Self::Revoked {
                lease,
                text: clean_text(r.text()?),
            },
            _ => return Ok(None),
        }))
    }

    fn get_of_lease(op: u16, r: &mut Reader<'_>) -> Result<Self, WireError> {
        let lease = get_lease(r)?;
        if let Some(request) = Self::get_lists(op, lease, r)? {
            return Ok(request);
        }
        Ok(match op {
            op::RETURN => Self::Return { lease },
            op::OPEN => Self::Open {
                lease,
                secret: Secret(r.array()?),
                irq_first: r.u32()?,
                irq_count: r.u32()?,
            },
            op::CONFIG => {
                let (offset, len) = (r.u16()?, r.u16()?);
                if usize::from(len) > CONFIG_BYTES_MAX {
                    return Err(bad("length", len));
                }
                Self::Config { lease, offset, len }
            }
            op::IRQS => Self::Irqs {
                lease,
                index: get_index(r)?,
                enable: r.bool("enable")?,
            },
            op::MASK => Self::Mask {
                lease,
                index: get_index(r)?,
                start: r.u32()?,
                count: r.u32()?,
                masked: r.bool("masked")?,
            },
            op::BUS_MASTER => Self::BusMaster {
                lease,
                enable: r.bool("enable")?,
            },
            op::RESET => Self::Reset { lease },
            _ => return Err(bad("op", op)),
        })
    }

    fn get(op: u16, id: OpId, r: &mut Reader<'_>) -> Result<Self, WireError> {
        match op {
            op::HELLO => Ok(Self::Hello {
                node: r.u16()?,
                window_bytes: r.u64()?,
            }),
            op::LIST => Ok(Self::List { cursor: r.u32()? }),
            op::BORROW => Ok(Self::Borrow { bdf: get_bdf(r)? }),
            op::RETURN..=op::REGION_WRITE | op::REVOKED => Self::get_of_lease(op, r),
            _ => Err(WireError::UnknownOp { id: id.0, op }),
        }
    }
}

impl Reply {
    fn put(&self, op: u16, w: &mut Writer) -> Encoded {
        match (op, self) {
            (op::HELLO, Self::Hello { node, window_bytes }) => {
                w.u16(*node);
                w.u64(*window_bytes);
            }
            (op::LIST, Self::List { next, entries }) => {
                w.u32(*next);
                w.count("entries", entries.len(), LIST_MAX)?;
                entries.iter().for_each(|entry| put_entry(w, entry));
            }
            (
                op::BORROW,
                Self::Borrowed {
                    lease,
                    secret,
                    entry,
                },
            ) => {
                w.u64(lease.0);
                w.raw(&secret.0);
                put_entry(w, entry);
            }
            (op::OPEN, Self::Opened(function)) => put_function(w, function)?,
            (op::CONFIG, Self::Bytes(bytes)) => put_bytes(w, bytes, CONFIG_BYTES_MAX)?,
            (op::REGION_READ, Self::Bytes(bytes)) => put_bytes(w, bytes, ACCESS_BYTES_MAX)?,
            (op::HELLO | op::LIST | op::BORROW | op::OPEN | op::CONFIG | op::REGION_READ, _) => {
                return Err(WireError::ReplyKind(op));
            }
            (_, Self::Done) => {}
            _ => return Err(WireError::ReplyKind(op)),
        }
        Ok(())
    }

    fn get(op: u16, r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(match op {
            op::HELLO => Self::Hello {
                node: r.u16()?,
                window_bytes: r.u64()?,
            },
            op::LIST => {
                let next = r.u32()?;
                let count = r.count("entries", LIST_MAX)?;
                let entries = (0..count).map(|_| get_entry(r)).collect::<Result<_, _>>()?;
                Self::List { next, entries }
            }
            op::BORROW => Self::Borrowed {
                lease: get_lease(r)?,
                secret: Secret(r.array()?),
                entry: get_entry(r)?,
            },
            op::OPEN => Self::Opened(get_function(r)?),
            op::CONFIG => Self::Bytes(get_bytes(r, CONFIG_BYTES_MAX)?),
            op::REGION_READ => Self::Bytes(get_bytes(r, ACCESS_BYTES_MAX)?),
            op::RETURN..=op::REGION_WRITE | op::REVOKED => Self::Done,
            _ => return Err(bad("op of a reply", op)),
        })
    }
}

impl Refusal {
    fn put(&self, w: &mut Writer) -> Encoded {
        let raw = self.code.raw();
        if raw == 0 {
            return Err(bad("result", raw));
        }
        w.u16(raw);
        w.u64(self.figure);
        w.text(&clean_text(&self.text))
    }
}

impl Message {
    /// The op (with bit 15 in a reply) and the payload.
    pub fn encode(&self) -> Result<(u16, Vec<u8>), WireError> {
        let mut w = Writer::new();
        let op = match self {
            Self::Request(id, request) => {
                w.u64(id.0);
                request.put(&mut w)?;
                request.op()
            }
            Self::Reply(_, op, _) if op & OP_REPLY != 0 => return Err(bad("op", *op)),
            Self::Reply(id, op, Ok(reply)) => {
                w.u64(id.0);
                w.u16(0);
                reply.put(*op, &mut w)?;
                op | OP_REPLY
            }
            Self::Reply(id, op, Err(refusal)) => {
                w.u64(id.0);
                refusal.put(&mut w)?;
                op | OP_REPLY
            }
        };
        Ok((op, w.finish()?))
    }

    /// From op and payload. `WireError::UnknownOp` is to be answered with error 1; every other
    /// error is a violation of the protocol.
    pub fn decode(op: u16, payload: &[u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(payload);
        let id = OpId(r.u64()?);
        let message = if op & OP_REPLY == 0 {
            Self::Request(id, Request::get(op, id, &mut r)?)
        } else {
            let op = op & !OP_REPLY;
            let result = match RefusalCode::from_raw(r.u16()?) {
                None => Ok(Reply::get(op, &mut r)?),
                Some(code) => Err(Refusal {
                    code,
                    figure: r.u64()?,
                    text: clean_text(r.text()?),
                }),
            };
            Self::Reply(id, op, result)
        };
        r.finish()?;
        Ok(message)
    }
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
