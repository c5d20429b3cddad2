//! What strangers send, as fuzz targets: plain functions of bytes, which a fuzzer calls and the gate replays.
//!
//! A target panics when a promise is broken; refusing its input is the usual thing to do.

mod config;
mod config_space;
// What the tests of the vfio-user server use; not all of it is used here.
#[allow(dead_code)]
#[path = "../../../vmm-glue/tests/vfio_user/fake.rs"]
mod fake;
mod ipc;
mod keeper;
mod peer;
mod session;
mod slot;
mod wire;

/// A target.
#[derive(Clone, Copy)]
pub struct Target {
    /// As its folder of `corpus` and the fuzzer's binary are called.
    pub name: &'static str,
    /// What it does with its input.
    pub run: fn(&[u8]),
    /// The sources whose lines it is to reach.
    pub covers: &'static [&'static str],
    /// Whether it is held to `coverage`'s goal in them.
    pub has_goal: bool,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "wire",
        run: wire::target,
        covers: &[
            "vmm-glue/src/vfio_user/wire.rs",
            "vmm-glue/src/vfio_user/version.rs",
        ],
        has_goal: true,
    },
    Target {
        name: "session",
        run: session::target,
        covers: &[
            "vmm-glue/src/vfio_user/session.rs",
            "vmm-glue/src/vfio_user/dispatch.rs",
        ],
        has_goal: true,
    },
    Target {
        name: "ipc",
        run: ipc::target,
        covers: &["broker/src/ipc/codec.rs"],
        has_goal: false,
    },
    Target {
        name: "keeper",
        run: keeper::target,
        covers: &["broker/src/keeper/message.rs"],
        has_goal: false,
    },
    Target {
        name: "slot",
        run: slot::target,
        covers: &["vfio-shim/src/path/codec.rs", "vfio-shim/src/path/wire.rs"],
        has_goal: true,
    },
    Target {
        name: "peer",
        run: peer::target,
        covers: &[
            "vfio-shim/src/path/mailbox.rs",
            "vfio-shim/src/path/lender.rs",
        ],
        has_goal: false,
    },
    Target {
        name: "config",
        run: config::target,
        covers: &[
            "broker/src/config/validate.rs",
            "broker/src/config/pattern.rs",
        ],
        has_goal: false,
    },
    Target {
        name: "config_space",
        run: config_space::target,
        covers: &[
            "vfio-shim/src/model/config_space.rs",
            "vfio-shim/src/model/shadow_config.rs",
        ],
        has_goal: true,
    },
];

/// The target of a name.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("a target of this name").run)(bytes);
}
