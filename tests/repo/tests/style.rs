//! The customs of every file: purpose first, sizes, words that must not stay, places of machines.

use repo_tests::{files, none, root, sources, text};
use std::fs;

const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 70;

/// Files over the limit, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// Functions over the limit, by what stands in their first line, each with its reason.
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[
    (
        "tests/lab/model/src/wire.rs",
        "fn decode<",
        "one match over all commands",
    ),
    (
        "vmm-glue/tests/vfio_user/bad_input.rs",
        "fn malformed_set_irqs_are_refused(",
        "one list of cases",
    ),
];

/// What may lie at the top beside dotfiles.
const TOP_LEVEL: &[&str] = &[
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-BSD-3-Clause",
    "README.md",
    "broker",
    "rust-toolchain.toml",
    "tests",
    "vfio-shim",
    "vmm-glue",
];

/// Hosts that the files may name.
const HOSTS: &[&str] = &[
    "deb.debian.org",
    "docs.kernel.org",
    "github.com",
    "www.apache.org",
    "www.dolphinics.com",
    "www.kernel.org",
];

/// Put together here, so that this file does not hold them itself.
fn word(parts: [&str; 2]) -> String {
    parts.concat()
}

#[test]
fn every_source_begins_with_its_purpose() {
    let mut findings = sources();
    findings.retain(|file| {
        let text = text(file);
        let first = text.lines().next().unwrap_or_default();
        !first.starts_with("//! ") || !first.ends_with('.') || first.len() < 16
    });
    none(
        findings,
        "files whose first line is not `//!` and one sentence of purpose",
    );
}

#[test]
fn no_file_is_longer_than_a_reader() {
    let mut findings = Vec::new();
    for file in sources() {
        let lines = text(&file).lines().count();
        let excused = LONG_FILES.iter().any(|(long, _)| *long == file);
        if (lines > FILE_LINES_MAX) != excused {
            findings.push(format!("{file}: {lines} lines"));
        }
    }
    none(findings, "files over 800 lines, or excused without need");
}

/// The functions of formatted code that are over the limit: a function ends at the first brace of
/// its own indentation.
fn long_functions(file: &str) -> Vec<String> {
    let text = text(file);
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let bare = line.trim_start();
        let mut words = bare.split(' ').take_while(|word| !word.contains('('));
        let head = bare.split('(').next().unwrap_or_default();
        let is_fn = bare.starts_with("fn ") || (head.contains(" fn ") && words.all(is_qualifier));
        if !is_fn || bare.ends_with(';') {
            continue;
        }
        let indent = line.len() - bare.len();
        let end = format!("{}}}", " ".repeat(indent));
        let body = lines[start..]
            .iter()
            .position(|line| *line == end)
            .unwrap_or(0);
        let excused = |(path, head, _): &(&str, &str, &str)| *path == file && line.contains(head);
        if body >= FUNCTION_LINES_MAX && !LONG_FUNCTIONS.iter().any(excused) {
            found.push(format!("{file}:{}: {} lines", start + 1, body + 1));
        }
    }
    found
}

fn is_qualifier(word: &str) -> bool {
    let known = ["pub", "const", "async", "unsafe", "extern", "\"C\"", "fn"];
    known.contains(&word)
        || word
            .chars()
            .all(|c| c.is_alphanumeric() || "_<>',:".contains(c))
}

#[test]
fn no_function_is_longer_than_a_screen() {
    let findings = sources()
        .iter()
        .flat_map(|file| long_functions(file))
        .collect();
    none(findings, "functions over 70 lines");
}

#[test]
fn nothing_unfinished_or_switched_off_stays() {
    let unwanted = [
        word(["todo", "!("]),
        word(["unimplemented", "!("]),
        word(["dbg", "!("]),
        word(["#[ig", "nore"]),
        word(["FIX", "ME"]),
        word(["TO", "DO"]),
        word(["XX", "X:"]),
    ];
    let mut findings = Vec::new();
    for file in sources() {
        for (number, line) in text(&file).lines().enumerate() {
            if unwanted.iter().any(|word| line.contains(word)) {
                findings.push(format!("{file}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    none(findings, "unfinished or switched off");
}

#[test]
fn files_name_no_place_of_one_machine() {
    let places = [
        word(["/wo", "rk/"]),
        word(["/ro", "ot/"]),
        word(["/ho", "me/"]),
    ];
    let mut findings = Vec::new();
    for file in files() {
        for (number, line) in text(&file).lines().enumerate() {
            let place = places.iter().any(|place| line.contains(place.as_str()));
            if place || strange_host(line) {
                findings.push(format!("{file}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    none(
        findings,
        "paths of a machine, or hosts that are not in this test's list",
    );
}

fn strange_host(line: &str) -> bool {
    let mut after_scheme = line.split("://").skip(1);
    after_scheme.any(|rest| {
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || ".-".contains(c)));
        let host = &rest[..end.unwrap_or(rest.len())];
        host.contains('.') && !HOSTS.contains(&host)
    })
}

#[test]
fn the_top_level_holds_what_belongs_there_and_nothing_else() {
    let mut top: Vec<String> = files();
    for file in &mut top {
        file.truncate(file.find('/').unwrap_or(file.len()));
    }
    top.dedup();
    top.retain(|name| !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()));
    none(top, "at the top level");
}

#[test]
fn scripts_can_be_run() {
    use std::os::unix::fs::PermissionsExt;
    let mut findings = files();
    findings.retain(|file| {
        let mode = fs::metadata(root().join(file))
            .unwrap()
            .permissions()
            .mode();
        text(file).starts_with("#!") && !file.ends_with(".rs") && mode & 0o100 == 0
    });
    none(findings, "scripts without the right to be run");
}
