//! Two hosts in one process: a rig of threads for single tests, and the deterministic simulator.
//!
//! ```text
//! seed -> schedule -> world: hosts, disks, cable, VMMs, guests -> scheduler -> the product's own threads
//! ```
//! The simulator runs the product's engine, lease pool, guest sessions, workers and soft fabric on a `Runtime` of its own:
//! every thread is a coroutine, and which one runs next follows from the seed.

pub mod apart;
pub mod coroutine;
pub mod faults;
pub mod forged;
pub mod forger;
pub mod guest;
pub mod host;
pub mod keeper;
pub mod keepers;
pub mod lease;
pub mod memory;
pub mod ops;
pub mod pool;
pub mod random;
pub mod rig;
pub mod runs;
pub mod schedule;
pub mod scheduler;
pub mod serve;
pub mod settle;
pub mod steps;
pub mod table;
pub mod trace;
pub mod vmm;
pub mod wire;
pub mod worker;
pub mod world;

pub use rig::{MAILBOX_BYTES, Ram, Sim, WINDOW_BYTES, until};
