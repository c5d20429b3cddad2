//! The architecture's invariants, as tests.
