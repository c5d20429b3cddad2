//! Logs of the lab's programs: each line stamped with the scenario's time, kept in a file, searchable.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How many of the last lines of a log are printed when a scenario fails.
const TAIL_LINES: usize = 40;

/// Faults of TCG's nested SVM, not of anything here, each in the words of who met it; a scenario is
/// tried again on exactly these. The first is a guest page fault followed by a trapped access with
/// no VM exit between them, in QEMU's and cloud-hypervisor's words. The other two are of a host: the
/// processor is outside of the guest, at the instruction behind VMRUN, and takes itself for inside.
/// An interrupt there meets the guest's GS; its handler faults, and so does the handler of that, to
/// the end of the thread's stack (a triple fault), or until the host is back with a stack that is
/// overwritten. Two guests without any device, one of them at work, meet all three within a few
/// boots. A guest's kernel ends by it as well, without a word: `shutdown` says when that is a
/// failure here, as it could be ours, and else keeps the last of these.
pub const NESTED_FAULTS: [&str; 5] = [
    "KVM internal error. Suberror: 3",
    "Unexpected exit reason on vcpu run: InternalError",
    "Triple fault",
    "corrupted stack end detected inside scheduler",
    "reason shutdown",
];

#[derive(Default)]
struct State {
    lines: Vec<String>,
    ended: bool,
}

/// What one program said so far.
#[derive(Clone)]
pub struct Log {
    path: PathBuf,
    state: Arc<(Mutex<State>, Condvar)>,
    since: Instant,
}

impl Log {
    /// An empty log that is also written to this file.
    pub fn new(path: PathBuf, since: Instant) -> Self {
        let state = Arc::default();
        Log { path, state, since }
    }

    /// Follows a program's output in a thread until it ends.
    pub fn follow(&self, from: impl Read + Send + 'static) -> Result<()> {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&self.path)
            .with_context(|| format!("cannot open {}", self.path.display()))?;
        let log = self.clone();
        thread::spawn(move || {
            let mut reader = BufReader::new(from);
            let mut bytes = Vec::new();
            while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                let _ = writeln!(file, "{:9.3} {text}", log.since.elapsed().as_secs_f64());
                log.change(|state| state.lines.push(text));
                bytes.clear();
            }
            log.change(|state| state.ended = true);
        });
        Ok(())
    }

    fn change(&self, act: impl FnOnce(&mut State)) {
        act(&mut self.state.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.state.1.notify_all();
    }

    /// Waits for a line that contains this text.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<String> {
        let state = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = |state: &State| state.lines.iter().find(|line| line.contains(text)).cloned();
        let (state, _) = self
            .state
            .1
            .wait_timeout_while(state, timeout, |state| {
                !state.ended && found(state).is_none()
            })
            .unwrap_or_else(PoisonError::into_inner);
        match found(&state) {
            Some(line) => Ok(line),
            None if state.ended => bail!("{} ended without `{text}`", self.path.display()),
            None => bail!("no `{text}` in {} within {timeout:?}", self.path.display()),
        }
    }
}

/// Every log file of a scenario's folder.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    files.sort();
    files
}

/// Prints the end of each log of a folder.
pub fn print_tails(dir: &Path) {
    for file in files(dir) {
        let text = String::from_utf8_lossy(&fs::read(&file).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        println!("--- the end of {}", file.display());
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            println!("    {}", line.trim_end());
        }
    }
}

/// The first of these texts that any log of a folder contains.
pub fn first_of<'a>(dir: &Path, texts: &[&'a str]) -> Option<&'a str> {
    let contents: Vec<Vec<u8>> = files(dir)
        .iter()
        .map(|file| fs::read(file).unwrap_or_default())
        .collect();
    let said = |text: &&str| {
        let said = |content: &Vec<u8>| String::from_utf8_lossy(content).contains(*text);
        contents.iter().any(said)
    };
    texts.iter().copied().find(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_fault_is_found_in_any_log_of_the_folder_and_in_nothing_else() {
        let dir = std::env::temp_dir().join(format!("sublet-log-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
        write("a.txt", "Triple fault");
        write("b.log", "nothing\n");
        assert_eq!(first_of(&dir, &NESTED_FAULTS), None);
        write("host-b-resets.log", "CPU Reset (CPU 0)\nTriple fault\n");
        assert_eq!(first_of(&dir, &NESTED_FAULTS), Some("Triple fault"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
