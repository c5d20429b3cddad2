//! The lender's verbs: which functions of this host are in the pool, and which of them are offered.

use super::claim::Named;
use super::{LocalHost, refuse};
use crate::daemon::vocabulary::{ErrorCode, Outcome, VerbError};
use std::sync::Arc;
use vfio_shim::model::{Bdf, Function, IrqIndex};
use vfio_shim::path::{PoolEntry, PoolState, Refusal, RefusalCode};
use vfio_shim::sysfs::{BindError, BindGuard, LendError, SysfsError};
use vfio_shim::vfio::{OpenError, VfioFunction};

/// A function of the pool.
#[derive(Default)]
pub(super) struct Lent {
    pub(super) offer: Option<Offer>,
}

/// A function that is offered. Fields drop in order: the function is closed, then its driver is
/// given back.
pub(super) struct Offer {
    pub(super) port: usize,
    _function: Arc<VfioFunction>,
    _bind: BindGuard,
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    vfio_shim::path::words(error)
}

fn from_sysfs(error: &SysfsError) -> VerbError {
    let code = match error {
        SysfsError::NoFunction { .. } => ErrorCode::UnknownFunction,
        _ => ErrorCode::Kernel,
    };
    refuse(code, chain(error))
}

fn from_lend(error: &LendError) -> VerbError {
    let code = match error {
        LendError::Sysfs(_, SysfsError::NoFunction(_)) => ErrorCode::UnknownFunction,
        LendError::Sysfs(..) => ErrorCode::Kernel,
        LendError::SriovOn { .. } => ErrorCode::SriovOn,
        LendError::Driven { .. } => ErrorCode::DriverBound,
        LendError::GroupInUse { .. } => ErrorCode::GroupInUse,
        LendError::NoReset(_) => ErrorCode::NoReset,
    };
    refuse(code, chain(error))
}

fn from_bind(error: &BindError) -> VerbError {
    let code = match error {
        BindError::Driven { .. } => ErrorCode::DriverBound,
        _ => ErrorCode::Kernel,
    };
    refuse(code, chain(error))
}

fn from_open(error: &OpenError) -> VerbError {
    let code = match error {
        OpenError::NotViable { .. } => ErrorCode::GroupInUse,
        _ => ErrorCode::Kernel,
    };
    refuse(code, chain(error))
}

/// The verb's error for a refusal of an engine, this host's or the peer's.
pub(super) fn from_refusal(refusal: &Refusal) -> VerbError {
    let code = match refusal.code {
        RefusalCode::UnknownFunction => ErrorCode::UnknownFunction,
        RefusalCode::Taken => ErrorCode::Taken,
        RefusalCode::NotAllowed => ErrorCode::NotAllowed,
        RefusalCode::NoLease => ErrorCode::NoLease,
        RefusalCode::WrongState => ErrorCode::WrongState,
        RefusalCode::WindowFull => ErrorCode::WindowFull,
        RefusalCode::Limit => ErrorCode::Limit,
        RefusalCode::NoReset => ErrorCode::NoReset,
        RefusalCode::Busy => ErrorCode::Busy,
        RefusalCode::Quarantine => ErrorCode::Quarantine,
        RefusalCode::Kernel => ErrorCode::Kernel,
        RefusalCode::UnknownOp | RefusalCode::OutOfRange | RefusalCode::Other(_) => {
            ErrorCode::PeerRefused
        }
    };
    refuse(code, refusal.text.clone())
}

impl LocalHost {
    pub(super) fn add(&self, bdf: Bdf) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        self.check_lendable(bdf)?;
        let mut state = self.state();
        let limit = self.config.limits.functions_per_port as usize * self.ports.len().max(1);
        if state.lent.len() >= limit {
            let text = format!(
                "the pool holds {limit} functions, its limit: remove one, or raise \
                 limits.functions_per_port"
            );
            return Err(refuse(ErrorCode::Limit, text));
        }
        state.lent.entry(bdf).or_default();
        Ok(Outcome::Done)
    }

    fn check_lendable(&self, bdf: Bdf) -> Result<(), VerbError> {
        self.sysfs
            .check_exists(bdf)
            .map_err(|error| from_sysfs(&error))?;
        if let Some(port) = self.ports.iter().find(|port| port.bdf == bdf) {
            let text = format!(
                "{bdf} is the NTB of port `{}`: it cannot be lent",
                port.name
            );
            return Err(refuse(ErrorCode::NotAllowed, text));
        }
        if !self.config.may_lend(bdf) {
            let text = format!(
                "policy.allow in the configuration does not name {bdf}: add it there, and restart \
                 the daemon"
            );
            return Err(refuse(ErrorCode::NotAllowed, text));
        }
        self.sysfs
            .check_lendable(bdf, false)
            .map_err(|error| from_lend(&error))
    }

    pub(super) fn remove(&self, bdf: Bdf) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        let mut state = self.state();
        match state.lent.get(&bdf) {
            None => Err(not_in_pool(bdf)),
            Some(lent) if lent.offer.is_some() => {
                let text = format!("{bdf} is offered: `sublet unavailable {bdf}` first");
                Err(refuse(ErrorCode::WrongState, text))
            }
            Some(_) => {
                state.lent.remove(&bdf);
                Ok(Outcome::Done)
            }
        }
    }

    pub(super) fn available(&self, bdf: Bdf) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        if self.offered_at(bdf)?.is_some() {
            return Ok(Outcome::Done);
        }
        let offer = self.offer(bdf)?;
        if let Some(lent) = self.state().lent.get_mut(&bdf) {
            lent.offer = Some(offer);
        }
        Ok(Outcome::Done)
    }

    /// Through which port it is offered, if it is.
    fn offered_at(&self, bdf: Bdf) -> Result<Option<usize>, VerbError> {
        let state = self.state();
        let lent = state.lent.get(&bdf).ok_or_else(|| not_in_pool(bdf))?;
        Ok(lent.offer.as_ref().map(|offer| offer.port))
    }

    fn offer(&self, bdf: Bdf) -> Result<Offer, VerbError> {
        // With several ports a function goes to the first; choosing among them comes with the
        // verb `connect`.
        let port = 0;
        let Some(open) = self.ports.get(port) else {
            let text = "the configuration has no [[port]]: nothing can be lent";
            return Err(refuse(ErrorCode::Config, text));
        };
        self.check_lendable(bdf)?;
        let bind = BindGuard::bind(&self.sysfs, bdf, "vfio-pci", false);
        let bind = bind.map_err(|error| from_bind(&error))?;
        let function = VfioFunction::open(bdf, &self.sysfs).map_err(|error| from_open(&error))?;
        let function = Arc::new(function);
        let entry = self.entry(bdf, &function)?;
        let offered: Arc<dyn Function> = function.clone();
        let taken = open.engine.offer(entry, offered);
        taken.map_err(|refusal| from_refusal(&refusal))?;
        Ok(Offer {
            port,
            _function: function,
            _bind: bind,
        })
    }

    fn entry(&self, bdf: Bdf, function: &VfioFunction) -> Result<PoolEntry, VerbError> {
        let info = function.info();
        let config = function
            .config_space()
            .map_err(|error| refuse(ErrorCode::Kernel, chain(&error)))?;
        let serial = vfio_shim::model::ConfigView::new(&config).map_or(0, |view| view.serial());
        let vectors = |index: IrqIndex| info.irqs[index as usize].count;
        Ok(PoolEntry {
            bdf,
            ids: info.ids,
            state: PoolState::Available,
            irq_count: vectors(IrqIndex::Msi).max(vectors(IrqIndex::Msix)),
            bar_bytes: info.regions[..6].iter().map(|region| region.size).sum(),
            serial,
        })
    }

    pub(super) fn unavailable(&self, bdf: Bdf) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        if let Some(port) = self.offered_at(bdf)? {
            let withdrawn = self.ports[port].engine.withdraw(bdf);
            withdrawn.map_err(|refusal| from_refusal(&refusal))?;
            // Closing a function and giving its driver back can wait: not under the lock.
            let lent = self
                .state()
                .lent
                .get_mut(&bdf)
                .and_then(|lent| lent.offer.take());
            drop(lent);
        }
        Ok(Outcome::Done)
    }
}

fn not_in_pool(bdf: Bdf) -> VerbError {
    let text = format!("{bdf} is not in the pool: `sublet add {bdf}` first");
    refuse(ErrorCode::UnknownFunction, text)
}
