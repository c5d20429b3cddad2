//! Random bytes and random requests: every session ends, and the next VMM is served.

use crate::{
    feed::{Scene, feed},
    rig::{Rig, access, dma_map, dma_unmap, words},
};
use proptest::{collection::vec, prelude::*};
use std::io::Write;

fn message(command: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = words(&[u32::from(command) << 16, 16 + body.len() as u32, 0, 0]);
    bytes.extend(body);
    bytes
}

fn version() -> Vec<u8> {
    message(1, &words(&[1 << 16]))
}

/// Requests that get somewhere reach the device: else the tests below show nothing.
#[test]
fn what_is_fed_reaches_the_function() {
    let journal = feed(
        &[
            version(),
            message(2, &dma_map(3, 0, 0x1000, 0x1000)),
            message(8, &words(&[20, 36, 2, 0, 2])),
            message(10, &access(7, 4, 1, &[4])),
            message(2, &dma_map(1, 0, 0x3000, 0x1000)),
        ]
        .concat(),
        Scene::default(),
    );
    let expected = [
        "triggers Msix 0+2 fds 2",
        "map 0x1000+0x1000 @0x0 rw",
        "write 7 0x4 1",
        "map 0x3000+0x1000 @0x0 r",
        "reset",
        "unmap 0x1000+0x3000",
    ];
    assert_eq!(journal[..6], expected);
}

fn page() -> impl Strategy<Value = u64> {
    prop_oneof![(0u64..16).prop_map(|page| page << 12), any::<u64>()]
}

/// Requests that are nearly right, so that they get far.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let small = prop_oneof![0u32..10, any::<u32>()];
    prop_oneof![
        (0u32..4, page(), page(), page()).prop_map(|(f, o, i, l)| message(2, &dma_map(f, o, i, l))),
        (0u32..4, page(), page()).prop_map(|(f, i, l)| message(3, &dma_unmap(f, i, l))),
        (0u32..10, any::<u16>(), vec(any::<u8>(), 0..16))
            .prop_map(|(r, o, d)| message(10, &access(r, o.into(), d.len() as u32, &d))),
        Just(message(10, &access(7, 4, 2, &[6, 0]))),
        (0u32..10, page(), 0u32..5000).prop_map(|(r, o, c)| message(9, &access(r, o, c, &[]))),
        (0u32..64, small.clone(), small.clone(), 0u32..3)
            .prop_map(|(f, i, s, c)| message(8, &words(&[20, f, i, s, c]))),
        (4u16..8, small).prop_map(|(c, i)| message(c, &words(&[64, 0, i, 0]))),
        Just(message(13, &[])),
        (any::<u16>(), vec(any::<u8>(), 0..40)).prop_map(|(c, b)| message(c % 20, &b)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200,
        failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_end_the_session_cleanly(bytes in vec(any::<u8>(), 0..400)) {
        feed(&bytes, Scene::default());
    }

    #[test]
    fn random_requests_end_the_session_cleanly(requests in vec(request(), 0..24)) {
        feed(&[version(), requests.concat()].concat(), Scene::default());
    }
}

#[test]
fn a_flood_of_reads_whose_answers_nobody_takes_does_not_hold_up_a_stop() {
    let mut rig = Rig::new();
    let mut client = rig.agreed();
    let reads: Vec<u8> = (0..64)
        .flat_map(|_| message(9, &access(0, 0, 1 << 20, &[])))
        .collect();
    client.stream.write_all(&reads).unwrap();
    rig.wait_for("a read", |rig| rig.shared.counters.bar_reads.get() > 0);
    rig.stop().unwrap();
}
