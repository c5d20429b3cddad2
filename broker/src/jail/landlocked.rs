//! Landlock: no file, no TCP port, no abstract socket and no signal to a process outside.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    Scope,
};

/// What is asked of the kernel: since Linux 6.12 there are files, TCP, abstract sockets and signals.
const ASKED: ABI = ABI::V6;

/// Shuts this thread, and all that it makes, off. No rule lets anything through again: what a
/// process needs of the file system it has opened before, or been handed.
pub(super) fn shut() -> Result<(), RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ASKED))?
        .handle_access(AccessNet::from_all(ASKED))?
        .scope(Scope::from_all(ASKED))?
        .create()?
        .restrict_self()
        .map(drop)
}
