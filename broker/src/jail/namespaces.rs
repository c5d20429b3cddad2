//! Namespaces of a process's own, where the kernel permits them.

use rustix::thread::UnshareFlags;

/// Network first: it is what a process without a network must not have. Never a PID namespace: the
/// process has to know which process is behind its socket.
const WANTED: [(&str, UnshareFlags); 3] = [
    ("net", UnshareFlags::NEWNET),
    ("ipc", UnshareFlags::NEWIPC),
    ("uts", UnshareFlags::NEWUTS),
];

/// Leaves the host's namespaces; returns the names of those that it got.
pub(super) fn leave() -> Vec<String> {
    let mut own = Vec::new();
    for (name, flag) in WANTED {
        // What is not permitted here (a container, no capability) is no reason not to run: Landlock
        // and seccomp deny the same and are not optional.
        #[expect(
            deprecated,
            reason = "what is unsafe of it is unsharing the table of descriptors, which none of these flags does"
        )]
        let left = rustix::thread::unshare(flag);
        match left {
            Ok(()) => own.push(name.to_owned()),
            Err(error) => tracing::debug!(name, %error, "no namespace of its own"),
        }
    }
    own
}
