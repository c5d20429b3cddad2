//! The whole model against fake clients.

mod bridge;
mod common;
mod process;
mod protocol;
