//! All that carries one lent function between two hosts: protocol, state machines, undoing.

mod codec;
pub mod link;
pub mod mailbox;
pub mod message;
mod refusal;
pub mod relay;
pub mod wire;

/// An error and its causes in one line.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str(": ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words
}
