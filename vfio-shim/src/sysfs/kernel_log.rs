//! The kernel's log from now on: the only place where some failures of a reset are told.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Records of the kernel's log that are read at one look; a flood is looked at the next time.
pub const RECORDS_MAX: usize = 4096;
/// The longest record that the kernel gives.
const RECORD_BYTES_MAX: usize = 8192;

/// The kernel's log, read from where it was when this was made.
pub struct KernelLog {
    file: File,
    last: String,
}

impl KernelLog {
    /// Where this machine's is.
    pub const PATH: &str = "/dev/kmsg";

    /// From now on.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::of(Self::open_file(path)?)
    }

    /// Opens it for [`KernelLog::of`], be that in another process.
    pub fn open_file(path: &Path) -> io::Result<File> {
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(nonblock).open(path)
    }

    /// What is told by this file from now on.
    pub fn of(mut file: File) -> io::Result<Self> {
        file.seek(SeekFrom::End(0))?;
        let last = String::new();
        Ok(Self { file, last })
    }

    /// The first line since the last look that holds all of these words.
    pub fn find(&mut self, words: &[&str]) -> Option<String> {
        let mut found = None;
        self.each(|line| {
            if found.is_none() && words.iter().all(|word| line.contains(word)) {
                found = Some(line.to_owned());
            }
        });
        found
    }

    /// Every line since the last look.
    pub fn each(&mut self, mut line: impl FnMut(&str)) {
        let mut bytes = [0; RECORD_BYTES_MAX];
        for _ in 0..RECORDS_MAX {
            let read = match self.file.read(&mut bytes) {
                Ok(0) => break,
                Ok(read) => read,
                // Overwritten before it was read: the next one is there.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => continue,
                Err(_) => break,
            };
            self.last.push_str(&String::from_utf8_lossy(&bytes[..read]));
            while let Some(end) = self.last.find('\n') {
                let whole: String = self.last.drain(..=end).collect();
                line(whole.trim());
            }
            if self.last.len() > RECORD_BYTES_MAX {
                self.last.clear();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_what_came_since_is_found_and_each_line_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kmsg");
        let mut file = File::create(&path).unwrap();
        writeln!(file, "VF1 FLR failed").unwrap();
        let mut log = KernelLog::open(&path).unwrap();
        let words = ["0000:4a:00.0", "VF1 ", "FLR failed"];
        assert_eq!(log.find(&words), None);
        writeln!(file, "xe 0000:4a:00.0: VF2 FLR failed").unwrap();
        write!(file, "xe 0000:4a:00.0: VF1 FLR ").unwrap();
        assert_eq!(log.find(&words), None);
        writeln!(file, "failed\nxe 0000:4a:00.0: VF1 FLR failed again").unwrap();
        let line = log.find(&words);
        assert_eq!(line.as_deref(), Some("xe 0000:4a:00.0: VF1 FLR failed"));
        assert_eq!(log.find(&words), None);
        write!(file, "{}", "x".repeat(3 * RECORD_BYTES_MAX)).unwrap();
        assert_eq!(log.find(&words), None);
        assert!(log.last.len() <= RECORD_BYTES_MAX);
    }
}
