//! The vfio-user server in front of a function that writes down what is done to it.

mod bad_input;
mod fake;
mod feed;
mod oracle;
mod protocol;
mod random;
mod rig;
mod undo;
