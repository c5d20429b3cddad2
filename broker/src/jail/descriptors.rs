//! Open descriptors: none goes to a child but what it is handed, and a child that got more is told.

use std::{
    fs, io,
    os::fd::{AsRawFd, RawFd},
};

/// Marks everything but stdin, stdout and stderr of this process as not for children. Whatever a
/// library or a caller has opened without that mark stays here.
pub fn keep_from_children() {
    close_fds::set_fds_cloexec_threadsafe(3, &[]);
}

/// Number and target of each open descriptor that is not among `own`.
pub fn check(own: &[RawFd]) -> io::Result<Vec<String>> {
    let folder = fs::File::open("/proc/self/fd")?;
    let reading = folder.as_raw_fd();
    let mut found = Vec::new();
    let mut spare = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let number: Option<RawFd> = name.to_str().and_then(|name| name.parse().ok());
        let Some(number) = number.filter(|number| !own.contains(number) && *number != reading)
        else {
            continue;
        };
        match fs::read_link(format!("/proc/self/fd/{number}")) {
            Ok(target) => spare.push((number, target)),
            // The folder's own, which is closed by now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    drop(folder);
    // What was listed and is still there: `read_dir`'s own descriptor is not.
    for (number, target) in spare {
        if fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok() {
            found.push(format!("{number}: {}", target.display()));
        }
    }
    found.sort();
    Ok(found)
}
