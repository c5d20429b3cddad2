//! What functions were bound to before the keeper took them: in a folder, so that a keeper that was killed is not missed.

use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use vfio_shim::{model::Bdf, sysfs::OldBinding};

/// A record is two short words; more is none of ours.
const RECORD_BYTES_MAX: u64 = 4096;

/// One file for each function, in the keeper's own folder. The folder lives as long as the
/// kernel's bindings do: both are gone after a reboot.
#[derive(Debug)]
pub(super) struct Journal {
    folder: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    driver: Option<String>,
    driver_override: Option<String>,
}

impl Journal {
    /// The journal in this folder, which is made.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    fn path(&self, bdf: Bdf) -> PathBuf {
        self.folder.join(bdf.to_string())
    }

    /// Before the function is bound. A record is there whole or not at all.
    pub(super) fn write(&self, bdf: Bdf, old: &OldBinding) -> io::Result<()> {
        let record = Record {
            driver: old.driver.clone(),
            driver_override: old.driver_override.clone(),
        };
        let fresh = self.folder.join(format!("{bdf}.new"));
        fs::write(&fresh, serde_json::to_vec(&record)?)?;
        fs::rename(&fresh, self.path(bdf))
    }

    /// After it was given back.
    pub(super) fn remove(&self, bdf: Bdf) {
        match fs::remove_file(self.path(bdf)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(%bdf, %error, "the record of a function that was given back stays");
            }
            _ => {}
        }
    }

    /// What the last keeper had bound. What is no record is told, and left where it is.
    pub(super) fn read(&self) -> io::Result<Vec<(Bdf, OldBinding)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(bdf) = name.and_then(|name| name.parse().ok()) else {
                continue;
            };
            match read(&path) {
                Ok(record) => {
                    let Record {
                        driver,
                        driver_override,
                    } = record;
                    let old = OldBinding {
                        driver,
                        driver_override,
                    };
                    found.push((bdf, old));
                }
                Err(error) => tracing::error!(
                    path = %path.display(), %error,
                    "cannot tell what {bdf} was bound to before: give it back by hand, and remove the file"
                ),
            }
        }
        found.sort_by_key(|(bdf, _)| *bdf);
        Ok(found)
    }
}

fn read(path: &Path) -> io::Result<Record> {
    if fs::metadata(path)?.len() > RECORD_BYTES_MAX {
        return Err(io::Error::other("it is longer than any record"));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}
