//! The register program against registers in memory that remember the order of writes.

use super::*;
use crate::model::Mapping;
use std::sync::Mutex;

const BARS: [WindowBar; 2] = [
    WindowBar {
        physical: 0x38_0000_0000,
        bytes: 1 << 30,
    },
    WindowBar {
        physical: 0x39_0000_0000,
        bytes: 1 << 20,
    },
];

/// BAR0 with what the program depends on: write-1-to-clear status, a log, and stuck registers.
#[derive(Default)]
struct Registers {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    writes: Vec<(u64, u64)>,
    reads: Vec<u64>,
    stuck: Option<u64>,
    gone: bool,
}

fn word(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    u64::from_le_bytes(bytes)
}

impl Registers {
    fn new() -> Arc<Self> {
        let this = Self::default();
        this.state.lock().unwrap().bytes = vec![0; 0x1_0000];
        this.poke(PPD1, 0x4200, 4);
        this.poke(LINK_CTRL, 0x10, 2);
        for bit in 0..VECTORS {
            this.poke(INTVEC + u64::from(bit), u64::from(bit + 1) % 33, 1);
        }
        Arc::new(this)
    }

    fn poke(&self, at: u64, value: u64, width: usize) {
        let at = at as usize;
        let bytes = &mut self.state.lock().unwrap().bytes;
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    }

    fn peek(&self, at: u64, width: usize) -> u64 {
        word(&self.state.lock().unwrap().bytes[at as usize..at as usize + width])
    }

    fn take_writes(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.state.lock().unwrap().writes)
    }
}

impl Aperture for Registers {
    fn len(&self) -> u64 {
        0x1_0000
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap();
        state.reads.push(offset);
        match state.gone {
            true => data.fill(0xff),
            false => data.copy_from_slice(&state.bytes[offset as usize..][..data.len()]),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock().unwrap();
        state.writes.push((offset, word(data)));
        if state.stuck == Some(offset) {
            return;
        }
        let here = &mut state.bytes[offset as usize..][..data.len()];
        match offset {
            INT_STATUS => here
                .iter_mut()
                .zip(data)
                .for_each(|(old, clear)| *old &= !clear),
            SLOTSTS => {}
            _ => here.copy_from_slice(data),
        }
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

fn started() -> (Arc<Registers>, Gen4) {
    let registers = Registers::new();
    let gen4 = Gen4::start(Arc::clone(&registers) as _, BARS).unwrap();
    registers.take_writes();
    (registers, gen4)
}

#[test]
fn start_masks_first_then_closes_and_puts_every_bit_on_the_shared_vector() {
    let registers = Registers::new();
    registers.poke(INT_STATUS, ALL_BITS, 8);
    registers.poke(XBASE, 0xdead_0000, 8);
    registers.poke(XLMT, 0x38_4000_0000, 8);
    Gen4::start(Arc::clone(&registers) as _, BARS).unwrap();
    let writes = registers.take_writes();
    assert_eq!(writes[0], (INT_DISABLE, ALL_BITS));
    assert_eq!(writes[1], (XLMT, BARS[0].physical));
    assert_eq!(writes[2], (XLMT + 0x10, BARS[1].physical));
    for bit in 0..u64::from(VECTORS) {
        assert_eq!(registers.peek(INTVEC + bit, 1), 0, "status bit {bit}");
    }
    assert_eq!(registers.peek(INT_STATUS, 8), 0);
    assert_eq!(registers.peek(LINK_CTRL, 2), 0x10);
}

#[test]
fn window_open_writes_the_closed_limit_before_the_base_and_the_limit_last() {
    let (registers, gen4) = started();
    gen4.open(0, PortIova(0x1_4000_0000), 1 << 29).unwrap();
    assert_eq!(
        registers.take_writes(),
        [
            (XLMT, 0x38_0000_0000),
            (XBASE, 0x1_4000_0000),
            (XLMT, 0x38_2000_0000),
        ]
    );
    gen4.open(1, PortIova(0xfee0_0000), 1 << 20).unwrap();
    assert_eq!(registers.take_writes()[2], (0x28, 0x39_0010_0000));
    // An open one changes its size alone; one that was closed, for a new link, is told all again.
    gen4.open(0, PortIova(0x1_4000_0000), 1 << 16).unwrap();
    assert_eq!(registers.take_writes(), [(XLMT, 0x38_0001_0000)]);
    gen4.close(0).unwrap();
    registers.take_writes();
    gen4.open(0, PortIova(0x1_4000_0000), 1 << 16).unwrap();
    assert_eq!(registers.take_writes()[1], (XBASE, 0x1_4000_0000));
}

#[test]
fn a_register_that_does_not_take_its_value_leaves_the_window_closed() {
    for stuck in [XBASE, XLMT] {
        let (registers, gen4) = started();
        registers.state.lock().unwrap().stuck = Some(stuck);
        let refused = gen4.open(0, PortIova(0x1000), 0x1000);
        assert!(matches!(refused, Err(PortError::Readback { .. })));
        assert_eq!(registers.peek(XLMT, 8), BARS[0].physical);
    }
}

#[test]
fn windows_that_do_not_fit_are_refused_before_any_write() {
    let (registers, gen4) = started();
    for (index, base, bytes) in [
        (0, 0x1000, 0),
        (0, 0x1000, (1 << 30) + 4096),
        (0, 0x1000, 0x1800),
        (0, 0x1800, 0x1000),
        (0, !0xfff, 0x1000),
        (2, 0x1000, 0x1000),
    ] {
        let refused = gen4.open(index, PortIova(base), bytes);
        assert!(matches!(refused, Err(PortError::Geometry { .. })));
    }
    assert_eq!(registers.take_writes(), []);
}

#[test]
fn take_clears_what_it_read_and_reads_back() {
    let (registers, gen4) = started();
    gen4.unmask_only(0b11);
    assert_eq!(registers.peek(INT_DISABLE, 8), ALL_BITS & !LINK_BIT & !0b11);
    registers.poke(INT_STATUS, LINK_BIT | 0b101, 8);
    registers.state.lock().unwrap().reads.clear();
    registers.take_writes();
    assert_eq!(gen4.take(), LINK_BIT | 0b1);
    let writes = registers.take_writes();
    assert_eq!(writes, [(SLOTSTS, 0x100), (INT_STATUS, LINK_BIT | 0b101)]);
    assert_eq!(
        registers.state.lock().unwrap().reads,
        [INT_STATUS, INT_STATUS]
    );
    assert_eq!(gen4.take(), 0);
    assert_eq!(registers.take_writes(), []);
}

#[test]
fn a_half_that_is_gone_has_nothing_pending_and_no_link() {
    let (registers, gen4) = started();
    gen4.unmask_only(u64::MAX);
    registers.state.lock().unwrap().gone = true;
    assert_eq!(gen4.take(), 0);
    assert!(!gen4.link_is_up());
    let again = Gen4::start(Arc::clone(&registers) as _, BARS);
    assert!(matches!(again, Err(PortError::Gone)));
}

#[test]
fn link_enable_starts_training_and_fails_where_it_does_not_read_back() {
    let (registers, gen4) = started();
    gen4.link_enable().unwrap();
    assert_eq!(registers.peek(NTBCNTL, 4), 0x154);
    assert_eq!(registers.peek(LINK_CTRL, 2), 0);
    registers.poke(LINK_STATUS, 0x2104, 2);
    assert!(gen4.link_is_up());
    gen4.link_disable();
    assert_eq!(registers.peek(LINK_CTRL, 2), 0x10);
    let (registers, gen4) = started();
    registers.state.lock().unwrap().stuck = Some(PPD0);
    assert!(matches!(
        gen4.link_enable(),
        Err(PortError::Readback { .. })
    ));
}

#[test]
fn bells_and_scratchpads_go_to_their_registers_and_never_past_them() {
    let (registers, gen4) = started();
    gen4.ring(0b10 | 1 << 31 | LINK_BIT);
    assert_eq!(registers.take_writes(), [(0x104, 1), (0x17c, 1)]);
    gen4.peer_spad_write(15, 7);
    gen4.spad_write(0, 8);
    gen4.peer_spad_write(16, 9);
    gen4.spad_write(16, 9);
    assert_eq!(registers.take_writes(), [(0x80bc, 7), (0x80, 8)]);
    assert_eq!((gen4.spad_read(0), gen4.spad_read(16)), (8, u32::MAX));
}

#[test]
fn a_half_that_is_not_back_to_back_or_has_no_window_is_refused() {
    let registers = Registers::new();
    for other in [0x4100, 0x4600] {
        registers.poke(PPD1, other, 4);
        let refused = Gen4::start(registers.clone() as _, BARS);
        assert!(matches!(refused, Err(PortError::Geometry { .. })));
    }
    for bad in [0, 3 << 20] {
        let mut bars = BARS;
        bars[0].bytes = bad;
        let refused = Gen4::start(Registers::new() as _, bars);
        assert!(matches!(refused, Err(PortError::Geometry { .. })));
    }
    let one_window = [BARS[0], WindowBar::default()];
    let gen4 = Gen4::start(Registers::new() as _, one_window).unwrap();
    assert!(gen4.open(1, PortIova(0), 4096).is_err());
    assert!(gen4.close(1).is_ok());
}
