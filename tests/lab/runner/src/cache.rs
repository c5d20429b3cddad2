//! Where things lie in the cache folder that `tests/lab/install.sh` fills.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::{env, fs};

/// The target that the static binaries are built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The cache folder.
#[derive(Clone, Debug)]
pub struct Cache {
    /// Its path; hosts see it at [`Cache::IN_HOST`], read-only.
    pub root: PathBuf,
}

/// A kernel image and the modules that belong to it.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// What `uname -r` will say.
    pub version: String,
    /// The compressed image.
    pub image: PathBuf,
    /// The folder with `modules.dep`.
    pub modules: PathBuf,
}

impl Kernel {
    /// A kernel whose packages were unpacked under this folder. Debian keeps the image beside the
    /// modules in newer packages, in /boot in older ones.
    pub fn unpacked(root: &Path, version: &str) -> Result<Self> {
        let modules = ["usr/lib/modules", "lib/modules"].map(|dir| root.join(dir).join(version));
        let modules = modules
            .into_iter()
            .find(|dir| dir.join("modules.dep").exists());
        let modules =
            modules.with_context(|| format!("no modules of {version} under {}", root.display()))?;
        let images = [
            modules.join("vmlinuz"),
            root.join("boot").join(format!("vmlinuz-{version}")),
        ];
        let image = images.into_iter().find(|path| path.exists());
        let image =
            image.with_context(|| format!("no image of {version} under {}", root.display()))?;
        Ok(Kernel {
            version: version.to_owned(),
            image,
            modules,
        })
    }
}

impl Cache {
    /// Where a host mounts the cache folder.
    pub const IN_HOST: &str = "/lab/cache";

    /// Finds it as `tests/run` does.
    pub fn find() -> Result<Self> {
        let root = match env::var_os("SUBLET_CACHE") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?)
                .join(".cache/sublet-lab"),
        };
        ensure!(
            root.join("stamps/kernel").exists(),
            "{} is not filled: run tests/run --install",
            root.display()
        );
        Ok(Cache { root })
    }

    /// The stock kernel of hosts and guests.
    pub fn kernel(&self) -> Result<Kernel> {
        let version = fs::read_to_string(self.root.join("stamps/kernel"))
            .context("cannot read the kernel's stamp")?;
        let version = version.trim();
        Kernel::unpacked(&self.root.join("kernel").join(version), version)
    }

    /// The project's static binaries; `SUBLET_LAB_BIN` names another folder of them.
    pub fn binary(&self, name: &str) -> Result<PathBuf> {
        let dir = match env::var_os("SUBLET_LAB_BIN") {
            Some(dir) => PathBuf::from(dir),
            None => self.root.join("target").join(TARGET).join("release"),
        };
        let path = dir.join(name);
        ensure!(
            path.exists(),
            "{} is not built: start the lab by tests/run lab",
            path.display()
        );
        Ok(path)
    }

    /// The command that runs a program of the newer Debian on an older one, by its own loader and
    /// libraries: no chroot, so every path means the same inside and out. `root` is the cache
    /// folder as the machine that runs it sees it.
    pub fn newer(root: &Path, program: &str) -> Vec<String> {
        let debian = root.join("trixie");
        let at = |path: &str| debian.join(path).display().to_string();
        let libraries = [at("usr/lib/x86_64-linux-gnu"), at("usr/lib")].join(":");
        vec![
            at("usr/lib64/ld-linux-x86-64.so.2"),
            "--library-path".into(),
            libraries,
            at("usr/bin").to_owned() + "/" + program,
        ]
    }

    /// QEMU with its firmware folders.
    pub fn qemu(root: &Path) -> Vec<String> {
        let mut argv = Self::newer(root, "qemu-system-x86_64");
        for dir in ["usr/share/seabios", "usr/share/qemu"] {
            argv.push("-L".into());
            argv.push(root.join("trixie").join(dir).display().to_string());
        }
        argv
    }
}
