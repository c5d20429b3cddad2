//! What the model answers to each request of a client.

use std::os::fd::OwnedFd;
use std::time::Instant;

use serde_json::json;

use crate::config_space::{MSIX_PBA, MSIX_TABLE, VECTORS};
use crate::dma_table::FLAG_UNMAP_ALL;
use crate::egress::Access;
use crate::half::Side;
use crate::model::Model;
use crate::msix::MSIX_INDEX;
use crate::registers::{PEER_SPAD, SPAD_BANK_BYTES};
use crate::stream::{Message, StreamError};
use crate::wire::{
    DMA_MAPS_MAX, Header, MESSAGE_FDS_MAX, REGION_PREFIX_BYTES, Request, TRANSFER_BYTES_MAX,
    WireError, decode,
};

const REGIONS: u32 = 9;
const REGION_CONFIG: u32 = 7;
const REGION_READ_WRITE: u32 = 3;
const IRQS: u32 = 5;
const IRQ_EVENTFD: u32 = 1;
const DEVICE_RESETS: u32 = 1;
const DEVICE_PCI: u32 = 2;

impl Model {
    pub(crate) fn request(
        &mut self,
        side: Side,
        message: Message,
        now: Instant,
    ) -> Result<(), StreamError> {
        let Message { header, body, fds } = message;
        let request = decode(&header, &body, fds.len())?;
        let first = matches!(request, Request::Version { .. });
        if first == self.half(side).negotiated {
            return Err(WireError::Order {
                command: header.command,
            }
            .into());
        }
        match request {
            Request::Version { major } => return self.version(side, &header, major, now),
            Request::DmaMap {
                flags,
                offset,
                iova,
                size,
            } => {
                let file = fds.into_iter().next().map(|fd| (fd, offset));
                let result = self.half_mut(side).dma.map(iova, size, flags, file);
                let result = result.map_err(|error| {
                    eprintln!("half {side:?}: {error}");
                    error.errno()
                });
                self.reply(side, &header, result.map(|()| vec![]), now);
            }
            Request::DmaUnmap { flags, iova, size } => {
                let dma = &mut self.half_mut(side).dma;
                let bytes = if flags & FLAG_UNMAP_ALL != 0 {
                    dma.unmap_all()
                } else {
                    dma.unmap(iova, size)
                };
                let mut echo = body[..24].to_vec();
                echo[16..24].copy_from_slice(&bytes.to_le_bytes());
                self.reply(side, &header, Ok(echo), now);
            }
            Request::GetInfo => {
                let resets = if self.no_reset { 0 } else { DEVICE_RESETS };
                let body = words(&[16, DEVICE_PCI | resets, REGIONS, IRQS]);
                self.reply(side, &header, Ok(body), now);
            }
            Request::GetRegionInfo { index } => self.region_info(side, &header, index, now),
            Request::GetIrqInfo { index } => {
                let count = if index == MSIX_INDEX {
                    VECTORS as u32
                } else {
                    0
                };
                let flags = if count > 0 { IRQ_EVENTFD } else { 0 };
                let body = words(&[16, flags, index, count]);
                self.reply(
                    side,
                    &header,
                    if index < IRQS {
                        Ok(body)
                    } else {
                        Err(libc::EINVAL)
                    },
                    now,
                );
            }
            Request::SetIrqs {
                flags,
                index,
                start,
                count,
                data,
            } => {
                self.set_irqs(
                    side,
                    &header,
                    (flags, index),
                    (start, count),
                    (data, fds),
                    now,
                );
            }
            Request::RegionRead {
                offset,
                region,
                count,
            } => {
                self.region_read(
                    side,
                    &header,
                    prefix_of(&body),
                    (region, offset, count),
                    now,
                );
            }
            Request::RegionWrite {
                offset,
                region,
                data,
            } => {
                let result = self.region_write(side, (region, offset), data, now);
                let result = result.map(|()| prefix_of(&body).to_vec());
                self.reply(side, &header, result, now);
            }
            Request::Reset => {
                if !self.no_reset {
                    self.half_mut(side).reset();
                    self.update_link(now);
                }
                self.reply(side, &header, Ok(vec![]), now);
            }
            Request::Unknown => self.reply(side, &header, Err(libc::ENOTSUP), now),
        }
        Ok(())
    }

    /// Answers a request whose client waits.
    fn reply(&mut self, side: Side, request: &Header, body: Result<Vec<u8>, i32>, now: Instant) {
        if !request.wants_reply() {
            return;
        }
        match body {
            Ok(body) => self.send(side, &request.reply(body.len()), &[&body], now),
            Err(errno) => self.send(side, &request.refusal(errno), &[], now),
        }
    }

    fn version(
        &mut self,
        side: Side,
        header: &Header,
        major: u16,
        now: Instant,
    ) -> Result<(), StreamError> {
        if major != 0 {
            return Err(WireError::Version { major }.into());
        }
        self.half_mut(side).negotiated = true;
        let capabilities = json!({ "capabilities": {
            "max_msg_fds": MESSAGE_FDS_MAX,
            "max_data_xfer_size": TRANSFER_BYTES_MAX,
            "max_dma_maps": DMA_MAPS_MAX,
            "pgsizes": 4096,
        }});
        // 0.0: QEMU refuses any higher minor number.
        let mut body = vec![0; 4];
        body.extend_from_slice(capabilities.to_string().as_bytes());
        body.push(0);
        self.reply(side, header, Ok(body), now);
        Ok(())
    }

    fn region_info(&mut self, side: Side, header: &Header, index: u32, now: Instant) {
        if index >= REGIONS {
            return self.reply(side, header, Err(libc::EINVAL), now);
        }
        let bytes = self.half(side).config.region_bytes(index);
        let flags = if bytes > 0 { REGION_READ_WRITE } else { 0 };
        let mut body = words(&[32, flags, index, 0]);
        body.extend_from_slice(&bytes.to_le_bytes());
        body.extend_from_slice(&(u64::from(index) << 40).to_le_bytes());
        self.reply(side, header, Ok(body), now);
    }

    fn set_irqs(
        &mut self,
        side: Side,
        header: &Header,
        what: (u32, u32),
        vectors: (u32, u32),
        (data, fds): (&[u8], Vec<OwnedFd>),
        now: Instant,
    ) {
        let half = self.half_mut(side);
        let result = match half.vectors.set(what, vectors, data, fds) {
            Ok(signalled) => {
                half.counters.msis += signalled;
                Ok(vec![])
            }
            Err(error) => {
                eprintln!("half {side:?}: {error}");
                Err(libc::EINVAL)
            }
        };
        self.reply(side, header, result, now);
    }

    fn region_read(
        &mut self,
        side: Side,
        header: &Header,
        prefix: [u8; REGION_PREFIX_BYTES],
        (region, offset, count): (u32, u64, usize),
        now: Instant,
    ) {
        let request = *header;
        let result = match (region, self.window(side, region, offset, count)) {
            (_, Some(window)) => {
                let access = Access::WindowRead {
                    request,
                    prefix,
                    window,
                    offset,
                    count,
                };
                return self.enqueue(side, access, now);
            }
            (0, None) => match register_access(offset, count) {
                Some((at, bytes)) => match peer_spad(at) {
                    Some(offset) => {
                        let access = Access::SpadRead {
                            request,
                            prefix,
                            offset,
                            count: bytes,
                        };
                        return self.enqueue(side, access, now);
                    }
                    None => Ok(self.bar0_read(side, at, bytes).to_le_bytes()[..count].to_vec()),
                },
                None => Err(libc::EINVAL),
            },
            (REGION_CONFIG, None) => {
                let bytes = self.half(side).config.read(offset, count);
                bytes.map(<[u8]>::to_vec).ok_or(libc::EINVAL)
            }
            _ => Err(libc::EINVAL),
        };
        let body = result.map(|data| [&prefix[..], &data].concat());
        self.reply(side, header, body, now);
    }

    fn region_write(
        &mut self,
        side: Side,
        (region, offset): (u32, u64),
        data: &[u8],
        now: Instant,
    ) -> Result<(), i32> {
        if let Some(window) = self.window(side, region, offset, data.len()) {
            let access = Access::WindowWrite {
                window,
                offset,
                data: data.to_vec(),
            };
            self.enqueue(side, access, now);
            return Ok(());
        }
        match region {
            0 => {
                let access = register_access(offset, data.len());
                let (at, bytes) = access.ok_or(libc::EINVAL)?;
                let value = data
                    .iter()
                    .rev()
                    .fold(0, |value, byte| value << 8 | u64::from(*byte));
                self.bar0_write(side, at, bytes, value, now);
                Ok(())
            }
            REGION_CONFIG => {
                let written = self.half_mut(side).config.write(offset, data);
                written.ok_or(libc::EINVAL)
            }
            _ => Err(libc::EINVAL),
        }
    }

    /// The window that a region access lies in.
    fn window(&self, side: Side, region: u32, offset: u64, count: usize) -> Option<usize> {
        let window = match region {
            2 => 0,
            4 => 1,
            _ => return None,
        };
        let end = offset.checked_add(count as u64)?;
        (end <= self.half(side).config.region_bytes(region)).then_some(window)
    }

    fn bar0_read(&self, side: Side, at: u16, bytes: u16) -> u64 {
        let half = self.half(side);
        if let Some(range) = table_range(at, bytes) {
            let stored = &half.msix_table[range];
            return stored
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte));
        }
        if (MSIX_PBA..MSIX_PBA + 8).contains(&at) {
            return half.vectors.pending() >> (8 * (at - MSIX_PBA));
        }
        half.registers.read(at, bytes)
    }

    fn bar0_write(&mut self, side: Side, at: u16, bytes: u16, value: u64, now: Instant) {
        if let Some(offset) = peer_spad(at) {
            let access = Access::SpadWrite {
                offset,
                count: bytes,
                value,
            };
            return self.enqueue(side, access, now);
        }
        let half = self.half_mut(side);
        if let Some(range) = table_range(at, bytes) {
            half.msix_table[range].copy_from_slice(&value.to_le_bytes()[..usize::from(bytes)]);
            return;
        }
        let effects = half.write_register(at, bytes, value);
        if effects.ring != 0 {
            self.enqueue(
                side,
                Access::Ring {
                    doorbells: effects.ring,
                },
                now,
            );
        }
        if effects.link_inputs {
            self.update_link(now);
        }
    }
}

/// Registers take naturally aligned accesses of 1, 2, 4 or 8 bytes.
fn register_access(offset: u64, count: usize) -> Option<(u16, u16)> {
    let at = u16::try_from(offset).ok()?;
    let bytes = u16::try_from(count)
        .ok()
        .filter(|bytes| matches!(bytes, 1 | 2 | 4 | 8))?;
    (at % bytes == 0).then_some((at, bytes))
}

fn peer_spad(at: u16) -> Option<u16> {
    at.checked_sub(PEER_SPAD)
        .filter(|offset| *offset < SPAD_BANK_BYTES)
}

fn table_range(at: u16, bytes: u16) -> Option<std::ops::Range<usize>> {
    let start = usize::from(at.checked_sub(MSIX_TABLE)?);
    let end = start + usize::from(bytes);
    (end <= 16 * VECTORS).then_some(start..end)
}

/// The offset, region and count of a region access, as its answer repeats them.
fn prefix_of(body: &[u8]) -> [u8; REGION_PREFIX_BYTES] {
    body.first_chunk().copied().unwrap_or_default()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
