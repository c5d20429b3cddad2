//! What the kernel tells of a process: its memory, threads, descriptors, and how often its threads went on and off.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

fn field(status: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let value = line.trim_start_matches(':').split_ascii_whitespace().next();
    value?.parse().ok()
}

/// Anonymous memory that it holds, MiB.
pub fn anonymous_mib(process: u32) -> f64 {
    let status = format!("/proc/{process}/status");
    let kib = field(Path::new(&status), "RssAnon").expect("the kernel tells RssAnon");
    kib as f64 / 1024.0
}

/// One thread: its name, and how often it has gone off a processor, of itself or not.
pub struct Thread {
    pub name: String,
    pub switches: u64,
}

/// The threads of a process by their ids.
pub fn threads(process: u32) -> BTreeMap<u32, Thread> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the process lives");
    let look = |task: fs::DirEntry| -> Option<(u32, Thread)> {
        let status = task.path().join("status");
        let count = |name| field(&status, name);
        let switches = count("voluntary_ctxt_switches")? + count("nonvoluntary_ctxt_switches")?;
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let id = task.file_name().to_str()?.parse().ok()?;
        let name = name.trim_end().to_owned();
        Some((id, Thread { name, switches }))
    };
    tasks.flatten().filter_map(look).collect()
}

/// How many descriptors a process has open.
pub fn descriptors(process: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{process}/fd"));
    open.expect("the process is of this user").count()
}
