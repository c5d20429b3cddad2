//! The fuzzer's entry to the target `slot`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_targets::run("slot", bytes));
