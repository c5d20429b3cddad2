//! Names of functions for people, in the words of lspci: class, vendor, device.

use crate::daemon::vocabulary::FunctionDescription;
use pci_ids::{Class, Device, FromId, Subclass, Vendor};
use vfio_shim::model::FunctionIds;

/// `VGA compatible controller Intel Corporation Device e212`.
pub fn function_name(ids: &FunctionIds) -> String {
    format!(
        "{} {} {}",
        class_name(ids.class),
        vendor_name(ids.vendor),
        device_name(ids.vendor, ids.device)
    )
}

/// The name of a 24-bit class code, by its subclass.
pub fn class_name(class: u32) -> String {
    let [_, base, sub, _] = class.to_be_bytes();
    if let Some(subclass) = Subclass::from_cid_sid(base, sub) {
        return subclass.name().to_owned();
    }
    match <Class as FromId<u8>>::from_id(base) {
        Some(known) => format!("{} [{base:02x}{sub:02x}]", known.name()),
        None => format!("Class [{base:02x}{sub:02x}]"),
    }
}

fn vendor_name(vendor: u16) -> String {
    match <Vendor as FromId<u16>>::from_id(vendor) {
        Some(known) => known.name().to_owned(),
        None => format!("Vendor {vendor:04x}"),
    }
}

fn device_name(vendor: u16, device: u16) -> String {
    match Device::from_vid_pid(vendor, device) {
        Some(known) => known.name().to_owned(),
        None => format!("Device {device:04x}"),
    }
}

impl From<&FunctionIds> for FunctionDescription {
    fn from(ids: &FunctionIds) -> Self {
        Self {
            name: function_name(ids),
            vendor: ids.vendor.into(),
            device: ids.device.into(),
            subsystem_vendor: ids.subsystem_vendor.into(),
            subsystem_device: ids.subsystem_device.into(),
            class: format!("{:06x}", ids.class & 0xff_ffff),
            revision: format!("{:02x}", ids.revision),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(vendor: u16, device: u16, class: u32) -> FunctionIds {
        FunctionIds {
            vendor,
            device,
            class,
            ..FunctionIds::default()
        }
    }

    #[test]
    fn names_are_those_that_lspci_prints() {
        assert_eq!(
            function_name(&ids(0x8086, 0xfffe, 0x03_0000)),
            "VGA compatible controller Intel Corporation Device fffe"
        );
        assert_eq!(class_name(0x01_0802), "Non-Volatile memory controller");
        assert_eq!(class_name(0x06_8000), "Bridge");
    }

    #[test]
    fn what_nobody_has_registered_is_named_by_its_numbers() {
        assert_eq!(
            function_name(&ids(0x7ffd, 0x0001, 0xfe_0000)),
            "Class [fe00] Vendor 7ffd Device 0001"
        );
        assert_eq!(class_name(0x03_7700), "Display controller [0377]");
    }
}
