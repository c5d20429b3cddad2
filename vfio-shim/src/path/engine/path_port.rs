//! A port as whoever serves a borrowed function reaches it: in this process, or from a worker's own.

use super::{
    CallReply, Engine, LET_GO_WAIT_MS, LeaseShared, LetGo, MAP_WAIT_MS, RESET_WAIT_MS, Signals,
    UNMAP_WAIT_MS,
};
use crate::model::{Aperture, BAR_COUNT, Mapping, WindowOffset};
use crate::path::borrower::{Answer, Call, CallError, OpenedPath};
use crate::path::message::{LeaseId, PoolEntry, Request};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The port's side of one borrowed lease.
pub trait PathPort: Send + Sync {
    /// Asks and waits for the answer. Of the lease's own calls only; the lease in it is not looked
    /// at where the port knows it by the way that it was asked.
    fn call(&self, call: Call, wait_ms: u64) -> Result<Answer, CallError>;
    /// What a BAR's slice is reached through, and where in that its first byte is.
    fn window(&self, bar: usize, slice: WindowOffset) -> (Arc<dyn Aperture>, u64);
    /// The outbound window's descriptor and where in it the window begins, for a trusted VMM.
    fn window_fd(&self) -> Option<(BorrowedFd<'_>, u64)>;
}

/// The port of a worker in the port's own process.
pub(super) struct InProcess {
    pub(super) engine: Arc<Engine>,
    pub(super) state: Arc<LeaseShared>,
}

impl PathPort for InProcess {
    fn call(&self, call: Call, wait_ms: u64) -> CallReply {
        self.engine.call_of(Some(&self.state), call, wait_ms)
    }

    fn window(&self, _bar: usize, slice: WindowOffset) -> (Arc<dyn Aperture>, u64) {
        (self.engine.port().window(0), slice.0)
    }

    fn window_fd(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.engine.port().window_fd(0)
    }
}

/// A BAR of the far function as this process loads and stores it: its slice of the window.
pub(super) struct SliceAperture {
    pub(super) window: Arc<dyn Aperture>,
    pub(super) base: u64,
    pub(super) len: u64,
    pub(super) state: Arc<LeaseShared>,
}

impl SliceAperture {
    /// An access within the slice, while the lease is held: it cannot be lost in between, as its
    /// slice may then be another tenant's.
    fn within(&self, offset: u64, len: usize, access: impl FnOnce()) -> bool {
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= self.len);
        let lost = self.state.runtime.lock(&self.state.lost);
        let open = inside && lost.is_none();
        if open {
            access();
        }
        open
    }
}

impl Aperture for SliceAperture {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let len = data.len();
        data.fill(0xff);
        self.within(offset, len, || self.window.read(self.base + offset, data));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let write = || self.window.write(self.base + offset, data);
        self.within(offset, data.len(), write);
    }

    fn mapping(&self) -> Option<&dyn Mapping> {
        None
    }
}

/// A borrowed lease with an open path, as the port keeps it for a worker in another process. What
/// it does not do by itself is end the lease.
pub struct BorrowedPath {
    engine: Arc<Engine>,
    lease: LeaseId,
    entry: PoolEntry,
    opened: OpenedPath,
    state: Arc<LeaseShared>,
}

/// Tells a worker that a vector was raised, and how often by now.
pub type Tell = Box<dyn Fn(u32, u64) + Send + Sync>;

impl Engine {
    /// Borrows a function and opens the path to it, for a worker in another process, which `tell`
    /// gives the way to for a number of vectors. Nothing is left behind on failure.
    pub fn borrow_path(
        self: &Arc<Self>,
        bdf: crate::model::Bdf,
        ram: Option<u64>,
        tell: impl FnOnce(u32) -> io::Result<Tell>,
    ) -> Result<BorrowedPath, CallError> {
        let (lease, entry) = self.lease(bdf, ram)?;
        let signals = |count| Signals::told(count, tell(count)?);
        match self.open(lease, &entry, signals) {
            Ok((opened, state)) => Ok(BorrowedPath {
                engine: Arc::clone(self),
                lease,
                entry,
                opened,
                state,
            }),
            Err(error) => {
                let _ = self.give_back(lease);
                Err(error)
            }
        }
    }
}

impl BorrowedPath {
    /// The lease.
    pub fn lease(&self) -> LeaseId {
        self.lease
    }

    /// The function in the lender's pool.
    pub fn entry(&self) -> &PoolEntry {
        &self.entry
    }

    /// What the lender told of it.
    pub fn opened(&self) -> &OpenedPath {
        &self.opened
    }

    /// Ends the lease. The guest session must have ended.
    pub fn give_back(&self) -> Result<(), CallError> {
        self.engine.end(self.lease, Some(&self.state))
    }

    /// Why the lease is lost, if it is.
    pub fn lost(&self) -> Option<String> {
        self.state.runtime.lock(&self.state.lost).clone()
    }

    /// Per vector: how often a scan found it raised.
    pub fn scanned(&self) -> Vec<u64> {
        self.state.signals.scanned()
    }

    /// How a worker is made to let go of the lease's slices, which are nobody else's before it has;
    /// at once where the lease is lost already.
    pub fn on_lost(&self, let_go: LetGo) {
        self.state.on_lost(let_go);
    }

    /// Waits until the worker of the lease, which is over, has let go; refused where it does not.
    pub fn wait_let_go(&self) -> Result<(), CallError> {
        match self.state.waits_until_let_go(LET_GO_WAIT_MS) {
            true => Ok(()),
            false => Err(CallError::Held),
        }
    }

    /// Asks the lender for what it does at once, whatever lease the request names.
    pub fn forward(&self, request: Request) -> Result<Answer, CallError> {
        let wait_ms = match request {
            Request::Reset { .. } | Request::Irqs { .. } => RESET_WAIT_MS,
            _ => MAP_WAIT_MS,
        };
        self.call(Call::Forward(self.lease, request.of(self.lease)), wait_ms)
    }

    /// Maps guest memory: all or none.
    pub fn map(&self, maps: Vec<crate::path::borrower::GuestMap>) -> Result<Answer, CallError> {
        self.call(Call::Map(self.lease, maps), MAP_WAIT_MS)
    }

    /// Takes all maps away that lie within the span. Of a lease that is lost it is answered when
    /// all that this had is unpinned.
    pub fn unmap(&self, span: crate::model::Span) -> Result<Answer, CallError> {
        let unmap = Call::Unmap(self.lease, span);
        self.engine.call_of(Some(&self.state), unmap, UNMAP_WAIT_MS)
    }

    fn call(&self, call: Call, wait_ms: u64) -> CallReply {
        match self.lost() {
            Some(why) => Err(CallError::Gone(why)),
            None => self.engine.call_of(Some(&self.state), call, wait_ms),
        }
    }

    /// A BAR by way of this process, for a worker that cannot map the window.
    pub fn bar(&self, bar: usize) -> Option<Arc<dyn Aperture>> {
        let region = self.opened.function.regions.get(bar)?;
        let slice = region.slice.filter(|_| bar < BAR_COUNT)?;
        Some(Arc::new(SliceAperture {
            window: self.engine.port().window(0),
            base: slice.0,
            len: region.info.size,
            state: Arc::clone(&self.state),
        }))
    }

    /// The window that its BARs are slices of, where that is memory.
    pub fn window_fd(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.engine.port().window_fd(0)
    }
}
