//! Any bytes on the socket end the guest session cleanly, with nothing left of it.
#![no_main]

// What the tests of the server use; not all of it is used here.
#[allow(dead_code)]
#[path = "../../../vmm-glue/tests/vfio_user/fake.rs"]
mod fake;
#[path = "../../../vmm-glue/tests/vfio_user/feed.rs"]
mod feed;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    feed::feed(bytes);
});
