//! The fuzzer's entry to the target `peer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_targets::run("peer", bytes));
