//! What a client may say, and what ends its connection: its own only, never the model.

use std::os::fd::AsFd;
use std::time::Instant;

use crate::common::{Client, irqs_body, linked, map_body, region_body, version_body};
use ntb_model::half::Side;
use ntb_model::model::Model;
use ntb_model::options::{DeviceId, DeviceOptions};
use ntb_model::wire::{self, Header, MESSAGE_BYTES_MAX};
use rustix::event::{EventfdFlags, eventfd};

/// Sends bytes that must end the connection of half A, and shows that half B lives on.
fn ends_its_own_connection(what: &str, bytes: &[u8]) {
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    a.send_raw(&mut model, bytes, &[]);
    assert!(a.is_closed(), "{what}");
    assert!(model.half(Side::A).stream.is_none(), "{what}");
    assert_eq!(b.register(&mut model, 0xB4C0, 4), 0x4200, "{what}");
    let mut again = Client::open(&mut model, Side::A);
    assert_eq!(again.register(&mut model, 0xB4C0, 4), 0x200, "{what}");
}

fn message(command: u16, body: &[u8]) -> Vec<u8> {
    [
        &Header::request(1, command, 0, body.len()).encode()[..],
        body,
    ]
    .concat()
}

#[test]
fn malformed_messages_end_their_own_connection_only() {
    let sized = |size: u32| {
        Header {
            size,
            ..Header::request(1, wire::REGION_READ, 0, 0)
        }
        .encode()
    };
    ends_its_own_connection("a header of no size", &sized(0));
    ends_its_own_connection("a size below the header", &sized(15));
    ends_its_own_connection("an oversized message", &sized(MESSAGE_BYTES_MAX as u32 + 1));
    ends_its_own_connection("the largest size", &sized(u32::MAX));
    let odd = Header {
        flags: 5,
        ..Header::request(1, wire::REGION_READ, 0, 16)
    };
    ends_its_own_connection("an unknown type", &odd.encode());
    ends_its_own_connection("a second version", &message(wire::VERSION, &version_body()));
    ends_its_own_connection(
        "a DMA message from a client",
        &message(wire::DMA_READ, &[0; 16]),
    );
    ends_its_own_connection(
        "a transfer of nothing",
        &message(wire::REGION_READ, &region_body(0, 0, 0)),
    );
    let huge = region_body(2, 0, wire::TRANSFER_BYTES_MAX as u32 + 1);
    ends_its_own_connection(
        "a transfer that is too large",
        &message(wire::REGION_READ, &huge),
    );
    let claims = region_body(2, 0, 4096);
    ends_its_own_connection(
        "a write of less than it says",
        &message(wire::REGION_WRITE, &claims),
    );
    for (command, bytes) in [
        (wire::DMA_MAP, 31),
        (wire::DMA_UNMAP, 23),
        (wire::DEVICE_GET_INFO, 15),
        (wire::DEVICE_GET_REGION_INFO, 31),
        (wire::DEVICE_GET_IRQ_INFO, 15),
        (wire::DEVICE_SET_IRQS, 19),
        (wire::REGION_READ, 15),
        (wire::REGION_WRITE, 15),
    ] {
        ends_its_own_connection(
            &format!("a short {command}"),
            &message(command, &vec![0; bytes]),
        );
    }
}

#[test]
fn command_before_the_version_and_another_major_version_end_the_connection() {
    let mut model = Model::new(&DeviceOptions::default());
    let mut early = Client::connect(&mut model, Side::A);
    early.send(&mut model, (wire::DEVICE_GET_INFO, 0), &[0; 16], &[]);
    assert!(early.is_closed());
    let mut other = Client::connect(&mut model, Side::A);
    other.send(&mut model, (wire::VERSION, 0), b"\x01\0\0\0{}\0", &[]);
    assert!(other.is_closed());
}

#[test]
fn version_0_1_is_answered_by_0_0_with_bounds_that_qemu_accepts() {
    let mut model = Model::new(&DeviceOptions::default());
    let mut client = Client::connect(&mut model, Side::B);
    let reply = client.call(&mut model, wire::VERSION, b"\0\0\x01\0{}\0", &[]);
    assert_eq!(reply.body[..4], [0; 4]);
    let text = std::str::from_utf8(&reply.body[4..]).expect("text");
    let text = text.strip_suffix('\0').expect("ends with a zero byte");
    let value: serde_json::Value = serde_json::from_str(text).expect("JSON");
    assert_eq!(value["capabilities"]["max_msg_fds"], 16);
    assert_eq!(value["capabilities"]["max_dma_maps"], 65535);
}

#[test]
fn too_many_descriptors_end_the_connection() {
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    let fd = eventfd(0, flags).expect("eventfd");
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    let body = message(wire::DEVICE_SET_IRQS, &irqs_body(0x24, 2, 0, 17));
    a.send_raw(&mut model, &body, &[fd.as_fd(); 17]);
    assert!(a.is_closed());
    b.send_raw(
        &mut model,
        &message(wire::REGION_READ, &region_body(0, 0, 4)),
        &[fd.as_fd()],
    );
    assert!(b.is_closed());
}

#[test]
fn message_in_pieces_and_several_at_once_are_understood_with_their_descriptors() {
    let (mut model, mut a, host, ..) = linked(&DeviceOptions::default());
    let bytes = message(wire::REGION_READ, &region_body(0, 0xB4C0, 4));
    for byte in &bytes {
        a.send_raw(&mut model, &[*byte], &[]);
    }
    assert_eq!(a.receive().body[16..], 0x200u32.to_le_bytes());

    let map = message(wire::DMA_MAP, &map_body(3, 0, 0x40_0000, 0x1000));
    let two = [&bytes[..], &map].concat();
    a.send_raw(&mut model, &two, &[host.ram.as_fd()]);
    a.send_raw(
        &mut model,
        &message(wire::DMA_MAP, &map_body(3, 0, 0x50_0000, 0x1000)),
        &[],
    );
    assert_eq!(a.receive().body.len(), 20);
    assert_eq!((a.receive().header.flags, a.receive().header.flags), (1, 1));
    let maps = model
        .half(Side::A)
        .dma
        .iter()
        .map(|(iova, map)| (iova, map.has_fd()));
    assert_eq!(
        maps.skip(1).collect::<Vec<_>>(),
        [(0x40_0000, true), (0x50_0000, false)]
    );
}

#[test]
fn write_without_reply_is_not_answered_and_one_with_is() {
    let (mut model, mut a, ..) = linked(&DeviceOptions::default());
    let body = [&region_body(0, 0x80, 4)[..], &[1, 0, 0, 0]].concat();
    a.send(
        &mut model,
        (wire::REGION_WRITE, wire::FLAG_NO_REPLY),
        &body,
        &[],
    );
    assert!(a.is_silent());
    let reply = a.call(&mut model, wire::REGION_WRITE, &body, &[]);
    assert_eq!(reply.body, region_body(0, 0x80, 4));
}

#[test]
fn refused_requests_leave_the_connection_open() {
    let (mut model, mut a, host, ..) = linked(&DeviceOptions::default());
    let ram = [host.ram.as_fd()];
    let long = map_body(3, 0, 0x4000_0000, crate::common::RAM_BYTES + 4096);
    for (what, command, body, fds) in [
        (
            "no such region",
            wire::REGION_READ,
            region_body(1, 0, 4).to_vec(),
            &[][..],
        ),
        (
            "unaligned register",
            wire::REGION_READ,
            region_body(0, 2, 4).to_vec(),
            &[],
        ),
        (
            "past the registers",
            wire::REGION_READ,
            region_body(0, 0x10000, 4).to_vec(),
            &[],
        ),
        (
            "past the configuration",
            wire::REGION_READ,
            region_body(7, 254, 4).to_vec(),
            &[],
        ),
        (
            "no such region",
            wire::DEVICE_GET_REGION_INFO,
            [32, 0, 9, 0].map(u32::to_le_bytes).concat().repeat(2),
            &[],
        ),
        (
            "no such irq",
            wire::DEVICE_GET_IRQ_INFO,
            [16, 0, 5, 0].map(u32::to_le_bytes).concat(),
            &[],
        ),
        ("a file that is too short", wire::DMA_MAP, long, &ram),
        (
            "past the vectors",
            wire::DEVICE_SET_IRQS,
            irqs_body(0x24, 2, 33, 1),
            &ram,
        ),
        (
            "no eventfd",
            wire::DEVICE_SET_IRQS,
            irqs_body(0x24, 2, 0, 1),
            &ram,
        ),
        ("no such command", 77, vec![], &[]),
    ] {
        let reply = a.call(&mut model, command, &body, fds);
        assert_eq!(
            reply.header.flags,
            wire::FLAG_REPLY | wire::FLAG_ERROR,
            "{what}"
        );
    }
}

#[test]
fn device_describes_itself_as_the_map_says() {
    let options = DeviceOptions {
        device_id: DeviceId(0x0DB4),
        ..DeviceOptions::default()
    };
    let mut model = Model::new(&options);
    let mut a = Client::open(&mut model, Side::A);
    let words = |body: &[u8]| {
        body.chunks(4)
            .map(|w| wire::u32_at(w, 0))
            .collect::<Vec<_>>()
    };
    let info = a.call(&mut model, wire::DEVICE_GET_INFO, &[0; 16], &[]);
    assert_eq!(words(&info.body), [16, 3, 9, 5]);
    for (index, bytes) in [
        (0, 0x1_0000),
        (1, 0),
        (2, 1 << 30),
        (4, 1 << 20),
        (7, 256),
        (8, 0),
    ] {
        let body = [32, 0, index, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
        let info = a.call(&mut model, wire::DEVICE_GET_REGION_INFO, &body, &[]);
        assert_eq!(wire::u64_at(&info.body, 16), bytes, "region {index}");
        assert_eq!(
            wire::u32_at(&info.body, 4),
            if bytes > 0 { 3 } else { 0 },
            "trapped only"
        );
    }
    for (index, count) in [(0, 0), (1, 0), (2, 33), (3, 0), (4, 0)] {
        let body = [16, 0, index, 0].map(u32::to_le_bytes).concat();
        let info = a.call(&mut model, wire::DEVICE_GET_IRQ_INFO, &body, &[]);
        assert_eq!(words(&info.body)[3], count, "irq index {index}");
    }
    assert_eq!(a.read(&mut model, 7, 0, 4), [0x86, 0x80, 0xB4, 0x0D]);
}

#[test]
fn random_bytes_never_take_the_model_down() {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut model, _, _, mut b, _) = linked(&DeviceOptions::default());
    // Each round drops the client of the one before.
    for _ in 0..2000 {
        model.service(Side::A, Instant::now());
        let mut a = Client::open(&mut model, Side::A);
        for _ in 0..10 {
            let body: Vec<u8> = (0..random() % 64)
                .map(|_| (random() as u8) & 0x3F)
                .collect();
            let command = (random() % 16) as u16;
            let flags = if random() % 4 == 0 {
                wire::FLAG_NO_REPLY
            } else {
                0
            };
            if model.half(Side::A).stream.is_some() {
                a.send(&mut model, (command, flags), &body, &[]);
            }
        }
    }
    assert_eq!(b.register(&mut model, 0xB4C0, 4), 0x4200);
}
