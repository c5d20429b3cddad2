//! Any config space is walked to its end or refused, and a guest that writes to its shadow changes only what it may.

use vfio_shim::model::{ConfigView, FunctionInfo, ShadowConfig};

/// One write: where, how long, and with what.
const WRITE_BYTES: usize = 4;

fn walk(bytes: &[u8]) -> Option<()> {
    let view = ConfigView::new(bytes).ok()?;
    let standard = view.capabilities().map_or(0, |all| all.len());
    let extended = view.extended_capabilities().map_or(0, |all| all.len());
    assert!(standard <= 64 && extended <= 1024, "{standard}, {extended}");
    let _ = (
        view.serial(),
        view.capability(0x10),
        view.extended_capability(3),
    );
    Some(())
}

/// The first two bytes are the length of a config space, which follows; the rest is what the guest
/// writes.
pub(super) fn target(bytes: &[u8]) {
    let Some((len, rest)) = bytes.split_first_chunk() else {
        return;
    };
    let len = usize::from(u16::from_le_bytes(*len));
    let (space, writes) = rest.split_at(len.min(rest.len()));
    if walk(space).is_none() {
        return;
    }
    let mut info = FunctionInfo {
        resettable: len & 1 == 0,
        ..FunctionInfo::default()
    };
    info.regions[0].size = 0x4000;
    let Ok(mut shadow) = ShadowConfig::new(space, &info) else {
        return;
    };
    assert_eq!(shadow.byte_count(), space.len());
    let seen = |shadow: &ShadowConfig| {
        let mut seen = vec![0; space.len()];
        shadow.read(0, &mut seen);
        seen
    };
    let power_on = seen(&shadow);
    for write in writes.chunks_exact(WRITE_BYTES) {
        let at = u64::from(u16::from_le_bytes([write[0], write[1]]));
        let some = usize::from(write[2] & 7);
        let _ = shadow.write(at, &vec![write[3]; some]);
        assert_eq!(seen(&shadow).len(), space.len());
    }
    shadow.reset();
    assert_eq!(seen(&shadow), power_on, "a reset brings all of it back");
}
