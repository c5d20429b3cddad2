//! What an access of one host does to the other, through the whole model.

use std::time::{Duration, Instant};

use crate::common::{BAR2, Client, RAM, RAM_BYTES, linked};
use ntb_model::half::Side;
use ntb_model::model::Model;
use ntb_model::options::{DeviceOptions, Fault};
use ntb_model::wire;

#[test]
fn window_access_reaches_the_peers_memory_at_xbase_plus_offset_both_ways() {
    let (mut model, mut a, host_a, mut b, host_b) = linked(&DeviceOptions::default());
    for (offset, data) in [
        (0, &[1u8, 2, 3, 4, 5, 6, 7, 8][..]),
        (0x123, &[9]),
        (0xFFC, &[4; 4]),
    ] {
        a.write(&mut model, 2, offset, data);
        assert_eq!(host_b.peek(RAM + offset, data.len()), data);
        assert_eq!(a.read(&mut model, 2, offset, data.len() as u32), data);
    }
    b.write(&mut model, 2, 0x800, &[7; 8]);
    assert_eq!(host_a.peek(RAM + 0x800, 8), [7; 8]);
    let counters = &model.half(Side::A).counters;
    assert_eq!(
        (
            counters.window_writes,
            counters.window_reads,
            counters.refused
        ),
        (3, 3, 0)
    );
    assert_eq!(counters.dma_direct_writes, 1);
}

#[test]
fn access_behind_the_receivers_limit_reads_ones_and_writes_nothing() {
    let (mut model, mut a, _, mut b, host_b) = linked(&DeviceOptions::default());
    b.write(&mut model, 0, 0x18, &(BAR2 + 0x1000).to_le_bytes());
    a.write(&mut model, 2, 0xFF8, &[1; 8]);
    a.write(&mut model, 2, 0xFFC, &[2; 8]);
    a.write(&mut model, 2, 0x1000, &[3; 8]);
    assert_eq!(host_b.peek(RAM + 0xFF8, 16), [[1; 8], [0; 8]].concat());
    assert_eq!(a.read(&mut model, 2, 0x1000, 8), [0xFF; 8]);
    assert_eq!(model.half(Side::A).counters.refused, 3);
}

#[test]
fn second_window_has_its_own_base_and_limit() {
    let (mut model, mut a, _, mut b, host_b) = linked(&DeviceOptions::default());
    a.write(&mut model, 4, 0, &[1; 8]);
    assert_eq!(host_b.peek(RAM, 8), [0; 8]);
    b.write(&mut model, 7, 0x20, &(0x90_0000_000Cu64).to_le_bytes());
    b.write(&mut model, 0, 0x20, &(RAM + 0x4000).to_le_bytes());
    b.write(
        &mut model,
        0,
        0x28,
        &(0x90_0000_0000u64 + 0x1000).to_le_bytes(),
    );
    a.write(&mut model, 4, 8, &[1; 8]);
    assert_eq!(host_b.peek(RAM + 0x4008, 8), [1; 8]);
}

#[test]
fn access_outside_the_bar_is_an_error() {
    let options = DeviceOptions {
        bar2_bytes_a: 4096,
        ..DeviceOptions::default()
    };
    let (mut model, mut a, ..) = linked(&options);
    assert_eq!(a.read(&mut model, 2, 4088, 8).len(), 8);
    let reply = a.call(
        &mut model,
        wire::REGION_READ,
        &crate::common::region_body(2, 4089, 8),
        &[],
    );
    assert_eq!(reply.header.flags, wire::FLAG_REPLY | wire::FLAG_ERROR);
}

#[test]
fn link_that_is_down_gives_ones_and_drops_writes_bells_and_scratchpads() {
    let (mut model, mut a, _, mut b, host_b) = linked(&DeviceOptions::default());
    a.write(&mut model, 0, 0xB050, &0x10u16.to_le_bytes());
    assert!(!model.link().is_up());
    assert_eq!(host_b.fired(), [(0, 1)]);
    a.write(&mut model, 2, 0, &[1; 8]);
    a.write(&mut model, 0, 0x100, &1u32.to_le_bytes());
    a.write(&mut model, 0, 0x8080, &5u32.to_le_bytes());
    assert_eq!(a.read(&mut model, 2, 0, 4), [0xFF; 4]);
    assert_eq!(a.register(&mut model, 0x8080, 4), 0xFFFF_FFFF);
    assert_eq!(a.register(&mut model, 0xB052, 2), 0);
    assert_eq!(b.register(&mut model, 0xB052, 2), 0);
    assert_eq!(b.register(&mut model, 0x80, 4), 0);
    assert_eq!(host_b.peek(RAM, 8), [0; 8]);
    assert_eq!(host_b.fired(), []);
}

#[test]
fn link_change_shows_on_both_halves_with_bit_32_and_its_vector() {
    let mut model = Model::new(&DeviceOptions::default());
    let mut a = Client::open(&mut model, Side::A);
    let mut b = Client::open(&mut model, Side::B);
    let host_a = a.bring_up(&mut model);
    assert_eq!(a.register(&mut model, 0xB052, 2), 0);
    let host_b = b.bring_up(&mut model);
    for (client, host) in [(&mut a, &host_a), (&mut b, &host_b)] {
        assert_eq!(client.register(&mut model, 0xB052, 2), 0x2104);
        assert_eq!(client.register(&mut model, 0x40, 8), 1 << 32);
        assert_eq!(host.fired(), [(0, 1)]);
    }
}

#[test]
fn doorbell_sets_the_peers_bit_and_fires_the_vector_that_intvec_names() {
    let (mut model, mut a, host_a, mut b, host_b) = linked(&DeviceOptions::default());
    a.write(&mut model, 0, 0x100 + 4 * 7, &1u32.to_le_bytes());
    assert_eq!(b.register(&mut model, 0x40, 8), 1 << 7);
    assert_eq!(host_b.fired(), [(8, 1)]);
    b.write(&mut model, 0, 0x40, &(1u64 << 7).to_le_bytes());
    b.write(&mut model, 0, 0x50 + 7, &[31]);
    a.write(&mut model, 0, 0x100 + 4 * 7, &1u32.to_le_bytes());
    assert_eq!(host_b.fired(), [(31, 1)]);
    assert_eq!(host_a.fired(), []);
}

#[test]
fn masked_doorbell_fires_when_it_is_unmasked() {
    let (mut model, mut a, _, mut b, host_b) = linked(&DeviceOptions::default());
    b.write(&mut model, 0, 0x48, &u64::MAX.to_le_bytes());
    a.write(&mut model, 0, 0x100, &1u32.to_le_bytes());
    assert_eq!(host_b.fired(), []);
    b.write(&mut model, 0, 0x48, &0u64.to_le_bytes());
    assert_eq!(host_b.fired(), [(1, 1)]);
}

#[test]
fn scratchpads_are_the_peers_through_the_second_bank() {
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    a.write(&mut model, 0, 0x8080 + 60, &0xABCDu32.to_le_bytes());
    assert_eq!(b.register(&mut model, 0x80 + 60, 4), 0xABCD);
    b.write(&mut model, 0, 0x80, &7u32.to_le_bytes());
    assert_eq!(a.register(&mut model, 0x8080, 4), 7);
    assert_eq!(a.register(&mut model, 0x80, 4), 0);
}

#[test]
fn half_without_bus_mastering_gets_neither_dma_nor_interrupts() {
    let (mut model, mut a, _, mut b, host_b) = linked(&DeviceOptions::default());
    b.write(&mut model, 7, 4, &2u16.to_le_bytes());
    a.write(&mut model, 2, 0, &[1; 8]);
    a.write(&mut model, 0, 0x100, &1u32.to_le_bytes());
    assert_eq!(a.read(&mut model, 2, 0, 8), [0xFF; 8]);
    assert_eq!(host_b.peek(RAM, 8), [0; 8]);
    assert_eq!(host_b.fired(), []);
    assert_eq!(
        b.register(&mut model, 0x40, 8),
        1,
        "the bit is set all the same"
    );
}

#[test]
fn device_reset_drops_the_link_on_both_and_tells_the_peer() {
    let (mut model, mut a, host_a, mut b, host_b) = linked(&DeviceOptions::default());
    a.call(&mut model, wire::DEVICE_RESET, &[], &[]);
    assert_eq!(a.register(&mut model, 0xB052, 2), 0);
    assert_eq!(a.register(&mut model, 0x40, 8), 0);
    assert_eq!(a.register(&mut model, 0x10, 8), 0);
    assert_eq!(a.register(&mut model, 0xB050, 2), 0x10);
    assert_eq!(b.register(&mut model, 0xB052, 2), 0);
    assert_eq!(b.register(&mut model, 0x40, 8), 1 << 32);
    assert_eq!(b.register(&mut model, 0x10, 8), RAM);
    assert_eq!((host_a.fired(), host_b.fired()), (vec![], vec![(0, 1)]));
}

#[test]
fn half_without_a_reset_method_keeps_its_registers() {
    let options = DeviceOptions {
        no_reset: true,
        ..DeviceOptions::default()
    };
    let (mut model, mut a, ..) = linked(&options);
    let info = a.call(&mut model, wire::DEVICE_GET_INFO, &[0; 16], &[]);
    assert_eq!(info.body[4..8], 2u32.to_le_bytes());
    a.call(&mut model, wire::DEVICE_RESET, &[], &[]);
    assert_eq!(a.register(&mut model, 0x10, 8), RAM);
    assert!(model.link().is_up());
}

#[test]
fn client_that_goes_resets_its_half_and_another_may_come() {
    let (mut model, a, _, mut b, host_b) = linked(&DeviceOptions::default());
    drop(a);
    model.service(Side::A, Instant::now());
    assert!(model.half(Side::A).stream.is_none());
    assert_eq!(model.half(Side::A).dma.iter().count(), 0);
    assert_eq!(b.register(&mut model, 0xB052, 2), 0);
    assert_eq!(host_b.fired(), [(0, 1)]);
    b.write(&mut model, 0, 0x40, &(1u64 << 32).to_le_bytes());
    let mut a = Client::open(&mut model, Side::A);
    let host_a = a.bring_up(&mut model);
    b.write(&mut model, 2, 0, &[5; 8]);
    assert_eq!(host_a.peek(RAM, 8), [5; 8]);
    assert_eq!(host_b.fired(), [(0, 1)]);
}

#[test]
fn address_without_a_mapped_file_is_read_and_written_by_messages() {
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    b.write(&mut model, 0, 0x10, &0xFE00_0000u64.to_le_bytes());
    let id = a.start_read(&mut model, 2, 0x14, 4);
    let dma = b.receive();
    assert_eq!(dma.header.command, wire::DMA_READ);
    assert_eq!(dma.body, [0xFE00_0014u64, 4].map(u64::to_le_bytes).concat());
    b.answer(&mut model, &dma, &[1, 2, 3, 4]);
    let reply = a.receive();
    assert_eq!(
        (reply.header.id, &reply.body[16..]),
        (id, &[1u8, 2, 3, 4][..])
    );

    a.write(&mut model, 2, 0x1000, &[9; 8]);
    let dma = b.receive();
    assert_eq!(dma.header.command, wire::DMA_WRITE);
    assert_eq!(dma.body[16..], [9; 8]);
    b.answer(&mut model, &dma, &[]);
    assert!(model.half(Side::A).egress.in_flight.is_none());
}

#[test]
fn bell_and_later_writes_wait_for_a_write_that_is_under_way() {
    let (mut model, mut a, _, mut b, host_b) = linked(&DeviceOptions::default());
    b.write(&mut model, 0, 0x10, &(RAM - 0x1000).to_le_bytes());
    a.write(&mut model, 2, 0, &[1; 8]);
    a.write(&mut model, 2, 0x1000, &[2; 8]);
    a.write(&mut model, 0, 0x100, &1u32.to_le_bytes());
    assert_eq!(host_b.peek(RAM, 8), [0; 8]);
    assert_eq!(host_b.fired(), []);
    assert_eq!(
        a.register(&mut model, 0xB052, 2),
        0x2104,
        "own registers do not wait"
    );
    let dma = b.receive();
    b.answer(&mut model, &dma, &[]);
    assert_eq!(host_b.peek(RAM, 8), [2; 8]);
    assert_eq!(host_b.fired(), [(1, 1)]);
}

#[test]
fn two_hosts_that_wait_for_each_other_are_both_answered() {
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    for client in [&mut a, &mut b] {
        client.write(&mut model, 0, 0x10, &0xFE00_0000u64.to_le_bytes());
    }
    a.start_read(&mut model, 2, 0, 8);
    b.start_read(&mut model, 2, 8, 8);
    let (to_a, to_b) = (a.receive(), b.receive());
    a.answer(&mut model, &to_a, &[0xA; 8]);
    b.answer(&mut model, &to_b, &[0xB; 8]);
    assert_eq!(a.receive().body[16..], [0xB; 8]);
    assert_eq!(b.receive().body[16..], [0xA; 8]);
}

#[test]
fn busy_device_is_asked_again_and_its_answer_counts() {
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    b.write(&mut model, 0, 0x10, &0xFE00_0000u64.to_le_bytes());
    a.start_read(&mut model, 2, 0, 8);
    for _ in 0..5 {
        let dma = b.receive();
        b.refuse(&mut model, &dma, libc::EPERM);
        assert!(b.is_silent());
        model.tick(model.deadline().expect("a retry is due"));
    }
    let dma = b.receive();
    b.answer(&mut model, &dma, &[7; 8]);
    assert_eq!(a.receive().body[16..], [7; 8]);
    assert_eq!(model.half(Side::B).counters.dma_retries, 5);
}

#[test]
fn address_that_is_refused_for_good_reads_ones() {
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    b.write(&mut model, 0, 0x10, &0xFE00_0000u64.to_le_bytes());
    a.start_read(&mut model, 2, 0, 8);
    for _ in 0..3 {
        let dma = b.receive();
        b.refuse(&mut model, &dma, libc::ENODEV);
        model.tick(model.deadline().unwrap_or_else(Instant::now));
    }
    assert_eq!(a.receive().body[16..], [0xFF; 8]);
    assert!(b.is_silent());
}

#[test]
fn peer_that_does_not_answer_or_goes_gives_ones() {
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    b.write(&mut model, 0, 0x10, &0xFE00_0000u64.to_le_bytes());
    a.start_read(&mut model, 2, 0, 4);
    let late = b.receive();
    model.tick(Instant::now() + Duration::from_millis(4100));
    assert_eq!(a.receive().body[16..], [0xFF; 4]);
    b.answer(&mut model, &late, &[1; 4]);
    assert!(a.is_silent(), "the late answer is dropped");
    a.start_read(&mut model, 2, 0, 4);
    drop(b);
    model.service(Side::B, Instant::now());
    assert_eq!(a.receive().body[16..], [0xFF; 4]);
}

#[test]
fn aligned_write_of_four_bytes_to_the_interrupt_range_is_an_msi_and_nothing_else_is() {
    let (mut model, mut a, _, mut b, _) = linked(&DeviceOptions::default());
    b.write(&mut model, 0, 0x10, &0xFEE0_0000u64.to_le_bytes());
    a.write(&mut model, 2, 0x2F8, &[1, 0, 0, 0]);
    let msi = b.receive();
    assert_eq!(
        (msi.header.command, msi.header.flags),
        (wire::DMA_WRITE, wire::FLAG_NO_REPLY)
    );
    let expected = [
        [0xFEE0_02F8u64, 4].map(u64::to_le_bytes).concat(),
        vec![1, 0, 0, 0],
    ]
    .concat();
    assert_eq!(msi.body, expected);
    a.write(&mut model, 2, 0x2F8, &[1; 8]);
    a.write(&mut model, 2, 0x2FA, &[1; 4]);
    assert_eq!(a.read(&mut model, 2, 0x2F8, 4), [0xFF; 4]);
    assert!(b.is_silent());
    assert_eq!(model.half(Side::A).counters.refused, 3);
    assert_eq!(model.half(Side::B).counters.msi_writes, 1);
}

#[test]
fn late_link_and_flap_follow_the_clock() {
    let options = DeviceOptions {
        late_link_up: 50,
        ..DeviceOptions::default()
    };
    let mut model = Model::new(&options);
    let mut a = Client::open(&mut model, Side::A);
    let mut b = Client::open(&mut model, Side::B);
    a.enable_link(&mut model);
    b.enable_link(&mut model);
    assert!(!model.link().is_up());
    let due = model.deadline().expect("training ends");
    model.tick(due);
    assert!(model.link().is_up());
    model.change_link(due, |link| link.flap(due + Duration::from_millis(20)));
    assert!(!model.link().is_up());
    model.tick(due + Duration::from_millis(20));
    assert!(model.link().is_up());
}

#[test]
fn sixty_five_thousand_maps_are_found() {
    let (mut model, mut a, _, mut b, host_b) = linked(&DeviceOptions::default());
    for n in 0..65_000u64 {
        let header = b.map(
            &mut model,
            (0x1_0000_0000 + n * 0x2000, 0x1000),
            Some(&host_b.ram),
        );
        assert_eq!(header.flags, wire::FLAG_REPLY);
    }
    let last: u64 = 0x1_0000_0000 + 64_999 * 0x2000;
    b.write(&mut model, 0, 0x10, &last.to_le_bytes());
    a.write(&mut model, 2, 0x10, &[3; 8]);
    assert_eq!(host_b.peek(RAM + 0x10, 8), [3; 8]);
    let unmap = crate::common::map_body(2, 0, 0, RAM_BYTES);
    b.call(&mut model, wire::DMA_UNMAP, &unmap[..24], &[]);
    assert_eq!(model.half(Side::B).dma.iter().count(), 0);
}

#[test]
fn faults_that_are_built_in_lose_what_they_say_and_can_be_mended() {
    let (mut model, mut a, _, mut b, host_b) = linked(&DeviceOptions::default());
    for (fault, rings, writes) in [
        (Some(Fault::DropDoorbells), false, true),
        (Some(Fault::DropWrites), true, false),
        (None, true, true),
    ] {
        model.set_fault(fault);
        a.write(&mut model, 2, 0, &[1; 8]);
        a.write(&mut model, 0, 0x100, &1u32.to_le_bytes());
        assert_eq!(host_b.peek(RAM, 8) == [1; 8], writes, "{fault:?}");
        assert_eq!(!host_b.fired().is_empty(), rings, "{fault:?}");
        b.write(&mut model, 0, 0x40, &u64::MAX.to_le_bytes());
        b.write(&mut model, 2, 0, &[0; 8]);
        rustix::io::pwrite(&host_b.ram, &[0; 8], 0).expect("cleared");
    }
}
