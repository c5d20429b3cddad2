//! The fuzzer's entry to the target `ipc`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_targets::run("ipc", bytes));
