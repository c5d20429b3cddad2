//! One test for each row of the register map.

use super::*;

fn half() -> Registers {
    Registers::new(0x200, IntvecReset::Table)
}

/// Writes, expects no effect.
fn put(registers: &mut Registers, offset: u16, bytes: u16, value: u64) {
    assert_eq!(
        registers.write(offset, bytes, value),
        Effects::default(),
        "{offset:#x}"
    );
}

#[test]
fn reset_column_is_what_a_fresh_half_reads() {
    let fresh = half();
    for offset in (0..=u16::MAX).step_by(4) {
        let expected = match offset {
            0x50 => 0x0403_0201,
            0x54 => 0x0807_0605,
            0x58 => 0x0C0B_0A09,
            0x5C => 0x100F_0E0D,
            0x60 => 0x1413_1211,
            0x64 => 0x1817_1615,
            0x68 => 0x1C1B_1A19,
            0x6C => 0x201F_1E1D,
            LINK_CTRL => 0x10,
            PPD1 => 0x200,
            _ => 0,
        };
        assert_eq!(fresh.read(offset, 4), expected, "{offset:#x}");
    }
}

#[test]
fn ntbcntl_reads_back() {
    let mut half = half();
    put(&mut half, NTBCNTL, 4, 0x154);
    assert_eq!(half.read(NTBCNTL, 4), 0x154);
}

#[test]
fn base_and_limit_read_back_exactly_also_by_halves_and_each_in_its_window() {
    let mut half = half();
    for (n, value) in [(0, 0x12_3456_789A_B001), (1, 0xFEDC_BA98_7654_3210)] {
        put(&mut half, XBASE[n], 8, value);
        put(&mut half, XLMT[n], 4, value & 0xFFFF_FFFF);
        put(&mut half, XLMT[n] + 4, 4, value >> 32);
        assert_eq!(half.read(XBASE[n], 4), value & 0xFFFF_FFFF);
        assert_eq!(half.read(XBASE[n] + 4, 4), value >> 32);
        assert_eq!(half.window(n), (value, value));
    }
}

#[test]
fn int_status_is_cleared_by_ones_only() {
    let mut half = half();
    assert_eq!(half.raise(0b101), 1 << 1 | 1 << 3);
    put(&mut half, INT_STATUS, 8, 0b100);
    assert_eq!(half.read(INT_STATUS, 8), 0b001);
    put(&mut half, INT_STATUS, 8, 0b110);
    assert_eq!(half.read(INT_STATUS, 8), 0b001);
}

#[test]
fn bell_on_a_bit_that_is_already_set_stays_silent() {
    let mut half = half();
    assert_eq!(half.raise(1), 1 << 1);
    assert_eq!(half.raise(1), 0);
    put(&mut half, INT_STATUS, 8, 1);
    assert_eq!(half.raise(1), 1 << 1);
}

#[test]
fn masked_source_is_silent_and_fires_when_unmasked() {
    let mut half = half();
    put(&mut half, INT_DISABLE, 8, u64::MAX);
    assert_eq!(half.read(INT_DISABLE, 8), (1 << 33) - 1);
    assert_eq!(half.raise(0b11), 0);
    assert_eq!(half.write(INT_DISABLE, 8, !0b10).fire, 1 << 2);
    assert_eq!(half.write(INT_DISABLE, 8, 0).fire, 1 << 1);
    assert_eq!(half.write(INT_DISABLE, 8, 0).fire, 0);
}

#[test]
fn intvec_routes_each_source_and_a_vector_out_of_range_fires_nothing() {
    let mut half = half();
    put(&mut half, INTVEC + 5, 1, 9);
    assert_eq!(half.read(INTVEC + 5, 1), 9);
    assert_eq!(half.raise(1 << 5), 1 << 9);
    put(&mut half, INTVEC + 6, 1, 33);
    assert_eq!(half.raise(1 << 6), 0);
    put(&mut half, INTVEC + 8, 8, 0);
    assert_eq!(half.raise(0xFF00), 1);
}

#[test]
fn intvec_reset_values_follow_the_option() {
    for (option, first, last) in [
        (IntvecReset::Table, 1, 0),
        (IntvecReset::Zero, 0, 0),
        (IntvecReset::Reverse, 32, 0),
    ] {
        let half = Registers::new(0x200, option);
        assert_eq!(half.read(INTVEC, 1), first, "{option:?}");
        assert_eq!(half.read(INTVEC + 32, 1), last, "{option:?}");
    }
}

#[test]
fn icx_index_registers_read_back() {
    let mut half = half();
    put(&mut half, XBASE_IDX[0], 2, 30);
    put(&mut half, XBASE_IDX[1], 2, 20);
    assert_eq!(half.read(XBASE_IDX[0], 4), 20 << 16 | 30);
}

#[test]
fn scratchpads_read_back_alone_and_in_pairs() {
    let mut half = half();
    put(&mut half, SPAD + 60, 4, 0xDEAD_BEEF);
    put(&mut half, SPAD, 8, 0x1111_1111_2222_2222);
    assert_eq!(half.read(SPAD, 4), 0x2222_2222);
    assert_eq!(half.read(SPAD + 4, 4), 0x1111_1111);
    assert_eq!(half.read(SPAD + 56, 8), 0xDEAD_BEEF_0000_0000);
}

#[test]
fn doorbell_rings_the_peer_by_bit_0_and_reads_0() {
    let mut half = half();
    for n in 0..32 {
        assert_eq!(half.write(DOORBELL + 4 * n, 4, 1).ring, 1 << n);
        assert_eq!(half.write(DOORBELL + 4 * n, 4, 2).ring, 0);
        assert_eq!(half.read(DOORBELL + 4 * n, 4), 0);
    }
    assert_eq!(half.read(INT_STATUS, 8), 0);
}

#[test]
fn ltr_registers_are_accepted_and_ignored() {
    let mut half = half();
    put(&mut half, 0x30EC, 1, 0xFF);
    put(&mut half, 0x30F0, 4, u64::MAX);
    put(&mut half, 0x30F4, 4, u64::MAX);
    assert_eq!(half, self::half());
}

#[test]
fn link_needs_link_ctrl_bit_4_clear_and_ppd0_bit_3_set() {
    let mut half = half();
    assert!(half.write(LINK_CTRL, 2, 0).link_inputs);
    assert!(!half.link_enabled());
    assert!(half.write(PPD0, 4, 0x8).link_inputs);
    assert_eq!(half.read(PPD0, 4), 0x8);
    assert!(half.link_enabled());
    assert!(half.write(LINK_CTRL, 2, 0x10).link_inputs);
    assert!(!half.link_enabled());
}

#[test]
fn link_change_shows_in_link_status_slotsts_and_int_status() {
    let mut half = half();
    put(&mut half, LINK_STATUS, 2, 0xFFFF);
    assert_eq!(half.read(LINK_STATUS, 2), 0);
    assert_eq!(half.set_link(true), 1 << 0);
    assert_eq!(half.read(LINK_STATUS, 2), 0x2104);
    assert_eq!(half.read(INT_STATUS, 8), LINK_BIT);
    assert_eq!(half.set_link(true), 0);
    assert_eq!(half.read(SLOTSTS, 2), 0x100);
    put(&mut half, SLOTSTS, 2, 0xFEFF);
    assert_eq!(half.read(SLOTSTS, 2), 0x100);
    put(&mut half, SLOTSTS, 2, 0x100);
    assert_eq!(half.read(SLOTSTS, 2), 0);
}

#[test]
fn ppd1_is_fixed_per_half() {
    for side in [0x200, 0x4200] {
        let mut half = Registers::new(side, IntvecReset::Table);
        put(&mut half, PPD1, 4, 0xFFFF_FFFF);
        half.reset();
        assert_eq!(half.read(PPD1, 4), u64::from(side));
    }
}

#[test]
fn reset_restores_every_register() {
    let mut half = Registers::new(0x4200, IntvecReset::Reverse);
    let fresh = half.clone();
    for offset in (0..0x200).step_by(8) {
        let _ = half.write(offset, 8, 0x1234_5678_9ABC_DEF1);
    }
    let _ = half.write(PPD0, 4, 8);
    let _ = half.raise(u64::MAX);
    let _ = half.set_link(true);
    half.reset();
    assert_eq!(half, fresh);
}

#[test]
fn access_at_any_offset_and_width_never_panics() {
    let mut half = half();
    for offset in 0..=u16::MAX {
        for bytes in 0..=9 {
            let _ = half.read(offset, bytes);
            let _ = half.write(offset, bytes, u64::MAX);
        }
    }
}
