//! What a guest can and cannot do to the shadow of a config space.

use super::*;
use crate::model::RegionInfo;
use proptest::prelude::*;

const IDS: FunctionIds = FunctionIds {
    vendor: 0x1b36,
    device: 0x0010,
    subsystem_vendor: 0x1af4,
    subsystem_device: 0x1100,
    class: 0x01_0802,
    revision: 2,
};

fn info(sizes: [u64; 6]) -> FunctionInfo {
    let mut info = FunctionInfo {
        ids: IDS,
        resettable: true,
        ..Default::default()
    };
    for (region, size) in info.regions.iter_mut().zip(sizes) {
        *region = RegionInfo {
            size,
            readable: true,
            writable: true,
            areas: vec![],
        };
    }
    info
}

fn put(bytes: &mut [u8], at: usize, data: &[u8]) {
    bytes[at..at + data.len()].copy_from_slice(data);
}

/// A VF in use: PM, MSI, VPD, MSI-X, PCIe; ARI first, then ATS, AER, SR-IOV, PASID, rebar.
fn snapshot() -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    put(
        &mut bytes,
        0,
        &[0xff, 0xff, 0xff, 0xff, 0x06, 0x04, 0x18, 0x00],
    );
    put(&mut bytes, 0x0e, &[0x80]);
    put(&mut bytes, 0x10, &[0x0c, 0, 0, 0x40, 0x38]);
    put(&mut bytes, 0x30, &[1, 0, 0, 0xfe, 0x40]);
    put(&mut bytes, 0x3c, &[11, 1]);
    put(&mut bytes, 0x40, &[CAP_PM, 0x50, 0x03, 0xf8, 0x03, 0x01]);
    put(
        &mut bytes,
        0x50,
        &[CAP_MSI, 0x70, 0x85 | 0x20, 0x01, 0, 0xf0, 0xe0, 0xfe],
    );
    put(&mut bytes, 0x70, &[0x03, 0x80, 0xff]);
    put(
        &mut bytes,
        0x80,
        &[CAP_MSIX, 0xa0, 0x08, 0xc0, 0, 0x20, 0, 0],
    );
    put(
        &mut bytes,
        0xa0,
        &[CAP_EXP, 0, 0x02, 0, 0, 0x80, 0, 0x10, 0x37, 0x29, 0x2f],
    );
    let extended: [(usize, u16, u16); 6] = [
        (0x100, 0x0e, 0x140),
        (0x140, EXT_CAP_ATS, 0x180),
        (0x180, 0x01, 0x1c0),
        (0x1c0, EXT_CAP_SRIOV, 0x200),
        (0x200, EXT_CAP_PASID, 0x240),
        (0x240, EXT_CAP_REBAR, 0),
    ];
    for (at, id, next) in extended {
        let header = u32::from(id) | 1 << 16 | u32::from(next) << 20;
        put(&mut bytes, at, &header.to_le_bytes());
    }
    // Rebar: one entry, BAR 2, 256 MiB now, everything up to 16 GiB offered.
    put(
        &mut bytes,
        0x244,
        &0x3_ffff_u32.rotate_left(4).to_le_bytes(),
    );
    put(&mut bytes, 0x248, &(2u32 | 1 << 5 | 8 << 8).to_le_bytes());
    bytes
}

fn shadow() -> ShadowConfig {
    ShadowConfig::new(&snapshot(), &info([0x4000, 0, 0, 0, 0, 0])).unwrap()
}

fn read32(shadow: &ShadowConfig, at: u64) -> u32 {
    let mut data = [0; 4];
    shadow.read(at, &mut data);
    u32::from_le_bytes(data)
}

fn write32(shadow: &mut ShadowConfig, at: u64, value: u32) -> Effects {
    shadow.write(at, &value.to_le_bytes())
}

#[test]
fn a_new_shadow_has_the_ids_and_nothing_enabled() {
    let shadow = shadow();
    assert_eq!(read32(&shadow, 0), 0x0010_1b36);
    assert_eq!(
        read32(&shadow, 4),
        0x0010_0000,
        "command off, capability list"
    );
    assert_eq!(read32(&shadow, 8), 0x0108_0202);
    assert_eq!(read32(&shadow, 0x0c), 0, "one function, header type 0");
    assert_eq!(read32(&shadow, 0x2c), 0x1100_1af4);
    assert_eq!(read32(&shadow, 0x30), 0, "no ROM");
    assert_eq!(read32(&shadow, 0x3c), 0, "no INTx");
    assert_eq!(read32(&shadow, 0x44), 0x8, "D0, no PME, no soft reset");
    assert_eq!(read32(&shadow, 0x80) >> 16, 0x0008, "9 vectors, off");
    assert_eq!(shadow.ids(), IDS);
}

#[test]
fn bars_are_sized_by_writing_ones_and_keep_only_address_bits() {
    let sizes = [0x4000, 0, 0x4_0000_0000, 0, 0x1000, 0x100];
    let mut bytes = snapshot();
    put(&mut bytes, 0x10, &[0; 24]);
    put(&mut bytes, 0x18, &[0x0c, 0, 0, 0, 0x40]);
    let mut shadow = ShadowConfig::new(&bytes, &info(sizes)).unwrap();
    for at in (0x10..0x28).step_by(4) {
        write32(&mut shadow, at, u32::MAX);
    }
    let sized: Vec<_> = (0x10..0x28)
        .step_by(4)
        .map(|at| read32(&shadow, at))
        .collect();
    assert_eq!(
        sized,
        [
            0xffff_c004, // zero BAR of a VF, taken as 64 bits wide
            0xffff_ffff,
            0x0000_000c, // 16 GiB prefetchable
            0xffff_fffc,
            0xffff_f000, // 32 bits: the next one is in use
            0xffff_ff00,
        ]
    );
    write32(&mut shadow, 0x10, 0xfe01_2345);
    assert_eq!(read32(&shadow, 0x10), 0xfe01_0004);
    shadow.reset();
    assert_eq!(read32(&shadow, 0x10), 4);
}

#[test]
fn bars_that_cannot_be_are_refused() {
    for (sizes, bar) in [
        ([0x4000, 0x1000, 0, 0, 0, 0], 0),
        ([0, 0, 0, 0, 0, 1 << 32], 5),
        ([0, 0, u64::MAX, 0, 0, 0], 2),
    ] {
        let refused = ShadowConfig::new(&snapshot(), &info(sizes)).unwrap_err();
        let bytes = sizes[bar];
        assert_eq!(refused, ShadowError::Bar { bar, bytes });
    }
    let mut bridge = snapshot();
    bridge[0x0e] = 1;
    let refused = ShadowConfig::new(&bridge, &info([0; 6])).unwrap_err();
    assert_eq!(refused, ShadowError::HeaderType(1));
}

#[test]
fn an_io_bar_is_not_shown() {
    let mut bytes = snapshot();
    put(&mut bytes, 0x10, &[0x01, 0xe0, 0, 0, 0]);
    let mut shadow = ShadowConfig::new(&bytes, &info([0x100, 0, 0, 0, 0, 0])).unwrap();
    write32(&mut shadow, 0x10, u32::MAX);
    assert_eq!(read32(&shadow, 0x10), 0);
}

#[test]
fn command_bits_are_stored_and_told_once() {
    let mut shadow = shadow();
    let on = shadow.write(4, &[0xff, 0xff]);
    assert_eq!((on.bus_master, on.memory), (Some(true), Some(true)));
    assert_eq!(read32(&shadow, 4) & 0xffff, 0x0406);
    assert_eq!(shadow.write(4, &[0x06]), Effects::default());
    assert_eq!(shadow.write(4, &[0x02]).bus_master, Some(false));
    assert_eq!(shadow.write(6, &[0xff, 0xff]), Effects::default());
    assert_eq!(read32(&shadow, 4) >> 16, 0x0010);
    shadow.write(4, &[0x06]);
    shadow.reset();
    assert_eq!(read32(&shadow, 4), 0x0010_0000);
}

#[test]
fn msi_and_msix_controls_are_stored_and_told() {
    let mut shadow = shadow();
    // 64 bits wide, maskable, 4 vectors: a guest asks for 32 and gets 4.
    assert_eq!(shadow.write(0x52, &[0xff, 0xff]).msi_enable, Some(true));
    assert_eq!(read32(&shadow, 0x50) >> 16, 0x01a5);
    write32(&mut shadow, 0x54, 0xfee0_0003);
    write32(&mut shadow, 0x58, 0x1);
    write32(&mut shadow, 0x5c, 0xffff_4021);
    let message: Vec<_> = [0x54, 0x58, 0x5c].map(|at| read32(&shadow, at)).into();
    assert_eq!(message, [0xfee0_0000, 1, 0x4021]);
    assert_eq!(write32(&mut shadow, 0x60, 2).msi_mask, Some(2));
    assert_eq!(write32(&mut shadow, 0x64, 2), Effects::default());
    assert_eq!(read32(&shadow, 0x64), 0);
    let on = shadow.write(0x83, &[0xc0]);
    assert_eq!((on.msix_enable, on.msix_mask_all), (Some(true), Some(true)));
    shadow.write(0x82, &[0x00]);
    assert_eq!(read32(&shadow, 0x80) >> 16, 0xc008, "table size stays");
    assert_eq!(shadow.write(0x83, &[0x80]).msix_mask_all, Some(false));
    assert_eq!(read32(&shadow, 0x84), 0x2000, "table place is read only");
}

#[test]
fn an_flr_is_told_and_not_stored_and_needs_a_reset() {
    let mut shadow = shadow();
    assert!(shadow.write(0xa8, &[0x10, 0xa8]).flr);
    assert_eq!(read32(&shadow, 0xa8), 0x2810);
    assert!(!shadow.write(0xa8, &[0xff]).flr);
    assert!(shadow.write(0xa9, &[0x80]).flr);
    assert_eq!(read32(&shadow, 0xa8) >> 16, 0, "no error status");
    let without = FunctionInfo {
        resettable: false,
        ..info([0x4000, 0, 0, 0, 0, 0])
    };
    let mut shadow = ShadowConfig::new(&snapshot(), &without).unwrap();
    assert_eq!(read32(&shadow, 0xa4) & EXP_FLR, 0);
    assert!(!shadow.write(0xa8, &[0, 0x80]).flr);
}

#[test]
fn power_state_is_stored_and_the_rest_of_pm_is_not() {
    let mut shadow = shadow();
    write32(&mut shadow, 0x44, u32::MAX);
    assert_eq!(read32(&shadow, 0x44), 0xb);
    write32(&mut shadow, 0x44, 0);
    assert_eq!(read32(&shadow, 0x44), 0x8);
}

#[test]
fn capabilities_that_a_guest_must_not_use_are_unlinked() {
    let shadow = shadow();
    let ids = |caps: Vec<Capability>| caps.iter().map(|c| c.id).collect::<Vec<_>>();
    let view = shadow.view();
    let standard = [CAP_PM, CAP_MSI, CAP_MSIX, CAP_EXP].map(u16::from);
    assert_eq!(ids(view.capabilities().unwrap()), standard);
    // The first one is hidden by a null capability that only links.
    let extended = ids(view.extended_capabilities().unwrap());
    assert_eq!(extended, [0, 0x01, EXT_CAP_REBAR]);
    assert_eq!(view.u32(0x140), 0);
    assert_eq!(view.u32(0x244), 1 << 12, "one size: 256 MiB");
}

#[test]
fn nothing_past_the_end_is_read_or_written() {
    let mut shadow = ShadowConfig::new(&snapshot()[..256], &info([0; 6])).unwrap();
    assert_eq!(shadow.byte_count(), 256);
    let mut data = [0; 8];
    shadow.read(252, &mut data);
    assert_eq!(data[4..], [0xff; 4]);
    shadow.read(u64::MAX - 2, &mut data[..2]);
    assert_eq!(shadow.write(u64::MAX - 8, &[0xff; 4]), Effects::default());
    assert_eq!(shadow.write(0, &[0; 8192]), Effects::default());
}

proptest! {
    #[test]
    fn any_snapshot_and_any_writes_do_no_harm(
        mut bytes in proptest::collection::vec(any::<u8>(), 256..=4096),
        sizes in proptest::array::uniform6(prop_oneof![Just(0u64), Just(4096), any::<u64>()]),
        writes in proptest::collection::vec(
            (0u64..4200, proptest::collection::vec(any::<u8>(), 0..9)), 0..64),
    ) {
        bytes[0x0e] = 0;
        let Ok(mut shadow) = ShadowConfig::new(&bytes, &info(sizes)) else { return Ok(()) };
        let new: Vec<u8> = shadow.bytes.clone();
        for (at, data) in writes {
            shadow.write(at, &data);
            let mut seen = vec![0; data.len()];
            shadow.read(at, &mut seen);
        }
        for (at, ((old, now), stored)) in new.iter().zip(&shadow.bytes).zip(&shadow.stored).enumerate() {
            prop_assert_eq!((old ^ now) & !stored, 0, "read-only bits at {:#x}", at);
        }
        shadow.reset();
        prop_assert_eq!(shadow.bytes, new);
    }

    #[test]
    fn a_sound_snapshot_takes_any_writes(
        writes in proptest::collection::vec(
            (0u64..0x280, proptest::collection::vec(any::<u8>(), 0..9)), 0..64),
    ) {
        let mut shadow = shadow();
        let mut mastering = false;
        for (at, data) in writes {
            if let Some(now) = shadow.write(at, &data).bus_master {
                prop_assert_ne!(now, mastering);
                mastering = now;
            }
        }
        prop_assert_eq!(mastering, read32(&shadow, 4) & 4 != 0);
        prop_assert_eq!(read32(&shadow, 0), 0x0010_1b36);
        prop_assert_eq!(read32(&shadow, 0x34) & 0xff, 0x40);
    }
}
