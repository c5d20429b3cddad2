//! The borrower's shadow of a function's config space: reads are served here, writes change only what a guest may change.
//!
//! It takes the lender's config space as vfio-pci shows it, hides what cannot cross the NTB, and
//! gives each byte a mask of the bits that stick, as vfio-pci does with its permission bits.

use super::config_space::{
    CAP_EXP, CAP_MSI, CAP_MSIX, CAP_PM, COMMAND, COMMAND_INTX_DISABLE, COMMAND_MASTER,
    COMMAND_MEMORY, ConfigError, ConfigView, EXT_CAP_ATS, EXT_CAP_PASID, EXT_CAP_PRI,
    EXT_CAP_REBAR, EXT_CAP_SRIOV,
};
use super::{BAR_COUNT, FunctionIds, FunctionInfo};

/// COMMAND: parity error response and SERR# enable; stored, without effect.
const COMMAND_ERRORS: u16 = 1 << 6 | 1 << 8;
const BAR0: usize = 0x10;
const BAR_IO: u32 = 1;
const BAR_TYPE: u32 = 6;
const BAR_TYPE_64: u32 = 4;
const CACHE_LINE: usize = 0x0c;
const ROM: usize = 0x30;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
/// Capability id: vital product data. A read of it is a protocol with the device: hidden.
const CAP_VPD: u8 = 0x03;
/// Capability id: advanced features, a second way to an FLR.
const CAP_AF: u8 = 0x13;
/// Extended capability id: VF resizable BAR.
const EXT_CAP_VF_REBAR: u16 = 0x0024;
/// What a guest must not see: translated requests pass the IOMMU by, and BARs have one size.
const EXT_CAPS_HIDDEN: [u16; 6] = [
    EXT_CAP_ATS,
    EXT_CAP_SRIOV,
    EXT_CAP_PRI,
    EXT_CAP_PASID,
    EXT_CAP_REBAR,
    EXT_CAP_VF_REBAR,
];
/// Device Control: initiate function level reset (PCIe 6.0 section 7.5.3.4).
const DEVCTL_FLR: u16 = 1 << 15;
/// Device Capabilities: function level reset capability.
const DEVCAP_FLR: u32 = 1 << 28;

/// What a write asks of the function itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Bus mastering changed to this.
    pub bus_master: Option<bool>,
    /// A function level reset was asked for.
    pub flr: bool,
}

/// The shadow.
#[derive(Clone, Debug)]
pub struct ShadowConfig {
    now: Vec<u8>,
    power_on: Vec<u8>,
    writable: Vec<u8>,
    flr: Option<(usize, u8)>,
}

impl ShadowConfig {
    /// From the config space as the lender shows it (256 or 4096 bytes). A config space that
    /// cannot be walked is refused: nobody knows what a driver would do with it.
    pub fn new(snapshot: &[u8], info: &FunctionInfo) -> Result<Self, ConfigError> {
        let view = ConfigView::new(snapshot)?;
        let capabilities = view.capabilities()?;
        let extended = view.extended_capabilities()?;
        let mut shadow = Self {
            now: snapshot.to_vec(),
            power_on: Vec::new(),
            writable: vec![0; snapshot.len()],
            flr: None,
        };
        shadow.header(info);
        for cap in &capabilities {
            shadow.capability(cap.id as u8, cap.offset.into());
        }
        shadow.hide_vpd(&capabilities);
        shadow.hide_extended(&extended);
        shadow.power_on = shadow.now.clone();
        Ok(shadow)
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        if let Some(bytes) = self.now.get_mut(at..at + 2) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn set_u32(&mut self, at: usize, value: u32) {
        if let Some(bytes) = self.now.get_mut(at..at + 4) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn u16(&self, at: usize) -> u16 {
        ConfigView::new(&self.now).map_or(0, |view| view.u16(at as u16))
    }

    fn u32(&self, at: usize) -> u32 {
        ConfigView::new(&self.now).map_or(0, |view| view.u32(at as u16))
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        if let Some(mask) = self.writable.get_mut(at..at + bits.len()) {
            mask.copy_from_slice(bits);
        }
    }

    fn header(&mut self, info: &FunctionInfo) {
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE | COMMAND_ERRORS;
        self.set_u16(COMMAND.into(), 0);
        self.allow(COMMAND.into(), &command.to_le_bytes());
        self.allow(CACHE_LINE, &[0xff]);
        self.allow(INTERRUPT_LINE, &[0xff]);
        self.now[INTERRUPT_LINE] = 0;
        // INTx cannot cross the NTB.
        self.now[INTERRUPT_PIN] = 0;
        self.set_u32(ROM, 0);
        let mut bar = 0;
        while bar < BAR_COUNT {
            bar += self.bar(bar, info.regions[bar].size);
        }
    }

    /// One BAR: its flags stay, its address bits above the size stick. Returns how many of the
    /// six registers it takes.
    fn bar(&mut self, bar: usize, size: u64) -> usize {
        let at = BAR0 + 4 * bar;
        let flags = self.u32(at);
        let wide = flags & (BAR_IO | BAR_TYPE) == BAR_TYPE_64 && bar + 1 < BAR_COUNT;
        self.set_u32(
            at,
            if size == 0 || flags & BAR_IO != 0 {
                0
            } else {
                flags & 0xf
            },
        );
        if size == 0 || flags & BAR_IO != 0 {
            return 1;
        }
        let address = !(size.next_power_of_two() - 1) & !0xf;
        self.allow(at, &(address as u32).to_le_bytes());
        if !wide {
            return 1;
        }
        self.set_u32(at + 4, 0);
        self.allow(at + 4, &((address >> 32) as u32).to_le_bytes());
        2
    }

    fn capability(&mut self, id: u8, at: usize) {
        match id {
            // Power state; the lent function itself stays in D0.
            CAP_PM => {
                let state = self.u16(at + 4) & !3;
                self.set_u16(at + 4, state);
                self.allow(at + 4, &[3]);
            }
            CAP_MSI => self.msi(at),
            // Enable and function mask; the table is the VMM's.
            CAP_MSIX => {
                let control = self.u16(at + 2) & 0x07ff;
                self.set_u16(at + 2, control);
                self.allow(at + 2, &0xc000u16.to_le_bytes());
            }
            CAP_EXP => {
                self.allow(at + 8, &(!DEVCTL_FLR).to_le_bytes());
                if self.u32(at + 4) & DEVCAP_FLR != 0 {
                    self.flr = Some((at + 9, (DEVCTL_FLR >> 8) as u8));
                }
                // Device Control 2, of capability version 2 and up.
                if self.u16(at + 2) & 0xf >= 2 {
                    self.allow(at + 0x28, &[0x1f, 0x00]);
                }
            }
            CAP_AF if self.now.get(at + 3).is_some_and(|caps| caps & 2 != 0) => {
                self.flr = self.flr.or(Some((at + 4, 1)));
            }
            _ => {}
        }
    }

    /// Enable, multiple message enable, address, data, and the mask bits where there are any
    /// (PCI 3.0 section 6.8.1).
    fn msi(&mut self, at: usize) {
        let control = self.u16(at + 2) & !0x0071;
        self.set_u16(at + 2, control);
        self.allow(at + 2, &[0x71]);
        let wide = control & 1 << 7 != 0;
        let maskable = control & 1 << 8 != 0;
        let data = if wide { at + 12 } else { at + 8 };
        self.allow(at + 4, &[0xfc, 0xff, 0xff, 0xff]);
        self.set_u32(at + 4, 0);
        if wide {
            self.allow(at + 8, &[0xff; 4]);
            self.set_u32(at + 8, 0);
        }
        self.allow(data, &[0xff; 2]);
        self.set_u16(data, 0);
        if maskable {
            self.allow(data + 4, &[0xff; 4]);
            self.set_u32(data + 4, 0);
        }
    }

    fn hide_vpd(&mut self, capabilities: &[super::Capability]) {
        let mut pointer = 0x34;
        for cap in capabilities {
            let at = usize::from(cap.offset);
            if cap.id == u16::from(CAP_VPD) {
                self.now[pointer] = self.now.get(at + 1).map_or(0, |next| next & !3);
            } else {
                pointer = at + 1;
            }
        }
    }

    /// Hidden ones are unlinked; the first cannot be, so it becomes a null capability with its
    /// pointer kept.
    fn hide_extended(&mut self, extended: &[super::Capability]) {
        let mut before: Option<usize> = None;
        for cap in extended {
            let at = usize::from(cap.offset);
            if !EXT_CAPS_HIDDEN.contains(&cap.id) {
                before = Some(at);
                continue;
            }
            let next = self.u32(at) & 0xfff0_0000;
            match before {
                Some(before) => {
                    let kept = self.u32(before) & 0x000f_ffff;
                    self.set_u32(before, kept | next);
                }
                None => {
                    self.set_u32(at, next);
                    before = Some(at);
                }
            }
        }
    }

    /// Reads; past the end reads as ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = self
                .now
                .get(offset.saturating_add(at))
                .copied()
                .unwrap_or(0xff);
        }
    }

    /// Writes what may be written; the rest is dropped.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Effects {
        let before = self.u16(COMMAND.into()) & COMMAND_MASTER;
        let mut effects = Effects::default();
        for (at, &value) in data.iter().enumerate() {
            let at = offset.saturating_add(at);
            let Some(byte) = self.now.get_mut(at) else {
                break;
            };
            let mask = self.writable[at];
            *byte = *byte & !mask | value & mask;
            effects.flr |= self
                .flr
                .is_some_and(|(flr, bit)| flr == at && value & bit != 0);
        }
        let after = self.u16(COMMAND.into()) & COMMAND_MASTER;
        if before != after {
            effects.bus_master = Some(after != 0);
        }
        effects
    }

    /// Back to power-on values.
    pub fn reset(&mut self) {
        self.now.clone_from(&self.power_on);
    }

    /// Ids and class.
    pub fn ids(&self) -> FunctionIds {
        FunctionIds {
            vendor: self.u16(0x00),
            device: self.u16(0x02),
            subsystem_vendor: self.u16(0x2c),
            subsystem_device: self.u16(0x2e),
            class: self.u32(0x08) >> 8,
            revision: self.now[0x08],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RegionInfo;
    use proptest::prelude::*;

    const MSIX: usize = 0x40;
    const EXP: usize = 0x50;

    /// An NVMe VF's shape: a 64-bit BAR of 16 KiB, MSI-X, PCIe with FLR, ATS after AER.
    fn snapshot() -> (Vec<u8>, FunctionInfo) {
        let mut bytes = vec![0; 4096];
        bytes[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
        bytes[0x04] = 0x06;
        bytes[0x06] = 0x10;
        bytes[0x08..0x0c].copy_from_slice(&[0x02, 0x02, 0x08, 0x01]);
        bytes[0x10..0x18].copy_from_slice(&0x0000_0038_0000_4004u64.to_le_bytes());
        bytes[0x34] = MSIX as u8;
        bytes[MSIX..MSIX + 4].copy_from_slice(&[0x11, EXP as u8, 0x02, 0x80]);
        bytes[EXP..EXP + 4].copy_from_slice(&[0x10, 0, 0x02, 0]);
        bytes[EXP + 4..EXP + 8].copy_from_slice(&DEVCAP_FLR.to_le_bytes());
        bytes[0x100..0x104].copy_from_slice(&0x1501_0001u32.to_le_bytes());
        bytes[0x150..0x154].copy_from_slice(&0x1600_000fu32.to_le_bytes());
        bytes[0x160..0x164].copy_from_slice(&0x0001_0003u32.to_le_bytes());
        let mut info = FunctionInfo::default();
        info.regions[0] = RegionInfo {
            size: 0x4000,
            ..RegionInfo::default()
        };
        (bytes, info)
    }

    fn shadow() -> ShadowConfig {
        let (bytes, info) = snapshot();
        ShadowConfig::new(&bytes, &info).unwrap()
    }

    fn u32_at(shadow: &ShadowConfig, at: usize) -> u32 {
        let mut bytes = [0; 4];
        shadow.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones_and_the_lenders_address_is_not_shown() {
        let mut shadow = shadow();
        assert_eq!(u32_at(&shadow, 0x10), 4);
        assert_eq!(u32_at(&shadow, 0x14), 0);
        shadow.write(0x10, &[0xff; 8]);
        assert_eq!(u32_at(&shadow, 0x10), !0x3fff | 4);
        assert_eq!(u32_at(&shadow, 0x14), u32::MAX);
        shadow.write(0x18, &[0xff; 4]);
        assert_eq!(u32_at(&shadow, 0x18), 0);
    }

    #[test]
    fn bus_mastering_is_told_when_it_changes_at_any_width() {
        let mut shadow = shadow();
        assert_eq!(shadow.write(4, &[0x06, 0x04]).bus_master, Some(true));
        assert_eq!(shadow.write(4, &[0x06]).bus_master, None);
        assert_eq!(shadow.write(2, &[0, 0, 0x02, 0]).bus_master, Some(false));
        assert_eq!(u32_at(&shadow, 0), 0x0010_1b36);
    }

    #[test]
    fn an_flr_is_told_and_does_not_stick() {
        let mut shadow = shadow();
        assert!(shadow.write(EXP + 8, &[0x10, 0x80]).flr);
        let mut control = [0; 2];
        shadow.read(EXP + 8, &mut control);
        assert_eq!(control, [0x10, 0x00]);
    }

    #[test]
    fn ats_is_hidden_and_what_follows_it_is_not() {
        let shadow = shadow();
        let view = ConfigView::new(&shadow.now).unwrap();
        assert_eq!(view.extended_capability(EXT_CAP_ATS), None);
        assert_eq!(view.extended_capability(3), Some(0x160));
    }

    #[test]
    fn msix_is_off_at_power_on_and_reset_gives_power_on_values() {
        let mut shadow = shadow();
        assert_eq!(u32_at(&shadow, MSIX) >> 16, 0x0002);
        shadow.write(MSIX + 2, &[0xff, 0xff]);
        assert_eq!(u32_at(&shadow, MSIX) >> 16, 0xc002);
        shadow.write(4, &[0x06]);
        shadow.reset();
        assert_eq!(u32_at(&shadow, MSIX) >> 16, 0x0002);
        assert_eq!(u32_at(&shadow, 4) & 0xffff, 0);
    }

    #[test]
    fn a_capability_list_in_a_loop_is_refused() {
        let (mut bytes, info) = snapshot();
        bytes[EXP + 1] = MSIX as u8;
        assert!(ShadowConfig::new(&bytes, &info).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_and_any_write_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 256..=4096),
            offset in any::<usize>(), data in proptest::collection::vec(any::<u8>(), 0..64),
            sizes in any::<[u64; 6]>(),
        ) {
            let mut info = FunctionInfo::default();
            for (region, size) in info.regions.iter_mut().zip(sizes) {
                region.size = size >> 1;
            }
            if let Ok(mut shadow) = ShadowConfig::new(&bytes, &info) {
                let ids = shadow.ids();
                shadow.write(offset, &data);
                shadow.write(offset % 4096, &data);
                prop_assert_eq!(shadow.ids(), ids);
            }
        }
    }
}
