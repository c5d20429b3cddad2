//! Landlock: no file but those that a role keeps, no TCP port, no abstract socket and no signal to a process outside.

use super::Reach;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};

/// What is asked of the kernel: since Linux 6.12 there are files, TCP, abstract sockets and signals.
const ASKED: ABI = ABI::V6;

type Boxed = Box<dyn std::error::Error + Send + Sync>;

fn rights(reach: &Reach) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    match reach {
        Reach::Read(_) => read,
        Reach::Write(_) => read | AccessFs::WriteFile | AccessFs::Truncate,
        Reach::Device(_) => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev,
        Reach::Own(_) => {
            read | AccessFs::WriteFile
                | AccessFs::Truncate
                | AccessFs::MakeReg
                | AccessFs::RemoveFile
        }
        Reach::Remove(_) => AccessFs::RemoveFile.into(),
        Reach::RemoveEmpty(_) => AccessFs::RemoveDir.into(),
    }
}

/// Shuts this thread, and all that it makes, off. What a process needs of the file system it has
/// opened before, or been handed, or is among what it keeps.
pub(super) fn shut(kept: &[Reach]) -> Result<(), Boxed> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ASKED))?
        .handle_access(AccessNet::from_all(ASKED))?
        .scope(Scope::from_all(ASKED))?
        .create()?;
    for reach in kept {
        let below = PathBeneath::new(PathFd::new(reach.path())?, rights(reach));
        rules = rules.add_rule(below)?;
    }
    rules.restrict_self()?;
    Ok(())
}
