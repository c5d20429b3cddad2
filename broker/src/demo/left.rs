//! What a lease could leave behind on two hosts, counted before it and after it; and what it takes of memory.

use super::claim::{Claim, DemoError, setup};
use super::fabric::Fabric;
use std::fs;
use std::path::{Path, PathBuf};

/// All that must be as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    /// Mappings in the containers of host 4's NTB, host 8's NTB and the VF.
    maps: [usize; 3],
    triggers: usize,
    /// Bytes free in the windows of host 4 and host 8.
    free: [Option<u64>; 2],
    fds: usize,
    threads: usize,
    files: Vec<PathBuf>,
}

impl Left {
    pub(super) fn look(fabric: &Fabric, folder: &Path) -> Result<Self, DemoError> {
        let ports = [0, 1].map(|side| fabric.link.port(side).space().maps().len());
        let (maps, triggers) = fabric
            .vf()
            .map_or((0, 0), |(_, vf)| (vf.space().maps().len(), vf.triggers()));
        let mut free = [None; 2];
        for (free, node) in free.iter_mut().zip([&fabric.lender, &fabric.borrower]) {
            let status = node.status();
            let status = status.map_err(|error| Claim::Left.broken(error.text))?;
            *free = status.ports.first().and_then(|port| port.window.free);
        }
        Ok(Self {
            maps: [ports[0], ports[1], maps],
            triggers,
            free,
            fds: entries("/proc/self/fd", |_| true)?,
            // Those of the control sockets' clients end a moment after their connections.
            threads: entries("/proc/self/task", |task| {
                fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() != "control")
            })?,
            files: files(folder)?,
        })
    }

    /// What is not as it was, in words.
    pub(super) fn against(&self, before: &Self) -> String {
        let mut found = Vec::new();
        let mut differ = |what: &str, now: String, then: String| {
            if now != then {
                found.push(format!("{what}: {then} before, {now} now"));
            }
        };
        let words = |left: &Self| {
            let [ports @ .., vf] = left.maps;
            let files: Vec<_> = left.files.iter().map(|f| f.display().to_string()).collect();
            [
                format!("{ports:?}"),
                vf.to_string(),
                left.triggers.to_string(),
                format!("{:?}", left.free),
                left.fds.to_string(),
                left.threads.to_string(),
                files.join(" "),
            ]
        };
        let names = [
            "maps of the NTBs",
            "maps of the VF",
            "triggers",
            "bytes free in the windows",
            "open fds",
            "threads",
            "files",
        ];
        let pairs = words(self).into_iter().zip(words(before));
        for (name, (now, then)) in names.into_iter().zip(pairs) {
            differ(name, now, then);
        }
        found.join("; ")
    }
}

fn entries(folder: &str, counts: impl Fn(&Path) -> bool) -> Result<usize, DemoError> {
    let failed = setup("count what it holds");
    let mut count = 0;
    for entry in fs::read_dir(folder).map_err(&failed)? {
        count += usize::from(counts(&entry.map_err(&failed)?.path()));
    }
    Ok(count)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, DemoError> {
    let mut found = Vec::new();
    let failed = setup("look into its folder");
    for entry in fs::read_dir(folder).map_err(&failed)? {
        let path = entry.map_err(&failed)?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        }
        found.push(path);
    }
    found.sort();
    Ok(found)
}

/// Anonymous memory that a process holds, in bytes. Guest memory is none: it is a memfd.
pub(super) fn anonymous_bytes(pid: u32) -> Result<u64, DemoError> {
    let failed = |cause: String| setup("read how much memory it holds")(cause);
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    let status = status.map_err(|error| failed(error.to_string()))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok());
    let kib = kib.ok_or_else(|| failed("the kernel does not tell RssAnon".to_owned()))?;
    Ok(kib << 10)
}
