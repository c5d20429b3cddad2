//! An Intel gen4 NTB between two hosts, as one vfio-user server with two sockets.
//!
//! ```text
//!   QEMU of host A --- socket A --- Half A --+-- link --+-- Half B --- socket B --- QEMU of host B
//!                                            |          |
//!     window access of A: registers of B translate, the memory of host B is touched
//!     doorbell of A:      INT_STATUS of B, then the eventfd of B's vector
//! ```
//! One thread owns everything. A request that needs an answer of the *other* host's QEMU (its
//! memory is no RAM with a file descriptor) waits in its half's egress queue while both sockets
//! go on being read: two QEMUs that wait for each other would otherwise deadlock.
//!
//! The model shares no code and no constant with the product: it is the second opinion about the
//! register map.

pub mod config_space;
pub mod control;
pub mod counters;
pub mod dma_table;
pub mod egress;
pub mod event_loop;
pub mod half;
pub mod link;
pub mod memory;
pub mod model;
pub mod msix;
pub mod options;
pub mod registers;
pub mod requests;
pub mod signals;
pub mod stream;
pub mod window;
pub mod wire;
