//! All that carries one lent function between two hosts: protocol, state machines, undoing.

mod codec;
pub mod message;
pub mod wire;
