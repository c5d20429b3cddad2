//! Faults planted on purpose: what is planted where, and which test has to find it.

pub mod outcome;
pub mod table;
pub mod tree;
