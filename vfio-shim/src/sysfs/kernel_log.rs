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

    /// Passes over what was told up to now.
    pub fn skip(&mut self) -> io::Result<()> {
        self.last.clear();
        self.file.seek(SeekFrom::End(0)).map(drop)
    }

    /// Every line since the last look. Whether that is all: some may have been overwritten before
    /// they were read, and what is left of a flood is read at the next look.
    pub fn each(&mut self, mut line: impl FnMut(&str)) -> bool {
        let mut all = true;
        let mut bytes = [0; RECORD_BYTES_MAX];
        for _ in 0..RECORDS_MAX {
            let read = match self.file.read(&mut bytes) {
                Ok(0) => return all,
                Ok(read) => read,
                // Overwritten before it was read: the next one is there.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    all = false;
                    continue;
                }
                Err(error) => return all && error.kind() == io::ErrorKind::WouldBlock,
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
        false
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
        let lines = |log: &mut KernelLog| {
            let mut lines = Vec::new();
            assert!(log.each(|line| lines.push(line.to_owned())));
            lines
        };
        assert!(lines(&mut log).is_empty());
        write!(file, "xe: VF2 FLR failed\nxe: VF1 FLR ").unwrap();
        assert_eq!(lines(&mut log), ["xe: VF2 FLR failed"]);
        writeln!(file, "failed\nagain").unwrap();
        assert_eq!(lines(&mut log), ["xe: VF1 FLR failed", "again"]);
        assert!(lines(&mut log).is_empty());
        write!(file, "{}", "x".repeat(3 * RECORD_BYTES_MAX)).unwrap();
        assert!(lines(&mut log).is_empty());
        assert!(log.last.len() <= RECORD_BYTES_MAX);
        writeln!(file, "\nbefore").unwrap();
        log.skip().unwrap();
        writeln!(file, "after").unwrap();
        assert_eq!(lines(&mut log), ["after"]);
    }

    #[test]
    fn flood_is_told_to_be_one_and_read_on_at_the_next_look() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kmsg");
        let mut file = File::create(&path).unwrap();
        let mut log = KernelLog::open(&path).unwrap();
        // As long as all that one look reads.
        let line = format!("{}\n", "x".repeat(RECORD_BYTES_MAX - 1));
        file.write_all(line.repeat(RECORDS_MAX).as_bytes()).unwrap();
        writeln!(file, "VF1 FLR failed").unwrap();
        let mut failed = 0;
        assert!(!log.each(|line| failed += u32::from(line.contains("failed"))));
        assert_eq!(failed, 0);
        assert!(log.each(|line| failed += u32::from(line.contains("failed"))));
        assert_eq!(failed, 1);
    }
}
