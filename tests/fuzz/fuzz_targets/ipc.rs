//! Any bytes between a daemon and a worker are a message, which can be sent again, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sublet::ipc::{ToPort, ToWorker};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = ToPort::decode(bytes, Vec::new()) {
        let _ = message.encode().expect("what came can be sent");
    }
    if let Ok(message) = ToWorker::decode(bytes, Vec::new()) {
        let _ = message.encode().expect("what came can be sent");
    }
});
