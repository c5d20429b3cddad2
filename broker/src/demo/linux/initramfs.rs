//! An initramfs with nothing in it but this program and the libraries that it runs on.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Where the program is in it.
pub(super) const PROGRAM: &str = "/sublet";

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_755;
const NODE: u32 = 0o020_600;
/// The device numbers of the two nodes that a program needs before anything is mounted.
const NODES: [(&str, u32, u32); 2] = [("/dev/console", 5, 1), ("/dev/null", 1, 3)];
/// Folders for what will be mounted.
const MOUNTS: [&str; 3] = ["/dev", "/proc", "/sys"];

/// Writes the initramfs.
pub(super) fn write(path: &Path) -> io::Result<()> {
    let libraries = libraries()?;
    let mut archive = Archive {
        out: BufWriter::new(File::create(path)?),
        written: 0,
        inode: 0,
    };
    let mut folders: BTreeSet<PathBuf> = MOUNTS.iter().map(PathBuf::from).collect();
    for library in &libraries {
        let parents = library.ancestors().skip(1);
        folders.extend(parents.filter(|p| p.parent().is_some()).map(Path::to_owned));
    }
    // Sorted: a folder comes before what is in it.
    for folder in &folders {
        archive.entry(folder, FOLDER, (0, 0), &mut io::empty(), 0)?;
    }
    for (node, major, minor) in NODES {
        archive.entry(Path::new(node), NODE, (major, minor), &mut io::empty(), 0)?;
    }
    archive.file(Path::new(PROGRAM), Path::new("/proc/self/exe"))?;
    for library in &libraries {
        archive.file(library, library)?;
    }
    archive.entry(Path::new("TRAILER!!!"), 0, (0, 0), &mut io::empty(), 0)?;
    archive.out.flush()
}

/// The files that this process runs on, as the kernel has mapped them: the loader, and what the
/// loader loaded. None for a static program. By the names that the loader looks for.
fn libraries() -> io::Result<BTreeSet<PathBuf>> {
    let own = std::env::current_exe()?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let files = maps.lines().filter_map(|line| line.split_once('/'));
    let files = files.map(|(_, path)| PathBuf::from(format!("/{path}")));
    let mut found: BTreeSet<PathBuf> = files
        .filter(|path| *path != own && is_library(path))
        .collect();
    // The loader goes by the name that is in the program's header.
    let loader = Path::new("/lib64/ld-linux-x86-64.so.2");
    if !found.is_empty() && loader.exists() {
        found.insert(loader.to_owned());
    }
    Ok(found)
}

fn is_library(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.contains(".so") && path.is_file()
}

struct Archive {
    out: BufWriter<File>,
    written: u64,
    inode: u32,
}

impl Archive {
    fn file(&mut self, path: &Path, from: &Path) -> io::Result<()> {
        let mut file = File::open(from)?;
        let bytes = file.metadata()?.len();
        let bytes = u32::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.entry(path, FILE, (0, 0), &mut file, bytes)
    }

    /// linux/Documentation/driver-api/early-userspace/buffer-format.rst
    fn entry(
        &mut self,
        path: &Path,
        mode: u32,
        (major, minor): (u32, u32),
        content: &mut dyn io::Read,
        bytes: u32,
    ) -> io::Result<()> {
        self.inode += 1;
        let name = path.to_string_lossy();
        let name = name.trim_start_matches('/');
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            bytes,
            0,
            0,
            major,
            minor,
            name.len() as u32 + 1,
            0,
        ];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08X}").as_bytes())?;
        }
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        let copied = io::copy(content, &mut self.out)?;
        self.written += copied;
        if copied != u64::from(bytes) {
            return Err(io::Error::other(format!(
                "{name} changed while it was copied"
            )));
        }
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 4][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_holds_this_program_and_its_entries_start_on_multiples_of_four() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("initramfs");
        write(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let own = std::fs::read("/proc/self/exe").unwrap();
        let mut at = 0;
        let mut names = Vec::new();
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701", "{at}");
            let field = |index: usize| {
                let from = at + 6 + 8 * index;
                let text = std::str::from_utf8(&bytes[from..from + 8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (size, name_bytes) = (field(6), field(11));
            let name = &bytes[at + 110..at + 110 + name_bytes - 1];
            let name = std::str::from_utf8(name).unwrap().to_owned();
            let content = (at + 110 + name_bytes).next_multiple_of(4);
            if name == "sublet" {
                assert!(bytes[content..content + size] == own);
            }
            names.push(name);
            at = (content + size).next_multiple_of(4);
        }
        assert!(names.iter().any(|name| name == "sublet"));
        assert!(names.iter().any(|name| name == "dev/console"));
        assert_eq!(names.last().unwrap(), "TRAILER!!!");
    }
}
