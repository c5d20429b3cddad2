//! The negotiation of version and capabilities: JSON in, JSON out, no I/O.

use super::wire;
use serde::{Deserialize, Serialize};

/// The most fds that QEMU takes a server at its word for; more is `malformed max_msg_fds` there.
pub const MSG_FDS_MAX: u32 = 16;
/// The most DMA maps of a guest session: what a type1 container holds.
pub const MAPS_MAX: u32 = 65535;
/// Page sizes that DMA maps may be made of, as a bit set: 4 KiB, 2 MiB, 1 GiB.
pub const PAGE_SIZES: u64 = 1 << 12 | 1 << 21 | 1 << 30;

/// The newest minor version known: 0.1 is what cloud-hypervisor speaks, 0.0 QEMU.
const MINOR_MAX: u16 = 1;

/// Why no version could be agreed on.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// Another major version.
    #[error("the VMM speaks vfio-user {major}.{minor}; only 0.x is known")]
    Major {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// The JSON is not closed by a NUL.
    #[error("the VMM's capabilities do not end in a NUL byte")]
    Unterminated,
    /// No JSON, or of another shape.
    #[error("the VMM's capabilities are not understood")]
    Json(#[source] serde_json::Error),
    /// VERSION asked for no reply.
    #[error("the VMM wants no reply to its VERSION message")]
    NoReply,
}

/// What the client told of itself. Only checked for its shape: this server sends at most one fd
/// per message, and never more data than was asked for.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a JSON object")]
struct Asked {
    #[expect(dead_code, reason = "parsed for its shape")]
    #[serde(default)]
    capabilities: AskedCapabilities,
}

#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "an object of capabilities")]
#[expect(dead_code, reason = "parsed for its shape")]
struct AskedCapabilities {
    max_msg_fds: Option<u64>,
    max_data_xfer_size: Option<u64>,
}

#[derive(Serialize)]
struct Offered {
    capabilities: OfferedCapabilities,
}

#[derive(Serialize)]
struct OfferedCapabilities {
    max_msg_fds: u32,
    max_data_xfer_size: u32,
    pgsizes: u64,
    max_dma_maps: u32,
}

/// The minor version to answer to a client that asks for `asked`: never a higher one, which QEMU
/// refuses as an incompatible server.
pub fn agree(asked: &wire::Version, json: &[u8]) -> Result<u16, VersionError> {
    let (major, minor) = (asked.major.get(), asked.minor.get());
    if major != 0 {
        return Err(VersionError::Major { major, minor });
    }
    if let Some((last, json)) = json.split_last() {
        if *last != 0 {
            return Err(VersionError::Unterminated);
        }
        serde_json::from_slice::<Asked>(json).map_err(VersionError::Json)?;
    }
    Ok(minor.min(MINOR_MAX))
}

/// The capabilities of this server, as NUL-terminated JSON. Short: QEMU takes no longer a reply
/// than its own request was.
pub fn capabilities(maps_max: u32) -> Vec<u8> {
    let offered = Offered {
        capabilities: OfferedCapabilities {
            max_msg_fds: MSG_FDS_MAX,
            max_data_xfer_size: wire::DATA_XFER_MAX,
            pgsizes: PAGE_SIZES,
            max_dma_maps: maps_max.min(MAPS_MAX),
        },
    };
    // Numbers alone always serialize.
    let mut json = serde_json::to_vec(&offered).unwrap_or_default();
    json.push(0);
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(major: u16, minor: u16) -> wire::Version {
        wire::Version {
            major: major.into(),
            minor: minor.into(),
        }
    }

    /// What QEMU 11.1 sends.
    const QEMU: &[u8] =
        b"{\"capabilities\": {\"migration\": {\"max_bitmap_size\": 268435456, \"pgsize\": 4096}, \
        \"max_msg_fds\": 16, \"max_dma_maps\": 65535, \"max_data_xfer_size\": 1048576, \
        \"pgsizes\": 4096, \"write_multiple\": true}}\0";

    #[test]
    fn the_answer_is_never_newer_than_what_was_asked() {
        assert_eq!(agree(&asked(0, 0), QEMU).unwrap(), 0);
        assert_eq!(agree(&asked(0, 1), QEMU).unwrap(), 1);
        assert_eq!(agree(&asked(0, 9), b"").unwrap(), 1);
    }

    #[test]
    fn the_answer_fits_into_the_buffer_of_qemus_request() {
        assert!(capabilities(MAPS_MAX).len() <= QEMU.len());
    }

    #[test]
    fn malformed_versions_are_refused_in_words() {
        let words = |major, json: &[u8]| agree(&asked(major, 0), json).unwrap_err().to_string();
        assert_eq!(
            words(1, QEMU),
            "the VMM speaks vfio-user 1.0; only 0.x is known"
        );
        assert_eq!(
            words(0, b"{}"),
            "the VMM's capabilities do not end in a NUL byte"
        );
        for json in [
            &b"\0"[..],
            b"{\0",
            b"7\0",
            b"\xff\0",
            b"{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        ] {
            assert_eq!(words(0, json), "the VMM's capabilities are not understood");
        }
    }

    #[test]
    fn deeply_nested_json_is_an_error() {
        let mut json = vec![b'['; wire::CAPABILITIES_MAX as usize - 1];
        json.push(0);
        assert!(agree(&asked(0, 0), &json).is_err());
    }
}
