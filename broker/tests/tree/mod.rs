//! A host of files: its functions as sysfs has them, and what a keeper of it is told and writes down.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

pub const NTB: &str = "0000:02:00.0";
/// The PF of both VFs, where there is one.
pub const PF: &str = "0000:01:00.0";
pub const VF: &str = "0000:01:00.1";
pub const OTHER: &str = "0000:01:00.2";
/// One that the configuration does not name.
pub const FORBIDDEN: &str = "0000:03:00.0";

pub fn put(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

pub struct Tree {
    dir: PathBuf,
    _made: Option<tempfile::TempDir>,
}

impl Tree {
    /// The one that is there already.
    pub fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            _made: None,
        }
    }

    pub fn new() -> Self {
        let made = tempfile::tempdir().unwrap();
        let mut tree = Self::at(made.path());
        tree._made = Some(made);
        for driver in ["vfio-pci", "nvme"] {
            for file in ["bind", "unbind"] {
                put(&tree.sys(&format!("bus/pci/drivers/{driver}/{file}")), "");
            }
        }
        put(&tree.sys("bus/pci/drivers_probe"), "");
        for (group, bdf) in [NTB, VF, OTHER, FORBIDDEN].into_iter().enumerate() {
            tree.function(bdf, group);
        }
        tree
    }

    /// The folder that stands for `/`.
    pub fn top(&self) -> &Path {
        &self.dir
    }

    pub fn sys(&self, below: &str) -> PathBuf {
        self.dir.join("sys").join(below)
    }

    fn device(&self, bdf: &str) -> PathBuf {
        self.sys(&format!("bus/pci/devices/{bdf}"))
    }

    /// The keeper's.
    pub fn folder(&self) -> PathBuf {
        self.dir.join("keeper")
    }

    /// The configuration of a keeper that serves this user.
    pub fn config_text(&self, user: u32) -> String {
        let folder = self.folder();
        format!(
            "[node]\nid = 4\nname = \"a\"\n[keeper]\nfolder = {folder:?}\nuser = \"{user}\"\n\
             [[port]]\nname = \"n\"\nbdf = \"{NTB}\"\npeers = \"cable\"\ntrust_domain = \"t\"\n\
             [policy]\nallow = [\"01:00.*\"]\n"
        )
    }

    /// Makes these the VFs of [`PF`], which xe drives, each with the file that stops it.
    pub fn xe_vfs(&self, vfs: &[&str]) {
        let pf = self.device(PF);
        let real = self.sys(&format!("devices/pci0000:00/{PF}"));
        fs::create_dir_all(&real).unwrap();
        symlink(&real, &pf).unwrap();
        self.function(PF, 9);
        fs::create_dir_all(self.sys("bus/pci/drivers/xe")).unwrap();
        self.bind_to(PF, "xe");
        put(&pf.join("sriov_numvfs"), &format!("{}\n", vfs.len()));
        for (index, vf) in vfs.iter().enumerate() {
            let device = self.device(vf);
            symlink(&pf, device.join("physfn")).unwrap();
            symlink(&device, pf.join(format!("virtfn{index}"))).unwrap();
            put(&self.xe_stop(index + 1), "");
        }
    }

    /// What stops the VF of that number.
    pub fn xe_stop(&self, number: usize) -> PathBuf {
        self.device(PF).join(format!("sriov_admin/vf{number}/stop"))
    }

    pub fn function(&self, bdf: &str, group: usize) {
        let dir = self.device(bdf);
        for name in [
            "vendor",
            "device",
            "subsystem_vendor",
            "subsystem_device",
            "class",
            "revision",
        ] {
            put(&dir.join(name), "0x0\n");
        }
        put(&dir.join("driver_override"), "(null)\n");
        put(&dir.join("reset_method"), "flr\n");
        let group = self.sys(&format!("kernel/iommu_groups/{group}"));
        fs::create_dir_all(group.join("devices").join(bdf)).unwrap();
        symlink(&group, dir.join("iommu_group")).unwrap();
    }

    /// Where a function's driver is told.
    pub fn driver(&self, bdf: &str) -> PathBuf {
        self.device(bdf).join("driver")
    }

    pub fn bind_to(&self, bdf: &str, driver: &str) {
        let to = self.sys(&format!("bus/pci/drivers/{driver}"));
        symlink(to, self.driver(bdf)).unwrap();
    }

    /// Leaves one as a keeper does that is killed while it has it bound.
    pub fn orphan(&self, bdf: &str) {
        let record = self.folder().join("bound").join(bdf);
        put(&record, r#"{"driver":null,"driver_override":null}"#);
        put(&self.device(bdf).join("driver_override"), "vfio-pci\n");
        self.bind_to(bdf, "vfio-pci");
    }

    /// Driver and override of a function.
    pub fn binding(&self, bdf: &str) -> (Option<String>, String) {
        let driver = fs::read_link(self.driver(bdf)).ok();
        let driver = driver.map(|path| path.file_name().unwrap().to_string_lossy().into_owned());
        let text = fs::read_to_string(self.device(bdf).join("driver_override")).unwrap();
        (driver, text.trim().replace("(null)", ""))
    }

    pub fn is_bound(&self, bdf: &str) -> bool {
        self.binding(bdf) == (Some("vfio-pci".to_owned()), "vfio-pci".to_owned())
    }

    pub fn is_as_before(&self, bdf: &str) -> bool {
        self.binding(bdf) == (None, String::new()) && self.records().is_empty()
    }

    /// What is written down as bound.
    pub fn records(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder().join("bound")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        names
            .map(|name| name.to_string_lossy().into_owned())
            .collect()
    }
}
