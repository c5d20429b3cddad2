//! The lender's verbs: which functions of this host are in the pool, and which of them are offered.

use super::claim::Named;
use super::functions::OpenFunction;
use super::{LocalHost, refuse};
use crate::daemon::vocabulary::{ErrorCode, HeldBack, Outcome, VerbError};
use vfio_shim::model::{Bdf, IrqIndex};
use vfio_shim::path::{LeaseId, PoolEntry, PoolState, Refusal, RefusalCode};

/// A function of the pool.
#[derive(Default)]
pub(super) struct Lent {
    pub(super) offer: Option<Offer>,
}

/// A function that is offered.
pub(super) struct Offer {
    pub(super) port: usize,
}

/// An offer that is being made; forgotten on drop.
pub(super) struct Offering<'a> {
    host: &'a LocalHost,
    bdf: Bdf,
}

impl Drop for Offering<'_> {
    fn drop(&mut self) {
        self.host.state().offering.remove(&self.bdf);
    }
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
        self.check_quarantine(bdf)?;
        self.check_lendable(bdf)?;
        let mut state = self.state();
        let limit = self.config.limits.functions_per_port as usize * self.config.ports.len();
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
        self.functions.check_exists(bdf)?;
        if let Some(port) = self.config.ports.iter().find(|port| port.bdf == bdf) {
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
        self.functions.check_lendable(bdf)
    }

    pub(super) fn remove(&self, bdf: Bdf) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        self.forget_gone_of_the_pool(bdf)?;
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

    pub(super) fn available(&self, bdf: Bdf, port: Option<&str>) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        self.check_quarantine(bdf)?;
        self.forget_gone(bdf)?;
        if let Some(held) = self.offered_at(bdf)? {
            let held = &self.ports[held].name;
            if port.is_none_or(|wanted| wanted == held) {
                return Ok(Outcome::Done);
            }
            let text = format!(
                "{bdf} is offered through port `{held}`, and a function goes through one: \
                 `sublet unavailable {bdf}` first"
            );
            return Err(refuse(ErrorCode::WrongState, text));
        }
        let port = self.way_out(bdf, port)?;
        let _offering = self.room(bdf, port)?;
        let offer = self.offer(bdf, port, None)?;
        if let Some(lent) = self.state().lent.get_mut(&bdf) {
            lent.offer = Some(offer);
        }
        Ok(Outcome::Done)
    }

    /// Through which port it is offered, if it is.
    pub(super) fn offered_at(&self, bdf: Bdf) -> Result<Option<usize>, VerbError> {
        let state = self.state();
        let lent = state.lent.get(&bdf).ok_or_else(|| not_in_pool(bdf))?;
        Ok(lent.offer.as_ref().map(|offer| offer.port))
    }

    fn way_out(&self, bdf: Bdf, named: Option<&str>) -> Result<usize, VerbError> {
        let names: Vec<&str> = self.ports.iter().map(|port| port.name.as_str()).collect();
        way_out(&names, bdf, named)
    }

    /// Refused when as many as the configuration allows are lent through this port. What it
    /// returns stands for the offer until that is there: of two verbs at once, the second sees
    /// the first.
    pub(super) fn room(&self, bdf: Bdf, port: usize) -> Result<Offering<'_>, VerbError> {
        let limit = self.config.limits.functions_per_port as usize;
        let mut state = self.state();
        let offers = state.lent.values().filter_map(|lent| lent.offer.as_ref());
        let offers = offers.map(|offer| offer.port);
        let taken = offers.chain(state.offering.values().copied());
        if taken.filter(|taken| *taken == port).count() < limit {
            state.offering.insert(bdf, port);
            return Ok(Offering { host: self, bdf });
        }
        let text = format!(
            "{limit} functions are offered through port `{}`, its limit: take one back, use \
             another port, or raise limits.functions_per_port",
            self.ports[port].name
        );
        Err(refuse(ErrorCode::Limit, text))
    }

    /// In quarantine where an earlier lease has left it there.
    pub(super) fn offer(
        &self,
        bdf: Bdf,
        port: usize,
        held: Option<HeldBack>,
    ) -> Result<Offer, VerbError> {
        let open = &self.ports[port];
        self.check_lendable(bdf)?;
        let function = self.functions.open(bdf)?;
        let entry = entry(bdf, &function);
        // The port has it from here on, and nobody else: it closes it when the kernel asks.
        let OpenFunction {
            function, mut keep, ..
        } = function;
        keep.quarantine = held.map(|held| (LeaseId(held.epoch), held.reason));
        let taken = open.engine.offer_with(entry, function, keep);
        taken.map_err(|refusal| from_refusal(&refusal))?;
        Ok(Offer { port })
    }

    pub(super) fn unavailable(&self, bdf: Bdf) -> Result<Outcome, VerbError> {
        let _claim = self.claim(Named::Local(bdf))?;
        if let Some(port) = self.offered_at(bdf)? {
            let withdrawn = self.ports[port].engine.withdraw(bdf);
            withdrawn.map_err(|refusal| from_refusal(&refusal))?;
            if let Some(lent) = self.state().lent.get_mut(&bdf) {
                lent.offer = None;
            }
        }
        Ok(Outcome::Done)
    }
}

/// The port that a function is to be offered through. Each leads to one host, so that nobody but
/// the operator knows which.
pub(in crate::daemon) fn way_out(
    names: &[&str],
    bdf: Bdf,
    named: Option<&str>,
) -> Result<usize, VerbError> {
    match (named, names) {
        (_, []) => {
            let text = "the configuration has no [[port]]: nothing can be lent";
            Err(refuse(ErrorCode::Config, text))
        }
        (None, [_]) => Ok(0),
        (None, [first, ..]) => {
            let text = format!(
                "this host has {} ports ({}), and a function goes through one: `sublet \
                 available {bdf} --port {first}`",
                names.len(),
                names.join(", ")
            );
            Err(refuse(ErrorCode::Ambiguous, text))
        }
        (Some(named), names) => {
            let found = names.iter().position(|name| *name == named);
            found.ok_or_else(|| {
                let names = names.join(", ");
                let text = format!("there is no port `{named}` here: name one of {names}");
                refuse(ErrorCode::Config, text)
            })
        }
    }
}

fn entry(bdf: Bdf, open: &OpenFunction) -> PoolEntry {
    let info = open.function.info();
    let vectors = |index: IrqIndex| info.irqs[index as usize].count;
    PoolEntry {
        bdf,
        ids: info.ids,
        state: PoolState::Available,
        irq_count: vectors(IrqIndex::Msi).max(vectors(IrqIndex::Msix)),
        bar_bytes: info.regions[..6].iter().map(|region| region.size).sum(),
        serial: open.serial,
    }
}

pub(super) fn not_in_pool(bdf: Bdf) -> VerbError {
    let text = format!("{bdf} is not in the pool: `sublet add {bdf}` first");
    refuse(ErrorCode::UnknownFunction, text)
}
