//! A copy of the repository's tree to plant faults in, and the guard that takes each out again.

use crate::table::Mutant;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The copy.
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// Copies all files that git has or would take. What has not changed since the last copy is
    /// left alone, so that it is not built again.
    pub fn copy(from: &Path, to: &Path) -> Result<Self> {
        let listed = Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(from)
            .output()
            .context("git ls-files")?;
        ensure!(listed.status.success(), "git ls-files failed");
        let files = String::from_utf8(listed.stdout).context("paths are UTF-8")?;
        fs::create_dir_all(to)?;
        remove_others(to, to, &files.lines().collect::<Vec<_>>())?;
        for file in files.lines().filter(|file| from.join(file).is_file()) {
            let target = to.join(file);
            let text = fs::read(from.join(file)).with_context(|| file.to_owned())?;
            if fs::read(&target).is_ok_and(|old| old == text) {
                continue;
            }
            if let Some(folder) = target.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(&target, text).with_context(|| file.to_owned())?;
        }
        Ok(Self {
            root: to.to_owned(),
        })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Plants a fault, until the guard is dropped.
    pub fn plant(&self, mutant: &Mutant) -> Result<Planted> {
        let path = self.root.join(&mutant.file);
        let original = fs::read_to_string(&path).with_context(|| mutant.file.clone())?;
        fs::write(&path, mutant.planted(&original)?)?;
        Ok(Planted { path, original })
    }
}

/// A planted fault; dropped, the file is as it was.
pub struct Planted {
    path: PathBuf,
    original: String,
}

impl Drop for Planted {
    fn drop(&mut self) {
        // Nothing to be done where it fails: the next copy of the tree mends it.
        let _ = fs::write(&self.path, &self.original);
    }
}

/// Removes what a copy made from another state of the tree has left.
fn remove_others(root: &Path, folder: &Path, files: &[&str]) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(root, &path, files)?;
        } else if let Ok(relative) = path.strip_prefix(root)
            && !files.iter().any(|file| Path::new(file) == relative)
        {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
