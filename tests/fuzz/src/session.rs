//! Any bytes on the socket end the guest session cleanly, with nothing left of it.

#[path = "../../../vmm-glue/tests/vfio_user/feed.rs"]
mod feed;

/// The last byte is the scene.
pub(super) fn target(bytes: &[u8]) {
    let (scene, bytes) = bytes.split_last().unwrap_or((&0, bytes));
    feed::feed(bytes, feed::Scene(*scene));
}
