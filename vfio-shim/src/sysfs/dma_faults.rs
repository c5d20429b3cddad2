//! DMA that the IOMMU has refused, by function: the kernel's log is the only place where that is told.

use super::KernelLog;
use crate::model::Bdf;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Faults of watched functions, as far as the kernel's log tells them: it keeps no more of a flood
/// than it has room for, and one line may stand for several. It is read when somebody asks.
pub struct DmaFaults(Mutex<Seen>);

struct Seen {
    log: KernelLog,
    counts: BTreeMap<Bdf, u64>,
}

impl DmaFaults {
    /// By this log, from now on.
    pub fn of(log: KernelLog) -> Self {
        let counts = BTreeMap::new();
        Self(Mutex::new(Seen { log, counts }))
    }

    /// Counts a function's from now on; what was told before is another tenant's.
    pub fn begin(&self, bdf: Bdf) {
        let mut seen = self.looked_at();
        seen.counts.insert(bdf, 0);
    }

    /// How many were told of a function since it began; none, if it did not.
    pub fn seen(&self, bdf: Bdf) -> Option<u64> {
        self.looked_at().counts.get(&bdf).copied()
    }

    fn looked_at(&self) -> MutexGuard<'_, Seen> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Seen { log, counts } = &mut *seen;
        log.each(|line| {
            for (bdf, count) in counts.iter_mut() {
                *count += u64::from(is_fault_of(line, *bdf));
            }
        });
        seen
    }
}

/// Intel's words (`dmar.c`) have the name in brackets, AMD's (`amd/iommu.c`) behind `device=` or
/// before the words; older kernels leave the domain out.
fn is_fault_of(line: &str, bdf: Bdf) -> bool {
    let whole = bdf.to_string();
    let Some((_, short)) = whole.split_once(':') else {
        return false;
    };
    let intel = line.contains("DMAR:")
        && line.contains("fault addr")
        && (line.contains(&format!("[{whole}]")) || line.contains(&format!("[{short}]")));
    let amd = line.contains("IO_PAGE_FAULT")
        && (line.contains(&format!("{whole}: AMD-Vi:"))
            || line.contains(&format!("device={short} "))
            || line.contains(&format!("device={whole} ")));
    intel || amd
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    const INTEL: &str = "3,811,12,-;DMAR: [DMA Write NO_PASID] Request device [0000:01:00.1] \
                         fault addr 0xc0000000 [fault reason 0x05] PTE Write access is not set";

    #[test]
    fn faults_are_counted_for_the_function_that_they_name_and_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kmsg");
        let mut file = File::create(&path).unwrap();
        let faults = DmaFaults::of(KernelLog::open(&path).unwrap());
        let [one, other] = ["0000:01:00.1", "0000:01:00.2"].map(|bdf| bdf.parse().unwrap());
        assert_eq!(faults.seen(one), None);
        writeln!(file, "{INTEL}").unwrap();
        faults.begin(one);
        faults.begin(other);
        assert_eq!(faults.seen(one), Some(0), "a former tenant's");
        writeln!(file, "{INTEL}\n{INTEL}").unwrap();
        writeln!(file, "6,9,9,-;pci 0000:01:00.2: enabling device").unwrap();
        assert_eq!([one, other].map(|bdf| faults.seen(bdf)), [Some(2), Some(0)]);
        faults.begin(one);
        assert_eq!(faults.seen(one), Some(0));
    }

    #[test]
    fn words_of_both_makers_name_the_function() {
        let bdf = "0000:4a:00.1".parse().unwrap();
        let amd = "AMD-Vi: Event logged [IO_PAGE_FAULT";
        for line in [
            "DMAR: [DMA Read NO_PASID] Request device [4a:00.1] fault addr 0x0 [fault reason 0x06]"
                .to_owned(),
            format!("vfio-pci 0000:4a:00.1: {amd} domain=0x0000 address=0x1000 flags=0x0020]"),
            format!("{amd} device=4a:00.1 domain=0x0000 address=0x1000 flags=0x0020]"),
            format!("{amd} device=0000:4a:00.1 domain=0x0000 address=0x1000 flags=0x0020]"),
        ] {
            assert!(is_fault_of(&line, bdf), "{line}");
            assert!(!is_fault_of(&line.replace("00.1", "00.2"), bdf), "{line}");
            assert!(
                !is_fault_of(&line.replace("4a:00.1", "4a:00.10"), bdf),
                "{line}"
            );
        }
        assert!(!is_fault_of("DMAR: IOMMU enabled [4a:00.1]", bdf));
    }
}
