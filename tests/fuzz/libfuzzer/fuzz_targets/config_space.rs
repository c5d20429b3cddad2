//! The fuzzer's entry to the target `config_space`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_targets::run("config_space", bytes));
