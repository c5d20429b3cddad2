//! The line between a port and its daemon, over which leases are asked for, granted and ended.
//!
//! ```text
//! daemon connects --> port: hello, all leases that it holds or held last, ready
//!                     then asks, openings and ends; daemon: grants, refusals, expiries
//! ```
//! Messages are datagrams of JSON on a SEQPACKET socket, each whole or refused. Nobody waits for
//! room: an end that does not read is cut off, and told everything anew when it is back. So what is
//! said here may be lost at any moment; what a port holds is what it says when a line begins.

mod message;
mod socket;

pub(crate) use message::short;
pub use message::{
    FromDaemon, FromPort, LEASES_PER_MESSAGE_MAX, Lease, MESSAGE_BYTES_MAX, MessageError, VERSION,
};
pub use socket::{Packets, Sent, connect};
