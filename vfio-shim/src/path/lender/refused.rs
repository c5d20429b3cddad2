//! Whose function it is that a refused message names: it is counted there.

use super::{Lender, Offer};
use crate::model::Bdf;
use crate::path::message::{LeaseId, Request};
use crate::path::refused::RefusedAs;

/// What a request is about.
#[derive(Clone, Copy)]
pub(super) enum Named {
    Lease(LeaseId),
    Function(Bdf),
    Nothing,
}

impl Named {
    pub(super) fn by(request: &Request) -> Self {
        match (request, request.lease()) {
            (Request::Borrow { bdf }, _) => Self::Function(*bdf),
            (_, Some(lease)) => Self::Lease(lease),
            (_, None) => Self::Nothing,
        }
    }
}

impl Lender {
    fn of_lease(&mut self, lease: LeaseId) -> Option<&mut Offer> {
        let mut offers = self.offers.values_mut();
        offers.find(|offer| offer.lease.is_some_and(|(held, _)| held == lease))
    }

    /// A message that was not taken names this lease, which may be none.
    pub fn count_refused(&mut self, lease: LeaseId, as_what: RefusedAs) {
        if let Some(offer) = self.of_lease(lease) {
            offer.refused.count(as_what);
        }
    }

    pub(super) fn count_request(&mut self, named: Named) {
        let offer = match named {
            Named::Lease(lease) => self.of_lease(lease),
            Named::Function(bdf) => self.offers.get_mut(&bdf),
            Named::Nothing => None,
        };
        match offer {
            Some(offer) => offer.refused.count(RefusedAs::Request),
            None => self.refused = self.refused.saturating_add(1),
        }
    }

    /// Requests refused that named nothing here.
    pub fn refused_unnamed(&self) -> u64 {
        self.refused
    }
}
