//! Any bytes parse as a vfio-user request or are refused.

use vmm_glue::vfio_user::{
    version,
    wire::{self, Header, Request},
};
use zerocopy::FromBytes;

pub(super) fn target(bytes: &[u8]) {
    let Ok((header, body)) = Header::ref_from_prefix(bytes) else {
        return;
    };
    let Ok(envelope) = header.envelope() else {
        return;
    };
    if let Ok(Request::Version(asked, json)) = wire::parse(&envelope, body) {
        let _ = version::agree(asked, json);
    }
}
