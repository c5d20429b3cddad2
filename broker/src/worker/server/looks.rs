//! Looks at the memory of one lease's VMMs: a few may stand still in the kernel, and no more are begun.

use crate::{
    daemon::vocabulary::{ErrorCode, VerbError},
    ipc::Check,
};
use std::sync::Arc;
use vfio_shim::model::Span;
use vmm_glue::vfio_user::memory_check::{Inode, MemoryError, MemoryMaps};

/// How many looks without an answer one lease may leave behind. Each of them goes on in the process
/// that looks, which has room for so many of all tenants, for as long as the VMM can make the kernel
/// wait.
const UNANSWERED_MAX: u32 = 2;

/// Those of one lease, whatever VMMs it has one after the other.
pub(super) struct Looks {
    maps: Arc<dyn MemoryMaps>,
    unanswered: u32,
}

impl Looks {
    pub(super) fn new(maps: Arc<dyn MemoryMaps>) -> Self {
        let unanswered = 0;
        Self { maps, unanswered }
    }

    /// Whether the process maps these ranges shared.
    pub(super) fn check(&mut self, check: Check) -> Result<(), MemoryError> {
        if self.unanswered >= UNANSWERED_MAX {
            return Err(MemoryError::Told(format!(
                "{UNANSWERED_MAX} looks at the memory of VMMs of this lease had no answer, its \
                 limit: return the function, and borrow it again"
            )));
        }
        let file = |(device, number, range): (u64, u64, Span)| (Inode { device, number }, range);
        let ranges: Vec<_> = check.ranges.into_iter().map(file).collect();
        let shared = self.maps.check_shared(check.pid, &ranges);
        if matches!(shared, Err(MemoryError::Unanswered(_))) {
            self.unanswered += 1;
        }
        shared
    }
}

/// As the processes say it that look for a port.
impl From<VerbError> for MemoryError {
    fn from(error: VerbError) -> Self {
        match error.code {
            ErrorCode::Timeout => Self::Unanswered(error.text),
            _ => Self::Told(error.text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Looks that stand still, but at process 1; which processes were looked at.
    #[derive(Debug, Default)]
    struct Standing(Mutex<Vec<i32>>);

    impl MemoryMaps for Standing {
        fn check_shared(&self, pid: i32, _: &[(Inode, Span)]) -> Result<(), MemoryError> {
            self.0.lock().unwrap().push(pid);
            match pid {
                1 => Err(MemoryError::Unseen),
                _ => Err(MemoryError::Unanswered("nothing within 5 s".into())),
            }
        }
    }

    #[test]
    fn lease_whose_vmms_make_looks_stand_still_has_no_more_of_them_and_another_has_its_own() {
        let standing = Arc::new(Standing::default());
        let mut lease = Looks::new(standing.clone());
        let look = |lease: &mut Looks, pid| {
            let ranges = Vec::new();
            lease.check(Check { pid, ranges }).unwrap_err().to_string()
        };
        // A refusal is an answer.
        for _ in 0..9 {
            look(&mut lease, 1);
        }
        for pid in 2..2 + UNANSWERED_MAX as i32 {
            assert_eq!(look(&mut lease, pid), "nothing within 5 s");
        }
        let looked = standing.0.lock().unwrap().len();
        for pid in [1, 99] {
            assert!(look(&mut lease, pid).contains("return the function"));
        }
        assert_eq!(standing.0.lock().unwrap().len(), looked);
        let mut other = Looks::new(standing);
        assert_eq!(look(&mut other, 7), "nothing within 5 s");
    }
}
