//! The sandbox of one process: descriptors, limits, namespaces, capabilities, Landlock, seccomp, in that order.
//!
//! ```text
//! started --confine (one thread)--> Confined --threads are made--> seal (all threads) --> Sealed
//! ```
//! Everything is given up before the first byte of a stranger is read. It fails closed: what the
//! kernel does not offer is a refusal, unless the operator said `--sandbox=off`, and then `status`
//! tells. What is inherited by threads (`confine`) comes before they are made; what can be put on
//! all threads at once (seccomp) comes after, so that no role needs to make threads any more.

mod calls;
mod descriptors;
mod landlocked;
mod limits;
mod namespaces;
mod privileges;
#[cfg(test)]
mod tests;

pub use calls::{Call, Only, any, when};
pub use descriptors::{check as check_descriptors, keep_from_children};
pub use limits::Limits;

use rustix::process::{chdir, chroot};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};
use std::{
    io,
    os::fd::RawFd,
    path::{Path, PathBuf},
};

/// What the operator said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sandbox {
    /// All of it, or the process does not run.
    #[default]
    On,
    /// Neither Landlock nor seccomp nor namespaces: for a kernel without them, and told in `status`.
    Off,
}

impl Sandbox {
    /// As it is typed.
    pub fn word(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
        }
    }
}

/// What a kind of process is left with.
#[derive(Debug)]
pub struct Role {
    /// Its name, for errors and `status`.
    pub name: &'static str,
    /// Its limits.
    pub limits: Limits,
    /// The system calls that it makes once it is sealed; each is needed.
    pub calls: &'static [Call],
}

/// What a process may still reach of the file system: files below a folder, or one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// To be read.
    Read(PathBuf),
    /// To be written as well; nothing is made or removed.
    Write(PathBuf),
    /// Devices, with whatever they are asked to do.
    Device(PathBuf),
    /// Files that it makes, writes and removes.
    Own(PathBuf),
    /// Files that it removes, without seeing what is there.
    Remove(PathBuf),
    /// Folders that it removes when nothing is in them.
    RemoveEmpty(PathBuf),
}

impl Reach {
    /// Which.
    pub fn path(&self) -> &Path {
        match self {
            Self::Read(path)
            | Self::Write(path)
            | Self::Device(path)
            | Self::Own(path)
            | Self::Remove(path)
            | Self::RemoveEmpty(path) => path,
        }
    }
}

/// What a process keeps of what [`confine`] takes from all others.
#[derive(Clone, Debug)]
pub struct Kept {
    /// What it may reach.
    pub reach: Vec<Reach>,
    /// Its capabilities.
    pub capabilities: CapabilitySet,
    /// Without Landlock, which would also keep it from looking at other processes.
    pub sees_processes: bool,
    /// The folder that is all it sees of the file system.
    pub root: Option<&'static str>,
}

impl Default for Kept {
    /// Nothing.
    fn default() -> Self {
        Self {
            reach: Vec::new(),
            capabilities: CapabilitySet::empty(),
            sees_processes: false,
            root: None,
        }
    }
}

/// Why a process cannot give its rights up; it must not run then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Somebody left descriptors open.
    #[error(
        "{role} was started with descriptors that are not its own ({found}): whoever starts it has to close them, as `sublet port` does for its workers"
    )]
    Descriptors {
        /// The process.
        role: &'static str,
        /// Number and target of each.
        found: String,
    },
    /// No Landlock, or one that is too old.
    #[error(
        "{role} cannot be shut off from files and network by Landlock: boot a kernel of 6.12 or later with `landlock` in its `lsm=` list, or say --sandbox=off"
    )]
    Landlock {
        /// The process.
        role: &'static str,
        /// The kernel's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No seccomp.
    #[error(
        "{role} cannot be held to its list of system calls by seccomp: boot a kernel with CONFIG_SECCOMP_FILTER, or say --sandbox=off"
    )]
    Seccomp {
        /// The process.
        role: &'static str,
        /// The kernel's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Anything else that the kernel refused.
    #[error("{role} cannot {act}")]
    Kernel {
        /// The process.
        role: &'static str,
        /// What was asked.
        act: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
}

/// What a process has been left with, as `status` tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Whether Landlock shuts it off from files, network and other processes' sockets.
    pub landlock: bool,
    /// Whether seccomp holds it to its list.
    pub seccomp: bool,
    /// The namespaces of its own that it was given; where not permitted, none.
    pub namespaces: Vec<String>,
}

impl Report {
    /// Whether the sandbox is complete; namespaces are a bonus.
    pub fn is_closed(&self) -> bool {
        self.landlock && self.seccomp
    }
}

/// A process on its way in: no new thread of it has more than it has now.
#[derive(Debug)]
#[must_use = "a confined process is not sealed yet"]
pub struct Confined {
    role: &'static Role,
    sandbox: Sandbox,
    report: Report,
}

/// Gives up everything but system calls. For the only thread of a process: threads that are there
/// already would keep what they have. `own` are all descriptors that it was handed.
pub fn confine(
    role: &'static Role,
    sandbox: Sandbox,
    own: &[RawFd],
) -> Result<Confined, JailError> {
    confine_but(role, sandbox, own, &Kept::default())
}

/// The same, but for what it keeps.
pub fn confine_but(
    role: &'static Role,
    sandbox: Sandbox,
    own: &[RawFd],
    kept: &Kept,
) -> Result<Confined, JailError> {
    let failed = |act| {
        move |source: io::Error| JailError::Kernel {
            role: role.name,
            act,
            source,
        }
    };
    let found = descriptors::check(own).map_err(failed("look at its own descriptors"))?;
    if !found.is_empty() {
        return Err(JailError::Descriptors {
            role: role.name,
            found: found.join(", "),
        });
    }
    limits::set(&role.limits).map_err(failed("limit itself"))?;
    let mut report = Report::default();
    if sandbox == Sandbox::On {
        report.namespaces = namespaces::leave();
    }
    if let Some(root) = kept.root {
        chroot(root)
            .and_then(|()| chdir("/"))
            .map_err(|errno| failed("shut itself into a folder")(errno.into()))?;
    }
    privileges::give_up(kept.capabilities).map_err(failed("give up its capabilities"))?;
    if sandbox == Sandbox::On && !kept.sees_processes {
        landlocked::shut(&kept.reach).map_err(|source| JailError::Landlock {
            role: role.name,
            source,
        })?;
        report.landlock = true;
    }
    Ok(Confined {
        role,
        sandbox,
        report,
    })
}

impl Confined {
    /// Holds all threads of the process to the role's list, for good.
    pub fn seal(mut self) -> Result<Report, JailError> {
        if self.sandbox == Sandbox::On {
            calls::hold_to(self.role.calls).map_err(|source| JailError::Seccomp {
                role: self.role.name,
                source,
            })?;
            self.report.seccomp = true;
        }
        Ok(self.report)
    }

    /// The same for a process whose threads come and go: what the C library asks for at the first
    /// of them is nothing that it may be asked for later.
    pub fn seal_before_threads(self) -> Result<Report, JailError> {
        let role = self.role.name;
        let first = std::thread::Builder::new().spawn(|| ());
        let first = first.map_err(|source| JailError::Kernel {
            role,
            act: "start a thread",
            source,
        })?;
        // It does nothing that could go wrong.
        let _ = first.join();
        self.seal()
    }
}
