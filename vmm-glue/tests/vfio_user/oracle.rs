//! The client that cloud-hypervisor embeds, against this server.

use crate::{
    fake::{BAR_FD_OFFSET, VECTORS},
    rig::Rig,
};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::AsRawFd;
use vfio_shim::model::IrqIndex;
use vfio_user::Client;
use vmm_glue::vfio_user::BarMode;

#[test]
fn the_client_of_cloud_hypervisor_finds_a_trapped_function() {
    let rig = Rig::new();
    let mut client = Client::new(&rig.socket).unwrap();
    // It reads the flag inverted.
    assert!(!client.resettable());
    let bar = client.region(0).unwrap();
    assert_eq!((bar.size, bar.flags), (0x4000, 3));
    assert!(bar.file_offset.is_none() && bar.sparse_areas.is_empty());
    assert_eq!(client.region(7).unwrap().size, 4096);
    assert_eq!(client.get_irq_info(0).unwrap().count, 0);
    let msix = client.get_irq_info(2).unwrap();
    assert_eq!((msix.count, msix.flags), (VECTORS, 9));
    // An index that does not exist leaves it in step.
    assert_eq!(client.get_irq_info(17).unwrap().count, 0);
    let mut data = [0; 8];
    client.region_read(7, 0x20, &mut data).unwrap();
    assert_eq!(data, [0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27]);
    client.region_write(0, 0x100, &[9, 8, 7, 6]).unwrap();
    client.region_read(0, 0x100, &mut data[..4]).unwrap();
    assert_eq!(data[..4], [9, 8, 7, 6]);
    // So does a region that does not.
    client.region_read(5, 0, &mut data).unwrap();
    assert_eq!(data, [0xff; 8]);
    client.region_write(5, 0, &data).unwrap();
    client.region_read(0, 0x100, &mut data[..4]).unwrap();
    assert_eq!(data[..4], [9, 8, 7, 6]);
    client.shutdown().unwrap();
    rig.wait_idle();
    assert_eq!(rig.shared.last_error(), None);
}

#[test]
fn the_client_of_cloud_hypervisor_finds_the_areas_of_a_mapped_function() {
    let rig = Rig::with(|options| options.bars = BarMode::Mapped);
    let client = Client::new(&rig.socket).unwrap();
    let bar = client.region(0).unwrap();
    assert_eq!((bar.size, bar.flags), (0x4000, 15));
    let file = bar.file_offset.as_ref().unwrap();
    assert_eq!(file.start(), BAR_FD_OFFSET);
    let areas: Vec<_> = bar
        .sparse_areas
        .iter()
        .map(|area| (area.offset, area.size))
        .collect();
    assert_eq!(areas, [(0, 0x2000), (0x3000, 0x1000)]);
    // A region with MMAP and no fd makes it panic.
    for index in 0..9 {
        let region = client.region(index).unwrap();
        assert_eq!(region.flags & 4 != 0, region.file_offset.is_some());
    }
}

#[test]
fn a_guest_of_cloud_hypervisor_boots_does_io_and_reboots() {
    let rig = Rig::new();
    let ram = rig.memory(0x40_0000, 's');
    for _ in 0..2 {
        let mut client = Client::new(&rig.socket).unwrap();
        client.dma_map(0, 0, 0x40_0000, ram.as_raw_fd()).unwrap();
        client.reset().unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let fds = vec![event.as_raw_fd(); VECTORS as usize];
        client.set_irqs(2, 36, 0, VECTORS, &fds).unwrap();
        client.set_irqs(2, 33, 0, 0, &[]).unwrap();
        client.set_irqs(2, 36, 0, VECTORS, &fds).unwrap();
        client.region_write(7, 4, &[6, 4]).unwrap();
        assert_eq!(rig.function.mapped().len(), 1);
        assert_eq!(rig.function.fire(IrqIndex::Msix, 3), 1);
        client.dma_unmap(0, 0x40_0000).unwrap();
        client.dma_map(0, 0, 0x20_0000, ram.as_raw_fd()).unwrap();
        // A reboot is only the end of the stream.
    }
    rig.wait_idle();
    assert!(rig.function.mapped().is_empty());
    assert_eq!(rig.shared.last_error(), None);
    assert_eq!(rig.shared.counters.sessions.get(), 2);
}

#[test]
fn a_map_that_is_refused_ends_the_session_of_a_client_that_ignores_errors() {
    let rig = Rig::new();
    let ram = rig.memory(0x2000, 'p');
    let mut client = Client::new(&rig.socket).unwrap();
    client.dma_map(0, 0, 0x2000, ram.as_raw_fd()).unwrap();
    assert!(client.region_read(7, 0, &mut [0; 4]).is_err());
    assert!(rig.last_error().contains("share=on"));
}
