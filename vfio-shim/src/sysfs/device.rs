//! One PCI function as sysfs shows it: ids, driver, IOMMU group, BAR addresses, reset.

use super::{Sysfs, SysfsError, found, io_error, link_name, read, read_number};
use crate::model::{BAR_COUNT, Bdf, FunctionIds, Span};
use std::fs;

/// Where a BAR lies in physical address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BarAddress {
    /// Its first address; 0 = not assigned.
    pub physical: u64,
    /// Its size.
    pub bytes: u64,
}

/// A member of an IOMMU group, and its driver.
pub type FunctionLookup = (Bdf, Option<String>);

impl Sysfs {
    /// Whether there is such a function.
    pub fn exists(&self, bdf: Bdf) -> bool {
        self.function_path(bdf).is_dir()
    }

    /// Refuses a function that is not there.
    pub fn check_exists(&self, bdf: Bdf) -> Result<(), SysfsError> {
        match self.exists(bdf) {
            true => Ok(()),
            false => Err(SysfsError::NoFunction(bdf)),
        }
    }

    /// The driver that has it.
    pub fn driver(&self, bdf: Bdf) -> Result<Option<String>, SysfsError> {
        self.check_exists(bdf)?;
        link_name(&self.function_path(bdf).join("driver"))
    }

    /// Its ids and class.
    pub fn ids(&self, bdf: Bdf) -> Result<FunctionIds, SysfsError> {
        self.check_exists(bdf)?;
        let number = |name: &str| read_number(&self.function_path(bdf).join(name));
        Ok(FunctionIds {
            vendor: number("vendor")? as u16,
            device: number("device")? as u16,
            subsystem_vendor: number("subsystem_vendor")? as u16,
            subsystem_device: number("subsystem_device")? as u16,
            class: number("class")? as u32 & 0xff_ffff,
            revision: number("revision")? as u8,
        })
    }

    /// Its IOMMU group.
    pub fn iommu_group(&self, bdf: Bdf) -> Result<u32, SysfsError> {
        self.check_exists(bdf)?;
        let name = link_name(&self.function_path(bdf).join("iommu_group"))?;
        let number = name.and_then(|name| name.parse().ok());
        number.ok_or(SysfsError::NoGroup(bdf))
    }

    /// All functions of an IOMMU group, sorted, and their drivers.
    pub fn group_members(&self, group: u32) -> Result<Vec<FunctionLookup>, SysfsError> {
        let path = self.path(format!("kernel/iommu_groups/{group}/devices"));
        let mut members = Vec::new();
        for entry in fs::read_dir(&path).map_err(io_error("list", &path))? {
            let entry = entry.map_err(io_error("list", &path))?;
            // A group may hold devices that are not PCI; they have no address of ours.
            if let Some(bdf) = entry.file_name().to_str().and_then(|n| n.parse().ok()) {
                members.push((bdf, self.driver(bdf)?));
            }
        }
        members.sort();
        Ok(members)
    }

    /// The other members of a function's group for a message: `0000:01:00.1 (nvme)`.
    pub(crate) fn group_in_words(&self, bdf: Bdf, group: u32) -> String {
        let Ok(members) = self.group_members(group) else {
            return format!("see /sys/kernel/iommu_groups/{group}/devices");
        };
        let others = members.iter().filter(|(other, _)| *other != bdf);
        let words: Vec<_> = others
            .map(|(other, driver)| {
                format!("{other} ({})", driver.as_deref().unwrap_or("no driver"))
            })
            .collect();
        words.join(", ")
    }

    /// Where its BARs lie, from `resource`: a line `START END FLAGS` in hex per resource.
    pub fn bars(&self, bdf: Bdf) -> Result<[BarAddress; BAR_COUNT], SysfsError> {
        self.check_exists(bdf)?;
        let path = self.function_path(bdf).join("resource");
        let text = read(&path)?;
        let mut bars = [BarAddress::default(); BAR_COUNT];
        for (bar, line) in bars.iter_mut().zip(text.lines()) {
            *bar = parse_resource(line).ok_or_else(|| SysfsError::Content {
                path: path.clone(),
                what: "list of resources",
                text: line.chars().take(64).collect(),
            })?;
        }
        Ok(bars)
    }

    /// Whether the kernel knows a way to reset it.
    pub fn has_reset(&self, bdf: Bdf) -> Result<bool, SysfsError> {
        self.check_exists(bdf)?;
        let path = self.function_path(bdf);
        // Linux 5.15 and later; before there is only `reset`.
        if let Some(methods) = found(read(&path.join("reset_method")))? {
            return Ok(!methods.is_empty());
        }
        Ok(path.join("reset").exists())
    }
}

fn parse_resource(line: &str) -> Option<BarAddress> {
    let mut words = line.split_whitespace().map(|word| {
        let hex = word.strip_prefix("0x")?;
        u64::from_str_radix(hex, 16).ok()
    });
    let (start, last, flags) = (words.next()??, words.next()??, words.next()??);
    if flags == 0 {
        return Some(BarAddress::default());
    }
    Some(BarAddress {
        physical: start,
        bytes: Span::from_inclusive(start, last)?.len(),
    })
}
