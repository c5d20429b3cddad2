//! The repository's files, for the tests of the architecture's invariants.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The repository's root.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("tests/repo").to_owned()
}

/// All files that git has or would take, relative to the root, sorted. Without git (an unpacked
/// archive): all files but those under `target` and dot folders.
pub fn files() -> Vec<String> {
    let root = root();
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(&root)
        .output();
    let mut files = match listed {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8(output.stdout).expect("paths are UTF-8");
            text.lines().map(str::to_owned).collect()
        }
        _ => {
            let mut found = Vec::new();
            walk(&root, &root, &mut found);
            found
        }
    };
    files.retain(|file| root.join(file).is_file());
    files.sort();
    files.dedup();
    assert!(files.len() > 50, "the repository's files are not found");
    files
}

fn walk(root: &Path, folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            walk(root, &path, found);
        } else if path.is_file() {
            let relative = path.strip_prefix(root).expect("under the root");
            found.push(relative.to_string_lossy().into_owned());
        }
    }
}

/// The `.rs` files among them.
pub fn sources() -> Vec<String> {
    let mut files = files();
    files.retain(|file| file.ends_with(".rs"));
    files
}

/// A file's text; empty for what is no text.
pub fn text(file: &str) -> String {
    let bytes = fs::read(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    String::from_utf8(bytes).unwrap_or_default()
}

/// A Cargo.toml.
pub fn manifest(file: &str) -> toml::Table {
    text(file).parse().unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// Fails with all findings at once.
pub fn none(findings: Vec<String>, what: &str) {
    assert!(findings.is_empty(), "{what}:\n  {}", findings.join("\n  "));
}
