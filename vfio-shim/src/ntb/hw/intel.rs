//! Intel SPR, EMR and GNR: a gen4 NTB half opened through VFIO.

use super::gen4::{DOORBELLS, Gen4, SHARED_VECTOR, SPADS, VECTORS, WindowBar};
use crate::{
    model::{AddressSpace, Aperture, Bdf, Function, IrqIndex, Mapping, PortIova, RegionIndex},
    ntb::{NtbPort, PortError, PortInfo},
    sysfs::Sysfs,
    vfio::{Door, OpenError, OpenGroup, VfioFunction},
};
use rustix::event::{EventfdFlags, eventfd};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

const VENDOR_INTEL: u16 = 0x8086;
/// SPR and EMR share ICX's device id; ICX is revision 0x02..=0x0f (ntb_hw_gen4.h).
const DEVICE_GEN4: u16 = 0x347e;
const REVISION_ICX_MAX: u8 = 0x0f;
const DEVICE_GNR: u16 = 0x0db4;

const REGISTERS: RegionIndex = RegionIndex(0);
/// The BARs of windows 0 and 1.
const WINDOWS: [RegionIndex; 2] = [RegionIndex(2), RegionIndex(4)];

/// A port on an Intel gen4 NTB.
///
/// Dropping it masks all doorbells, closes both windows, takes the link down and stops the
/// device's own DMA, while all that is still mapped; then the fields go in their order.
pub struct IntelPort {
    gen4: Gen4,
    windows: [Arc<dyn Aperture>; 2],
    info: PortInfo,
    event: OwnedFd,
    // Last: it closes the device and then its container.
    function: VfioFunction,
}

/// A window that firmware has switched off.
struct NoWindow;

impl Aperture for NoWindow {
    fn len(&self) -> u64 {
        0
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

fn kernel(act: &'static str) -> impl FnOnce(io::Error) -> PortError {
    move |source| PortError::Kernel { act, source }
}

fn new_eventfd() -> Result<OwnedFd, PortError> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    eventfd(0, flags).map_err(|errno| kernel("make an eventfd for the interrupts")(errno.into()))
}

fn chip(vendor: u16, device: u16, revision: u8) -> Result<&'static str, PortError> {
    match (vendor, device) {
        (VENDOR_INTEL, DEVICE_GEN4) if revision > REVISION_ICX_MAX => Ok("Intel SPR/EMR"),
        (VENDOR_INTEL, DEVICE_GNR) => Ok("Intel GNR"),
        _ => Err(PortError::Unknown {
            vendor,
            device,
            revision,
        }),
    }
}

/// Which chip a function is, by its ids in sysfs.
fn chip_of(bdf: Bdf, sysfs: &Sysfs) -> Result<&'static str, PortError> {
    let ids = sysfs.ids(bdf);
    let ids = ids.map_err(|error| OpenError::Sysfs(bdf, error))?;
    chip(ids.vendor, ids.device, ids.revision)
}

impl IntelPort {
    /// Opens the NTB at `bdf`, which is bound to vfio-pci: windows closed, doorbells masked, link
    /// off. Everything is programmed anew, as opening through VFIO resets the device.
    pub fn open(bdf: Bdf, sysfs: &Sysfs) -> Result<Self, PortError> {
        // What is no NTB is not even opened.
        chip_of(bdf, sysfs)?;
        Self::open_with(bdf, sysfs, Door::default().open(bdf, sysfs)?)
    }

    /// The same with a group that somebody else has opened.
    pub fn open_with(bdf: Bdf, sysfs: &Sysfs, opened: OpenGroup) -> Result<Self, PortError> {
        // Before the device is opened, which would reset whatever it is.
        let chip = chip_of(bdf, sysfs)?;
        let function = VfioFunction::open_with(bdf, sysfs, opened)?;
        let bars = WINDOWS.map(|region| {
            let bar = function.bar_addresses()[region.0 as usize];
            let size = function.info().regions[region.0 as usize].size;
            WindowBar {
                physical: bar.physical,
                bytes: size,
            }
        });
        let registers = function.bar(REGISTERS).ok_or(PortError::Geometry {
            what: "BAR0, which holds the registers and cannot be mapped,",
            value: 0,
        })?;
        let gen4 = Gen4::start(registers, bars)?;
        let map = |index: usize| -> Result<Arc<dyn Aperture>, PortError> {
            if bars[index].bytes == 0 {
                return Ok(Arc::new(NoWindow));
            }
            function.bar(WINDOWS[index]).ok_or(PortError::Geometry {
                what: "memory window's BAR, which cannot be mapped,",
                value: WINDOWS[index].0.into(),
            })
        };
        let windows = [map(0)?, map(1)?];
        let event = Self::name_vectors(&function)?;
        function.set_bus_master(true)?;
        Ok(Self {
            gen4,
            windows,
            info: PortInfo {
                chip,
                window_bytes: bars.map(|bar| bar.bytes),
                doorbell_count: DOORBELLS,
                spad_count: SPADS,
                doorbell_ordered: true,
            },
            event,
            function,
        })
    }

    /// Names every vector that may ever be used, at once, because a set cannot grow on every
    /// kernel: the shared one gets the port's eventfd, all others a sink that nobody reads.
    fn name_vectors(function: &VfioFunction) -> Result<OwnedFd, PortError> {
        let count = function.info().irqs[IrqIndex::Msix as usize].count;
        if count < VECTORS {
            return Err(PortError::Geometry {
                what: "number of MSI-X vectors (33 are needed)",
                value: count.into(),
            });
        }
        let event = new_eventfd()?;
        let sink = new_eventfd()?;
        let trigger = |vector: u32| {
            let fd = if vector == u32::from(SHARED_VECTOR) {
                &event
            } else {
                &sink
            };
            let copy = fd.try_clone().map(Some);
            copy.map_err(kernel("copy an eventfd for the interrupts"))
        };
        let triggers = (0..VECTORS).map(trigger).collect::<Result<_, _>>()?;
        function.set_irqs(IrqIndex::Msix, 0, triggers)?;
        Ok(event)
    }

    /// The function behind the port.
    pub fn function(&self) -> &VfioFunction {
        &self.function
    }
}

impl Drop for IntelPort {
    fn drop(&mut self) {
        self.gen4.mask_all();
        for index in 0..WINDOWS.len() {
            self.window_close(index);
        }
        self.gen4.link_disable();
        if let Err(error) = self.function.set_bus_master(false) {
            tracing::error!(%error, "the NTB's bus mastering stays on until VFIO closes it");
        }
    }
}

impl NtbPort for IntelPort {
    fn info(&self) -> &PortInfo {
        &self.info
    }

    fn link_enable(&self, enable: bool) {
        if !enable {
            return self.gen4.link_disable();
        }
        if let Err(error) = self.gen4.link_enable() {
            tracing::error!(%error, "the NTB's link does not begin to train");
        }
    }

    fn link_is_up(&self) -> bool {
        self.gen4.link_is_up()
    }

    fn window_open(&self, index: usize, base: PortIova, bytes: u64) -> Result<(), PortError> {
        self.gen4.open(index, base, bytes)
    }

    fn window_close(&self, index: usize) {
        if let Err(error) = self.gen4.close(index) {
            tracing::error!(index, %error, "the NTB's window may still be open");
        }
    }

    fn window(&self, index: usize) -> Arc<dyn Aperture> {
        match self.windows.get(index) {
            Some(window) => Arc::clone(window),
            None => Arc::new(NoWindow),
        }
    }

    fn spad_read(&self, index: u32) -> u32 {
        self.gen4.spad_read(index)
    }

    fn spad_write(&self, index: u32, value: u32) {
        self.gen4.spad_write(index, value);
    }

    fn peer_spad_write(&self, index: u32, value: u32) {
        self.gen4.peer_spad_write(index, value);
    }

    fn doorbell_unmask_only(&self, bits: u64) {
        self.gen4.unmask_only(bits);
    }

    fn peer_doorbell_ring(&self, bits: u64) {
        self.gen4.ring(bits);
    }

    fn doorbell_take(&self) -> u64 {
        self.gen4.take()
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn address_space(&self) -> &dyn AddressSpace {
        self.function.address_space()
    }

    fn window_fd(&self, index: usize) -> Option<(BorrowedFd<'_>, u64)> {
        self.function.mmap_fd(*WINDOWS.get(index)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_no_ntb_is_refused_before_it_is_opened() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("bus/pci/devices/0000:01:00.0");
        std::fs::create_dir_all(&device).unwrap();
        let ids = [
            ("vendor", "0x1b36"),
            ("device", "0x0010"),
            ("subsystem_vendor", "0x1af4"),
            ("subsystem_device", "0x1100"),
            ("class", "0x010802"),
            ("revision", "0x02"),
        ];
        for (name, text) in ids {
            std::fs::write(device.join(name), text).unwrap();
        }
        let sysfs = Sysfs::new(root.path());
        let bdf = "0000:01:00.0".parse().unwrap();
        let refused = IntelPort::open(bdf, &sysfs).map(drop);
        assert!(
            matches!(refused, Err(PortError::Unknown { .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn only_chips_of_the_gen4_map_are_taken() {
        assert!(chip(0x8086, 0x347e, 0x10).is_ok());
        assert!(chip(0x8086, 0x0db4, 0).is_ok());
        for (vendor, device, revision) in [
            (0x8086, 0x347e, 0x0f),
            (0x8086, 0x201c, 0),
            (0x1022, 0x347e, 0x10),
        ] {
            assert!(matches!(
                chip(vendor, device, revision),
                Err(PortError::Unknown { .. })
            ));
        }
    }
}
