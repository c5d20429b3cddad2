//! The fuzzer's entry to the target `keeper`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_targets::run("keeper", bytes));
