//! A vfio-user server that shows one function to one VMM at a time, and a client for VMMs.
//!
//! ```text
//! Endpoint (socket file) --accept--> guest session --> Function, AddressSpace
//!   bytes+fds -> socket -> wire -> dispatch -> version | dma | regions | irqs -> reply
//! ```
//! Addresses are guest-physical, sizes are in bytes, errors are [`SessionError`] (one guest
//! session ends, the endpoint accepts the next VMM) and [`EndpointError`] (the endpoint ends).

mod client;
mod dispatch;
mod dma;
mod endpoint;
mod error;
mod holders;
mod irqs;
pub mod memory_check;
mod options;
mod peer;
mod regions;
mod session;
mod shared;
pub mod socket;
mod spin;
pub mod version;
pub mod wire;

pub use client::{Client, ClientError};
pub use dma::{MEMORY_FILES_MAX, MapRefusal};
pub use endpoint::Endpoint;
pub use error::{EndpointError, SessionError, words};
pub use holders::{Holders, Vmm};
pub use irqs::IrqError;
pub use options::{BarMode, MemoryCheck, Options};
pub use peer::{PEERS_MAX, Peers};
pub use session::serve_connection;
pub use shared::{Counter, SessionCounters, SessionShared, SessionState};
