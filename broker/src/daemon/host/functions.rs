//! The functions of a host, as the lender's verbs see them: the kernel's here, soft ones elsewhere.

use super::refuse;
use crate::daemon::refusals::{from_bind, from_lend, from_open, from_sysfs};
use crate::daemon::vocabulary::{ErrorCode, VerbError};
use crate::keeper::{Keeper, Stopper};
use crate::warden::Warden;
use std::any::Any;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use vfio_shim::model::{Bdf, ConfigView, Function, FunctionIds};
use vfio_shim::path::{Keep, Orphaned, ResetWord, ScrubPlan, StopFunction, words};
use vfio_shim::sysfs::{BindGuard, DmaFaults, KernelLog, Sysfs, SysfsError, XE_CLEARED_MS};
use vfio_shim::vfio::VfioFunction;
use vmm_glue::vfio_user::memory_check::MemoryMaps;

/// Where the functions of a host come from.
pub trait Functions: Send + Sync {
    /// Who sees whether a VMM's memory is shared, where that comes with the functions.
    fn memory_maps(&self) -> Option<Arc<dyn MemoryMaps>> {
        None
    }
    /// Refused in words where there is no such function.
    fn check_exists(&self, bdf: Bdf) -> Result<(), VerbError>;
    /// What a function is.
    fn ids(&self, bdf: Bdf) -> Result<FunctionIds, VerbError>;
    /// Refused in words where it cannot be lent.
    fn check_lendable(&self, bdf: Bdf) -> Result<(), VerbError>;
    /// How many DMAs of it the kernel's log says were refused, since the newest lease's path was
    /// opened; none, where that cannot be read.
    fn dma_faults_seen(&self, _: Bdf) -> Option<u64> {
        None
    }
    /// Opens it for lending.
    fn open(&self, bdf: Bdf) -> Result<OpenFunction, VerbError>;
}

/// An open function.
pub struct OpenFunction {
    /// The function.
    pub function: Arc<dyn Function>,
    /// Its device serial number; 0 = it has none.
    pub serial: u64,
    /// What comes with it; dropped after it is closed.
    pub keep: Keep,
}

/// What is to be undone when a function is closed.
type Kept = Option<Box<dyn Any + Send>>;

/// The functions of this machine: sysfs and VFIO, by this process's own rights or by a keeper's.
pub(super) struct KernelFunctions {
    sysfs: Sysfs,
    keeper: Option<Keeper>,
    /// Whoever opens the kernel's log, where this process may not.
    warden: Option<Arc<Warden>>,
    /// Read from when the first function was opened; none, where it cannot be.
    faults: OnceLock<Option<Arc<DmaFaults>>>,
}

impl KernelFunctions {
    pub(super) fn new(sysfs: Sysfs, keeper: Option<Keeper>, warden: Option<Arc<Warden>>) -> Self {
        Self {
            sysfs,
            keeper,
            warden,
            faults: OnceLock::new(),
        }
    }

    /// Bound and opened, and what undoes that: with a keeper the function itself, which it stops.
    fn open_vfio(
        &self,
        bdf: Bdf,
        driver: &str,
    ) -> Result<(VfioFunction, Kept, Option<Stopper>), VerbError> {
        if let Some(keeper) = &self.keeper {
            let (opened, stopper) = keeper.open_to_lend(bdf)?;
            let function = VfioFunction::open_with(bdf, &self.sysfs, opened);
            let function = function.map_err(|error| from_open(&error))?;
            return Ok((function, None, Some(stopper)));
        }
        let bind = BindGuard::bind(&self.sysfs, bdf, driver, false);
        let bind = bind.map_err(|error| from_bind(&error))?;
        let function = VfioFunction::open(bdf, &self.sysfs).map_err(|error| from_open(&error))?;
        Ok((function, Some(Box::new(bind)), None))
    }
}

impl KernelFunctions {
    /// Of a VF that xe drives: its PF, and its number there, counted from 1.
    fn xe_vf(&self, bdf: Bdf) -> Result<Option<(Bdf, u32)>, VerbError> {
        let ids = self.ids(bdf)?;
        let is_xe = self.sysfs.is_xe_vf(bdf, &ids);
        let pf = || self.sysfs.pf_of(bdf);
        match is_xe.and_then(|is_xe| if is_xe { pf() } else { Ok(None) }) {
            Ok(found) => Ok(found.map(|(pf, index)| (pf, index + 1))),
            Err(error) => Err(from_sysfs(&error)),
        }
    }

    fn kernel_log(&self) -> io::Result<KernelLog> {
        match &self.warden {
            Some(warden) => KernelLog::of(warden.kernel_log().map_err(io::Error::other)?),
            None => KernelLog::open(Path::new(KernelLog::PATH)),
        }
    }

    fn faults(&self) -> Option<Arc<DmaFaults>> {
        let faults = self.faults.get_or_init(|| {
            let log = self.kernel_log().inspect_err(|error| {
                tracing::warn!(%error, "DMA of lent functions that the IOMMU refuses is not told");
            });
            log.ok().map(|log| Arc::new(DmaFaults::of(log)))
        });
        faults.clone()
    }

    /// The PF's driver tells in the kernel's log alone that it could not clear a VF.
    fn reset_word(&self, (pf, number): (Bdf, u32)) -> Option<Box<dyn ResetWord>> {
        let log = self.kernel_log().inspect_err(|error| {
            tracing::warn!(%error, "a reset of {pf}'s VFs that fails will not be told by the kernel's log");
        });
        Some(Box::new(XeWord {
            log: log.ok()?,
            pf: pf.to_string(),
            vf: format!("VF{number} "),
        }))
    }

    /// Nothing to look at where it is no VF, or its PF has no driver anyway.
    fn orphaned(&self, bdf: Bdf) -> Result<Option<Orphaned>, VerbError> {
        let pf = self.sysfs.pf_of(bdf).map_err(|error| from_sysfs(&error))?;
        let Some((pf, _)) = pf else { return Ok(None) };
        let driver = self.sysfs.driver(pf).map_err(|error| from_sysfs(&error))?;
        let sysfs = self.sysfs.clone();
        Ok(driver.map(|driver| Box::new(move || orphaned(&sysfs, pf, &driver)) as Orphaned))
    }

    /// The write takes root: the keeper's, where it has opened the function.
    fn stop(&self, bdf: Bdf, stopper: Option<Stopper>) -> Result<Option<StopFunction>, VerbError> {
        let file = self.sysfs.xe_stop(bdf);
        let file = file.map_err(|error| from_sysfs(&error))?;
        let sysfs = self.sysfs.clone();
        Ok(file.map(|file| match stopper {
            Some(keeper) => Box::new(move || keeper.stop().map_err(io::Error::other)),
            None => {
                Box::new(move || sysfs.stop_xe_vf(&file).map_err(io::Error::other)) as StopFunction
            }
        }))
    }
}

/// What xe tells of one VF's resets.
struct XeWord {
    log: KernelLog,
    pf: String,
    vf: String,
}

impl ResetWord for XeWord {
    fn before(&mut self) {
        if let Err(error) = self.log.skip() {
            tracing::warn!(%error, "the kernel's log of before a reset is not passed over");
        }
    }

    fn failed(&mut self) -> Option<String> {
        let words = [&self.pf[..], &self.vf, "FLR failed"];
        let mut found = None;
        let all = self.log.each(|line| {
            if found.is_none() && words.iter().all(|word| line.contains(word)) {
                found = Some(line.to_owned());
            }
        });
        let unknown = || {
            format!(
                "the kernel's log was flooded, so that nothing tells whether {}'s reset of {}\
                 failed",
                self.pf, self.vf
            )
        };
        found.or_else(|| (!all).then(unknown))
    }
}

/// A driver that is unbound from a PF may leave its VFs where they are, as nvme does. Nobody tends
/// them then; what they do, their hardware decides.
fn orphaned(sysfs: &Sysfs, pf: Bdf, driver: &str) -> Option<String> {
    let found = match sysfs.driver(pf) {
        Ok(Some(now)) if now == driver => return None,
        Ok(Some(now)) => format!("it has {now} now"),
        Ok(None) => "it has none now".to_owned(),
        Err(SysfsError::NoFunction(_)) => "it is gone".to_owned(),
        // It could not be looked at, which says nothing.
        Err(_) => return None,
    };
    Some(format!(
        "the lender's PF {pf} has lost its driver {driver}, and {found}: bind it again, then offer \
         the function again"
    ))
}

/// How a function's own memory is cleared of a tenant.
fn scrub_plan(xe: Option<(Bdf, u32)>, waits: Option<&str>) -> ScrubPlan {
    match (xe, waits) {
        (None, _) => ScrubPlan::Reset,
        (Some(_), Some(_)) => ScrubPlan::DriverWaits,
        (Some(_), None) => ScrubPlan::Wait { ms: XE_CLEARED_MS },
    }
}

impl Functions for KernelFunctions {
    fn memory_maps(&self) -> Option<Arc<dyn MemoryMaps>> {
        let keeper = self.keeper.clone()?;
        Some(Arc::new(keeper))
    }

    fn check_exists(&self, bdf: Bdf) -> Result<(), VerbError> {
        let checked = self.sysfs.check_exists(bdf);
        checked.map_err(|error| from_sysfs(&error))
    }

    fn ids(&self, bdf: Bdf) -> Result<FunctionIds, VerbError> {
        let ids = self.sysfs.ids(bdf);
        ids.map_err(|error| refuse(ErrorCode::Kernel, error.to_string()))
    }

    fn check_lendable(&self, bdf: Bdf) -> Result<(), VerbError> {
        let checked = self.sysfs.check_lendable(bdf, false);
        checked.map_err(|error| from_lend(&error))
    }

    fn dma_faults_seen(&self, bdf: Bdf) -> Option<u64> {
        self.faults.get()?.as_ref()?.seen(bdf)
    }

    fn open(&self, bdf: Bdf) -> Result<OpenFunction, VerbError> {
        let xe = self.xe_vf(bdf)?;
        let waits = self.sysfs.xe_vfio_driver().filter(|_| xe.is_some());
        let (function, kept, stopper) = self.open_vfio(bdf, waits.unwrap_or("vfio-pci"))?;
        let config = function
            .config_space()
            .map_err(|error| refuse(ErrorCode::Kernel, words(&error)))?;
        Ok(OpenFunction {
            function: Arc::new(function),
            serial: ConfigView::new(&config).map_or(0, |view| view.serial()),
            keep: Keep {
                scrub: scrub_plan(xe, waits),
                stop: self.stop(bdf, stopper)?,
                reset_word: xe.and_then(|xe| self.reset_word(xe)),
                orphaned: self.orphaned(bdf)?,
                begins: (self.faults())
                    .map(|faults| Box::new(move || faults.begin(bdf)) as Box<dyn Fn() + Send>),
                quarantine: None,
                kept,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vf_whose_pf_loses_its_driver_is_an_orphan_and_what_cannot_be_looked_at_is_none() {
        use std::{fs, os::unix::fs::symlink};
        let tree = tempfile::tempdir().unwrap();
        let at = |name: &str| tree.path().join("bus/pci").join(name);
        let device = at("devices/0000:01:00.0");
        for folder in [&device, &at("drivers/nvme"), &at("drivers/other")] {
            fs::create_dir_all(folder).unwrap();
        }
        let sysfs = Sysfs::new(tree.path());
        let pf = "0000:01:00.0".parse().unwrap();
        let told = || orphaned(&sysfs, pf, "nvme");
        let says = |words: &str| told().is_some_and(|told| told.contains(words));
        symlink(at("drivers/nvme"), device.join("driver")).unwrap();
        assert_eq!(told(), None);
        fs::remove_file(device.join("driver")).unwrap();
        assert!(says("lost its driver nvme, and it has none now"));
        symlink(at("drivers/other"), device.join("driver")).unwrap();
        assert!(says("it has other now"));
        fs::remove_file(device.join("driver")).unwrap();
        fs::create_dir(device.join("driver")).unwrap();
        assert_eq!(told(), None);
        fs::remove_dir_all(&device).unwrap();
        assert!(says("it is gone"));
    }

    #[test]
    fn vf_of_xe_is_waited_for_by_its_driver_or_by_the_clock_and_others_are_not() {
        let xe = Some(("4a:00.0".parse().unwrap(), 1));
        assert_eq!(scrub_plan(None, None), ScrubPlan::Reset);
        let plan = scrub_plan(xe, Some("xe-vfio-pci"));
        assert_eq!(plan, ScrubPlan::DriverWaits);
        assert_eq!(scrub_plan(xe, None), ScrubPlan::Wait { ms: 12_000 });
    }

    #[test]
    fn vf_of_xe_is_stopped_by_the_keeper_before_it_is_reset_and_one_without_a_file_by_nobody() {
        use super::super::tests::{Rig, VF, bdf};
        use crate::keeper::tests::{Machine, Running};
        use std::{fs, sync::mpsc};
        use vfio_shim::path::{PoolEntry, PoolState};
        let machine = Machine::new();
        machine.xe_vfs(&[VF]);
        let running = Running::of(&machine);
        let keeper = Keeper::at(&machine.folder());
        let (opened, stopper) = keeper.open_to_lend(bdf(VF)).unwrap();
        let functions = KernelFunctions::new(machine.sysfs(), Some(keeper), None);
        let stop = functions.stop(bdf(VF), Some(stopper)).unwrap();
        let stop = stop.expect("it has a file");
        let rig = Rig::new();
        let (told, seen) = mpsc::channel();
        let (function, file) = (rig.function.clone(), machine.xe_stop(1));
        let keep = Keep {
            stop: Some(Box::new(move || {
                stop()?;
                let written = fs::read_to_string(&file)?;
                told.send((written, function.resets()))
                    .map_err(io::Error::other)
            })),
            ..Keep::default()
        };
        let entry = PoolEntry {
            bdf: bdf(VF),
            ids: FunctionIds::default(),
            state: PoolState::Available,
            irq_count: 4,
            bar_bytes: 0,
            serial: 0,
        };
        let [lender, borrower] = rig.hosts.each_ref().map(|host| &host.ports[0].engine);
        lender.withdraw(bdf(VF)).unwrap();
        let offered: Arc<dyn Function> = rig.function.clone();
        lender.offer_with(entry, offered, keep).unwrap();
        borrower.borrow(bdf(VF), None).unwrap();
        assert_eq!(seen.try_iter().count(), 0);
        let before = rig.function.resets();
        let revoked = lender.revoke_and_wait(bdf(VF), "wanted back", 10_000);
        revoked.unwrap();
        assert_eq!(seen.try_recv(), Ok(("1".to_owned(), before)));
        assert_eq!(rig.function.resets(), before + 1);
        fs::remove_file(machine.xe_stop(1)).unwrap();
        assert!(functions.stop(bdf(VF), None).unwrap().is_none());
        drop(opened);
        running.stop();
    }
}
