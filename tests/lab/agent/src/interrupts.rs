//! The interrupts of one PCI device as /proc/interrupts counts them.

use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;

#[derive(Serialize)]
struct Line {
    irq: u32,
    count: u64,
    name: String,
}

/// Prints a JSON array, one entry for each MSI or MSI-X vector that the kernel gave the device.
pub fn print(bdf: &str) -> Result<()> {
    let dir = format!("/sys/bus/pci/devices/{bdf}/msi_irqs");
    let mut irqs = Vec::new();
    // A device without MSI has no such folder.
    for entry in fs::read_dir(&dir).into_iter().flatten() {
        irqs.push(entry?.file_name().to_string_lossy().parse::<u32>()?);
    }
    irqs.sort_unstable();
    let table = fs::read_to_string("/proc/interrupts").context("cannot read /proc/interrupts")?;
    let lines: Vec<Line> = table
        .lines()
        .filter_map(parse)
        .filter(|line| irqs.contains(&line.irq))
        .collect();
    println!("{}", serde_json::to_string(&lines)?);
    Ok(())
}

/// ` 24:   12   3   IR-PCI-MSIX-0000:01:00.1   0-edge   nvme0q0`
fn parse(line: &str) -> Option<Line> {
    let (irq, rest) = line.split_once(':')?;
    let mut count = 0;
    let mut words = rest.split_whitespace().peekable();
    while let Some(one) = words.peek().and_then(|word| word.parse::<u64>().ok()) {
        count += one;
        words.next();
    }
    Some(Line {
        irq: irq.trim().parse().ok()?,
        count,
        name: words.collect::<Vec<_>>().join(" "),
    })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn counts_of_all_processors_are_summed() {
        let line = parse(" 24:   12   3   IR-PCI-MSIX-0000:01:00.1   0-edge   nvme0q0").unwrap();
        assert_eq!((line.irq, line.count), (24, 15));
        assert!(line.name.ends_with("nvme0q0"));
        assert!(parse("NMI:  1  2  Non-maskable interrupts").is_none());
    }
}
