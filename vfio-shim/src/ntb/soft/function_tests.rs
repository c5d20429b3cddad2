//! Software functions: both shapes keep the functions' contract, and what is special to each.

pub(crate) use super::recipe::{ARC, ENGINE, MEMIRQ, memirq_taken};
use super::*;
use crate::model::contract::{self, Driver, function_contract};
use crate::model::{
    Aperture, Bdf, CAP_MSI, CAP_MSIX, ConfigView, EXT_CAP_ATS, EXT_CAP_REBAR, EXT_CAP_SRIOV,
    Function, FunctionError, FunctionIds, IrqIndex, RegionIndex, ShadowConfig,
};
use std::sync::Arc;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const VRAM_BYTES: u64 = 256 * MIB;
const CONFIG: RegionIndex = RegionIndex::CONFIG;
const BAR0: RegionIndex = RegionIndex(0);
const VRAM: RegionIndex = RegionIndex(2);
fn engine() -> SoftFunction {
    let ids = FunctionIds {
        vendor: 0x5b1e,
        device: 1,
        class: 0x12_00_00,
        ..FunctionIds::default()
    };
    SoftFunction::new(ids, 4)
}

fn arc() -> SoftFunction {
    SoftFunction::arc_pro(VRAM_BYTES).unwrap()
}

fn arc_pf() -> SoftPf {
    let bdf: Bdf = "4a:00.0".parse().unwrap();
    let shape = VfShape::ArcPro {
        vram_bytes: VRAM_BYTES,
    };
    SoftPf::new(bdf, shape, SoftHost::new()).unwrap()
}

mod engine_contract {
    use super::*;
    macro_rules! tests {
        ($($name:ident)*) => {
            $(#[test] fn $name() { contract::$name(&Driver::new(&engine(), ENGINE)); })*
        };
    }
    function_contract! { tests }
}

mod arc_contract {
    use super::*;
    macro_rules! tests {
        ($($name:ident)*) => {
            $(#[test] fn $name() { contract::$name(&Driver::new(&arc(), ARC)); })*
        };
    }
    function_contract! { tests }
}

fn config_of(function: &SoftFunction) -> Vec<u8> {
    let len = function.info().regions[CONFIG.0 as usize].size;
    let mut bytes = vec![0; len as usize];
    function.region_read(CONFIG, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn checksum_is_that_of_the_memory_and_an_unknown_operation_fails() {
    let function = engine();
    let driver = Driver::new(&function, ENGINE);
    driver.start();
    driver.ram.write(100, b"123456789");
    let operate = |operation: u32| {
        let bytes = operation.to_le_bytes();
        function.region_write(BAR0, OPERATION, &bytes).unwrap();
        driver.copy(100, 0, 9);
        assert!(driver.interrupted());
        (driver.u32(BAR0, STATUS), driver.u32(BAR0, CHECKSUM))
    };
    assert_eq!(operate(OPERATION_CHECKSUM), (STATUS_DONE, 0xe306_9283));
    assert_eq!(operate(2), (STATUS_FAILED, 0));
    assert_eq!(driver.u32(BAR0, COMPLETED), 2);
}

#[test]
fn arc_shows_what_lspci_shows_of_one_and_exactly_one_maskable_msi() {
    let function = arc();
    let bytes = config_of(&function);
    let view = ConfigView::new(&bytes).unwrap();
    assert_eq!(view.u32(0), 0xe212_8086);
    assert_eq!(view.capability(CAP_MSIX), None);
    let msi = view.capability(CAP_MSI).unwrap();
    // Maskable, 64 bits, one vector, off.
    assert_eq!((msi, view.u16(msi + 2)), (0xac, 0x180));
    assert_eq!(view.extended_capability(EXT_CAP_ATS), Some(0x200));
    let rebar = view.extended_capability(EXT_CAP_REBAR).unwrap();
    // BAR2 of 1 MiB << 8, and one BAR.
    assert_eq!((rebar, view.u32(rebar + 8)), (0x420, 0x822));
    assert_ne!(view.u32(rebar + 4) & 1 << 12, 0);
    assert_eq!([0x10, 0x18].map(|at| view.u32(at) & 0xf), [0xc, 0xc]);
    assert_eq!(view.extended_capability(EXT_CAP_SRIOV), None);
    let count = |index| function.info().irqs[index as usize].count;
    assert_eq!([IrqIndex::Msi, IrqIndex::Msix].map(count), [1, 0]);
    let shadow = ShadowConfig::new(&bytes, function.info()).unwrap();
    let mut head = [0; 4];
    shadow.read(0x200, &mut head);
    assert_eq!(head, [0; 4], "a guest sees no ATS");
}

#[test]
fn arc_copies_by_way_of_its_memory_which_a_reset_clears() {
    let function = arc();
    let driver = Driver::new(&function, ARC);
    driver.start();
    let bar = function.bar(VRAM).unwrap();
    let last = VRAM_BYTES - 8;
    bar.write_u64(last, 0x1122);
    let flags = |flags: u32| {
        let bytes = flags.to_le_bytes();
        function.region_write(BAR0, ARC_FLAGS, &bytes).unwrap();
    };
    flags(ARC_FROM_VRAM);
    driver.copy(last, 8, 8);
    assert!(driver.interrupted() && memirq_taken(&driver.ram));
    assert_eq!(driver.ram.read_u64(8), 0x1122);
    flags(ARC_TO_VRAM);
    driver.copy(8, 4 * MIB, 8);
    assert_eq!(bar.read_u64(4 * MIB), 0x1122);
    assert_eq!(driver.u32(BAR0, ARC_STATUS), STATUS_DONE);
    driver.copy(8, last + 4, 8);
    assert_eq!(driver.u32(BAR0, ARC_STATUS), STATUS_FAILED);
    let registers = function.bar(BAR0).unwrap();
    registers.write_u64(ARC_GGTT, 3);
    function.reset().unwrap();
    let after = [bar.read_u64(last), bar.read_u64(4 * MIB)];
    assert_eq!((after, registers.read_u64(ARC_GGTT)), ([0, 0], 0));
    assert_eq!(driver.u32(BAR0, ARC_IDENT), ARC_IDENT_VALUE);
}

#[test]
fn arc_without_a_memirq_page_or_with_its_event_disabled_stays_silent() {
    let function = arc();
    let driver = Driver::new(&function, ARC);
    driver.start();
    driver.ram.write(MEMIRQ + ARC_MEMIRQ_ENABLE, &[0; 4]);
    driver.copy(0, PAGE, 8);
    assert!(memirq_taken(&driver.ram), "the event is still told");
    function.region_write(BAR0, ARC_MEMIRQ, &[0; 8]).unwrap();
    function.region_write(BAR0, ARC_DOORBELL, &[1; 4]).unwrap();
    assert_eq!(driver.u32(BAR0, ARC_COMPLETED), 2);
    driver.ram.write(MEMIRQ + ARC_MEMIRQ_ENABLE, &[1]);
    driver.copy(0, PAGE, 8);
    assert!(driver.interrupted());
    assert_eq!(function.space().fault_count(), 0);
}

#[test]
fn msi_masked_in_config_space_is_pending_until_unmasked() {
    let function = arc();
    let driver = Driver::new(&function, ARC);
    driver.start();
    let mask = |bit: u8| function.region_write(CONFIG, 0xac + 0x10, &[bit]).unwrap();
    mask(1);
    driver.copy(0, PAGE, 8);
    driver.copy(0, PAGE, 8);
    let raised = function.raise_irqs(IrqIndex::Msi, 0, 1);
    assert!(raised.is_ok() && memirq_taken(&driver.ram));
    let before = driver.pending();
    mask(0);
    assert_eq!((before, driver.pending()), (0, 1));
}

#[test]
fn pf_makes_its_vfs_at_their_routing_ids_and_destroyed_ones_are_gone() {
    let pf = arc_pf();
    let view = |at: u16| {
        let bytes = config_of(pf.function());
        let view = ConfigView::new(&bytes).unwrap();
        let sriov = view.extended_capability(EXT_CAP_SRIOV).unwrap();
        assert_eq!(sriov, 0x320);
        view.u16(sriov + at)
    };
    assert_eq!(
        [0x0e, 0x10, 0x14, 0x16, 0x1a].map(view),
        [VFS_MAX, 0, 1, 1, 0xe212]
    );
    pf.set_num_vfs(5).unwrap();
    assert_eq!([0x08, 0x10].map(view), [9, 5]);
    let names: Vec<String> = pf.vfs().iter().map(|(bdf, _)| bdf.to_string()).collect();
    let expected: Vec<String> = (1..=5).map(|n| format!("0000:4a:00.{n}")).collect();
    assert_eq!(names, expected);
    assert!(matches!(pf.set_num_vfs(3), Err(SriovError::Enabled(5))));
    assert!(matches!(
        pf.set_num_vfs(VFS_MAX + 1),
        Err(SriovError::TooMany(_))
    ));
    let held = Arc::clone(&pf.vfs()[1].1);
    let driver = Driver::new(&*held, ARC);
    driver.start();
    pf.set_num_vfs(0).unwrap();
    assert_eq!((view(0x10), pf.vfs().len()), (0, 0));
    assert_eq!(driver.u32(BAR0, ARC_IDENT), u32::MAX);
    assert_eq!(driver.u32(CONFIG, 0), u32::MAX);
    driver.copy(0, PAGE, 8);
    assert_eq!((driver.pending(), held.space().fault_count()), (0, 0));
    assert!(matches!(held.reset(), Err(FunctionError::Gone(_))));
    pf.set_num_vfs(VFS_MAX).unwrap();
    assert_eq!(pf.vfs()[7].0.to_string(), "0000:4a:01.0");
}

#[test]
fn vfs_of_one_pf_share_nothing() {
    let pf = arc_pf();
    pf.set_num_vfs(2).unwrap();
    let vfs = pf.vfs();
    let drivers = [0, 1].map(|at: usize| Driver::new(&*vfs[at].1, ARC));
    drivers.iter().for_each(Driver::start);
    let vram = [0, 1].map(|at: usize| vfs[at].1.bar(VRAM).unwrap());
    vram[0].write_u64(0, 7);
    drivers[0].copy(0, PAGE, 8);
    assert_eq!((drivers[0].pending(), drivers[1].pending()), (1, 0));
    assert_eq!(vram[1].read_u64(0), 0);
    vfs[1].1.reset().unwrap();
    assert_eq!(vram[0].read_u64(0), 7);
}

#[test]
fn engine_pf_has_the_capability_too_and_vfs_that_are_engines() {
    let shape = VfShape::Engine {
        ids: FunctionIds::default(),
        vectors: 3,
    };
    let pf = SoftPf::new("01:00.0".parse().unwrap(), shape, SoftHost::new()).unwrap();
    let bytes = config_of(pf.function());
    let view = ConfigView::new(&bytes).unwrap();
    assert_eq!(view.extended_capability(EXT_CAP_SRIOV), Some(0x320));
    pf.set_num_vfs(1).unwrap();
    let vf = Arc::clone(&pf.vfs()[0].1);
    contract::copy_is_there_before_its_interrupt(&Driver::new(&*vf, ENGINE));
}

#[test]
fn planned_operation_fails_once_and_changes_nothing() {
    let function = engine();
    let plan = FaultPlan::default()
        .nth(Fault::ResetFails, 1)
        .nth(Fault::SetIrqsFails, 1);
    function.arm(plan.nth(Fault::ConfigFails, 2));
    let driver = Driver::new(&function, ENGINE);
    let refused = |result| matches!(result, Err(FunctionError::Kernel { .. }));
    assert!(refused(function.set_irqs(IrqIndex::Msix, 0, vec![None])));
    driver.command(6);
    assert!(refused(function.region_write(CONFIG, 4, &[0, 0])));
    assert_eq!(driver.u32(CONFIG, 4) & 6, 6);
    assert!(refused(function.reset()));
    assert_eq!(function.resets(), 0);
    function.reset().unwrap();
    assert_eq!(function.struck().len(), 3);
    assert_eq!(function.address_space().available(), 65_534);
}
