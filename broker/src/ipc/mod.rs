//! What a daemon and its workers say to each other: typed, bounded messages over a SEQPACKET socket.
//!
//! One message is one datagram of at most [`MESSAGE_BYTES_MAX`] bytes with at most [`FDS_MAX`]
//! descriptors. No message names a lease: whose it is about follows from the socket it came on.
//! What comes from a worker is a stranger's: parsing is total, and what cannot be ends the worker.

mod codec;
mod message;
mod socket;
#[cfg(test)]
mod tests;

pub use codec::MessageError;
pub(crate) use codec::{bad, check_fds, get_check, get_text, put_check, put_text};
pub use message::{
    Answered, Check, FILES_MAX, MapPart, MapPiece, PEERS_MAX, PIECES_MAX, SIGNALS_MAX, Start,
    ToPort, ToWorker, Token, Told,
};
pub use socket::{Channel, ChannelError, Datagram, FDS_MAX, MESSAGE_BYTES_MAX, Sent};
