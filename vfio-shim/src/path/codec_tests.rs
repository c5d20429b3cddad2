//! Codec tests: every message round trips, limits hold at MAX and MAX + 1, random bytes never panic.

use super::*;
use crate::model::IrqInfo;
use crate::path::wire::{PAYLOAD_BYTES_MAX, TEXT_BYTES_MAX};
use proptest::prelude::*;

fn span() -> impl Strategy<Value = Span> {
    (0..1u64 << 52, 0..1u64 << 40).prop_map(|(start, len)| Span::new(start, len).unwrap())
}

fn range() -> impl Strategy<Value = MapRange> {
    (span(), any::<u64>(), 1u8..4).prop_map(|(span, offset, bits)| MapRange {
        span,
        offset: WindowOffset(offset),
        access: Access {
            read: bits & 1 != 0,
            write: bits & 2 != 0,
        },
    })
}

fn bdf() -> impl Strategy<Value = Bdf> {
    any::<(u16, u16)>().prop_map(|(domain, id)| Bdf::from_routing_id(domain, id))
}

fn index() -> impl Strategy<Value = IrqIndex> {
    prop::sample::select(&IrqIndex::ALL[..])
}

fn width() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![1, 2, 4, 8])
}

fn request() -> impl Strategy<Value = Request> {
    let lease = || any::<u64>().prop_map(LeaseId);
    prop_oneof![
        any::<(u16, u64)>().prop_map(|(node, window_bytes)| Request::Hello { node, window_bytes }),
        any::<u32>().prop_map(|cursor| Request::List { cursor }),
        bdf().prop_map(|bdf| Request::Borrow { bdf }),
        lease().prop_map(|lease| Request::Return { lease }),
        (lease(), any::<([u8; 16], u32, u32)>()).prop_map(
            |(lease, (secret, irq_first, irq_count))| Request::Open {
                lease,
                secret: Secret(secret),
                irq_first,
                irq_count
            }
        ),
        (lease(), any::<u16>(), 0..=CONFIG_BYTES_MAX as u16)
            .prop_map(|(lease, offset, len)| Request::Config { lease, offset, len }),
        (lease(), prop::collection::vec(range(), 0..=RANGES_MAX))
            .prop_map(|(lease, ranges)| Request::Map { lease, ranges }),
        (lease(), prop::collection::vec(span(), 0..=RANGES_MAX))
            .prop_map(|(lease, spans)| Request::Unmap { lease, spans }),
        (lease(), index(), any::<bool>()).prop_map(|(lease, index, enable)| Request::Irqs {
            lease,
            index,
            enable
        }),
        (lease(), index(), any::<(u32, u32, bool)>()).prop_map(
            |(lease, index, (start, count, masked))| Request::Mask {
                lease,
                index,
                start,
                count,
                masked
            }
        ),
        (lease(), any::<bool>()).prop_map(|(lease, enable)| Request::BusMaster { lease, enable }),
        lease().prop_map(|lease| Request::Reset { lease }),
        (lease(), any::<(u8, u64)>(), width()).prop_map(|(lease, (region, offset), len)| {
            Request::RegionRead {
                lease,
                region,
                offset,
                len: len as u8,
            }
        }),
        (lease(), any::<(u8, u64, [u8; 8])>(), width()).prop_map(
            |(lease, (region, offset, data), len)| Request::RegionWrite {
                lease,
                region,
                offset,
                data: data[..len].to_vec()
            }
        ),
        (lease(), ".*").prop_map(|(lease, text)| Request::Revoked {
            lease,
            text: clean_text(&text)
        }),
    ]
}

fn entry() -> impl Strategy<Value = PoolEntry> {
    let state = prop::sample::select(vec![
        PoolState::Available,
        PoolState::InUse,
        PoolState::Quarantine,
    ]);
    (
        bdf(),
        state,
        any::<(u16, u16, u16, u16, u32, u8)>(),
        any::<(u32, u64, u64)>(),
    )
        .prop_map(
            |(bdf, state, ids, (irq_count, bar_bytes, serial))| PoolEntry {
                bdf,
                ids: FunctionIds {
                    vendor: ids.0,
                    device: ids.1,
                    subsystem_vendor: ids.2,
                    subsystem_device: ids.3,
                    class: ids.4,
                    revision: ids.5,
                },
                state,
                irq_count,
                bar_bytes,
                serial,
            },
        )
}

fn region() -> impl Strategy<Value = RemoteRegion> {
    (any::<(u64, bool, bool, Option<u32>)>(), 0..=AREAS_MAX).prop_map(
        |((size, readable, writable, slice), areas)| {
            let area = |i: usize| Span::new(i as u64 * 0x2000, 0x1000).unwrap();
            let areas: Vec<_> = (0..areas)
                .map(area)
                .filter(|area| area.end() <= size)
                .collect();
            RemoteRegion {
                info: RegionInfo {
                    size,
                    readable,
                    writable,
                    areas,
                },
                slice: slice.map(|at| WindowOffset(at.into())),
            }
        },
    )
}

fn function() -> impl Strategy<Value = RemoteFunction> {
    (
        any::<u16>(),
        prop::array::uniform9(region()),
        any::<[u32; 5]>(),
    )
        .prop_map(|(config_len, regions, irqs)| RemoteFunction {
            config_len,
            regions,
            irqs: irqs.map(|count| IrqInfo { count }),
        })
}

fn reply() -> impl Strategy<Value = (u16, Reply)> {
    prop_oneof![
        prop::sample::select(vec![
            op::RETURN,
            op::MAP,
            op::UNMAP,
            op::IRQS,
            op::MASK,
            op::BUS_MASTER,
            op::RESET,
            op::REGION_WRITE,
            op::REVOKED
        ])
        .prop_map(|op| (op, Reply::Done)),
        any::<(u16, u64)>()
            .prop_map(|(node, window_bytes)| (op::HELLO, Reply::Hello { node, window_bytes })),
        (any::<u32>(), prop::collection::vec(entry(), 0..=LIST_MAX))
            .prop_map(|(next, entries)| (op::LIST, Reply::List { next, entries })),
        (any::<(u64, [u8; 16])>(), entry()).prop_map(|((lease, secret), entry)| {
            let (lease, secret) = (LeaseId(lease), Secret(secret));
            (
                op::BORROW,
                Reply::Borrowed {
                    lease,
                    secret,
                    entry,
                },
            )
        }),
        function().prop_map(|function| (op::OPEN, Reply::Opened(function))),
        prop::collection::vec(any::<u8>(), 0..=CONFIG_BYTES_MAX)
            .prop_map(|bytes| (op::CONFIG, Reply::Bytes(bytes))),
        prop::collection::vec(any::<u8>(), 0..=ACCESS_BYTES_MAX)
            .prop_map(|bytes| (op::REGION_READ, Reply::Bytes(bytes))),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    let refused = (1..op::REVOKED, 1u16..99, any::<u64>(), ".*").prop_map(
        |(op, code, figure, text): (u16, u16, u64, String)| {
            let code = RefusalCode::from_raw(code).unwrap();
            (op, Err(Refusal::new(code, figure, text)))
        },
    );
    let done = reply().prop_map(|(op, reply)| (op, Ok(reply)));
    prop_oneof![
        (any::<u64>(), request()).prop_map(|(id, request)| Message::Request(OpId(id), request)),
        (any::<u64>(), prop_oneof![done, refused]).prop_map(|(id, (op, result))| Message::Reply(
            OpId(id),
            op,
            result
        )),
    ]
}

proptest! {
    #[test]
    fn every_message_survives_the_wire(message in message()) {
        let (op, payload) = message.encode().unwrap();
        prop_assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        prop_assert_eq!(Message::decode(op, &payload).unwrap(), message);
    }

    #[test]
    fn a_cut_or_lengthened_payload_is_an_error(message in message(), cut in any::<prop::sample::Index>()) {
        let (op, mut payload) = message.encode().unwrap();
        let at = cut.index(payload.len());
        prop_assert!(Message::decode(op, &payload[..at]).is_err());
        payload.push(0);
        prop_assert!(Message::decode(op, &payload).is_err());
    }

    #[test]
    fn random_bytes_never_panic(op in prop_oneof![0u16..20, 0x8000u16..0x8014, any::<u16>()], bytes in prop::collection::vec(any::<u8>(), 0..PAYLOAD_BYTES_MAX)) {
        let _ = Message::decode(op, &bytes);
    }

    #[test]
    fn a_damaged_message_never_panics(message in message(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let (op, mut payload) = message.encode().unwrap();
        let at = at.index(payload.len());
        payload[at] = byte;
        let _ = Message::decode(op, &payload);
    }
}

fn map_of(count: usize) -> Message {
    let range = MapRange {
        span: Span::new(0, 4096).unwrap(),
        offset: WindowOffset(0),
        access: Access::READ,
    };
    let ranges = vec![range; count];
    Message::Request(
        OpId(1),
        Request::Map {
            lease: LeaseId(1),
            ranges,
        },
    )
}

#[test]
fn lists_hold_max_entries_and_refuse_one_more_both_ways() {
    let (op, mut payload) = map_of(RANGES_MAX).encode().unwrap();
    assert!(Message::decode(op, &payload).is_ok());
    assert!(map_of(RANGES_MAX + 1).encode().is_err());
    payload[16] += 1;
    payload.extend_from_slice(&[1; 25]);
    let refused = Message::decode(op, &payload).unwrap_err();
    assert!(
        matches!(refused, WireError::TooMany { max, .. } if max == RANGES_MAX),
        "{refused}"
    );
}

#[test]
fn the_largest_function_fits_a_slot() {
    let areas = (0..AREAS_MAX as u64).map(|i| Span::new(i << 13, 4096).unwrap());
    let info = RegionInfo {
        size: 1 << 40,
        readable: true,
        writable: true,
        areas: areas.collect(),
    };
    let region = RemoteRegion { info, slice: None };
    let mut function = RemoteFunction {
        regions: std::array::from_fn(|_| region.clone()),
        ..RemoteFunction::default()
    };
    let reply = |function| Message::Reply(OpId(1), op::OPEN, Ok(Reply::Opened(function)));
    assert!(reply(function.clone()).encode().is_ok());
    let more = Span::new(1 << 30, 4096).unwrap();
    function.regions[0].info.areas.push(more);
    assert!(reply(function).encode().is_err());
}

#[test]
fn an_unknown_request_can_be_answered_and_an_unknown_reply_cannot() {
    let payload = 7u64.to_le_bytes();
    let unknown = Message::decode(999, &payload).unwrap_err();
    assert_eq!(unknown, WireError::UnknownOp { id: 7, op: 999 });
    let answer = Refusal::new(RefusalCode::UnknownOp, 999, unknown.to_string());
    let (op, payload) = Message::Reply(OpId(7), 999, Err(answer)).encode().unwrap();
    assert_eq!(op, 999 | OP_REPLY);
    assert!(Message::decode(op, &payload).is_ok(), "it is a refusal");
    let done = [&7u64.to_le_bytes()[..], &[0, 0]].concat();
    assert!(matches!(
        Message::decode(op, &done),
        Err(WireError::Field { .. })
    ));
}

#[test]
fn text_over_the_maximum_is_an_error_and_control_characters_are_replaced() {
    let revoked = |text: &[u8]| {
        let mut payload = [1u64.to_le_bytes(), 2u64.to_le_bytes()].concat();
        payload.extend_from_slice(&(text.len() as u16).to_le_bytes());
        payload.extend_from_slice(text);
        Message::decode(op::REVOKED, &payload)
    };
    assert!(revoked(&[b'a'; TEXT_BYTES_MAX]).is_ok());
    assert!(revoked(&[b'a'; TEXT_BYTES_MAX + 1]).is_err());
    assert_eq!(revoked(&[0xff]), Err(WireError::Utf8));
    let Ok(Message::Request(_, Request::Revoked { text, .. })) = revoked(b"\x1b[2J") else {
        panic!("not taken");
    };
    assert_eq!(text, "\u{fffd}[2J");
}
