//! The wire between the lab's runner and its agents, shared by both.

pub mod wire;
