//! Binds a function to vfio-pci with a guard that gives the old driver back.

use super::{Sysfs, SysfsError, found, is_vfio_driver, read};
use crate::model::Bdf;

/// What the kernel shows where no override is set.
const NO_OVERRIDE: &str = "(null)";

/// Why a function was not bound. Nothing is changed then.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// sysfs did not tell or take something.
    #[error("{bdf} cannot be bound to {driver}")]
    Sysfs {
        /// The function.
        bdf: Bdf,
        /// The driver wanted.
        driver: String,
        /// Which file, and why.
        #[source]
        source: SysfsError,
    },
    /// Another driver has it.
    #[error(
        "{bdf} is driven by {driver}: stop what uses it, then unbind it: echo {bdf} > /sys/bus/pci/drivers/{driver}/unbind"
    )]
    Driven {
        /// The function.
        bdf: Bdf,
        /// Its driver.
        driver: String,
    },
    /// The wanted driver is not there.
    #[error("there is no driver {driver} on this host: modprobe {driver}")]
    NoDriver {
        /// The driver wanted.
        driver: String,
    },
    /// What was before cannot be had back.
    #[error(
        "{bdf} cannot be given back to {driver}: the kernel's log says why; then echo {bdf} > /sys/bus/pci/devices/{bdf}/driver/unbind"
    )]
    GiveBack {
        /// The function.
        bdf: Bdf,
        /// Its driver before.
        driver: String,
        /// Which file, and why.
        #[source]
        source: SysfsError,
    },
    /// The probe ended otherwise.
    #[error(
        "{bdf} was offered to {driver}, but {now} has it now: the kernel's log says why the probe failed"
    )]
    Probe {
        /// The function.
        bdf: Bdf,
        /// The driver wanted.
        driver: String,
        /// What has it.
        now: String,
    },
}

/// What a function was bound to before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OldBinding {
    /// Its driver.
    pub driver: Option<String>,
    /// Its `driver_override`.
    pub driver_override: Option<String>,
}

/// A function bound to another driver; dropping it gives the old driver and override back. Close
/// the function first: the kernel waits until VFIO has let go of it.
#[derive(Debug)]
pub struct BindGuard {
    sysfs: Sysfs,
    bdf: Bdf,
    /// `None` once it is to be kept.
    old: Option<OldBinding>,
}

impl BindGuard {
    /// Binds `bdf` to `driver`. With `unbind` a driver that has it is made to let go, which can
    /// block for as long as that driver likes; without, the function is refused.
    pub fn bind(sysfs: &Sysfs, bdf: Bdf, driver: &str, unbind: bool) -> Result<Self, BindError> {
        let old = sysfs.check_bindable(bdf, driver, unbind)?;
        // From here on the guard undoes what was done.
        let guard = Self::adopt(sysfs, bdf, old);
        sysfs.rebind(bdf, driver)?;
        Ok(guard)
    }

    /// A function that was bound before this process began: the guard gives back what a journal
    /// says was there.
    pub fn adopt(sysfs: &Sysfs, bdf: Bdf, old: OldBinding) -> Self {
        Self {
            sysfs: sysfs.clone(),
            bdf,
            old: Some(old),
        }
    }

    /// Binds a function that was adopted to `driver`, as far as it is not: the process before this
    /// one may have ended in the middle. One that another driver has is refused.
    pub fn bind_again(&self, driver: &str) -> Result<(), BindError> {
        self.sysfs.check_bindable(self.bdf, driver, false)?;
        self.sysfs.rebind(self.bdf, driver)
    }

    /// Gives the old driver and override back; a function that has gone has nothing to get back.
    pub fn give_back(mut self) -> Result<(), BindError> {
        let Some(old) = self.old.take() else {
            return Ok(());
        };
        match self.undo(&old) {
            Ok(()) | Err(SysfsError::NoFunction(_)) => Ok(()),
            Err(source) => Err(BindError::GiveBack {
                bdf: self.bdf,
                driver: old.driver.unwrap_or_else(|| "no driver".to_owned()),
                source,
            }),
        }
    }

    /// What it was bound to before, for a journal.
    pub fn old(&self) -> Option<&OldBinding> {
        self.old.as_ref()
    }

    /// Keeps the binding; returns what was before.
    pub fn keep(mut self) -> Option<OldBinding> {
        self.old.take()
    }

    fn undo(&self, old: &OldBinding) -> Result<(), SysfsError> {
        self.sysfs.restore_binding(self.bdf, old)
    }
}

fn failed(bdf: Bdf, driver: &str) -> impl FnOnce(SysfsError) -> BindError {
    let driver = driver.to_owned();
    move |source| BindError::Sysfs {
        bdf,
        driver,
        source,
    }
}

impl Drop for BindGuard {
    fn drop(&mut self) {
        let Some(old) = self.old.take() else {
            return;
        };
        if let Err(error) = self.undo(&old) {
            let bdf = self.bdf;
            tracing::error!(%bdf, ?old, %error, "the old driver could not be given back");
        }
    }
}

impl Sysfs {
    /// That there is such a driver, and no other has the function: what it is bound to.
    fn check_bindable(
        &self,
        bdf: Bdf,
        driver: &str,
        unbind: bool,
    ) -> Result<OldBinding, BindError> {
        let old = self.binding(bdf).map_err(failed(bdf, driver))?;
        let other = old.driver.as_deref().filter(|now| *now != driver);
        if let Some(now) = other.filter(|_| !unbind) {
            let driver = now.to_owned();
            return Err(BindError::Driven { bdf, driver });
        }
        if !self.path("bus/pci/drivers").join(driver).is_dir() {
            let driver = driver.to_owned();
            return Err(BindError::NoDriver { driver });
        }
        Ok(old)
    }

    fn rebind(&self, bdf: Bdf, driver: &str) -> Result<(), BindError> {
        let rebind = || {
            // First the override: between unbind and probe nobody else may take it.
            self.set_driver_override(bdf, Some(driver))?;
            if self.driver(bdf)?.as_deref() != Some(driver) {
                self.unbind(bdf)?;
                self.write("bus/pci/drivers_probe", &bdf.to_string())?;
            }
            self.driver(bdf)
        };
        match rebind().map_err(failed(bdf, driver))? {
            Some(now) if now == driver => Ok(()),
            now => Err(BindError::Probe {
                bdf,
                driver: driver.to_owned(),
                now: now.unwrap_or_else(|| "no driver".to_owned()),
            }),
        }
    }

    /// What a function is bound to now.
    pub fn binding(&self, bdf: Bdf) -> Result<OldBinding, SysfsError> {
        Ok(OldBinding {
            driver: self.driver(bdf)?,
            driver_override: self.driver_override(bdf)?,
        })
    }

    /// Its `driver_override`.
    pub fn driver_override(&self, bdf: Bdf) -> Result<Option<String>, SysfsError> {
        self.check_exists(bdf)?;
        let text = found(read(&self.function_path(bdf).join("driver_override")))?;
        Ok(text.filter(|text| !text.is_empty() && text != NO_OVERRIDE))
    }

    /// Sets its `driver_override`; `None` clears it.
    pub fn set_driver_override(&self, bdf: Bdf, driver: Option<&str>) -> Result<(), SysfsError> {
        let path = self.function_path(bdf).join("driver_override");
        // A lone newline clears it.
        self.write(path, &format!("{}\n", driver.unwrap_or("")))
    }

    /// Takes its driver away. Fine where there is none.
    pub fn unbind(&self, bdf: Bdf) -> Result<(), SysfsError> {
        match self.driver(bdf)? {
            Some(driver) => {
                let path = format!("bus/pci/drivers/{driver}/unbind");
                self.write(path, &bdf.to_string())
            }
            None => Ok(()),
        }
    }

    /// Gives a function back to what it was bound to before. One that neither VFIO nor nobody has
    /// was taken by somebody since: that driver keeps it.
    pub fn restore_binding(&self, bdf: Bdf, old: &OldBinding) -> Result<(), SysfsError> {
        let now = self.driver(bdf)?;
        self.set_driver_override(bdf, old.driver_override.as_deref())?;
        let is_taken = now.as_deref().is_some_and(|now| !is_vfio_driver(now));
        if now == old.driver || is_taken {
            return Ok(());
        }
        self.unbind(bdf)?;
        match &old.driver {
            Some(driver) => {
                let path = format!("bus/pci/drivers/{driver}/bind");
                self.write(path, &bdf.to_string())
            }
            None => Ok(()),
        }
    }
}
