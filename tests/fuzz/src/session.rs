//! Any bytes on the socket end the guest session cleanly, with nothing left of it.

#[path = "../../../vmm-glue/tests/vfio_user/feed.rs"]
mod feed;

pub(super) fn target(bytes: &[u8]) {
    feed::feed(bytes);
}
