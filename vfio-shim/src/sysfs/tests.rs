//! sysfs as a directory of files, with a stand-in for what the kernel does when they are written.

use super::*;
use crate::model::FunctionIds;
use std::{collections::BTreeMap, os::unix::fs::symlink, sync::Mutex};

struct Tree {
    dir: tempfile::TempDir,
    writes: Arc<Mutex<Vec<(String, String)>>>,
}

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn put(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn relink(target: &Path, link: &Path) {
    let _ = fs::remove_file(link);
    symlink(target, link).unwrap();
}

impl Tree {
    fn new() -> Self {
        let tree = Self {
            dir: tempfile::tempdir().unwrap(),
            writes: Arc::default(),
        };
        for driver in ["vfio-pci", "nvme", "pcieport"] {
            for file in ["bind", "unbind"] {
                put(&tree.driver(driver).join(file), "");
            }
        }
        put(&tree.root().join("bus/pci/drivers_probe"), "");
        tree
    }

    fn root(&self) -> &Path {
        self.dir.path()
    }

    fn driver(&self, name: &str) -> PathBuf {
        self.root().join("bus/pci/drivers").join(name)
    }

    fn file(&self, bdf: &str, name: &str) -> PathBuf {
        self.root().join("bus/pci/devices").join(bdf).join(name)
    }

    fn function(&self, bdf: &str, group: Option<u32>, driver: Option<&str>) {
        for (name, text) in [
            ("vendor", "0x8086\n"),
            ("device", "0xe211\n"),
            ("subsystem_vendor", "0x8086\n"),
            ("subsystem_device", "0x1100\n"),
            ("class", "0x030000\n"),
            ("revision", "0x05\n"),
            ("driver_override", "(null)\n"),
            ("reset_method", "flr\n"),
        ] {
            put(&self.file(bdf, name), text);
        }
        if let Some(group) = group {
            let group = self.root().join(format!("kernel/iommu_groups/{group}"));
            fs::create_dir_all(group.join("devices").join(bdf)).unwrap();
            relink(&group, &self.file(bdf, "iommu_group"));
        }
        if let Some(driver) = driver {
            relink(&self.driver(driver), &self.file(bdf, "driver"));
        }
    }

    /// sysfs that does what a kernel does on bind, unbind and probe. `refusing` never probes.
    fn kernel(&self, refusing: &'static [&'static str]) -> Sysfs {
        let root = self.root().to_owned();
        let writes = Arc::clone(&self.writes);
        let kernel = move |path: &Path, text: &str| {
            let name = path.display().to_string();
            writes.lock().unwrap().push((name.clone(), text.to_owned()));
            let link = |bdf: &str| root.join("bus/pci/devices").join(bdf).join("driver");
            let bind = |bdf: &str, driver: &str| {
                if !refusing.contains(&driver) {
                    relink(&root.join("bus/pci/drivers").join(driver), &link(bdf));
                }
            };
            let parts: Vec<_> = name.split('/').collect();
            match parts[..] {
                ["bus", "pci", "drivers_probe"] => {
                    let wanted = link(text).with_file_name("driver_override");
                    bind(text, fs::read_to_string(wanted).unwrap().trim());
                }
                ["bus", "pci", "drivers", driver, "bind"] => bind(text, driver),
                ["bus", "pci", "drivers", _, "unbind"] => fs::remove_file(link(text)).unwrap(),
                _ => {}
            }
        };
        Sysfs::stand_in(self.root(), Arc::new(kernel))
    }

    /// Every file's text and every link's target: what must be as before.
    fn snapshot(&self, bdf: &str) -> BTreeMap<PathBuf, String> {
        let entries = fs::read_dir(self.file(bdf, "")).unwrap();
        let describe = |path: &Path| match fs::read_link(path) {
            Ok(target) => target.display().to_string(),
            Err(_) => fs::read_to_string(path)
                .unwrap()
                .trim()
                .replace("(null)", ""),
        };
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.map(|path| (path.clone(), describe(&path))).collect()
    }
}

const VF: &str = "0000:01:00.1";

#[test]
fn a_guard_binds_and_gives_the_old_driver_back_on_drop() {
    let tree = Tree::new();
    tree.function(VF, Some(7), Some("nvme"));
    let before = tree.snapshot(VF);
    let sysfs = tree.kernel(&[]);
    let guard = BindGuard::bind(&sysfs, bdf(VF), "vfio-pci", true).unwrap();
    assert_eq!(sysfs.driver(bdf(VF)).unwrap().as_deref(), Some("vfio-pci"));
    let order: Vec<_> = tree
        .writes
        .lock()
        .unwrap()
        .iter()
        .map(|w| w.0.clone())
        .collect();
    assert_eq!(
        order,
        [
            format!("bus/pci/devices/{VF}/driver_override"),
            "bus/pci/drivers/nvme/unbind".to_owned(),
            "bus/pci/drivers_probe".to_owned(),
        ]
    );
    drop(guard);
    assert_eq!(tree.snapshot(VF), before);
}

#[test]
fn a_kept_binding_stays_and_tells_what_was_before() {
    let tree = Tree::new();
    tree.function(VF, Some(7), None);
    let sysfs = tree.kernel(&[]);
    let guard = BindGuard::bind(&sysfs, bdf(VF), "vfio-pci", false).unwrap();
    let old = guard.keep().unwrap();
    assert_eq!(sysfs.driver(bdf(VF)).unwrap().as_deref(), Some("vfio-pci"));
    assert_eq!((&old.driver, &old.driver_override), (&None, &None));
    sysfs.restore_binding(bdf(VF), &old).unwrap();
    assert_eq!(sysfs.driver(bdf(VF)).unwrap(), None);
    assert_eq!(sysfs.driver_override(bdf(VF)).unwrap(), None);
}

#[test]
fn a_driven_function_is_refused_by_name_and_left_alone() {
    let tree = Tree::new();
    tree.function(VF, Some(7), Some("nvme"));
    let sysfs = tree.kernel(&[]);
    let refused = BindGuard::bind(&sysfs, bdf(VF), "vfio-pci", false).unwrap_err();
    assert!(
        refused.to_string().contains("drivers/nvme/unbind"),
        "{refused}"
    );
    assert!(tree.writes.lock().unwrap().is_empty());
}

#[test]
fn a_probe_that_fails_is_an_error_and_is_undone() {
    let tree = Tree::new();
    tree.function(VF, Some(7), Some("nvme"));
    let before = tree.snapshot(VF);
    let sysfs = tree.kernel(&["vfio-pci"]);
    let refused = BindGuard::bind(&sysfs, bdf(VF), "vfio-pci", true).unwrap_err();
    assert!(matches!(refused, BindError::Probe { .. }), "{refused}");
    assert_eq!(tree.snapshot(VF), before);
    let missing = BindGuard::bind(&sysfs, bdf(VF), "xe-vfio-pci", true).unwrap_err();
    assert!(matches!(missing, BindError::NoDriver { .. }), "{missing}");
}

#[test]
fn virtual_functions_are_made_with_autoprobe_off_and_never_over_others() {
    let tree = Tree::new();
    tree.function("0000:01:00.0", Some(6), Some("nvme"));
    let pf = bdf("0000:01:00.0");
    let sysfs = tree.kernel(&[]);
    assert!(matches!(sysfs.create_vfs(pf, 1), Err(SriovError::None(_))));
    put(&tree.file("0000:01:00.0", "sriov_totalvfs"), "4\n");
    put(&tree.file("0000:01:00.0", "sriov_numvfs"), "0\n");
    put(&tree.file("0000:01:00.0", "sriov_drivers_autoprobe"), "1\n");
    assert!(matches!(
        sysfs.create_vfs(pf, 5),
        Err(SriovError::TooMany { total: 4, .. })
    ));
    sysfs.create_vfs(pf, 2).unwrap();
    let writes = tree.writes.lock().unwrap().clone();
    assert!(writes[0].0.ends_with("sriov_drivers_autoprobe") && writes[0].1 == "0");
    assert!(writes[1].0.ends_with("sriov_numvfs") && writes[1].1 == "2");
    sysfs.create_vfs(pf, 2).unwrap();
    assert!(matches!(
        sysfs.create_vfs(pf, 3),
        Err(SriovError::Busy { now: 2, .. })
    ));
    sysfs.destroy_vfs(pf).unwrap();
    assert_eq!(sysfs.vf_count(pf).unwrap(), 0);
}

#[test]
fn a_virtual_function_knows_its_parent_and_index() {
    let tree = Tree::new();
    let (pf, vf) = ("0000:01:00.0", "0000:01:00.2");
    tree.function(pf, Some(6), None);
    tree.function(VF, Some(7), None);
    tree.function(vf, Some(8), None);
    put(&tree.file(pf, "sriov_numvfs"), "2\n");
    for (index, child) in [VF, vf].into_iter().enumerate() {
        relink(
            &tree.file(child, ""),
            &tree.file(pf, &format!("virtfn{index}")),
        );
        relink(&tree.file(pf, ""), &tree.file(child, "physfn"));
    }
    let sysfs = Sysfs::new(tree.root());
    assert_eq!(sysfs.vfs(bdf(pf)).unwrap(), [bdf(VF), bdf(vf)]);
    assert_eq!(sysfs.pf_of(bdf(vf)).unwrap(), Some((bdf(pf), 1)));
    assert_eq!(sysfs.pf_of(bdf(pf)).unwrap(), None);
    let refused = sysfs.check_lendable(bdf(pf), true).unwrap_err();
    assert!(
        matches!(refused, LendError::SriovOn { count: 2, .. }),
        "{refused}"
    );
    // A driver that was unbound from its PF has left it behind.
    let refused = sysfs.check_lendable(bdf(vf), false).unwrap_err();
    assert!(matches!(refused, LendError::Orphan { .. }), "{refused}");
    relink(&tree.driver("nvme"), &tree.file(pf, "driver"));
    let refused = sysfs.check_lendable(bdf(vf), false);
    assert!(!matches!(refused, Err(LendError::Orphan { .. })));
}

#[test]
fn a_function_is_lendable_unless_something_stands_in_the_way() {
    let tree = Tree::new();
    let sysfs = Sysfs::new(tree.root());
    let vf = bdf(VF);
    let words = |error: LendError| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}; {}", source.unwrap_or_default())
    };
    let refused = || words(sysfs.check_lendable(vf, false).unwrap_err());
    assert!(refused().contains("lspci -D"), "{}", refused());
    tree.function(VF, None, Some("nvme"));
    assert!(refused().contains("driven by nvme"), "{}", refused());
    fs::remove_file(tree.file(VF, "driver")).unwrap();
    assert!(refused().contains("intel_iommu=on"), "{}", refused());
    tree.function(VF, Some(7), None);
    tree.function("0000:01:00.3", Some(7), Some("pcieport"));
    sysfs.check_lendable(vf, false).unwrap();
    tree.function("0000:01:00.4", Some(7), Some("nvme"));
    assert!(refused().contains("0000:01:00.4 (nvme)"), "{}", refused());
    fs::remove_file(tree.file("0000:01:00.4", "driver")).unwrap();
    sysfs.check_lendable(vf, false).unwrap();
    put(&tree.file(VF, "reset_method"), "\n");
    assert!(matches!(
        sysfs.check_lendable(vf, false),
        Err(LendError::NoReset(_))
    ));
}

#[test]
fn ids_and_bar_addresses_are_read_and_nonsense_is_an_error() {
    let tree = Tree::new();
    tree.function(VF, Some(7), None);
    let sysfs = Sysfs::new(tree.root());
    let expected = FunctionIds {
        vendor: 0x8086,
        device: 0xe211,
        subsystem_vendor: 0x8086,
        subsystem_device: 0x1100,
        class: 0x03_0000,
        revision: 5,
    };
    assert_eq!(sysfs.ids(bdf(VF)).unwrap(), expected);
    put(
        &tree.file(VF, "resource"),
        "0x000000fe40000000 0x000000fe40003fff 0x0000000000140204\n\
         0x0000000000000000 0x0000000000000000 0x0000000000000000\n",
    );
    let bars = sysfs.bars(bdf(VF)).unwrap();
    let first = BarAddress {
        physical: 0xfe_4000_0000,
        bytes: 0x4000,
    };
    assert_eq!(bars[..2], [first, BarAddress::default()]);
    put(&tree.file(VF, "resource"), "nonsense\n");
    assert!(matches!(
        sysfs.bars(bdf(VF)),
        Err(SysfsError::Content { .. })
    ));
    put(&tree.file(VF, "vendor"), "8086h\n");
    assert!(matches!(
        sysfs.ids(bdf(VF)),
        Err(SysfsError::Content { .. })
    ));
}

#[test]
fn vf_of_xe_is_stopped_by_its_pfs_file_and_others_have_none() {
    let tree = Tree::new();
    for (vf, index) in [("0000:4a:00.1", 0), ("0000:4a:00.2", 1)] {
        tree.function(vf, None, None);
        relink(&tree.file("0000:4a:00.0", ""), &tree.file(vf, "physfn"));
        let name = format!("virtfn{index}");
        put(&tree.file("0000:4a:00.0", "sriov_numvfs"), "2\n");
        relink(&tree.file(vf, ""), &tree.file("0000:4a:00.0", &name));
    }
    tree.function("0000:4a:00.0", None, Some("xe"));
    let sysfs = tree.kernel(&[]);
    let (first, second) = (bdf("4a:00.1"), bdf("4a:00.2"));
    assert_eq!(sysfs.xe_stop(second).unwrap(), None);
    put(&tree.file("0000:4a:00.0", "sriov_admin/vf2/stop"), "");
    assert_eq!(sysfs.xe_stop(first).unwrap(), None);
    assert_eq!(sysfs.xe_stop(bdf("4a:00.0")).unwrap(), None);
    let stop = sysfs.xe_stop(second).unwrap().unwrap();
    sysfs.stop_xe_vf(&stop).unwrap();
    let written = tree.writes.lock().unwrap().pop().unwrap();
    let name = "bus/pci/devices/0000:4a:00.0/sriov_admin/vf2/stop".to_owned();
    assert_eq!(written, (name, "1".to_owned()));
    let ids = |bdf| sysfs.ids(bdf).unwrap();
    assert!(sysfs.is_xe_vf(first, &ids(first)).unwrap());
    let pf = bdf("4a:00.0");
    assert!(!sysfs.is_xe_vf(pf, &ids(pf)).unwrap(), "a PF is none");
    let nvme = FunctionIds {
        class: 0x01_0802,
        ..ids(first)
    };
    assert!(!sysfs.is_xe_vf(first, &nvme).unwrap());
    assert_eq!(sysfs.xe_vfio_driver(), None);
    put(&tree.driver("xe-vfio-pci").join("bind"), "");
    assert_eq!(sysfs.xe_vfio_driver(), Some("xe-vfio-pci"));
}
