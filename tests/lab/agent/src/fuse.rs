//! A file system in user space with one file that nobody can read: READ is never answered.
//!
//! Written on the raw protocol (linux/include/uapi/linux/fuse.h, 7.31): a server that does not
//! answer is what no library is for.

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs::{File, OpenOptions, create_dir, remove_dir};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;

const HEADER_BYTES: usize = 40;
const REQUEST_BYTES_MAX: usize = 64 << 10;
const ROOT: u64 = 1;
const FILE: u64 = 2;
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const BATCH_FORGET: u32 = 42;
const ENOSYS: i32 = 38;

/// The mounted file system; dropping it takes it away.
pub struct Unread(PathBuf);

impl Unread {
    /// Mounts it at a new folder; its file has so many bytes.
    /// Whoever closes the file waits for ever as well, unless `closes`.
    pub fn mount(dir: &Path, bytes: u64, closes: bool) -> Result<Self> {
        create_dir(dir)?;
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        let device = device.context("no /dev/fuse (module fuse)")?;
        let data = format!(
            "fd={},rootmode=40755,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let data = CString::new(data)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        mount("unread", dir, "fuse", flags, Some(data.as_c_str())).context("cannot mount")?;
        thread::spawn(move || serve(device, bytes, closes));
        Ok(Unread(dir.to_owned()))
    }

    /// Opens its file.
    pub fn open(&self) -> Result<File> {
        let path = self.0.join("memory");
        let opened = OpenOptions::new().read(true).write(true).open(path);
        opened.context("the file system's file does not open")
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = remove_dir(&self.0);
    }
}

/// Until the file system is no more.
fn serve(mut device: File, bytes: u64, closes: bool) {
    let mut request = vec![0; REQUEST_BYTES_MAX];
    while let Ok(HEADER_BYTES..) = device.read(&mut request) {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| request[at + byte]));
        let node = u64::from(word(16)) | u64::from(word(20)) << 32;
        let (error, body) = match word(4) {
            FORGET | BATCH_FORGET | READ => continue,
            FLUSH if !closes => continue,
            INIT => (0, init()),
            LOOKUP => (
                0,
                [words(&[FILE, 0, 0, 0, 0]), attributes(FILE, bytes)].concat(),
            ),
            GETATTR => (0, [words(&[0, 0]), attributes(node, bytes)].concat()),
            OPEN => (0, words(&[0, 0])),
            _ => (-ENOSYS, Vec::new()),
        };
        let mut answer = ((16 + body.len()) as u32).to_le_bytes().to_vec();
        answer.extend(i32::to_le_bytes(error));
        answer.extend(&request[8..16]);
        answer.extend(body);
        // Who asked may have gone.
        let _ = device.write(&answer);
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// fuse_init_out: version 7.31, writes of 4 KiB at most, and nothing that one may or may not do.
fn init() -> Vec<u8> {
    let mut body = vec![0; 64];
    body[0] = 7;
    body[4] = 31;
    body[21] = 0x10;
    body
}

/// fuse_attr: a folder or a file.
fn attributes(node: u64, bytes: u64) -> Vec<u8> {
    let mode = if node == ROOT { 0o040_755 } else { 0o100_600 };
    let mut body = words(&[node, bytes, bytes / 512, 0, 0, 0]);
    body.extend(
        [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]
            .map(u32::to_le_bytes)
            .concat(),
    );
    body
}
