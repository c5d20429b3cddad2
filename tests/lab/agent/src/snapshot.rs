//! What a scenario may not leave behind on a host, read from the kernel as it is now.

use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A scenario's folders are small; a runaway one must not hang the lab.
const FILES_MAX: usize = 4096;

#[derive(Serialize)]
struct Function {
    driver: Option<String>,
    driver_override: String,
    numvfs: Option<String>,
    iommu_group: Option<String>,
}

#[derive(Serialize)]
struct Daemon {
    fds: BTreeMap<String, usize>,
    threads: usize,
    locked_kib: u64,
    resident_kib: u64,
}

#[derive(Serialize)]
struct Snapshot {
    pci: BTreeMap<String, Function>,
    vfio_nodes: Vec<String>,
    vfio_holders: Vec<String>,
    processes: Vec<String>,
    files: Vec<String>,
    huge_pages_free: u64,
    daemons: BTreeMap<String, Daemon>,
}

/// Prints it as JSON.
pub fn print() -> Result<()> {
    let mut files = Vec::new();
    for root in ["/run", "/tmp"] {
        walk(Path::new(root), &mut files);
    }
    let mut vfio_nodes = names("/dev/vfio");
    vfio_nodes.retain(|name| name != "devices");
    let mut snapshot = Snapshot {
        pci: functions(),
        vfio_nodes,
        vfio_holders: Vec::new(),
        processes: Vec::new(),
        files,
        huge_pages_free: field(&text("/proc/meminfo"), "HugePages_Free:"),
        daemons: BTreeMap::new(),
    };
    add_processes(&mut snapshot);
    println!("{}", serde_json::to_string(&snapshot)?);
    Ok(())
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn link_name(path: impl AsRef<Path>) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn functions() -> BTreeMap<String, Function> {
    let root = Path::new("/sys/bus/pci/devices");
    names(root)
        .into_iter()
        .map(|bdf| {
            let dir = root.join(&bdf);
            let function = Function {
                driver: link_name(dir.join("driver")),
                driver_override: text(dir.join("driver_override")),
                numvfs: fs::read_to_string(dir.join("sriov_numvfs"))
                    .ok()
                    .map(|n| n.trim().to_owned()),
                iommu_group: link_name(dir.join("iommu_group")),
            };
            (bdf, function)
        })
        .collect()
}

fn walk(dir: &Path, files: &mut Vec<String>) {
    for name in names(dir) {
        let path = dir.join(name);
        if files.len() >= FILES_MAX {
            return;
        }
        files.push(path.display().to_string());
        if path.is_dir() && !path.is_symlink() {
            walk(&path, files);
        }
    }
}

/// Kernel threads have no command line and come and go by themselves; the agent's own helper is not counted.
fn add_processes(snapshot: &mut Snapshot) {
    let own = std::process::id().to_string();
    for pid in names("/proc") {
        if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let dir = Path::new("/proc").join(&pid);
        let command = text(dir.join("cmdline"))
            .replace('\0', " ")
            .trim()
            .to_owned();
        if command.is_empty() {
            continue;
        }
        let fds = descriptors(&dir);
        for target in fds.keys().filter(|target| target.starts_with("/dev/vfio/")) {
            snapshot.vfio_holders.push(format!("{command}: {target}"));
        }
        if text(dir.join("comm")) == "sublet" {
            snapshot.daemons.insert(command.clone(), daemon(&dir, fds));
        }
        snapshot.processes.push(command);
    }
    snapshot.vfio_holders.sort();
    snapshot.processes.sort();
}

/// Descriptors by what they are, without the numbers that differ from one time to the next.
/// One that is closed while they are listed is none.
fn descriptors(dir: &Path) -> BTreeMap<String, usize> {
    let mut fds = BTreeMap::new();
    for name in names(dir.join("fd")) {
        let Ok(target) = fs::read_link(dir.join("fd").join(name)) else {
            continue;
        };
        let target = target.display().to_string();
        let kind = target
            .split_once(":[")
            .map_or(target.as_str(), |(kind, _)| kind);
        *fds.entry(kind.to_owned()).or_insert(0) += 1;
    }
    fds
}

fn daemon(dir: &Path, fds: BTreeMap<String, usize>) -> Daemon {
    let status = text(dir.join("status"));
    Daemon {
        fds,
        threads: names(dir.join("task")).len(),
        locked_kib: field(&status, "VmLck:"),
        resident_kib: field(&status, "VmRSS:"),
    }
}
