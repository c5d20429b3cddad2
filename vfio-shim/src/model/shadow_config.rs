//! The config space that a guest sees of a lent function: a snapshot, and which bits of it are stored.
//!
//! Nothing here reaches the device. What a guest writes is filtered much as the kernel's vfio-pci
//! does (drivers/vfio/pci/vfio_pci_config.c), stored, and told as [`Effects`]; who owns the
//! function acts on those.

use super::{
    BAR_COUNT, CAP_EXP, CAP_MSI, CAP_MSIX, CAP_PM, COMMAND, COMMAND_INTX_DISABLE, COMMAND_MASTER,
    COMMAND_MEMORY, Capability, ConfigError, ConfigView, EXT_CAP_ATS, EXT_CAP_PASID, EXT_CAP_PRI,
    EXT_CAP_REBAR, EXT_CAP_SRIOV, FunctionIds, FunctionInfo,
};

const STATUS: u16 = 0x06;
const STATUS_CAP_LIST: u16 = 1 << 4;
const CACHE_LINE: u16 = 0x0c;
const HEADER_TYPE: u16 = 0x0e;
const BAR_FIRST: u16 = 0x10;
const CARDBUS_CIS: u16 = 0x28;
const ROM: u16 = 0x30;
const CAP_POINTER: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;

/// BAR flags (PCI 3.0 section 6.2.5.1).
const BAR_IO: u32 = 1;
const BAR_64: u32 = 1 << 2;
const BAR_FLAGS: u32 = 0xf;

const MSI_CONTROL: u16 = 2;
const MSI_ENABLE: u16 = 1;
const MSI_MME: u16 = 7 << 4;
const MSI_64: u16 = 1 << 7;
const MSI_MASKABLE: u16 = 1 << 8;

const MSIX_CONTROL: u16 = 2;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;

const PM_CAPS: u16 = 2;
const PM_CAPS_PME: u16 = 0x1f << 11;
const PM_CONTROL: u16 = 4;
const PM_STATE: u16 = 3;
const PM_NO_SOFT_RESET: u16 = 1 << 3;

/// PCI Express capability (PCIe 6.0 section 7.5.3).
const EXP_DEVICE_CAPS: u16 = 4;
const EXP_FLR: u32 = 1 << 28;
const EXP_DEVICE_CONTROL: u16 = 8;
const EXP_INITIATE_FLR: u16 = 1 << 15;
const EXP_DEVICE_CONTROL_DEFAULT: u16 = 0x2810;
const EXP_DEVICE_STATUS: u16 = 10;
const EXP_DEVICE_CONTROL_2: u16 = 0x28;
/// Completion timeout value and its disable bit.
const EXP_DEVICE_CONTROL_2_STORED: u16 = 0x1f;

/// Resizable BAR (PCIe 6.0 section 7.8.6): entries of capability and control words.
const REBAR_CAPS: u16 = 4;
const REBAR_CONTROL: u16 = 8;
const REBAR_STRIDE: u16 = 8;

/// Standard capabilities that a guest could only hang in: VPD, which needs a live register; AF,
/// a second way to reset; enhanced allocation, which would replace the BARs.
const HIDDEN: [u16; 3] = [0x03, 0x13, 0x14];
/// Extended ones that must not be used from a guest: translated and tagged DMA, virtual functions
/// of its own, and what needs live registers of the device or of the port above it (ARI, MR-IOV,
/// TPH, VF resizable BAR, DPC, DOE, IDE).
const HIDDEN_EXTENDED: [u16; 11] = [
    EXT_CAP_ATS,
    EXT_CAP_SRIOV,
    EXT_CAP_PRI,
    EXT_CAP_PASID,
    0x0e,
    0x11,
    0x17,
    0x24,
    0x1d,
    0x2e,
    0x30,
];

/// Why a snapshot cannot be shown to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShadowError {
    /// It cannot be walked.
    #[error("the function's config space makes no sense")]
    Config(#[from] ConfigError),
    /// It is a bridge.
    #[error("the function's header type is {0}; only endpoints (0) can be lent")]
    HeaderType(u8),
    /// A BAR that cannot be.
    #[error("BAR {bar} of {bytes:#x} bytes cannot be shown in config space")]
    Bar {
        /// Its number.
        bar: usize,
        /// Its size.
        bytes: u64,
    },
}

/// What a write asked for, beyond being stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Bus mastering was turned on or off.
    pub bus_master: Option<bool>,
    /// Memory decoding was turned on or off.
    pub memory: Option<bool>,
    /// A function level reset was asked for. The owner resets the function and the shadow.
    pub flr: bool,
    /// MSI was turned on or off.
    pub msi_enable: Option<bool>,
    /// MSI-X was turned on or off.
    pub msix_enable: Option<bool>,
    /// All vectors of MSI-X were masked or unmasked.
    pub msix_mask_all: Option<bool>,
    /// MSI's mask register was changed to this.
    pub msi_mask: Option<u32>,
}

/// Where the registers are that have effects.
#[derive(Clone, Copy, Debug, Default)]
struct Places {
    msi: Option<u16>,
    msi_mask: Option<u16>,
    msix: Option<u16>,
    /// The device control register, if it has an FLR.
    flr: Option<u16>,
}

/// A guest's view of a function's config space.
#[derive(Clone, Debug)]
pub struct ShadowConfig {
    bytes: Vec<u8>,
    power_on: Vec<u8>,
    /// The bits that are stored.
    stored: Vec<u8>,
    places: Places,
    ids: FunctionIds,
}

/// The registers that effects are told from, before and after a write.
#[derive(PartialEq, Eq)]
struct Watched {
    command: u16,
    msi: bool,
    msix: u16,
    msi_mask: u32,
}

impl ShadowConfig {
    /// From the lender's view of the function, and what the function is. The values are those
    /// after power-on: nothing enabled, no addresses assigned.
    pub fn new(snapshot: &[u8], info: &FunctionInfo) -> Result<Self, ShadowError> {
        let view = ConfigView::new(snapshot)?;
        let header = view.u8(HEADER_TYPE) & 0x7f;
        if header != 0 {
            return Err(ShadowError::HeaderType(header));
        }
        let standard = view.capabilities()?;
        let extended = view.extended_capabilities()?;
        let mut this = Self {
            bytes: snapshot.to_vec(),
            power_on: Vec::new(),
            stored: vec![0; snapshot.len()],
            places: Places::default(),
            ids: info.ids,
        };
        this.header(&standard);
        this.bars(info)?;
        this.link_standard(&standard);
        this.link_extended(&extended);
        for cap in &standard {
            match u8::try_from(cap.id) {
                Ok(CAP_PM) => this.pm(cap.offset),
                Ok(CAP_MSI) if this.places.msi.is_none() => this.msi(cap.offset),
                Ok(CAP_MSIX) if this.places.msix.is_none() => this.msix(cap.offset),
                Ok(CAP_EXP) => this.express(cap.offset, info.resettable),
                _ => {}
            }
        }
        let rebar = extended.iter().filter(|cap| cap.id == EXT_CAP_REBAR);
        rebar.for_each(|cap| this.rebar(cap.offset));
        this.power_on = this.bytes.clone();
        Ok(this)
    }

    /// The ids that it shows.
    pub fn ids(&self) -> FunctionIds {
        self.ids
    }

    /// How many bytes it has; past them everything reads as ones.
    pub fn byte_count(&self) -> usize {
        self.bytes.len()
    }

    /// Reads; any offset, any length.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        // No offset that is a u64 wraps: past the end is past the end.
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0xff);
        if let Some(bytes) = self.bytes.get(from..) {
            let len = bytes.len().min(data.len());
            data[..len].copy_from_slice(&bytes[..len]);
        }
    }

    /// Writes; any offset, any length. What is not stored is dropped.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effects {
        let before = self.watched();
        let mut flr = false;
        let flr_byte = self.places.flr.map(|at| usize::from(at) + 1);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let all = self.bytes.iter_mut().zip(&self.stored).enumerate();
        for ((at, (old, stored)), byte) in all.skip(from).zip(data) {
            *old = *old & !stored | byte & stored;
            flr |= Some(at) == flr_byte && byte & (EXP_INITIATE_FLR >> 8) as u8 != 0;
        }
        self.clamp_msi();
        let after = self.watched();
        let changed = |was: bool, is: bool| (was != is).then_some(is);
        let bit = |watched: &Watched, bit: u16| watched.command & bit != 0;
        let msix = |watched: &Watched, bit: u16| watched.msix & bit != 0;
        Effects {
            bus_master: changed(bit(&before, COMMAND_MASTER), bit(&after, COMMAND_MASTER)),
            memory: changed(bit(&before, COMMAND_MEMORY), bit(&after, COMMAND_MEMORY)),
            flr,
            msi_enable: changed(before.msi, after.msi),
            msix_enable: changed(msix(&before, MSIX_ENABLE), msix(&after, MSIX_ENABLE)),
            msix_mask_all: changed(msix(&before, MSIX_MASK_ALL), msix(&after, MSIX_MASK_ALL)),
            msi_mask: (before.msi_mask != after.msi_mask).then_some(after.msi_mask),
        }
    }

    /// Back to the values after power-on.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.power_on);
    }

    fn view(&self) -> ConfigView<'_> {
        ConfigView::of_any_length(&self.bytes)
    }

    fn watched(&self) -> Watched {
        let view = self.view();
        let control = |at: Option<u16>, offset| at.map_or(0, |at| view.u16(at + offset));
        Watched {
            command: view.u16(COMMAND),
            msi: control(self.places.msi, MSI_CONTROL) & MSI_ENABLE != 0,
            msix: control(self.places.msix, MSIX_CONTROL),
            msi_mask: self.places.msi_mask.map_or(0, |at| view.u32(at)),
        }
    }

    /// A guest can ask for no more MSI vectors than there are.
    fn clamp_msi(&mut self) {
        let Some(at) = self.places.msi.map(|at| at + MSI_CONTROL) else {
            return;
        };
        let control = self.view().u16(at);
        let capable = control >> 1 & 7;
        if (control & MSI_MME) >> 4 > capable {
            self.set16(at, control & !MSI_MME | capable << 4);
        }
    }

    fn set8(&mut self, at: u16, value: u8) {
        if let Some(byte) = self.bytes.get_mut(at as usize) {
            *byte = value;
        }
    }

    fn set16(&mut self, at: u16, value: u16) {
        let [low, high] = value.to_le_bytes();
        self.set8(at, low);
        self.set8(at.saturating_add(1), high);
    }

    fn set32(&mut self, at: u16, value: u32) {
        self.set16(at, value as u16);
        self.set16(at.saturating_add(2), (value >> 16) as u16);
    }

    fn store16(&mut self, at: u16, bits: u16) {
        for (at, byte) in (at as usize..).zip(bits.to_le_bytes()) {
            if let Some(stored) = self.stored.get_mut(at) {
                *stored |= byte;
            }
        }
    }

    fn store32(&mut self, at: u16, bits: u32) {
        self.store16(at, bits as u16);
        self.store16(at.saturating_add(2), (bits >> 16) as u16);
    }

    fn header(&mut self, capabilities: &[Capability]) {
        // A VF's own registers hold no ids (all ones) and no class that differs from its PF's.
        let ids = self.ids;
        self.set16(0x00, ids.vendor);
        self.set16(0x02, ids.device);
        self.set32(0x08, ids.class << 8 | u32::from(ids.revision));
        self.set16(0x2c, ids.subsystem_vendor);
        self.set16(0x2e, ids.subsystem_device);
        self.set16(COMMAND, 0);
        self.store16(
            COMMAND,
            COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE,
        );
        self.set16(
            STATUS,
            if capabilities.is_empty() {
                0
            } else {
                STATUS_CAP_LIST
            },
        );
        // Cache line size is stored; latency timer, header type (single function) and BIST are 0.
        self.set32(CACHE_LINE, 0);
        self.store16(CACHE_LINE, 0xff);
        self.set32(CARDBUS_CIS, 0);
        self.set32(ROM, 0);
        self.set32(0x38, 0);
        // No INTx: it is level triggered and cannot cross an NTB. The line is a note for software.
        self.set8(INTERRUPT_LINE, 0);
        self.store16(INTERRUPT_LINE, 0xff);
        self.set8(INTERRUPT_PIN, 0);
    }

    /// A BAR stores the address bits above its size, so sizing it (write ones, read) just works.
    fn bars(&mut self, info: &FunctionInfo) -> Result<(), ShadowError> {
        let mut bar = 0;
        while bar < BAR_COUNT {
            let at = BAR_FIRST + 4 * bar as u16;
            let flags = self.view().u32(at) & BAR_FLAGS;
            let bytes = info.regions[bar].size;
            self.set32(at, 0);
            if bytes == 0 || flags & BAR_IO != 0 {
                bar += 1;
                continue;
            }
            let refused = ShadowError::Bar { bar, bytes };
            let size = bytes.max(16).checked_next_power_of_two().ok_or(refused)?;
            let upper_is_free = bar + 1 < BAR_COUNT && info.regions[bar + 1].size == 0;
            // A VF's own BARs read as zero, flags and all, where nobody has filled them in.
            let flags = if flags == 0 && upper_is_free {
                BAR_64
            } else {
                flags
            };
            let wide = flags & BAR_64 != 0;
            if (wide && !upper_is_free) || (!wide && size > 1 << 31) {
                return Err(refused);
            }
            self.set32(at, flags);
            let address_bits = !(size - 1);
            self.store32(at, address_bits as u32);
            if wide {
                self.set32(at + 4, 0);
                self.store32(at + 4, (address_bits >> 32) as u32);
                bar += 1;
            }
            bar += 1;
        }
        Ok(())
    }

    fn link_standard(&mut self, capabilities: &[Capability]) {
        let mut pointer = CAP_POINTER;
        for cap in capabilities {
            if HIDDEN.contains(&cap.id) {
                self.set16(cap.offset, 0);
                continue;
            }
            self.set8(pointer, cap.offset as u8);
            pointer = cap.offset + 1;
        }
        self.set8(pointer, 0);
        if pointer == CAP_POINTER {
            self.set16(STATUS, 0);
        }
    }

    fn link_extended(&mut self, capabilities: &[Capability]) {
        // From the last to the first, so that the next one shown is known.
        let mut next = 0;
        for (index, cap) in capabilities.iter().enumerate().rev() {
            let header = self.view().u32(cap.offset);
            // The list begins at 0x100 whatever is there: a hidden first one becomes a null
            // capability (PCIe 6.0 section 7.9.28) that only links.
            match HIDDEN_EXTENDED.contains(&cap.id) {
                true if index == 0 => self.set32(cap.offset, next),
                true => self.set32(cap.offset, 0),
                false => {
                    self.set32(cap.offset, header & 0xf_ffff | next);
                    next = u32::from(cap.offset) << 20;
                }
            }
        }
    }

    fn pm(&mut self, at: u16) {
        let caps = self.view().u16(at + PM_CAPS);
        self.set16(at + PM_CAPS, caps & !PM_CAPS_PME);
        // Only the shadow goes to D3, so nothing is lost on the way back to D0.
        self.set32(at + PM_CONTROL, PM_NO_SOFT_RESET.into());
        self.store16(at + PM_CONTROL, PM_STATE);
    }

    fn msi(&mut self, at: u16) {
        let control = self.view().u16(at + MSI_CONTROL);
        self.places.msi = Some(at);
        self.set16(at + MSI_CONTROL, control & !(MSI_ENABLE | MSI_MME));
        self.store16(at + MSI_CONTROL, MSI_ENABLE | MSI_MME);
        self.set32(at + 4, 0);
        self.store32(at + 4, !3);
        let mut data = at + 8;
        if control & MSI_64 != 0 {
            self.set32(data, 0);
            self.store32(data, u32::MAX);
            data += 4;
        }
        self.set16(data, 0);
        self.store16(data, u16::MAX);
        if control & MSI_MASKABLE != 0 {
            self.places.msi_mask = Some(data + 4);
            self.set32(data + 4, 0);
            self.store32(data + 4, u32::MAX);
            self.set32(data + 8, 0);
        }
    }

    fn msix(&mut self, at: u16) {
        let control = self.view().u16(at + MSIX_CONTROL);
        self.places.msix = Some(at);
        self.set16(at + MSIX_CONTROL, control & 0x07ff);
        self.store16(at + MSIX_CONTROL, MSIX_ENABLE | MSIX_MASK_ALL);
    }

    fn express(&mut self, at: u16, resettable: bool) {
        let caps = self.view().u32(at + EXP_DEVICE_CAPS);
        let control = self.view().u16(at + EXP_DEVICE_CONTROL);
        if !resettable {
            self.set32(at + EXP_DEVICE_CAPS, caps & !EXP_FLR);
        } else if caps & EXP_FLR != 0 {
            self.places.flr = Some(at + EXP_DEVICE_CONTROL);
        }
        // A VF's device control is 0 but for the FLR bit; others have the default of the standard.
        let default = if control == 0 {
            0
        } else {
            EXP_DEVICE_CONTROL_DEFAULT
        };
        self.set16(at + EXP_DEVICE_CONTROL, default);
        self.store16(at + EXP_DEVICE_CONTROL, !EXP_INITIATE_FLR);
        // No errors and nothing pending, ever: they are the host's.
        self.set16(at + EXP_DEVICE_STATUS, 0);
        let version = self.view().u16(at + 2) & 0xf;
        if version >= 2 {
            self.set16(at + EXP_DEVICE_CONTROL_2, 0);
            self.store16(at + EXP_DEVICE_CONTROL_2, EXP_DEVICE_CONTROL_2_STORED);
        }
    }

    /// Read only, and offering the one size that the BAR has.
    fn rebar(&mut self, at: u16) {
        let entries = (self.view().u32(at + REBAR_CONTROL) >> 5 & 7).min(BAR_COUNT as u32) as u16;
        for entry in 0..entries {
            let (caps, control) = (
                at.saturating_add(REBAR_CAPS + entry * REBAR_STRIDE),
                at.saturating_add(REBAR_CONTROL + entry * REBAR_STRIDE),
            );
            let now = self.view().u32(control) & 0xffff;
            // Size n is 1 MiB << n; bit n + 4 of the capability says that it is supported.
            let size = now >> 8 & 0x3f;
            self.set32(caps, 1u32.checked_shl(size + 4).unwrap_or(0));
            self.set32(control, now);
        }
    }
}

#[cfg(test)]
#[path = "shadow_config_tests.rs"]
mod tests;
