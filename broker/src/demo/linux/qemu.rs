//! QEMU with the borrowed function behind `vfio-user-pci`, a kernel, and this program as its init.

use super::initramfs::{self, PROGRAM};
use crate::demo::claim::{DemoError, setup};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The first QEMU with `vfio-user-pci`.
const VERSION_MIN: (u32, u32) = (10, 1);
/// The kernel's own console goes here, so that nothing of it comes between the guest's words.
const CONSOLE: &str = "console.log";
/// The most of it that is shown when the guest says nothing.
const CONSOLE_LINES: usize = 8;

/// What is asked for with `--linux`.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// Its accelerator; by default KVM where /dev/kvm opens.
    pub accel: Option<String>,
}

impl Qemu {
    /// The guest's memory.
    pub const MEMORY_BYTES: u64 = 512 << 20;

    /// Its version, refused where it has no `vfio-user-pci`.
    pub fn check(&self) -> Result<String, DemoError> {
        let act = "boot a Linux guest";
        let name = self.program.display();
        let output = Command::new(&self.program).arg("--version").output();
        let output = output.map_err(|error| {
            setup(act)(format!(
                "{name} does not run: {error}; install QEMU 10.1 or newer, or name it with --qemu"
            ))
        })?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = version(&told);
        if version.is_none_or(|version| version < VERSION_MIN) {
            let line = told.lines().next().unwrap_or("nothing").to_owned();
            return Err(setup(act)(format!(
                "{name} says {line:?}, and vfio-user-pci is in QEMU 10.1 and newer: name one with \
                 --qemu"
            )));
        }
        File::open(&self.kernel).map_err(|error| {
            let kernel = self.kernel.display();
            setup(act)(format!("the kernel {kernel} cannot be read: {error}"))
        })?;
        Ok(told.lines().next().unwrap_or_default().to_owned())
    }

    /// The command that becomes this QEMU and ends with this process. Serial port 0 is its stdin
    /// and stdout.
    pub fn command(&self, socket: &Path, folder: &Path) -> io::Result<Command> {
        std::fs::create_dir(folder)?;
        let initramfs = folder.join("initramfs");
        initramfs::write(&initramfs)?;
        let kvm = || {
            File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_ok()
        };
        let accel = self.accel.as_deref();
        let accel = accel.unwrap_or(if kvm() { "kvm" } else { "tcg" });
        let cpu = if accel == "kvm" { "host" } else { "max" };
        let device = serde_json::json!({
            "driver": "vfio-user-pci",
            "socket": { "type": "unix", "path": socket },
        });
        let mib = Self::MEMORY_BYTES >> 20;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("demo-qemu")
            .arg("--parent")
            .arg(std::process::id().to_string())
            .arg("--")
            .arg(&self.program)
            .args(["-M", "q35,memory-backend=m", "-accel", accel, "-cpu", cpu])
            .args(["-smp", "1", "-m", &format!("{mib}M"), "-object"])
            .arg(format!("memory-backend-memfd,id=m,size={mib}M,share=on"))
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-nic", "none", "-no-reboot"])
            .args([
                "-chardev",
                "stdio,id=words,signal=off",
                "-serial",
                "chardev:words",
            ])
            .arg("-serial")
            .arg(format!("file:{}", folder.join(CONSOLE).display()))
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .arg("-append")
            .arg(format!(
                "console=ttyS1 panic=-1 rdinit={PROGRAM} -- demo-init"
            ))
            .arg("-device")
            .arg(device.to_string());
        Ok(command)
    }

    /// The last lines of the kernel's console.
    pub fn console(folder: &Path) -> String {
        let text = std::fs::read(folder.join(CONSOLE)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join(" | ")
    }
}

/// `QEMU emulator version 11.1.3 (Debian ...)`.
fn version(told: &str) -> Option<(u32, u32)> {
    let (_, rest) = told.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Becomes another program that is killed when the parent goes.
pub fn become_qemu(parent: i32, argv: &[std::ffi::OsString]) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(parent) {
        return Ok(());
    }
    let (program, arguments) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    Err(Command::new(program).args(arguments).exec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_qemu_prints_them() {
        let debian = "QEMU emulator version 7.2.17 (Debian 1:7.2+dfsg-7+deb12u16)\nCopyright";
        assert_eq!(version(debian), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.1.0\n"), Some((10, 1)));
        assert_eq!(version("no emulator"), None);
        assert!(version(debian) < Some(VERSION_MIN));
    }
}
