//! The user whom the keeper serves, by name or number.

use std::{fs, io, path::Path};

/// Where the kernel's numbers of users have names.
const PASSWD: &str = "/etc/passwd";

/// The number of a user. Only files are asked: the keeper has no network.
pub(super) fn uid(user: &str) -> io::Result<u32> {
    uid_in(user, Path::new(PASSWD))
}

fn uid_in(user: &str, passwd: &Path) -> io::Result<u32> {
    if let Ok(uid) = user.parse() {
        return Ok(uid);
    }
    let text = fs::read_to_string(passwd)?;
    let of_user = |line: &str| {
        let mut fields = line.split(':');
        let named = fields.next() == Some(user);
        named.then(|| fields.nth(1)?.parse().ok())?
    };
    text.lines().find_map(of_user).ok_or_else(|| {
        let words = format!("{} names no user {user}", passwd.display());
        io::Error::new(io::ErrorKind::NotFound, words)
    })
}

#[cfg(test)]
mod tests {
    use super::uid_in;
    use std::fs;

    #[test]
    fn user_is_found_by_name_or_number_and_told_when_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let passwd = dir.path().join("passwd");
        fs::write(
            &passwd,
            "root:x:0:0:root:/:/bin/sh\nsublet:x:973:970::/:/x\nbroken\n",
        )
        .unwrap();
        assert_eq!(uid_in("sublet", &passwd).unwrap(), 973);
        assert_eq!(uid_in("1000", &passwd).unwrap(), 1000);
        for unknown in ["nobody", "broken", "subl"] {
            let error = uid_in(unknown, &passwd).unwrap_err().to_string();
            assert!(error.contains(unknown), "{error}");
        }
    }
}
